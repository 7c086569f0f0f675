"""
Write the inputs to begin with into fuzz/corpus: each frame, each code, each kind of file.

Usage: python fuzz/seeds.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from choices import FORMS, seal
from targets import (
    BEGIN,
    COMMIT,
    DELIMITERS,
    LABELS,
    PEERS,
    RECEIVER_STEPS,
    RUNS,
    SECRETS,
    SENDER_STEPS,
    STEPS,
    TARGETS,
)
from wire import CURVE_STEPS, KINDS, greeting
from wire import frame as zmtp_frame
from zmqpush.core.protocol.messages import (
    DAMAGED,
    DROPPED,
    Ack,
    Data,
    Error,
    Goodbye,
    Hello,
    Message,
    Ping,
    Reset,
    Skip,
    Welcome,
    encode,
    public_name,
)
from zmqpush.core.records.encode import Format
from zmqpush.core.zmtp.metadata import SocketType
from zmqpush.core.zmtp.metadata import encode as metadata

CORPUS = Path(__file__).parent / "corpus"
HELLO = {
    "versions": [2, 2],
    "secret": SECRETS[0],
    "run": RUNS[0],
    "first": 1,
    "spooled": False,
    "type": "nginx",
    "host": "web",
}
WELCOME = {
    "version": 2,
    "stream": public_name("0" * 32),
    **LABELS._asdict(),
    "session": f"{1:016x}",
    "acked": 0,
    "run": RUNS[0],
    "blocks": 256,
    "bytes": 1 << 18,
    "ping": 5.0,
    "durability": "disk",
}
MESSAGES: dict[str, Message] = {
    "hello": Hello(HELLO),
    "welcome": Welcome(WELCOME),
    "data": Data.of(1, 2, b"{}\n{}\n"),
    "ack": Ack(3, 256, 1 << 18),
    "ping": Ping(7),
    "skip-dropped": Skip(1, 5, DROPPED),
    "skip-damaged": Skip(6, 1, DAMAGED),
    "goodbye": Goodbye(),
    "reset-400": Reset(400, "a malformed Data"),
    "reset-404": Reset(404, "this session has ended"),
    "reset-412": Reset(412, "5 comes after 3"),
    "reset-429": Reset(429, "beyond the credit"),
    "error-505": Error(505, "this receiver speaks version 2"),
}


def framed(data: bytes) -> bytes:
    """Return the choice of these bytes as a frame."""
    return bytes((FORMS.index("raw"), len(data))) + data


def changed(data: bytes, at: int, byte: int) -> bytes:
    """Return bytes with another one in one place."""
    return data[:at] + bytes((byte,)) + data[at + 1 :]


def codec() -> dict[str, bytes]:
    """Return a frame of each kind, and the ways in which a header can be wrong."""
    frames = {name: encode(message, 1) for name, message in MESSAGES.items()}
    data = frames["data"]
    return frames | {
        "other-magic": changed(data, 0, 0),
        "other-version": changed(data, 2, 1),
        "unknown-type": changed(data, 3, 77),
        "unknown-type-to-be-understood": changed(changed(data, 3, 77), 4, 0x80),
        "longer-header": changed(data[:16] + b"new" + data[16:], 7, 19),
        "short": data[:9],
        "deep": seal(frames["hello"][:16] + b"[" * 1500 + b"last"),
    }


def receiver() -> dict[str, bytes]:
    """Return conversations that come to each answer."""

    def step(name: str, *choices: int) -> bytes:
        return bytes((RECEIVER_STEPS.index(name), *choices))

    def send(message: Message, session: int, peer: int = 0) -> bytes:
        return step("frame", peer) + framed(encode(message, session))

    hello = send(Hello(HELLO), 0)
    data, later = send(MESSAGES["data"], 1), send(Data.of(9, 1, b"{}\n"), 1)
    commit, answer = 2 * step("commit"), step("answer")
    blocks = b"".join(send(Data.of(n, 1, b"x" * 150 + b"\n"), 1) for n in range(1, 5))
    torn = step("frame", 0) + framed(changed(encode(MESSAGES["data"], 1), 40, 0))
    return {
        "welcome": b"\0" + hello + answer,
        "ack": b"\0" + hello + data + answer + commit + answer,
        "duplicate": b"\0" + hello + data + data + answer,
        "skip": b"\0" + hello + send(Skip(1, 3, DROPPED), 1) + commit + answer,
        "ping": b"\0" + hello + send(Ping(), 1) + answer,
        "goodbye": b"\0" + hello + data + send(Goodbye(), 1) + commit + step("commit"),
        "reset-400": b"\0" + hello + torn + answer,
        "reset-404": b"\0" + data + answer,
        "reset-412": b"\0" + hello + later + answer,
        "reset-412-overlap": b"\0" + hello + data + send(Data.of(2, 2, b"{}\n{}\n"), 1) + answer,
        "reset-412-ping": b"\0" + hello + send(Ping(1), 1) + answer,
        "reset-429": b"\2" + hello + blocks + answer,
        "error-505": b"\0" + send(Hello(HELLO | {"versions": [3, 4]}), 0) + answer,
        "error-505-header": b"\0" + step("frame", 0) + framed(changed(encode(Ping(), 0), 2, 9)),
        "waiting": b"\0" + hello + data + hello + answer + commit + answer,
        "another-peer": b"\0" + hello + data + send(Hello(HELLO), 0, 1) + data + commit + answer,
        "one-peer-two-streams": b"\0"
        + hello
        + data
        + send(Hello(HELLO | {"secret": SECRETS[1]}), 0)
        + hello
        + commit
        + answer,
        "two-streams-share": b"\1"
        + hello
        + send(Hello(HELLO | {"secret": SECRETS[1]}), 0, 1)
        + send(Ping(), 1)
        + send(Ping(), 2, 1)
        + answer,
        "silence": b"\0" + hello + data + commit + step("wait", 7) + hello + answer,
        "a-month": b"\0" + hello + data + 2 * step("wait", len(STEPS) - 1) + commit + hello,
        "gone": b"\0" + hello + step("forget", PEERS.index(b"one")) + data + answer,
        "restart": b"\0" + hello + data + commit + step("restart") + hello + data + answer,
        "former": b"\0" + send(Hello(HELLO | {"was": SECRETS[0]}), 0) + commit + answer,
        "former-dies": b"\0" + send(Hello(HELLO | {"was": SECRETS[0]}), 0) + step("restart"),
        "state-is-older": b"\0" + hello + data + send(Hello(HELLO | {"first": 50}), 0) + commit,
        "stop": b"\0" + hello + step("stop") + data + send(Goodbye(), 1),
    }


def sender() -> dict[str, bytes]:
    """Return conversations that come to each state and each request."""
    begin = bytes((0, 0, 4, 0))  # it blocks when full, has four blocks, none recovered
    small = bytes((1, 1, 0, 0))

    def step(name: str, *choices: int) -> bytes:
        return bytes((SENDER_STEPS.index(name), *choices))

    def come(message: Message, session: int = 1) -> bytes:
        return step("frame", 0, 0) + framed(encode(message, session))

    send = step("send")
    greeted = send + come(Welcome(WELCOME)) + send
    put = step("put", 200)
    return {
        "greeted": begin + greeted,
        "acked": begin + greeted + come(Ack(2, 256, 1 << 18)) + send,
        "acked-beyond": begin + greeted + come(Ack(1 << 60, 256, 1 << 18)) + send,
        "no-credit": begin + greeted + come(Ack(1, 0, 0)) + send,
        "one-block": begin + send + come(Welcome(WELCOME | {"blocks": 1})) + send,
        "credit-with-a-fraction": begin + send + come(Welcome(WELCOME | {"bytes": 1.5})) + send,
        "two-welcomes": begin + greeted + come(Welcome(WELCOME | {"acked": 2})) + send,
        "of-another-life": begin + send + come(Welcome(WELCOME | {"acked": 99, "run": RUNS[1]})),
        "recovered": bytes((0, 0, 4, 1)) + send + come(Welcome(WELCOME | {"acked": 4})) + send,
        "other-stream": begin + send + come(Welcome(WELCOME | {"stream": SECRETS[0]})) + send,
        "ping": begin + greeted + step("wait", STEPS.index(1.1)) + send,
        "dead": begin + greeted + step("wait", STEPS.index(16.0)) + send,
        "no-answer": begin + send + step("wait", STEPS.index(5.1)) + send,
        "disconnected": begin + greeted + step("disconnect") + send,
        "bye": begin + greeted + step("goodbye"),
        "drops-oldest": small + put + greeted + 8 * put + send,
    } | {
        name: begin + greeted + 2 * come(MESSAGES[name]) + send
        for name in ("goodbye", "reset-400", "reset-404", "reset-412", "reset-429", "error-505")
    }


def spool() -> dict[str, bytes]:
    """Return files of a slot: bits 0 and 1 say which, the rest how many segments."""
    good, elsewhere, many, open_end, flipped, torn = 6, 1, 2, 3, 4, 5

    def entry(how: int, *choices: int) -> bytes:
        return bytes((how,)) + b"\x05{}\n{}" + bytes(choices)

    def segment(*entries: bytes, number: int = 0, header: bytes = b"\1") -> bytes:
        return bytes((number, *header, len(entries))) + b"".join(entries)

    two = segment(entry(good), entry(good))
    former = segment(entry(good), entry(good), header=b"\0")
    return {
        "empty": b"\0",
        "segments": b"\x0c" + two + two + two,
        "acknowledged": b"\x08" + two + two + b"\0\1",
        "state": b"\x05\0" + bytes((1, 0, 2, 1)) + two,
        "state-within-a-block": b"\x05\0" + bytes((1, 0, 2, 0)) + two,
        "state-beyond": b"\x05\0" + bytes((1, 0, 2, 41)) + two,
        "state-damaged": b"\x05\1\x05hello" + two,
        "meta": b"\x06\0\0" + two,
        "meta-of-format-1": b"\x06\0\2" + former,
        "format-1": b"\x0c" + former + former + two,
        "format-1-torn": b"\x04" + segment(entry(good), entry(torn, 20), header=b"\0"),
        "header-flipped": b"\x08" + segment(entry(good), header=b"\2\x05\0") + two,
        "header-torn": b"\x08" + two + segment(header=b"\3\x05hello"),
        "meta-later": b"\x06\0\1" + two,
        "meta-damaged": b"\x06\1\x05hello" + two,
        "hole": b"\x08" + two + segment(entry(good), number=7),
        "twice": b"\x08" + two + segment(entry(good), number=4),
        "overlap": b"\x08" + two + segment(entry(good), number=2),
        "garbage": b"\x04" + segment(b"\0\x05hello", entry(good)),
        "flipped": b"\x04" + segment(entry(good), entry(flipped, 34, 0), entry(good)),
        "torn": b"\x04" + segment(entry(good), entry(torn, 20)),
        "number-elsewhere": b"\x04" + segment(entry(elsewhere, 7), entry(good)),
        "count-beyond": b"\x04" + segment(entry(good), entry(many, 33), entry(good)),
        "no-newline": b"\x04" + segment(entry(good), entry(open_end), entry(good)),
    }


def records() -> dict[str, bytes]:
    """Return messages in all framings, and what is none."""
    return {
        "single": b'\xff{"message":"a","type":"x","@pid":1}',
        "frames": b'\xff{"a":1}\0\0{"b":"\xc3\xa9"}\n\0\0{}',
        "array": b'\x02[{"a":1}, {"b":[]},\n3, "x"]',
        "lines": b'\x01{"a":1}\n{"b":2}\n',
        "newline-for-a-comma": b'\xff{"a":[1\n2]}',
        "pretty": b'\xff{\n "a": [1,\n 2]\n}',
        "text": b"\xffhello\nworld\n",
        "not-utf8": b'\xff{"a":1}\n\xff\xfe\n{"b":2}',
        "constants": b'\xff{"a":NaN}\0\0[Infinity]\0\0{"a":1e999}',
        "pieces": b'\xff[{"a":1}\0\0{"b":2}]\0\0{"c":\0\0"d"}',
        "deep": b"\xff" + b'{"a":' * 400 + b"[" * 400,
        "surrogate": b'\xff["\\ud800", {"\\udfff": "\\ud83d\\ude00"}]',
    }


def lines() -> dict[str, bytes]:
    """Return a text for each format and each delimiter, cut in two places."""
    text = b'one\r\n\ttwo "2"\n\n\xc3\xa9\xff\xe2\x82\xac\rabaa\0\\\x7f\x1b\n'
    text += b"x" * 30 + b"\nend\r"
    each = {format.value: bytes((n, 0, 255, 2, 5, 40)) + text for n, format in enumerate(Format)}
    for n in range(len(DELIMITERS)):
        each[f"delimiter-{n}"] = bytes((0, n, 255, 2, 5, 40)) + text
        each[f"delimiter-{n}-short"] = bytes((n % len(Format), n, n, 2, 31, 33)) + text
    return each


def dialogue() -> dict[str, bytes]:
    """Return what rsyslog says."""
    begin, commit = BEGIN + b"\n", COMMIT + b"\n"
    return {
        "messages": b"\xffone\ntwo\n\nthree",
        "transactions": b"\xff" + begin + b"one\n" + commit + begin + b"one\ntwo\n" + commit,
        "much": b"\x85" + begin + commit + begin + b"one\ntwo\nthree\n" + commit,
        "marks-in-a-row": b"\x81" + 2 * begin + 3 * commit + 2 * begin,
        "no-marks": b"\x03one\n" + begin + b"two\n" + commit,
        "marks-for-messages": b"\xff" + begin + b"one\n" + commit + b"two\n" + begin + commit,
    }


def wire_frames() -> dict[str, bytes]:
    """Return frames of each kind and with each error, after a choice of limits and no cuts."""
    begin = b"\0\1\0\0"
    ping = zmtp_frame(b"\4PING\0\0context", 4)
    return {
        "messages": begin
        + zmtp_frame(b"a")
        + zmtp_frame(b"")
        + zmtp_frame(b"b", 1)
        + zmtp_frame(b"c"),
        "long": b"\1\1\1\0" + zmtp_frame(b"x" * 300) + b"\2" + bytes(7) + b"\3abc",
        "buffer": b"\3\1\1\3\2\7\0" + zmtp_frame(b"y" * 1500)[:9] + b"y" * 1500,
        "ping": begin + zmtp_frame(b"a", 1) + ping + zmtp_frame(b"b") + ping,
        "short-ping": begin + zmtp_frame(b"\4PING\0", 4),
        "unknown-command": begin + zmtp_frame(b"\5OTHER", 4) + zmtp_frame(b"a"),
        "malformed-command": begin + zmtp_frame(b"a") + zmtp_frame(b"\5x", 4),
        "empty-command": begin + zmtp_frame(b"", 4),
        "reserved": begin + zmtp_frame(b"a") + zmtp_frame(b"b", 8),
        "more-command": begin + zmtp_frame(b"\4PING\0\0", 5),
        "too-long": begin + zmtp_frame(b"a") + b"\2" + b"\xff" * 8,
        "too-many": begin + zmtp_frame(b"", 1) * 9,
        "sum": begin + zmtp_frame(b"x" * 200, 1) * 2,
    }


def wire_null() -> dict[str, bytes]:
    """Return what peers say first: a kind, how the end is, no cuts, bytes."""
    pull = KINDS.index(SocketType.PULL)

    def begin(how: int) -> bytes:
        return bytes((pull, how, 0))

    ready = zmtp_frame(b"\5READY" + metadata(SocketType.PUSH), 4)
    v2 = greeting(b"NULL")[:10] + b"\1"
    return {
        "ready": begin(5) + ready + zmtp_frame(b"a"),
        "connects": begin(4) + ready + zmtp_frame(b"a", 1) + zmtp_frame(b"b"),
        "wrong-type": begin(5) + zmtp_frame(b"\5READY" + metadata(SocketType.PULL), 4),
        "error": begin(5) + zmtp_frame(b"\5ERROR\3why", 4),
        "twice": begin(5) + zmtp_frame(ready[2:] + metadata(SocketType.PUSH), 4),
        "message-first": begin(5) + zmtp_frame(b"a"),
        "too-long": begin(5) + b"\6" + b"\xff" * 8,
        "other-mechanism": begin(1) + greeting(b"CURVE"),
        "v2": begin(3) + v2 + b"\x08" + zmtp_frame(b"me") + zmtp_frame(b"a"),
        "v2-connects": begin(2) + v2 + b"\x08\0\0" + zmtp_frame(b"a", 1) + zmtp_frame(b"b"),
        "v2-command": begin(3) + v2 + b"\x08\0\0" + zmtp_frame(b"\4PING\0\0", 4),
        "v2-wrong-type": begin(3) + v2 + b"\x05\0\0",
        "v2-refused": begin(1) + v2,
        "v1": begin(1) + b"\1\0",
        "http": begin(1) + b"GET / HTTP/1.1\r\n",
    }


def wire_curve() -> dict[str, bytes]:
    """Return conversations with each end: what is wrong in the handshake, numbers, steps."""

    def step(name: str, *choices: int) -> bytes:
        return bytes((CURVE_STEPS.index(name), *choices))

    def said(flags: int, body: bytes, nonce: int = 0) -> bytes:
        return step("message", nonce, flags, len(body)) + body

    # Which end, what is wrong; a client chooses two numbers, a server a cookie and one.
    ends = {"binds": b"\1%c\0\0", "connects": b"\0%c" + b"c" * 96 + b"\0"}
    traffic = {
        "messages": said(0, b"a") + said(1, b"b") + said(0, b"c") + said(0, b"x" * 250),
        "ping": said(1, b"a") + said(2, b"\4PING\0\0ctx") + said(0, b"b"),
        "again": said(0, b"a") + step("again", 0),
        "number-0": said(0, b"a") + said(0, b"b", 128 + 3),
        "other-flags": said(3, b"a"),
        "changed": said(0, b"a") + step("changed", 1, 120, 0, 30, 1),
        "changed-size": step("changed", 1, 120, 0, 1, 4),
        "unchanged": step("changed", 1, 120, 0, 1, 0),
        "cut": step("cut", 1, 120, 20),
        "clear": step("clear", 1, 120, 1),
        "raw": step("raw", 3, 0, 1, 120),
    }
    inputs = {
        f"{end}-{name}": begin % 0 + steps
        for end, begin in ends.items()
        for name, steps in traffic.items()
    }
    for wrong in range(1, 7):
        inputs[f"binds-wrong-{wrong}"] = ends["binds"] % wrong + b"\0\20\1" + bytes(40)
        inputs[f"connects-wrong-{wrong}"] = ends["connects"] % wrong + b"\0\20\1" + bytes(40)
    return inputs


def main() -> None:
    """Write all of them."""
    makers: tuple[Callable[[], dict[str, Any]], ...] = (
        *(codec, receiver, sender, spool, records, lines, dialogue),
        *(wire_frames, wire_null, wire_curve),
    )
    for make in makers:
        assert make.__name__ in TARGETS
        directory = CORPUS / make.__name__
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in make().items():
            (directory / name).write_bytes(data)


if __name__ == "__main__":
    main()
