"""
Many short boxes at once.

A call of PyNaCl costs more than what libsodium does in it for a line of a log. So the
functions that PyNaCl compiles, and that its own are made of, are called in loops of C, and
put what they make into one piece of memory, which one thread may use, and which keeps the last
texts. The caller does what is not short, or not good.
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
_KEY_BYTES = 32
_NONCE_BYTES = 24

_memory = ffi.new("unsigned char[]", BATCH * _MAX_BYTES)
_buffer = ffi.buffer(_memory)
_view = memoryview(_buffer)
_starts = range(0, BATCH * _MAX_BYTES, _MAX_BYTES)
_places = [_memory + start for start in _starts]


def seal(
    plains: Sequence[bytes], prefix: bytes, nonces: Iterable[bytes], key: bytes
) -> list[bytes] | None:
    """
    Return the boxes with some texts.

    Args:
        plains: At most :data:`BATCH` of them.
        prefix: What all nonces begin with, 16 bytes.
        nonces: The last 8 bytes of each.
        key: The shared key.

    Returns:
        The boxes; None if one would be long.

    """
    lengths = list(map(len, plains))
    if max(lengths) > _MAX_BYTES - _MAC_BYTES:
        return None
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
