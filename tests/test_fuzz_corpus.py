"""Every input that fuzzing begins with, or has found, passes: without the fuzzer."""

from pathlib import Path

import pytest

import targets
from zmqpush.core.protocol import messages as frames
from zmqpush.core.protocol.receiver import Receiver
from zmqpush.core.zmtp.connection import Connection
from zmqpush.core.zmtp.errors import Fault
from zmqpush.errors import RemoteProtocolError

CORPUS = Path(__file__).parent.parent / "fuzz" / "corpus"
INPUTS = sorted(path for path in CORPUS.glob("*/*"))


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_input_of_the_corpus_passes(path):
    targets.TARGETS[path.parent.name](path.read_bytes())


def test_every_target_has_a_corpus():
    assert {path.parent.name for path in INPUTS} == set(targets.TARGETS)


def test_the_corpus_of_the_codec_has_every_kind_of_frame_and_every_code():
    kinds, codes = set(), set()
    for path in (CORPUS / "codec").iterdir():
        try:
            message, _ = frames.decode(path.read_bytes())
        except RemoteProtocolError as exc:
            message = exc
        kinds.add(type(message))
        codes.add(getattr(message, "code", None))

    assert kinds >= {*frames._TYPES, type(None), RemoteProtocolError}
    assert codes >= {400, 404, 412, 429, 505}


def test_the_corpus_of_the_receiver_gets_every_answer(monkeypatch):
    answers = set()
    reply = Receiver._reply

    def watched(self, peer, message, token):
        answers.add((type(message), getattr(message, "code", None)))
        reply(self, peer, message, token)

    monkeypatch.setattr(Receiver, "_reply", watched)
    for path in (CORPUS / "receiver").iterdir():
        targets.receiver(path.read_bytes())

    resets = {(frames.Reset, code) for code in (400, 404, 412, 429)}
    assert answers >= resets | {
        (frames.Error, 505),
        (frames.Welcome, None),
        (frames.Ack, None),
    }


def test_the_corpus_of_the_wire_gets_every_fault_but_an_error_of_ours(monkeypatch):
    faults = set()
    fail = Connection._fail

    def watched(self, exc):
        fail(self, exc)
        faults.add(self.failure.fault)

    monkeypatch.setattr(Connection, "_fail", watched)
    for name in ("wire_frames", "wire_null", "wire_curve"):
        for path in (CORPUS / name).iterdir():
            targets.TARGETS[name](path.read_bytes())

    assert faults == {*Fault} - {Fault.INTERNAL}
