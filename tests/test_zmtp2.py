"""Bare sockets that speak ZMTP 2.0, as libzmq 3.2 does, with the installed programs."""

import json
import re
import socket
import struct

import pytest

import test_curve
from helpers import FRAMINGS, PATIENCE, ZMQPULL, ZMQPUSH, losses, wait_until
from test_curve import feed, free_endpoint, messages

keys = test_curve.keys
SIGNATURE = b"\xff" + bytes(7) + b"\x01\x7f"
TYPES = {"PUB": 1, "SUB": 2, "PULL": 7, "PUSH": 8}
TEXTS = [f"{number} {'x' * (number % 300)}" for number in range(1000)] + ["", "y" * 100_000]
LINES = "".join(text + "\n" for text in TEXTS).encode()
EITHER_END = pytest.mark.parametrize("binds", [False, True], ids=["connects", "binds"])
PROGRAMS = pytest.mark.parametrize("program", [ZMQPUSH, ZMQPULL], ids=["zmqpush", "zmqpull"])


class OldPeer:
    """
    A connection, whose end says what ZMTP 2.0 has it say, and no earlier.

    Args:
        end: A socket that is connected.
        identity: What it calls itself.

    Attributes:
        heard: What it was told before the messages.

    """

    def __init__(self, end, kind, identity=b""):
        self._end = end
        end.settimeout(PATIENCE)
        self._stream = end.makefile("rb")
        end.sendall(SIGNATURE)
        self.heard = self._stream.read(11)  # and no more, until it knows our version
        end.sendall(b"\x01" + bytes((TYPES[kind],)))
        self.heard += self._stream.read(1)
        end.sendall(bytes((0, len(identity))) + identity)
        self.heard += self._stream.read(2)

    def send(self, *messages):
        for parts in messages:
            for at, part in enumerate(parts, 1):
                flags, size = int(at < len(parts)), bytes((len(part) & 255,))
                if len(part) > 255:
                    flags, size = flags | 2, struct.pack(">Q", len(part))
                self._end.sendall(bytes((flags,)) + size + part)

    def receive(self):
        """Return the parts of all messages until the end."""
        parts = []
        while header := self._stream.read(2):
            flags, size = header
            assert flags in range(4)
            if flags & 2:
                (size,) = struct.unpack(">Q", bytes((size,)) + self._stream.read(7))
            parts.append(self._stream.read(size))
        return parts

    def close(self):
        self._stream.close()
        self._end.close()


@pytest.fixture
def meet(start, tmp_path):
    """Return a function that starts a program, and returns it and a connected socket."""
    ends = []
    server = socket.create_server(("127.0.0.1", 0))

    def run(program, *options, binds):
        if binds:
            endpoint = free_endpoint("tcp", tmp_path)
            child = start(program, "-b", endpoint, *options)

            def connect():
                try:
                    ends.append(socket.create_connection(("127.0.0.1", port_of(endpoint))))
                except ConnectionRefusedError:
                    return False
                return True

            wait_until(connect)
        else:
            port = server.getsockname()[1]
            child = start(program, "-c", f"tcp://127.0.0.1:{port}", *options)
            if program == ZMQPUSH:
                feed(child, LINES)
            server.settimeout(PATIENCE)
            ends.append(server.accept()[0])
        return child, ends[-1]

    yield run
    for end in (server, *ends):
        end.close()


def port_of(endpoint):
    return int(endpoint.rsplit(":", 1)[1])


@EITHER_END
@FRAMINGS
def test_a_puller_gets_each_record(meet, binds, framing):
    sender, end = meet(ZMQPUSH, "--framing", framing, binds=binds)
    if binds:
        feed(sender, LINES)
    sender.stdin.close()
    peer = OldPeer(end, "PULL")
    parts = peer.receive()
    peer.close()
    records = [*map(json.loads, parts)] if framing in ("single", "frames") else []
    for part in parts:
        if framing == "array":
            records += json.loads(part)
        if framing == "lines":
            records += map(json.loads, part.splitlines())

    assert peer.heard == b"\xff" + (1).to_bytes(8) + b"\x7f\x03" + b"\x08\0\0"
    assert [record["message"] for record in records] == TEXTS
    assert sender.wait(PATIENCE) == 0
    assert losses(sender.stderr.read()) == (0, 0)


@EITHER_END
@pytest.mark.parametrize("identity", [b"", b"its name", b"x" * 255])
def test_what_a_pusher_sends_is_written(meet, tmp_path, binds, identity):
    path = tmp_path / "all"
    _, end = meet(ZMQPULL, "--to", path, binds=binds)
    peer = OldPeer(end, "PUSH", identity)
    records = [json.dumps({"message": text}).encode() for text in TEXTS]
    peer.send(*[[record] for record in records], records, [b"\n".join(records)])
    peer.close()
    wait_until(lambda: len(messages(path)) == 3 * len(TEXTS))

    assert peer.heard == b"\xff" + (1).to_bytes(8) + b"\x7f\x03" + b"\x07\0\0"
    assert messages(path) == 3 * TEXTS


@EITHER_END
@PROGRAMS
def test_another_type_is_named(meet, binds, program):
    kind, wanted = ("SUB", "PULL") if program == ZMQPUSH else ("PUB", "PUSH")
    child, end = meet(program, "-q", binds=binds)
    end.sendall(SIGNATURE + b"\x01" + bytes((TYPES[kind], 0, 0)))

    assert f"it is a {kind} socket, not a {wanted}" in child.stderr.readline().decode()
    end.settimeout(PATIENCE)
    heard = end.makefile("rb").read()
    assert len(heard) in ((11,) if binds else (11, 14))  # who connects may say what it is


@EITHER_END
@PROGRAMS
def test_with_keys_it_is_refused_by_name_and_told_no_more(meet, keys, binds, program):
    options = keys.binds() if binds else keys.connects()
    child, end = meet(program, "-q", *options, binds=binds)
    end.sendall(SIGNATURE + b"\x01" + bytes((TYPES["PULL"], 0, 0)))

    assert b"it speaks ZMTP 2.0: libzmq 4 or later is wanted" in child.stderr.readline()
    end.settimeout(PATIENCE)
    assert len(end.makefile("rb").read()) == 11


@EITHER_END
@PROGRAMS
@pytest.mark.parametrize("said", [b"\x01\x00", SIGNATURE[:9] + b"\x00", SIGNATURE + b"\x00"])
def test_zmtp_1_is_refused_by_name(meet, binds, program, said):
    child, end = meet(program, "-q", binds=binds)
    end.sendall(said)

    assert b"it speaks ZMTP 1.0: libzmq 3.2 or later is wanted" in child.stderr.readline()
    end.settimeout(PATIENCE)
    assert len(end.makefile("rb").read()) == 11


def test_with_acknowledgements_it_is_refused_by_name(meet):
    child, end = meet(ZMQPUSH, "-q", "--ack", binds=False)
    end.sendall(SIGNATURE + b"\x01" + bytes((6, 0, 0)))

    assert re.search(rb"it speaks ZMTP 2\.0: libzmq 4", child.stderr.readline())
    end.settimeout(PATIENCE)
    assert len(end.makefile("rb").read()) == 11
