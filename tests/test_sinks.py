"""The contract of sinks: one that a third party has written, as a package of its own."""

import fcntl
import json
import os
import signal
import textwrap

import pytest
import zmq

import test_pull
from helpers import PATIENCE, ZMQPULL, ZMQPUSH, push, sent, wait_until
from peers import STREAM, bare, deliver, greet
from test_pull import finish
from zmqpush.core.protocol.messages import Data, encode

endpoint = test_pull.endpoint

SHELF = """
    import json
    from pathlib import Path

    from zmqpush.errors import SettingsError, SinkError, SinkStalledError
    from zmqpush.runtime.faults import fault_point
    from zmqpush.sinks.base import Held, Rejection, Sink, Synced


    class Shelf(Sink):
        '''Keeps each batch as a line of a file, and obeys notes that lie beside it.'''

        def __init__(self, to, context):
            self.name = to
            self.context = context
            self.directory = Path(to.removeprefix("shelf:/"))
            self.path = self.directory / "shelf"
            self.todo = []
            self.rejected = []
            if unknown := {*context.options} - {"shout"}:
                raise SettingsError(f"shelf:// knows no {unknown}")

        def obey(self, step):
            if (self.directory / f"stall-{step}").exists():
                raise SinkStalledError(f"{self.name}: it is dusted")
            if (self.directory / f"fail-{step}").exists():
                raise SinkError(f"cannot write to {self.name}: it has burnt down")
            if (self.directory / f"bug-{step}").exists():
                raise RuntimeError("of theirs")

        async def open(self, marks):
            self.obey("open")
            self.path.touch()
            tail = self.path.read_bytes()[int(marks.get("shelf:length") or 0):].splitlines()
            batches = [json.loads(line) for line in tail]
            return [Held(b["stream"], b["first"], b["records"]) for b in batches if b["stream"]]

        async def write(self, batches):
            self.todo = self.todo or list(batches)
            with self.path.open("a") as file:
                while self.todo:
                    self.obey("write")
                    batch = self.todo.pop(0)
                    records = bytes(batch.payload).decode("utf-8", "surrogateescape").splitlines()
                    for at, record in enumerate(records):
                        if "poison" in record:
                            seq = batch.first + at if batch.first else 0
                            data = record.encode("utf-8", "surrogateescape")
                            self.rejected.append(Rejection(data, "poison", batch.stream, seq))
                    if "shout" in self.context.options:
                        records = [record.upper() for record in records]
                    line = batch._asdict() | {"payload": records}
                    file.write(json.dumps(line) + "\\n")
            fault_point("shelved")

        async def sync(self):
            self.obey("sync")
            rejected, self.rejected = self.rejected, []
            length = self.path.stat().st_size
            fault_point("shelf-synced")
            return Synced({"shelf:length": str(length)}, rejected)

        async def close(self):
            return {}
"""


@pytest.fixture
def shelf(start, endpoint, tmp_path, monkeypatch):
    """Return a function that starts a receiver with that sink, as installed packages are found."""
    package = tmp_path / "packages"
    information = package / "shelf-1.0.dist-info"
    information.mkdir(parents=True)
    (package / "shelf.py").write_text(textwrap.dedent(SHELF))
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: shelf\nVersion: 1.0\n")
    text = "[zmqpush.sinks]\nshelf = shelf:Shelf\nabsent = absent.module:Sink\n"
    (information / "entry_points.txt").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(package))
    options = ("-a", endpoint, "--to", f"shelf:/{tmp_path}", "--grace", "1")
    return lambda *more, **kwargs: start(ZMQPULL, *options, *more, **kwargs)


def shelved(directory):
    """Return the batches that are in the sink."""
    return [json.loads(line) for line in (directory / "shelf").read_text().splitlines()]


def records(directory):
    """Return the records that are in the sink."""
    return [record for batch in shelved(directory) for record in batch["payload"]]


def test_a_package_of_a_third_party_adds_a_sink(shelf, endpoint, tmp_path):
    child = shelf("-X", "shout=1")
    done = push("--ack", "-c", endpoint, "--format", "raw", "web", data=b'{"a":1}\ntwo\n')
    child.terminate()

    assert (sent(done), done.stderr) == (2, b"")
    told = b"zmqpull: 2 records written, 1 of them were no JSON object\n"
    assert finish(child) == (0, b"", told)
    (batch,) = shelved(tmp_path)
    assert batch["labels"] == {"type": "web", "host": os.uname().nodename}
    assert batch["payload"] == ['{"A":1}', '{"MESSAGE":"TWO"}']
    assert (batch["records"], batch["first"]) == (2, 1)
    assert len(batch["stream"]) == 32


def test_what_comes_without_acknowledgements_goes_there_too(shelf, start, endpoint, tmp_path):
    child = shelf("-b", endpoint + "-plain")
    with bare(zmq.PUSH, endpoint + "-plain") as peer:
        peer.send_multipart([b'{"a":1}', b"[2]"])
        wait_until(lambda: (tmp_path / "shelf").exists() and shelved(tmp_path))
    child.terminate()
    finish(child)

    ((payload, number, labels, stream, first),) = (b.values() for b in shelved(tmp_path))
    assert (payload, number) == (['{"a":1}', '{"message":"2"}'], 2)
    assert (labels, stream, first) == ({}, "", 0)


