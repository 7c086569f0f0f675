"""ZMTP as it is fuzzed: any bytes for each end, next to a second reading of the specification."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from nacl.bindings import (
    crypto_box_beforenm,
    crypto_box_easy,
    crypto_box_easy_afternm,
    crypto_box_keypair,
    crypto_box_open_easy,
    crypto_box_open_easy_afternm,
    crypto_box_seed_keypair,
)

from choices import Choices
from zmqpush.core.zmtp.connection import Connection, Limits
from zmqpush.core.zmtp.curve import CurveClient, CurveServer, Keys
from zmqpush.core.zmtp.errors import Fault
from zmqpush.core.zmtp.metadata import SocketType, encode
from zmqpush.core.zmtp.null import Null

KINDS = tuple(SocketType)
SIZES = (255, 300, 1000, 100_000)
SERVER, CLIENT, OTHER = (Keys(*crypto_box_seed_keypair(bytes((n,)) * 32)) for n in (1, 2, 3))
_MORE, _LONG, _COMMAND = 1, 2, 4


def greeting(mechanism: bytes) -> bytes:
    """Return a greeting."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)


def frame(body: bytes, flags: int = 0) -> bytes:
    """Return a frame."""
    if len(body) > 255:
        return bytes((flags | _LONG,)) + len(body).to_bytes(8) + body
    return bytes((flags, len(body))) + body


class _Outcome:
    """
    What an end made of some segments.

    Attributes:
        accepted: The parts that it took.
        said: What it said, and the PONG at the end.

    """

    def __init__(self, end: Connection, segments: Sequence[bytes], *, fill: bool = False) -> None:
        self.accepted: list[bytes] = []
        self.said = b""
        came = 0
        for segment in segments:
            self.accepted += self._take(end, segment, fill)
            came += len(segment)
            if not end.ready:
                self.said += end.take_output()
                assert not self.accepted
            assert end.failure or end.held <= 70 * came + 100
        assert not (end.failure and end.failure.fault is Fault.INTERNAL), end.failure
        if end.failure:
            failure = end.failure
            assert end.receive(greeting(b"NULL") + frame(b"x")) == []
            assert end.failure is failure
            assert str(failure).isprintable()
            assert len(str(failure)) < 300
        self.said += end.take_output()
        assert end.take_output() == b""

    def _take(self, end: Connection, data: bytes, fill: bool) -> list[bytes]:
        taken = []
        while fill and data and not end.failure and (free := end.free()) is not None:
            part, data = data[: len(free)], data[len(free) :]
            free[: len(part)] = part
            taken += end.fill(len(part))
        return [bytes(body) for body in taken + end.receive(data)]


