"""
Many short boxes at once, and long ones in place.

A call of PyNaCl costs more than what libsodium does in it for a line of a log. So the
functions that PyNaCl compiles, and that its own are made of, are called in loops of C. They
read and write slots of one piece of memory, which one thread may use, and which keeps the last
texts. A long text is not copied: libsodium takes and gives it in the same place.
"""

from collections.abc import Sequence
from itertools import repeat
from typing import Any

from nacl._sodium import ffi, lib  # type: ignore[import-not-found]

# So many boxes at once, each so long, in bytes, at most.
BATCH = 256
_MAX_BYTES = 1024
_MAC_BYTES = 16
MAX_TEXT_BYTES = _MAX_BYTES - _MAC_BYTES
_KEY_BYTES = 32
_PREFIX_BYTES = 16
_NONCE_BYTES = 8
_LONG_NONCE_BYTES = _PREFIX_BYTES + _NONCE_BYTES
_WORD = 8  # bytes

# A slot: a header, the end of a nonce, a box; and elsewhere the whole nonce.
_HEADER_BYTES = 8
_BOX_AT = _HEADER_BYTES + _NONCE_BYTES
_SLOT_BYTES = _BOX_AT + _MAX_BYTES
_slots = ffi.new("unsigned char[]", BATCH * _SLOT_BYTES)
_nonces = ffi.new("unsigned char[]", BATCH * _LONG_NONCE_BYTES)
_slot_view = memoryview(ffi.buffer(_slots))
_nonce_view = memoryview(ffi.buffer(_nonces))
_SLOT_STARTS = range(0, BATCH * _SLOT_BYTES, _SLOT_BYTES)
_box_places = [_slots + start + _BOX_AT for start in _SLOT_STARTS]
_nonce_places = [_nonces + n * _LONG_NONCE_BYTES for n in range(BATCH)]
# What is read out of a slot: all of it, or a text after its first byte.
_slot_places = [ffi.cast("char *", _slots + start) for start in _SLOT_STARTS]
_rest_places = [place + _BOX_AT + 1 for place in _slot_places]


def seal(
    header: bytes, plains: Sequence[bytes], prefix: bytes, nonces: bytes, key: bytes
) -> list[bytes]:
    """
    Return messages: a header, a nonce and a box each.

    Args:
        header: What each begins with, 8 bytes.
        plains: The texts, at most :data:`BATCH`, of :data:`MAX_TEXT_BYTES` each.
        prefix: What all nonces begin with, 16 bytes.
        nonces: The last 8 bytes of each, one after the other.
        key: The shared key.

    """
    lengths = list(map(len, plains))
    if max(lengths) > MAX_TEXT_BYTES or len(header) != _HEADER_BYTES:
        raise ValueError("a text or a header of another size")  # C does not look
    _set_nonces(len(plains), prefix, nonces, key)
    _write_words(0, header * len(plains))
    _write_words(_HEADER_BYTES, nonces)
    any(map(lib.crypto_box_easy_afternm, _box_places, plains, lengths, _nonce_places, repeat(key)))
    return list(map(ffi.unpack, _slot_places, map((_BOX_AT + _MAC_BYTES).__add__, lengths)))


def open_all(
    boxes: Sequence[bytes], prefix: bytes, nonces: bytes, key: bytes
) -> tuple[bytes, list[bytes]] | None:
    """
    Return the first byte and the rest of what is in some boxes; they are not empty.

    Args:
        boxes: At most :data:`BATCH` of them.
        prefix: What all nonces begin with, 16 bytes.
        nonces: The last 8 bytes of each, one after the other.
        key: The shared key.

    Returns:
        The first bytes, and the rests; None if a box is long, or not what it should be.

    """
    lengths = list(map(len, boxes))
    if max(lengths) > _MAX_BYTES:
        return None
    _set_nonces(len(boxes), prefix, nonces, key)
    opened = map(
        lib.crypto_box_open_easy_afternm, _box_places, boxes, lengths, _nonce_places, repeat(key)
    )
    if any(opened):
        return None
    firsts = bytes(_slot_view[_BOX_AT : len(boxes) * _SLOT_BYTES : _SLOT_BYTES])
    rests = map(ffi.unpack, _rest_places, map((-1 - _MAC_BYTES).__add__, lengths))
    return firsts, list(rests)


def _set_nonces(number: int, prefix: bytes, nonces: bytes, key: bytes) -> None:
    # C does not look.
    if len(key) != _KEY_BYTES or len(prefix) != _PREFIX_BYTES:
        raise ValueError("a key or a prefix of another size")
    if not len(nonces) == number * _NONCE_BYTES <= BATCH * _NONCE_BYTES:
        raise ValueError("other nonces than texts, or too many")
    _nonce_view[: number * _LONG_NONCE_BYTES] = (prefix + bytes(_NONCE_BYTES)) * number
    step = _LONG_NONCE_BYTES // _WORD
    words = memoryview(nonces).cast("Q")
    _nonce_view.cast("Q")[_PREFIX_BYTES // _WORD : number * step : step] = words


def _write_words(at: int, words: bytes) -> None:
    """Write 8 bytes into each slot, so far from its start."""
    end = len(words) // _WORD * _SLOT_BYTES
    step = _SLOT_BYTES // _WORD
    _slot_view.cast("Q")[at // _WORD : end // _WORD : step] = memoryview(words).cast("Q")


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
    if len(message) - at < _MAC_BYTES or len(nonce) != _LONG_NONCE_BYTES or len(key) != _KEY_BYTES:
        raise ValueError("a box, a nonce or a key of another size")
    return ffi.from_buffer("unsigned char[]", message, require_writable=True) + at
