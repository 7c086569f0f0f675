"""
CURVE: https://rfc.zeromq.org/spec/26/. Every cryptographic operation is libsodium's.

In the words of the specification: the client has the long-term keys C and c, the server S
and s; C', c' and S', s' belong to this connection alone, and so does the cookie. It is
random and not made of C' and s', so one that was recorded on another connection is
refused.
"""

from collections.abc import Callable, Generator, Sequence
from functools import partial
from operator import add, lt
from struct import pack
from typing import NamedTuple, cast

from nacl.bindings import (
    crypto_box_beforenm,
    crypto_box_easy,
    crypto_box_easy_afternm,
    crypto_box_keypair,
    crypto_box_open_easy,
    crypto_box_open_easy_afternm,
    randombytes,
    sodium_memcmp,
)
from nacl.exceptions import CryptoError

from zmqpush.core.zmtp import frames
from zmqpush.core.zmtp.boxes import (
    BATCH,
    MAX_TEXT_BYTES,
    open_all,
    open_in_place,
    seal,
    seal_in_place,
)
from zmqpush.core.zmtp.errors import Fault, ZmtpError
from zmqpush.core.zmtp.frames import COMMAND, MORE, Body, Sealed, Unsealed
from zmqpush.core.zmtp.mechanism import read_command

KEY_BYTES = 32
_NONCE_BYTES = 8
_LONG_NONCE_BYTES = 16
_MAC_BYTES = 16
_COOKIE_BYTES = 96
_VERSION = b"\x01\x00"
_PADDING = bytes(72)
_SIGNED = bytes(64)
_NO_NONCE = bytes(_NONCE_BYTES)
_NO_MAC = bytes(_MAC_BYTES)

_HELLO = b"\x05HELLO"
_WELCOME = b"\x07WELCOME"
_INITIATE = b"\x08INITIATE"
_READY = b"\x05READY"
_MESSAGE = b"\x07MESSAGE"
_HELLO_NONCE = b"CurveZMQHELLO---"
_WELCOME_NONCE = b"WELCOME-"
_INITIATE_NONCE = b"CurveZMQINITIATE"
_VOUCH_NONCE = b"VOUCH---"
_READY_NONCE = b"CurveZMQREADY---"
_CLIENT_NONCE = b"CurveZMQMESSAGEC"
_SERVER_NONCE = b"CurveZMQMESSAGES"

# Where the fields of commands begin.
_HELLO_KEY = len(_HELLO) + len(_VERSION) + len(_PADDING)
_HELLO_BYTES = _HELLO_KEY + KEY_BYTES + _NONCE_BYTES + len(_SIGNED) + _MAC_BYTES
_WELCOME_BOX = len(_WELCOME) + _LONG_NONCE_BYTES
_WELCOME_BYTES = _WELCOME_BOX + KEY_BYTES + _COOKIE_BYTES + _MAC_BYTES
_INITIATE_COOKIE = len(_INITIATE)
_INITIATE_NONCE_AT = _INITIATE_COOKIE + _COOKIE_BYTES
_VOUCH_BOX = KEY_BYTES + _LONG_NONCE_BYTES
_VOUCH_END = _VOUCH_BOX + 2 * KEY_BYTES + _MAC_BYTES
_BODY_AT = len(_MESSAGE) + _NONCE_BYTES
_MIN_MESSAGE = _BODY_AT + _MAC_BYTES + 1

# The flags within a box.
_INNER_MORE = 1
_INNER_COMMAND = 2
_FLAGS = {0: 0, _INNER_MORE: MORE, _INNER_COMMAND: COMMAND}
_KNOWN_FLAGS = bytes(_FLAGS)
_TO_OUTER = bytes.maketrans(_KNOWN_FLAGS, bytes(_FLAGS.values()))
# What is longer is not copied out of what was decrypted, in bytes.
_COPY_BYTES = 8 << 10
# What is longer a thread may encrypt: for less, to hand it over costs more than it saves. In bytes.
_DEFERRED_BYTES = 256 << 10


