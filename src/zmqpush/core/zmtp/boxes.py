"""
Many short boxes at once, and long ones in place.

A call of PyNaCl costs more than what libsodium does in it for a line of a log. So the
functions that PyNaCl compiles, and that its own are made of, are called in loops of C, and
put what they make into one piece of memory, which one thread may use, and which keeps the last
texts. A long text is not copied: libsodium takes and gives it in the same place.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from operator import add
from typing import Any

from nacl._sodium import ffi, lib  # type: ignore[import-not-found]

# So many boxes at once, each so long, in bytes, at most.
BATCH = 256
_MAX_BYTES = 1024
_MAC_BYTES = 16
MAX_TEXT_BYTES = _MAX_BYTES - _MAC_BYTES
_KEY_BYTES = 32
_NONCE_BYTES = 24

_memory = ffi.new("unsigned char[]", BATCH * _MAX_BYTES)
_buffer = ffi.buffer(_memory)
_view = memoryview(_buffer)
_starts = range(0, BATCH * _MAX_BYTES, _MAX_BYTES)
_places = [_memory + start for start in _starts]


def seal(
    plains: Sequence[bytes], prefix: bytes, nonces: Iterable[bytes], key: bytes
) -> list[bytes]:
    """
    Return the boxes with some texts.

    Args:
        plains: At most :data:`BATCH` of them, of :data:`MAX_TEXT_BYTES` each.
        prefix: What all nonces begin with, 16 bytes.
        nonces: The last 8 bytes of each.
        key: The shared key.

    """
    lengths = list(map(len, plains))
    if max(lengths) > MAX_TEXT_BYTES:
        raise ValueError("a text is too long")  # C does not look
    _call(lib.crypto_box_easy_afternm, plains, lengths, prefix, nonces, key)
    ends = map(add, _starts, map(_MAC_BYTES.__add__, lengths))
    return list(map(_buffer.__getitem__, map(slice, _starts, ends)))


def open_all(
    boxes: Sequence[bytes], prefix: bytes, nonces: Iterable[bytes], key: bytes
) -> tuple[bytes, list[bytes]] | None:
    """
    Return the first byte and the rest of what is in some boxes; they are not empty.

    Args:
        boxes: At most :data:`BATCH` of them.
        prefix: What all nonces begin with, 16 bytes.
        nonces: The last 8 bytes of each.
        key: The shared key.

    Returns:
        The first bytes, and the rests; None if a box is long, or not what it should be.

    """
    lengths = list(map(len, boxes))
    if max(lengths) > _MAX_BYTES:
        return None
    if _call(lib.crypto_box_open_easy_afternm, boxes, lengths, prefix, nonces, key):
        return None
    firsts = bytes(_view[: len(boxes) * _MAX_BYTES : _MAX_BYTES])
    ends = map(add, _starts, map((-_MAC_BYTES).__add__, lengths))
    rests = map(slice, map((1).__add__, _starts), ends)
    return firsts, list(map(_buffer.__getitem__, rests))


def _call(
    function: Callable[[Any, bytes, int, bytes, bytes], int],
    texts: Sequence[bytes],
    lengths: Sequence[int],
    prefix: bytes,
    nonces: Iterable[bytes],
    key: bytes,
) -> bool:
    """Call a function of libsodium for each text; whether any call has failed."""
    # C does not look.
    whole = [prefix + nonce for nonce in nonces]
    if len(key) != _KEY_BYTES or {*map(len, whole)} != {_NONCE_BYTES}:
        raise ValueError("a key or a nonce of another size")
    if not len(whole) == len(texts) <= BATCH:
        raise ValueError("other nonces than texts, or too many")
    return sum(map(function, _places, texts, lengths, whole, repeat(key))) != 0


def seal_in_place(message: bytearray, at: int, nonce: bytes, key: bytes) -> None:
    """
    Make a box of the end of a message.

    Args:
        message: What goes before the box, 16 bytes of room, and the text.
        at: Where the box begins.
        nonce: 24 bytes.
        key: The shared key.

    """
    box = _box_in(message, at, nonce, key)
    lib.crypto_box_easy_afternm(box, box + _MAC_BYTES, len(message) - at - _MAC_BYTES, nonce, key)


def open_in_place(message: bytearray | memoryview, at: int, nonce: bytes, key: bytes) -> bool:
    """
    Open the box at the end of a message.

    Args:
        message: What goes before the box, and the box; then, 16 bytes later, the text. It can
            be written.
        at: Where the box begins.
        nonce: 24 bytes.
        key: The shared key.

    Returns:
        Whether the box is what it should be; if not, nothing is changed.

    """
    box = _box_in(message, at, nonce, key)
    size = len(message) - at
    return not lib.crypto_box_open_easy_afternm(box + _MAC_BYTES, box, size, nonce, key)


def _box_in(message: bytearray | memoryview, at: int, nonce: bytes, key: bytes) -> Any:
    # C does not look.
    if len(message) - at < _MAC_BYTES or len(nonce) != _NONCE_BYTES or len(key) != _KEY_BYTES:
        raise ValueError("a box, a nonce or a key of another size")
    return ffi.from_buffer("unsigned char[]", message, require_writable=True) + at
