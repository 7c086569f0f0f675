r"""
A block of lines into a payload of records.

A line is never a Python object here. A block is checked and escaped as a whole, and
then each delimiter in it becomes the end of one record and the head of the next: type,
pid, host, time and extra fields are the same for all lines of a block. Each step is
one pass in C, and a pass that would change nothing is not made.

The escapes are those of RFC 8259, section 7. Bytes that are not UTF-8 become the text
``\xNN``, so that nothing is lost, and are counted.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple

from zmqpush.core.records.lines import Block
from zmqpush.errors import SettingsError

# Stands between lines while they are escaped, where a newline may be part of a line.
# The byte does not occur in UTF-8.
_SEPARATOR = b"\xff"

_HEAD = b'{"message":"'
HARMLESS = bytes(range(0x20, 0x100))
_ESCAPES = {control: json.dumps(chr(control))[1:-1].encode() for control in range(0x20)}


class Format(StrEnum):
    """What a record looks like."""

    JSON = "json"
    LOGSTASH = "logstash"
    ECS = "ecs"
    RAW = "raw"


class Payload(NamedTuple):
    """
    The records of a block.

    Attributes:
        data: The records, each followed by the envelope's ``separator``.
        records: How many they are.

    """

    data: bytes
    records: int

    def first(self, records: int) -> "Payload":
        """Return the first ``records`` records, where a newline ends each."""
        lines = self.data.split(b"\n", records)[:records]
        return Payload(b"\n".join(lines) + b"\n", len(lines))


class Envelope:
    """
    Makes records of lines.

    Args:
        format: What a record looks like.
        logtype: Its ``type`` (``event.dataset`` in ECS).
        pid: The process that the records are tagged with.
        host: The name of this machine, for the formats that carry it.
        fields: More fields, added to every record. In ECS a dotted name is a path
            of objects, and a name without dots is one of the ``labels``.
        delimiter: What stands between the lines of a block.

    Raises:
        SettingsError: If ``fields`` has a name that the format itself uses or has no
            place for, or any field at all for the format ``raw``.

    Attributes:
        separator: What ends each record of a payload: a newline, or for ``raw``
            the delimiter.
        invalid_bytes: How many bytes were not UTF-8, so far.

    """

    def __init__(
        self,
        *,
        format: Format = Format.JSON,
        logtype: str = "syslog",
        pid: int,
        host: str = "",
        fields: Mapping[str, str] | None = None,
        delimiter: bytes = b"\n",
    ) -> None:
        self._format = format
        self._delimiter = delimiter
        self._constant: dict[str, Any] = {}
        self._harmless = HARMLESS + (b"\n" if delimiter == b"\n" else b"")
        self.separator = delimiter if format is Format.RAW else b"\n"
        self.invalid_bytes = 0
        logtype, host = _to_text(logtype), _to_text(host)
        if format is Format.ECS:
            self._constant = {
                "ecs": {"version": "8.11.0"},
                "event": {"dataset": logtype},
                "host": {"name": host},
                "process": {"pid": pid},
            }
        elif format is not Format.RAW:
            self._constant = {"type": logtype, "@pid": pid}
        if format is Format.LOGSTASH:
            self._constant |= {"@version": "1", "host": host}
        # ECS has no field of its own for this.
        self._partial = {"tags": ["partial"]} if format is Format.ECS else {"@partial": True}
        self._add_fields(fields or {})
        self._tail = self._make_tail({})

    @property
    def overhead_bytes(self) -> int:
        """How much longer a record is than its line, at most, without its escapes."""
        if self._format is Format.RAW:
            return 1
        return len(_HEAD) + len(self._make_tail({"@timestamp": "x" * 24} | self._partial)) + 1

    def _add_fields(self, fields: Mapping[str, str]) -> None:
        if fields and self._format is Format.RAW:
            raise SettingsError("the format raw has no place for fields")
        variable = {"message", "@timestamp", *self._partial}
        for name in fields:
            if name in self._constant or name in variable:
                raise SettingsError(f"the field {name!r} is part of the format {self._format}")
        texts = {_to_text(name): _to_text(value) for name, value in fields.items()}
        if self._format is not Format.ECS:
            self._constant |= texts
            return
        for name, value in texts.items():
            path = name.split(".") if "." in name else ["labels", name]
            if path[0] in variable or not _place(self._constant, path, value):
                raise SettingsError(f"the format ecs has no place for the field {name!r}")

    def _make_tail(self, variable: dict[str, Any]) -> bytes:
        rest = json.dumps(self._constant | variable, ensure_ascii=False, separators=(",", ":"))
        return b'",' + rest[1:].encode()

    def format(self, block: Block, read_at: float) -> Payload:
        """
        Make the records of a block.

        Args:
            block: Lines with the delimiter between them.
            read_at: When they were read, in seconds since the epoch.

        """
        if self._format is Format.RAW:
            return Payload(block.data + self._delimiter, block.data.count(self._delimiter) + 1)
        tail = self._tail_at(block, read_at) + b"\n"
        separator, lines = self._escape(block.data)
        between = tail + _HEAD
        joined = lines.replace(separator, between)
        # How much it grew tells how often, without another pass.
        records = (len(joined) - len(lines)) // (len(between) - 1) + 1
        return Payload(b"".join((_HEAD, joined, tail)), records)

    def _tail_at(self, block: Block, read_at: float) -> bytes:
        if self._format is Format.JSON and not block.partial:
            return self._tail
        variable: dict[str, Any] = {}
        if self._format is not Format.JSON:
            moment = datetime.fromtimestamp(read_at, UTC).isoformat(timespec="milliseconds")
            variable["@timestamp"] = moment.replace("+00:00", "Z")
        if block.partial:
            variable |= self._partial
        return self._make_tail(variable)

    def _escape(self, lines: bytes) -> tuple[bytes, bytes]:
        separator = self._delimiter
        if separator == b"\n":
            lines = self._check(lines)
        else:
            separator, lines = _SEPARATOR, self._separate(lines)
        return separator, escape(lines, self._harmless)

    def _separate(self, lines: bytes) -> bytes:
        if _is_utf8(lines.replace(self._delimiter, b"\n")):
            return lines.replace(self._delimiter, _SEPARATOR)
        return _SEPARATOR.join(map(self._check, lines.split(self._delimiter)))

    def _check(self, lines: bytes) -> bytes:
        if _is_utf8(lines):
            return lines
        checked = to_utf8(lines)
        self.invalid_bytes += (len(checked) - len(lines)) // 3  # one byte became four
        return checked


def escape(text: bytes, harmless: bytes) -> bytes:
    """Return UTF-8 as it is within a string of JSON, but for controls that are harmless here."""
    text = text.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    for control in set(text.translate(None, harmless)):
        text = text.replace(bytes((control,)), _ESCAPES[control])
    return text


def _place(record: dict[str, Any], path: list[str], value: str) -> bool:
    """Put a value into nested objects; whether it is the only one there, as ECS wants it."""
    *names, last = path
    if not all(path) or (names[0] == "labels" and len(path) > 2):  # labels are flat
        return False
    for name in names:
        record = record.setdefault(name, {})
        if not isinstance(record, dict):
            return False
    is_free = last not in record
    record[last] = value
    return is_free


def to_utf8(data: bytes) -> bytes:
    r"""Return bytes with the text ``\xNN`` for each that is not UTF-8."""
    return data.decode("utf-8", "backslashreplace").encode()


def _to_text(argument: str) -> str:
    # Arguments and the environment may hold bytes that are not UTF-8.
    return to_utf8(argument.encode("utf-8", "surrogateescape")).decode()


def _is_utf8(data: bytes) -> bool:
    try:
        return data.isascii() or bool(data.decode())
    except UnicodeDecodeError:
        return False