def _segments(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


def _compare(make: Callable[[], Connection], data: bytes, choices: Choices) -> _Outcome:
    """Check that cuts do not matter; return what came of it."""
    whole, pieces, single = make(), make(), make()
    one = _Outcome(whole, [data])
    cuts = [int.from_bytes(choices.take(2)) for _ in range(choices.byte() % 8)]
    two = _Outcome(pieces, _segments(data, cuts), fill=True)
    three = _Outcome(single, [data[n : n + 1] for n in range(len(data))])
    for end, it in ((pieces, two), (single, three)):
        assert it.accepted == one.accepted
        assert end.ready == whole.ready
        assert _fault(end) == _fault(whole)
        assert end.failure or it.said == one.said
    return one


def _fault(end: Connection) -> Fault | None:
    return end.failure and end.failure.fault


def _read(data: bytes, limits: Limits) -> tuple[list[bytes], Fault | None, bytes]:
    """Read frames one by one: all parts of messages, what is wrong, and the last PONG."""
    accepted: list[bytes] = []
    parts: list[bytes] = []
    pong = b""
    at = 0
    while len(data) - at >= 2:
        flags = data[at]
        if flags not in (0, 1, 2, 3, 4, 6):
            return accepted, Fault.PROTOCOL, pong
        header = 9 if flags & _LONG else 2
        if len(data) - at < header:
            break
        size = int.from_bytes(data[at + 1 : at + header])
        if size > limits.max_bytes:
            return accepted, Fault.LIMIT, pong
        body = data[at + header : at + header + size]
        if len(body) < size:
            break
        at += header + size
        if flags & _COMMAND:
            name = body[1 : 1 + body[0]] if body else b""
            if not name or len(name) < body[0] or (name == b"PING" and len(body) < 7):
                return accepted, Fault.PROTOCOL, pong
            if name == b"PING":
                pong = frame(b"\4PONG" + body[7:23], _COMMAND)
            continue
        parts.append(body)
        if len(parts) > limits.max_parts or sum(map(len, parts)) > limits.max_bytes:
            return accepted, Fault.LIMIT, pong
        if not flags & _MORE:
            accepted += parts
            parts = []
    return accepted, None, pong


def wire_frames(data: bytes) -> None:
    """Let any frames come after a handshake without keys."""
    choices = Choices(data)
    limits = Limits(
        choices.pick(SIZES), max_parts=1 + choices.byte() % 4, views=bool(choices.byte() & 1)
    )
    cuts = Choices(choices.data())
    stream = choices.rest()
    begin = greeting(b"NULL") + frame(b"\5READY" + encode(SocketType.PUSH), _COMMAND)

    def make() -> Connection:
        end = Connection(SocketType.PULL, Null(binds=True), limits)
        assert end.receive(begin) == []
        assert end.ready
        end.take_output()
        return end

    outcome = _compare(make, stream, cuts)
    end = make()
    again = _Outcome(end, [stream])
    accepted, fault, pong = _read(stream, limits)
    assert again.accepted == outcome.accepted == accepted, (outcome.accepted, accepted)
    assert _fault(end) == fault
    assert fault or outcome.said == pong


def wire_null(data: bytes) -> None:
    """Let any bytes come to an end without keys, from the first one on."""
    choices = Choices(data)
    kind, how = choices.pick(KINDS), choices.byte()
    limits = Limits(300, max_parts=2, v2=bool(how & 2))
    cuts = Choices(choices.data())
    stream = (greeting(b"NULL") if how & 4 else b"") + choices.rest()

    def make() -> Connection:
        return Connection(kind, Null(binds=bool(how & 1)), limits)

    outcome = _compare(make, stream, cuts)
    end = make()
    _Outcome(end, [stream])
    if end.ready and stream.startswith(greeting(b"NULL")):
        size = 2 + stream[65] if stream[64] == _COMMAND else 9 + int.from_bytes(stream[65:73])
        assert kind.peer.encode() in stream[64 : 64 + size]
        assert _read(stream[64 + size :], limits)[0] == outcome.accepted
    elif not end.ready:
        assert not outcome.accepted


# CURVE: the end that is fuzzed talks to a peer that knows all keys and seals what it wants.

CURVE_STEPS = ("message", "message", "message", "again", "changed", "raw", "cut", "clear")


class _Sealer:
    """A peer of an end with keys, made of the operations alone."""

    prefix = b""

    def __init__(self, end: Connection) -> None:
        self.end = end
        self.public, self.secret = crypto_box_keypair()
        self.shared = b""
        self.nonce = 0
        self.sealed: list[bytes] = []

    def seal(self, nonce: int, plain: bytes) -> bytes:
        """Return the frame of a MESSAGE."""
        short = nonce.to_bytes(8)
        box = crypto_box_easy_afternm(plain, self.prefix + short, self.shared)
        self.sealed.append(frame(b"\7MESSAGE" + short + box))
        return self.sealed[-1]

    def pong(self, data: bytes) -> bytes:
        """Return what is in the box that the end has sent."""
        start = 9 if data[0] & _LONG else 2
        theirs = b"CurveZMQMESSAGES" if self.prefix.endswith(b"C") else b"CurveZMQMESSAGEC"
        nonce = theirs + data[start + 8 : start + 16]
        return crypto_box_open_easy_afternm(data[start + 16 :], nonce, self.shared)


class _Client(_Sealer):
    """Talks to an end that binds."""

    prefix = b"CurveZMQMESSAGEC"

    def shake_hands(self, choices: Choices) -> bool | None:
        """Shake hands, with something wrong in it; return whether that works, None if it may."""
        end, wrong = self.end, choices.pick(("", "hello", "key", "vouch", "data", "short", "box"))
        end.receive(greeting(b"CURVE"))
        assert len(end.take_output()) == 64
        self.nonce = choices.number(1)
        short = self.nonce.to_bytes(8)
        box = crypto_box_easy(bytes(64), b"CurveZMQHELLO---" + short, SERVER.public, self.secret)
        good = hello = b"\5HELLO\1\0" + bytes(72) + self.public + short + box
        if wrong == "hello":
            hello = _changed(choices, hello)
        end.receive(frame(hello, _COMMAND))
        works = hello == good and self.nonce > 0
        answer = end.take_output()
        assert bool(answer) != bool(end.failure)
        assert answer or not works
        if not answer:
            return False
        # X25519 ignores a bit of C', so not each change is seen here.
        opened = crypto_box_open_easy(
            answer[26:], b"WELCOME-" + answer[10:26], SERVER.public, self.secret
        )
        theirs, cookie = opened[:32], opened[32:]
        self.shared = crypto_box_beforenm(theirs, self.secret)
        before, self.nonce = self.nonce, choices.number(self.nonce + 1)
        works &= self.nonce > before
        keys, right, metadata = CLIENT, self.public + SERVER.public, encode(SocketType.DEALER)
        if wrong == "key":
            keys, works = OTHER, False
        vouched = choices.take(64) if wrong == "vouch" else right
        if wrong == "data":
            metadata = choices.data()
        vouch = crypto_box_easy(vouched, b"VOUCH---" + bytes(16), theirs, keys.secret)
        full = plain = keys.public + bytes(16) + vouch + metadata
        if wrong == "short":
            plain = plain[: choices.byte()]
        short = self.nonce.to_bytes(8)
        box = crypto_box_easy_afternm(plain, b"CurveZMQINITIATE" + short, self.shared)
        good = initiate = b"\x08INITIATE" + cookie + short + box
        if wrong == "box":
            initiate = _changed(choices, initiate)
        end.receive(frame(initiate, _COMMAND))
        assert not end.ready or end.key == CLIENT.public
        works &= vouched == right and initiate == good
        if wrong == "short" and plain != full:  # whole properties of the metadata may be left
            whole = plain.startswith(full.removesuffix(metadata))
            return None if works and whole else False
        return None if works and wrong == "data" else works


class _Server(_Sealer):
    """Talks to an end that connects."""

    prefix = b"CurveZMQMESSAGES"

    def shake_hands(self, choices: Choices) -> bool | None:
        """Shake hands, with something wrong in it; return whether that works, None if it may."""
        end, wrong = self.end, choices.pick(("", "welcome", "key", "ready", "data", "short"))
        end.receive(greeting(b"CURVE"))
        theirs = end.take_output()[64 + 2 + 80 :][:32]
        full = plain = self.public + choices.take(96).ljust(96, b"c")
        if wrong == "short":
            plain = plain[: choices.byte()]
        secret = OTHER.secret if wrong == "key" else SERVER.secret
        box = crypto_box_easy(plain, b"WELCOME-" + bytes(16), theirs, secret)
        good = welcome = b"\7WELCOME" + bytes(16) + box
        if wrong == "welcome":
            welcome = _changed(choices, welcome)
        end.receive(frame(welcome, _COMMAND))
        works = welcome == good and plain == full and wrong != "key"
        assert bool(end.take_output()) == works
        assert bool(end.failure) != works
        if not works:
            return False
        self.shared = crypto_box_beforenm(theirs, self.secret)
        self.nonce = choices.number(1)
        metadata = choices.data() if wrong == "data" else encode(SocketType.ROUTER)
        short = self.nonce.to_bytes(8)
        box = crypto_box_easy_afternm(metadata, b"CurveZMQREADY---" + short, self.shared)
        good = ready = b"\5READY" + short + box
        if wrong == "ready":
            ready = _changed(choices, ready)
        end.receive(frame(ready, _COMMAND))
        works = self.nonce > 0 and ready == good
        return None if works and wrong == "data" else works


def _changed(choices: Choices, data: bytes) -> bytes:
    at = int.from_bytes(choices.take(2)) % len(data)
    return data[:at] + bytes((data[at] ^ choices.byte(),)) + data[at + 1 :]


def wire_curve(data: bytes) -> None:
    """Let a peer with the right keys come, and change, repeat and seal what it likes."""
    choices = Choices(data)
    limits = Limits(300, max_parts=2)
    it: Any
    if choices.byte() & 1:
        mechanism = CurveServer(SERVER, CLIENT.public.__eq__)
        it = _Client(Connection(SocketType.ROUTER, mechanism, limits))
    else:
        it = _Server(Connection(SocketType.DEALER, CurveClient(CLIENT, SERVER.public), limits))
    end = it.end
    works = it.shake_hands(choices)
    assert works in (None, end.ready)
    assert end.ready != bool(end.failure)
    assert _fault(end) is not Fault.INTERNAL, end.failure
    if not end.ready:
        assert end.receive(frame(b"x")) == []
        return
    end.take_output()
    accepted: list[bytes] = []
    stream = b""  # of what was in the boxes, as frames
    while choices.more and not end.failure:
        accepted += _step(it, choices, limits, stream_of := [])
        stream += b"".join(stream_of)
    expected, fault, pong = _read(stream, limits)
    assert accepted == expected, (accepted, expected)
    assert not fault or end.failure
    said = end.take_output()
    assert bool(said) == bool(pong)
    if said:
        assert it.pong(said) == b"\2" + pong[2:]


def _step(it: _Sealer, choices: Choices, limits: Limits, stream: list[bytes]) -> list[bytes]:
    """Let something come; add what it has in its box if it must be taken."""
    end = it.end
    good = False
    match choices.pick(CURVE_STEPS):
        case "message":
            nonce, flags, body = choices.number(it.nonce + 1), choices.byte(), choices.data()
            data = it.seal(nonce, bytes((flags,)) + body)
            good = nonce > it.nonce and flags in (0, 1, 2)
            if good:
                it.nonce = nonce
                stream.append(frame(body, {0: 0, 1: _MORE, 2: _COMMAND}[flags]))
        case "again" if it.sealed:
            data = choices.pick(it.sealed)
        case "changed":
            data = it.seal(it.nonce + 1 & (1 << 64) - 1, b"\0" + choices.data())
            changed = _changed(choices, data)
            good = changed == data and it.nonce + 1 < 1 << 64
            if good:
                it.nonce += 1
                plain = crypto_box_open_easy_afternm(
                    data[18 if data[0] == 0 else 25 :],
                    it.prefix + it.nonce.to_bytes(8),
                    it.shared,
                )
                stream.append(frame(plain[1:]))
            data = changed
        case "cut":
            data = it.seal(it.nonce + 1 & (1 << 64) - 1, b"\0" + choices.data())
            body = data[2:] if data[0] == 0 else data[9:]
            data = frame(body[: choices.byte() % len(body)])
        case "clear":
            data = it.seal(it.nonce + 1 & (1 << 64) - 1, b"\0" + choices.data())
            data = bytes((data[0] | choices.pick((1, 4, 5, 8)),)) + data[1:]
        case _:
            data = choices.data()
    taken = [bytes(body) for body in end.receive(data)]
    if not good:
        assert not taken
        # Bytes that claim more than came are waited for: what follows belongs to them.
        if not end.failure and data:
            assert end.held
            assert end.receive(bytes(500)) == []
            assert end.failure
    assert len(taken) <= limits.max_parts
    return taken
