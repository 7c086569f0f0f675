"""
The texts of options into values.

What cannot be read is a SettingsError, whose message shows a good one.
"""

import os
import re
from pathlib import Path

from zmqpush.errors import SettingsError
from zmqpush.settings import ALLOW_ANY, MAX_LINE_BYTES, MAX_SPOOL_SLOTS

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_MAX_QUOTED = 100  # characters
_ESCAPE = re.compile(rb"\\(x[0-9A-Fa-f]{2}|0(?![0-9])|[abfnrtv\\]|)")
_ESCAPES = dict(zip(b"0abfnrtv\\", b"\0\a\b\f\n\r\t\v\\", strict=True))


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "…")


def read_size(text: str) -> int:
    """Return a size in bytes, as ``64MiB`` says it."""
    match = re.fullmatch(r"([0-9]{1,18}) ?([kmg]?)(i?b)?", text.strip().lower())
    if not match or not int(match[1]):
        raise SettingsError(f"{_quoted(text)} is not a size; a good one is 64MiB")
    return int(match[1]) * _UNITS[match[2]]


def read_spool_size(text: str) -> int:
    """Return the size of a spool in bytes."""
    if (size := read_size(text)) < 1 << 20:
        raise SettingsError(f"{_quoted(text)} is too small for a spool; it needs 1MiB")
    return size


def read_memory(text: str) -> int:
    """Return the memory that senders share in bytes."""
    if (size := read_size(text)) < 1 << 20:
        raise SettingsError(f"{_quoted(text)} is too little for senders to share; they need 1MiB")
    return size


def read_seconds(text: str) -> float:
    """Return a time in seconds."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?|\.[0-9]+", text):
        return float(text)
    raise SettingsError(f"{_quoted(text)} is not a time in seconds; a good one is 2.5")


def read_count(text: str) -> int:
    """Return a number of records."""
    if re.fullmatch(r"[0-9]{1,18}", text) and int(text):
        return int(text)
    raise SettingsError(f"{_quoted(text)} is not a number of records; a good one is 1000")


def read_slots(text: str) -> int:
    """Return how many processes may use a spool."""
    if re.fullmatch(r"[0-9]{1,2}", text) and 1 <= int(text) <= MAX_SPOOL_SLOTS:
        return int(text)
    raise SettingsError(f"{_quoted(text)} is not a number of processes from 1 to {MAX_SPOOL_SLOTS}")


def read_max_line(text: str) -> int:
    """Return the length of a line in bytes."""
    size = read_size(text)
    if not 4 <= size <= MAX_LINE_BYTES:
        most = f"{MAX_LINE_BYTES >> 20}MiB"
        raise SettingsError(f"{_quoted(text)} is out of bounds: from 4 bytes to {most}")
    return size


def read_delimiter(text: str) -> bytes:
    """Return the bytes that text with escapes stands for."""

    def unescape(match: re.Match[bytes]) -> bytes:
        if not match[1]:
            raise SettingsError(
                rf"{_quoted(text)} has a backslash that escapes nothing; there are \n \r \t \0 \a "
                r"\b \f \v \\ and \xNN, two hexadecimal digits"
            )
        return bytes([int(match[1][1:], 16) if match[1][1:] else _ESCAPES[match[1][0]]])

    if not text:
        raise SettingsError(r"'' is not a delimiter; a good one is ';' or '\r\n' or '\x1e'")
    return _ESCAPE.sub(unescape, text.encode("utf-8", "surrogateescape"))


def read_allow(text: str) -> str | Path:
    """Return the place of a list of keys, or ``any``."""
    if not text:
        raise SettingsError("'' is not a list of keys")
    return text if text == ALLOW_ANY else Path(text)


def read_mark(text: str) -> bytes:
    """Return what stands around a transaction."""
    if not text:
        raise SettingsError("'' is not a mark")
    return os.fsencode(text)


def read_field(text: str) -> tuple[str, str]:
    """Return the key and the value of ``KEY=VALUE``."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise SettingsError(f"{_quoted(text)} is not a field; a good one is environment=production")
    return key, value


def read_option(text: str) -> tuple[str, str]:
    """Return the name and the value of ``NAME=VALUE``; the text may be secret."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise SettingsError("an option is NAME=VALUE; a good one is security.protocol=ssl")
    return name, value