@pytest.mark.parametrize("step", ["open", "write", "sync"])
def test_a_sink_that_stalls_is_tried_again_and_that_is_said_once(shelf, endpoint, tmp_path, step):
    note = tmp_path / f"stall-{step}"
    note.touch()
    child = shelf()
    with bare(zmq.DEALER, endpoint) as peer:
        if step != "open":
            _, session = greet(peer)
            peer.send(encode(Data.of(1, 2, b"1\n2\n"), session))
        line = f"zmqpull: cannot write to shelf:/{tmp_path}: it is dusted: waiting\n"
        assert child.stderr.readline().decode() == line
        assert not peer.poll(300)
        note.unlink()
        again = child.stderr.readline().decode()
        assert again.startswith(f"zmqpull: writing to shelf:/{tmp_path} again (after ")
        if step == "open":
            _, session = greet(peer)
        deliver(peer, session, 1 if step == "open" else 3, b"3")

    assert records(tmp_path) == ["1", "2", "3"][2 if step == "open" else 0 :]


@pytest.mark.parametrize("step", ["open", "write", "sync"])
def test_a_signal_ends_the_wait_for_a_sink_that_stalls(shelf, endpoint, tmp_path, step):
    (tmp_path / f"stall-{step}").touch()
    child = shelf()
    if step != "open":
        with bare(zmq.DEALER, endpoint) as peer:
            _, session = greet(peer)
            peer.send(encode(Data.of(1, 1, b"1\n"), session))
            child.stderr.readline()
    else:
        child.stderr.readline()
    child.terminate()
    code, _, err = finish(child)

    assert code == (0 if step == "open" else 74)
    assert err in (b"", b"zmqpull: 0 records written\n", b"zmqpull: 1 records written\n")


@pytest.mark.parametrize("step", ["open", "write", "sync"])
def test_a_sink_that_fails_ends_the_program_with_one_line(shelf, endpoint, tmp_path, step):
    (tmp_path / f"fail-{step}").touch()
    child = shelf()
    with bare(zmq.DEALER, endpoint) as peer:
        if step != "open":
            _, session = greet(peer)
            peer.send(encode(Data.of(1, 1, b"1\n"), session))
        code, out, err = finish(child)
        assert not peer.poll(0)  # nothing is acknowledged

    line = f"zmqpull: cannot write to shelf:/{tmp_path}: it has burnt down"
    assert (code, out) == (74, b"")
    assert line in err.decode().splitlines()
    assert b"Traceback" not in err


@pytest.mark.parametrize("step", ["open", "write", "sync"])
def test_a_bug_of_a_sink_is_no_traceback(shelf, endpoint, tmp_path, step):
    (tmp_path / f"bug-{step}").touch()
    child = shelf()
    with bare(zmq.DEALER, endpoint) as peer:
        if step != "open":
            _, session = greet(peer)
            peer.send(encode(Data.of(1, 1, b"1\n"), session))
        code, _, err = finish(child)

    assert (code, err.splitlines()[-1]) == (
        70,
        b"zmqpull: internal error, please report it: RuntimeError('of theirs')",
    )
    assert b"Traceback" not in err


@pytest.mark.parametrize("option", [(), ("--dead-letters", "letters")])
def test_what_a_sink_refuses_for_good_is_kept_and_the_rest_goes_on(
    shelf, endpoint, tmp_path, option
):
    child = shelf("--state", tmp_path / "state", *option, cwd=tmp_path)
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer)
        deliver(peer, session, 1, b"1", b"poison \xff", b"3")
        deliver(peer, session, 4, b"4", b"poison")
    child.terminate()
    code, _, err = finish(child)
    place = "letters" if option else f"{tmp_path}/state/dead-letters.ndjson"
    letters = [json.loads(line) for line in (tmp_path / place).read_text().splitlines()]

    told = f"zmqpull: shelf:/{tmp_path} refuses 1 records (poison): they are in {place}\n" * 2
    told += "zmqpull: 3 records written, 2 were refused by the sink\n"
    assert (code, err.decode()) == (0, told)
    assert [(letter["seq"], letter["reason"]) for letter in letters] == [
        (2, "poison"),
        (5, "poison"),
    ]
    assert letters[0]["stream"] == STREAM
    assert letters[0]["record"].encode("utf-8", "surrogateescape") == b"poison \xff"


def test_without_a_place_for_it_what_a_sink_refuses_is_not_acknowledged(shelf, endpoint, tmp_path):
    child = shelf()
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer)
        peer.send(encode(Data.of(1, 1, b"poison\n"), session))
        told = child.stderr.readline()
        assert not peer.poll(300)

    assert told.endswith(b"(poison): waiting; --dead-letters FILE lets the others pass\n")


