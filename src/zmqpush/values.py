"""
The texts of options into values.

What cannot be read is a ValueError, whose message shows a good one.
"""

import re

from zmqpush.settings import MAX_LINE_BYTES

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def read_size(text: str) -> int:
    """Return a size in bytes, as ``64MiB`` says it."""
    match = re.fullmatch(r"([0-9]{1,18}) ?([kmg]?)(i?b)?", text.strip().lower())
    if not match or not int(match[1]):
        raise ValueError(f"{text!r} is not a size; a good one is 64MiB")
    return int(match[1]) * _UNITS[match[2]]


def read_spool_size(text: str) -> int:
    """Return the size of a spool in bytes."""
    if (size := read_size(text)) < 1 << 20:
        raise ValueError(f"{text!r} is too small for a spool; it needs 1MiB")
    return size


def read_memory(text: str) -> int:
    """Return the memory that senders share in bytes."""
    if (size := read_size(text)) < 1 << 20:
        raise ValueError(f"{text!r} is too little for senders to share; they need 1MiB")
    return size


def read_seconds(text: str) -> float:
    """Return a time in seconds."""
    try:
        if (seconds := float(text)) >= 0:
            return seconds
    except ValueError:
        pass
    raise ValueError(f"{text!r} is not a time in seconds; a good one is 2.5")


def read_max_line(text: str) -> int:
    """Return the length of a line in bytes."""
    size = read_size(text)
    if not 4 <= size <= MAX_LINE_BYTES:
        raise ValueError(f"{text!r} is out of bounds: from 4 bytes to {MAX_LINE_BYTES >> 20}MiB")
    return size


def read_delimiter(text: str) -> bytes:
    """Return the bytes that text with escapes stands for."""
    try:
        escaped = text.encode("utf-8", "surrogateescape").decode("unicode_escape")
        delimiter = escaped.encode("latin-1")
    except UnicodeError:
        delimiter = b""
    if not delimiter:
        raise ValueError(rf"{text!r} is not a delimiter; a good one is ';' or '\r\n' or '\x1e'")
    return delimiter


def read_field(text: str) -> tuple[str, str]:
    """Return the key and the value of ``KEY=VALUE``."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"{text!r} is not a field; a good one is environment=production")
    return key, value


def read_option(text: str) -> tuple[str, str]:
    """Return the name and the value of ``NAME=VALUE``; the text may be secret."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise ValueError("an option is NAME=VALUE; a good one is security.protocol=ssl")
    return name, value