class Keys(NamedTuple):
    """A long-term key pair, 32 bytes each."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"Keys({self.public!r})"


class _Curve:
    """
    What both ends do once they share a key.

    Args:
        ours: The prefix of the nonces of what is sent.
        theirs: That of what is received.

    """

    name = b"CURVE"
    overhead = _MIN_MESSAGE
    binds = False

    def __init__(self, ours: bytes, theirs: bytes) -> None:
        self.key: bytes | None = None
        self._ours, self._theirs = ours, theirs
        self._shared = b""
        self._sent = 0
        self._last_nonce = _NO_NONCE

    def encode_message(self, body: bytes) -> list[Sealed | Unsealed]:
        if len(body) < _DEFERRED_BYTES:
            return frames.encode_message(*self._seal([b"\0"], [body]))
        return frames.encode_message(self._prepare(b"\0", body, self._next_nonces()))

    def encode_messages(self, bodies: Sequence[bytes]) -> list[Sealed]:
        return frames.encode_messages(self._seal([b"\0"] * len(bodies), bodies))

    def encode_parts(self, bodies: Sequence[bytes]) -> list[Sealed]:
        # MORE is in the boxes, where nobody can change it.
        flags = [b"\1"] * (len(bodies) - 1) + [b"\0"]
        return frames.encode_messages(self._seal(flags, bodies))

    def encode_command(self, body: bytes) -> bytes:
        return b"".join(frames.encode_messages(self._seal([b"\2"], [body])))

    def open(self, flags: bytearray, bodies: list[Body], *, views: bool) -> None:
        at = 0
        try:
            for start in range(0, len(bodies), BATCH):
                at = start
                some = slice(start, min(start + BATCH, len(bodies)))
                if opened := self._open_short(flags[some], bodies[some]):
                    flags[some], bodies[some] = opened
                    continue
                for at in range(start, some.stop):
                    flags[at], bodies[at] = self._open(flags[at], bodies[at], views)
        except BaseException:  # nothing that was not opened may be taken for a message
            del flags[at:], bodies[at:]
            raise

    def _open_short(self, outer: bytearray, bodies: list[Body]) -> tuple[bytes, list[bytes]] | None:
        """Do as :meth:`_open`, for frames that are all short and good; None if one is not."""
        if outer.strip(b"\0") or {*map(type, bodies)} != {bytes}:
            return None
        short = cast("list[bytes]", bodies)
        if min(map(len, short)) < _MIN_MESSAGE:
            return None
        heads = [body[:_BODY_AT] for body in short]
        # What lies between two that begin with MESSAGE does so, too.
        last = _MESSAGE + self._last_nonce
        if not heads[-1].startswith(_MESSAGE) or not all(map(lt, [last, *heads], heads)):
            return None
        nonces = bytes(memoryview(b"".join(heads)).cast("Q")[1::2])
        boxes = [body[_BODY_AT:] for body in short]
        if (opened := open_all(boxes, self._theirs, nonces, self._shared)) is None:
            return None
        flags, texts = opened
        if flags.strip(_KNOWN_FLAGS):
            return None
        self._last_nonce = nonces[-_NONCE_BYTES:]
        return flags.translate(_TO_OUTER), texts

    def _open(self, outer: int, body: Body, views: bool) -> tuple[int, Body]:
        if outer:  # MORE and COMMAND are in the boxes: in the clear they are nobody's word
            raise ZmtpError(Fault.PROTOCOL, "a frame with flags in the clear")
        if len(body) < _MIN_MESSAGE or body[: len(_MESSAGE)] != _MESSAGE:
            raise ZmtpError(Fault.PROTOCOL, "a frame that is no MESSAGE")
        nonce = self._check_nonce(body, len(_MESSAGE))
        is_ours = isinstance(body, memoryview) and not body.readonly
        message = memoryview(body if is_ours else bytearray(body))
        if not open_in_place(message, _BODY_AT, self._theirs + nonce, self._shared):
            raise _changed(Fault.PROTOCOL)
        self._last_nonce = nonce
        plain = message[_BODY_AT + _MAC_BYTES :]
        if (flag := _FLAGS.get(plain[0])) is None:
            raise ZmtpError(Fault.PROTOCOL, f"a message with the flags {plain[0]:#04x}")
        return flag, plain[1:] if views and len(plain) > _COPY_BYTES else bytes(plain[1:])

    def _next_nonces(self, number: int = 1) -> bytes:
        first = self._sent + 1
        self._sent += number
        return pack(f">{number}Q", *range(first, first + number))

    def _check_nonce(self, command: Body, at: int) -> bytes:
        nonce = bytes(command[at : at + _NONCE_BYTES])
        if nonce <= self._last_nonce:
            raise ZmtpError(Fault.PROTOCOL, "a frame that came before")
        return nonce

    def _seal(self, flags: Sequence[bytes], bodies: Sequence[bytes]) -> list[Sealed]:
        sealed: list[Sealed] = []
        for start in range(0, len(bodies), BATCH):
            some = bodies[start : start + BATCH]
            marks = flags[start : start + BATCH]
            nonces = self._next_nonces(len(some))
            if max(map(len, some)) < MAX_TEXT_BYTES:
                plains = list(map(add, marks, some))
                sealed += seal(_MESSAGE, plains, self._ours, nonces, self._shared)
            else:
                places = range(0, len(nonces), _NONCE_BYTES)
                each = [nonces[at : at + _NONCE_BYTES] for at in places]
                sealed += map(self._seal_long, marks, some, each)
        return sealed

    def _seal_long(self, flag: bytes, body: bytes, nonce: bytes) -> bytearray:
        unsealed = self._prepare(flag, body, nonce)
        unsealed.seal()
        return unsealed.message

    def _prepare(self, flag: bytes, body: bytes, nonce: bytes) -> Unsealed:
        message = bytearray().join((_MESSAGE, nonce, _NO_MAC, flag, body))
        whole = self._ours + nonce
        return Unsealed(message, partial(seal_in_place, message, _BODY_AT, whole, self._shared))


class CurveClient(_Curve):
    """
    The end that connects: a :class:`~zmqpush.core.zmtp.mechanism.Mechanism`.

    Args:
        keys: Its own.
        server_key: The public key of what it connects to.

    """

    def __init__(self, keys: Keys, server_key: bytes) -> None:
        super().__init__(_CLIENT_NONCE, _SERVER_NONCE)
        self._keys = keys
        self._server_key = server_key

    def handshake(
        self, write: Callable[[bytes], None], metadata: bytes, check: Callable[[bytes], None]
    ) -> Generator[int, bytes, None]:
        """Send HELLO and INITIATE."""
        public, secret = crypto_box_keypair()  # C', c'
        nonce = self._next_nonces()
        signature = _box(_SIGNED, _HELLO_NONCE + nonce, self._server_key, secret)
        hello = (_HELLO, _VERSION, _PADDING, public, nonce, signature)
        write(frames.encode_command(b"".join(hello)))

        welcome = yield from read_command(_WELCOME)
        _check_size(welcome, _WELCOME_BYTES)
        long_nonce = welcome[len(_WELCOME) : _WELCOME_BOX]
        opened = _open(
            welcome[_WELCOME_BOX:], _WELCOME_NONCE + long_nonce, self._server_key, secret
        )
        short_key, cookie = opened[:KEY_BYTES], opened[KEY_BYTES:]  # S'
        self._shared = _beforenm(short_key, secret)

        long_nonce = randombytes(_LONG_NONCE_BYTES)
        vouch = _box(
            public + self._server_key, _VOUCH_NONCE + long_nonce, short_key, self._keys.secret
        )
        nonce = self._next_nonces()
        box = crypto_box_easy_afternm(
            b"".join((self._keys.public, long_nonce, vouch, metadata)),
            _INITIATE_NONCE + nonce,
            self._shared,
        )
        write(frames.encode_command(b"".join((_INITIATE, cookie, nonce, box))))

        ready = yield from read_command(_READY)
        if len(ready) < len(_READY) + _NONCE_BYTES + _MAC_BYTES:
            raise ZmtpError(Fault.PROTOCOL, "a short READY")
        nonce = self._check_nonce(ready, len(_READY))
        box = ready[len(_READY) + _NONCE_BYTES :]
        theirs = _open_afternm(box, _READY_NONCE + nonce, self._shared, Fault.KEY)
        self._last_nonce = nonce
        self.key = self._server_key
        check(theirs)


class CurveServer(_Curve):
    """
    The end that binds: a :class:`~zmqpush.core.zmtp.mechanism.Mechanism`.

    Args:
        keys: Its own.
        admits: Tells whether a public key is admitted.

    """

    binds = True

    def __init__(self, keys: Keys, admits: Callable[[bytes], bool]) -> None:
        super().__init__(_SERVER_NONCE, _CLIENT_NONCE)
        self._keys = keys
        self._admits = admits

    def handshake(
        self, write: Callable[[bytes], None], metadata: bytes, check: Callable[[bytes], None]
    ) -> Generator[int, bytes, None]:
        """Answer HELLO and INITIATE; the latter if the client is admitted and fits."""
        hello = yield from read_command(_HELLO)
        _check_size(hello, _HELLO_BYTES)
        if hello[len(_HELLO) : len(_HELLO) + len(_VERSION)] != _VERSION:
            raise ZmtpError(Fault.PROTOCOL, "another version of CURVE")
        if hello[len(_HELLO) + len(_VERSION) : _HELLO_KEY] != _PADDING:
            raise ZmtpError(Fault.PROTOCOL, "a HELLO whose padding is not zero")
        client_key = hello[_HELLO_KEY : _HELLO_KEY + KEY_BYTES]  # C'
        nonce = self._check_nonce(hello, _HELLO_KEY + KEY_BYTES)
        signature = hello[_HELLO_KEY + KEY_BYTES + _NONCE_BYTES :]
        signed = _open(signature, _HELLO_NONCE + nonce, client_key, self._keys.secret)
        _check_equal(signed, _SIGNED)
        self._last_nonce = nonce

        public, secret = crypto_box_keypair()  # S', s'
        cookie = randombytes(_COOKIE_BYTES)
        long_nonce = randombytes(_LONG_NONCE_BYTES)
        box = _box(public + cookie, _WELCOME_NONCE + long_nonce, client_key, self._keys.secret)
        write(frames.encode_command(b"".join((_WELCOME, long_nonce, box))))

        initiate = yield from read_command(_INITIATE)
        if len(initiate) < _INITIATE_NONCE_AT + _NONCE_BYTES + _VOUCH_END + _MAC_BYTES:
            raise ZmtpError(Fault.PROTOCOL, "a short INITIATE")
        _check_equal(initiate[_INITIATE_COOKIE:_INITIATE_NONCE_AT], cookie)
        nonce = self._check_nonce(initiate, _INITIATE_NONCE_AT)
        self._shared = _beforenm(client_key, secret)
        box = initiate[_INITIATE_NONCE_AT + _NONCE_BYTES :]
        opened = _open_afternm(box, _INITIATE_NONCE + nonce, self._shared, Fault.KEY)
        self._last_nonce = nonce

        long_term_key = opened[:KEY_BYTES]  # C
        long_nonce = opened[KEY_BYTES:_VOUCH_BOX]
        vouch = opened[_VOUCH_BOX:_VOUCH_END]
        vouched = _open(vouch, _VOUCH_NONCE + long_nonce, long_term_key, secret)
        _check_equal(vouched, client_key + self._keys.public)
        if not self._admits(long_term_key):
            raise ZmtpError(Fault.NOT_ADMITTED, "its key is not admitted")
        check(opened[_VOUCH_END:])
        self.key = long_term_key

        nonce = self._next_nonces()
        box = crypto_box_easy_afternm(metadata, _READY_NONCE + nonce, self._shared)
        write(frames.encode_command(b"".join((_READY, nonce, box))))


def _check_size(command: bytes, size: int) -> None:
    if len(command) != size:
        raise ZmtpError(Fault.PROTOCOL, f"a handshake command of {len(command)} bytes, not {size}")


def _check_equal(theirs: bytes, ours: bytes) -> None:
    if len(theirs) != len(ours) or not sodium_memcmp(theirs, ours):
        raise _wrong_key()


def _wrong_key() -> ZmtpError:
    return ZmtpError(Fault.KEY, "its keys do not fit ours")


# libsodium refuses a key that makes the shared one known to all (zero, or of low order) and
# a box that is not what it should be; PyNaCl has many exceptions for that.
_REFUSED = (CryptoError, TypeError, ValueError, RuntimeError)


def _beforenm(public: bytes, secret: bytes) -> bytes:
    try:
        return crypto_box_beforenm(public, secret)
    except _REFUSED:
        raise _wrong_key() from None


def _box(plain: bytes, nonce: bytes, public: bytes, secret: bytes) -> bytes:
    try:
        return crypto_box_easy(plain, nonce, public, secret)
    except _REFUSED:
        raise _wrong_key() from None


def _open(box: bytes, nonce: bytes, public: bytes, secret: bytes) -> bytes:
    try:
        return crypto_box_open_easy(box, nonce, public, secret)
    except _REFUSED:
        raise _wrong_key() from None


def _open_afternm(box: bytes, nonce: bytes, shared: bytes, fault: Fault) -> bytes:
    try:
        return crypto_box_open_easy_afternm(box, nonce, shared)
    except _REFUSED as exc:
        raise _changed(fault) from exc


def _changed(fault: Fault) -> ZmtpError:
    return ZmtpError(fault, "a frame that was changed on the way")