def test_a_dead_letter_begins_on_a_line_of_its_own(shelf, endpoint, tmp_path):
    letters = tmp_path / "letters"
    letters.write_bytes(b'{"half')
    child = shelf("--dead-letters", letters)
    with bare(zmq.DEALER, endpoint) as peer:
        deliver(peer, greet(peer)[1], 1, b"poison")
    child.terminate()
    err = finish(child)[2]

    half, letter = letters.read_bytes().splitlines()
    assert (half, json.loads(letter)["record"]) == (b'{"half', "poison")
    assert b"letters ends within a line: 6 bytes of it are kept" in err


def test_dead_letters_are_shared_and_each_process_waits_for_its_turn(shelf, endpoint, tmp_path):
    letters = tmp_path / "letters"
    child = shelf("--dead-letters", letters)
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer)
        with letters.open("ab") as another:
            fcntl.flock(another, fcntl.LOCK_EX)
            peer.send(encode(Data.of(1, 1, b"poison\n"), session))
            assert b"refuses 1 records" in child.stderr.readline()
            line = b"zmqpull: cannot write to %s: another process has locked it: waiting\n"
            assert child.stderr.readline() == line % bytes(letters)
            assert letters.stat().st_size == 0
        deliver(peer, session, 2, b"2")

    assert json.loads(letters.read_bytes())["record"] == "poison"


@pytest.mark.parametrize("point", ["shelved", "shelf-synced", "engine-buried"])
def test_what_a_sink_holds_and_nobody_remembers_is_in_it_once(
    shelf, start, endpoint, tmp_path, point
):
    state = ("--state", tmp_path / "state")
    child = shelf(*state, env=os.environ | {"ZMQPUSH_FAULT": f"{point}:2"})
    options = ("-c", endpoint, "--format", "raw", "--spool", tmp_path / "spool", "web")
    sender = start(ZMQPUSH, *options)
    for number in range(1, 5):
        sender.stdin.write(b"%d poison\n" % number)
        sender.stdin.flush()
        wait_until(
            lambda number=number: (
                child.poll() is not None
                or ((tmp_path / "shelf").exists() and len(records(tmp_path)) >= number)
            )
        )
    assert child.wait(PATIENCE) == -signal.SIGKILL
    child = shelf(*state)
    sender.communicate(b"5 poison\n", timeout=PATIENCE)
    child.terminate()
    assert finish(child)[0] == 0

    assert sender.returncode == 0
    assert records(tmp_path) == [f'{{"message":"{number} poison"}}' for number in range(1, 6)]


def usage_error(text):
    """Return how a run ends that is used wrongly."""
    return 2, b"", b"zmqpull: %s; see zmqpull --help\n" % text


def test_a_scheme_that_nobody_knows_and_a_missing_package_are_told(shelf, tmp_path):
    for to, told in (
        ("amqp://host/x", b"--to amqp:// is none of absent://, kafka://, nats://, shelf://"),
        ("absent://x", b"--to absent:// needs the Python package absent: see shelf"),
    ):
        assert finish(shelf("--to", to)) == usage_error(told)
    for to in ("Kafka:/k/logs", "kafka//k/logs", "Shelf2:///"):
        code, out, err = finish(shelf("--to", to))
        assert (code, out, err[:14]) == (2, b"", b"zmqpull: --to ")
    assert finish(shelf("-X", "whisper=1")) == usage_error(b"shelf:// knows no {'whisper'}")
    code, out, err = finish(shelf("-X", "secret"))
    assert (code, b"secret" in err) == (2, False)
    done = finish(shelf("--to", tmp_path / "file", "-X", "a=1"))
    assert done == usage_error(b"-X is for what --to SCHEME:// names")
    also = {"ZMQPULL_OPTION": "shout=1 whisper=2"}
    done = finish(shelf("-X", "shout=2", env=os.environ | also))
    assert done == usage_error(b"shelf:// knows no {'whisper'}")


def test_the_state_of_the_version_before_is_read(start, endpoint, tmp_path):
    import sqlite3

    (tmp_path / "state").mkdir()
    path = tmp_path / "all"
    path.write_bytes(b"1\nby whom?\n")
    with sqlite3.connect(tmp_path / "state" / "state.db") as database:
        database.executescript(
            "CREATE TABLE streams (principal TEXT, stream TEXT, acked INTEGER, run TEXT, "
            "seen INTEGER, PRIMARY KEY (principal, stream)) WITHOUT ROWID;"
            "CREATE TABLE files (path TEXT PRIMARY KEY, inode INTEGER, length INTEGER) "
            "WITHOUT ROWID; PRAGMA user_version=1"
        )
        row = (str(path), path.stat().st_ino, 2)
        database.execute("INSERT INTO files VALUES (?, ?, ?)", row)
    database.close()
    child = start(ZMQPULL, "-qa", endpoint, "--to", path, "--state", tmp_path / "state")
    with bare(zmq.DEALER, endpoint) as peer:
        deliver(peer, greet(peer)[1], 1, b"2")

    # That version left no proof of what it had written.
    assert child.stderr.readline().startswith(b"zmqpull: kept the last 9 bytes of ")
    assert path.read_bytes() == b"1\nby whom?\n2\n"
