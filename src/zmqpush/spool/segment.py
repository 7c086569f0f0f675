"""
The files of a slot of the spool, as ``docs/spool.md`` specifies them: how they are read.

Nothing here changes a file, and no bytes in one make a function fail.
"""

import contextlib
import json
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from zmqpush.core.protocol.messages import (
    MAX_LABEL,
    MAX_PAYLOAD_BYTES,
    MAX_SEQ,
    Data,
    Labels,
    checksum,
    public_name,
)
from zmqpush.errors import SpoolError, SpoolForeignError, SpoolFullError
from zmqpush.runtime.files import has_no_room

FORMAT = 2
# Of an entry: the first half of its segment's mark, payload length, the other half, first,
# count, CRC.
HEADER = struct.Struct(">4sI4sQQI")
# What begins each entry in a segment of format 1, which has no header of its own.
FORMER_MARK = b"ZS\x01\x01\0\0\0\0"
STATE_SLOTS = (0, 4096)
STATE_BYTES = 28

_STATE = struct.Struct(">8sQQ")  # magic, generation, ack floor
_STATE_MAGIC = b"SPOOLST1"
_CRC = struct.Struct(">I")
_MAGIC = b"ZS\x02\x01"
# Of a segment, in front of the CRC: magic, length of the labels, their CRC, mark.
_BEGINNING = struct.Struct(">4sII8s")
# The most bytes of labels: each character may be two escapes of JSON.
_MAX_LABELS_BYTES = 2 * 12 * MAX_LABEL + 64
_MAX_HEADER_BYTES = 2 * (_BEGINNING.size + 4 + _MAX_LABELS_BYTES)
_SEGMENT_NAME = re.compile(r"(\d{20})\.seg(2?)")
_HEX_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(slots=True)
class Segment:
    """A file of blocks: the number of its first record, and its size in bytes."""

    first: int
    path: Path
    size: int
    header: "Header | None" = None  # once it was read


class Header(NamedTuple):
    """
    What a segment begins with.

    Attributes:
        mark: What each entry begins with, so that no content is taken for one.
        size: Where the first entry is, in bytes.
        labels: What its records have in common, if that is known.

    """

    mark: bytes
    size: int
    labels: Labels | None


class Meta(NamedTuple):
    """What a stream's name is made of, and the name that it had in format 1; or nothing."""

    secret: str = ""
    was: str = ""

    @property
    def stream(self) -> str:
        """The name of the stream."""
        return public_name(self.secret) if self.secret else self.was


@contextlib.contextmanager
def telling(path: Path) -> Iterator[None]:
    """Make a :class:`SpoolError` of what the system says."""
    try:
        yield
    except OSError as exc:
        where = exc.filename or path
        kind = SpoolFullError if has_no_room(exc) else SpoolError
        raise kind(f"cannot use the spool {path}: {where}: {exc.strerror}") from exc


def inode_of(slot: Path) -> int:
    """Return what tells a slot from a copy of it."""
    return os.stat(slot).st_ino


def read_meta(slot: Path) -> Meta:
    """
    Return what is known of the stream: nothing if it cannot be read, or is that of another slot.

    Raises:
        SpoolForeignError: If the slot is of a later version.

    """
    try:
        values = json.loads((slot / "meta").read_bytes())
        if values["format"] > FORMAT:
            raise SpoolForeignError(f"{slot} is a spool of a later version")
        if values["inode"] != inode_of(slot):
            return Meta()
        if values["format"] < FORMAT:
            return Meta(was=values["stream"] if _HEX_ID.fullmatch(values["stream"]) else "")
        secret, was = values["secret"], values.get("was", "")
        if _HEX_ID.fullmatch(secret):
            return Meta(secret, was if _HEX_ID.fullmatch(was) else "")
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return Meta()


def pack_state(generation: int, floor: int) -> bytes:
    """Return a slot of the state file."""
    slot = _STATE.pack(_STATE_MAGIC, generation, floor)
    return slot + _CRC.pack(zlib.crc32(slot))


def read_state(fd: int) -> tuple[int, int]:
    """Return the generation and the ack floor of the newest valid slot."""
    newest = (0, 0)
    for offset in STATE_SLOTS:
        data = os.pread(fd, STATE_BYTES, offset)
        slot, crc = data[: _STATE.size], data[_STATE.size :]
        if len(crc) == _CRC.size and slot[:8] == _STATE_MAGIC:
            _, generation, floor = _STATE.unpack(slot)
            if _CRC.unpack(crc)[0] == zlib.crc32(slot) and max(generation, floor) <= MAX_SEQ:
                newest = max(newest, (generation, floor))
    return newest


def new_header(mark: bytes, labels: Labels) -> tuple[Header, bytes]:
    """Return the header of a new segment, and its bytes; the mark is 8 random ones."""
    text = json.dumps(labels._asdict(), separators=(",", ":")).encode()
    beginning = _BEGINNING.pack(_MAGIC, len(text), zlib.crc32(text), mark)
    # Each part twice, so that one damaged byte costs nothing.
    data = 2 * (beginning + _CRC.pack(zlib.crc32(beginning))) + 2 * text
    return Header(mark, len(data), labels), data


def read_header(segment: Segment, fd: int) -> Header:
    """Return the header of a segment; if it is damaged, one that no entry fits."""
    if segment.header is None:
        if segment.path.suffix == ".seg":
            segment.header = Header(FORMER_MARK, 0, None)
        else:
            segment.header = _parse_header(os.pread(fd, _MAX_HEADER_BYTES, 0))
    return segment.header


def _parse_header(data: bytes) -> Header:
    part = _BEGINNING.size + _CRC.size
    for offset in (0, part):
        beginning, crc = data[offset:][: _BEGINNING.size], data[offset:][_BEGINNING.size : part]
        if crc != _CRC.pack(zlib.crc32(beginning)):
            continue
        magic, length, text_crc, mark = _BEGINNING.unpack(beginning)
        if magic == _MAGIC and length <= _MAX_LABELS_BYTES:
            texts = data[2 * part :][:length], data[2 * part + length :][:length]
            labels = [_read_labels(text) for text in texts if zlib.crc32(text) == text_crc]
            return Header(mark, 2 * (part + length), labels[0] if labels else None)
    return Header(os.urandom(8), 0, None)


def _read_labels(text: bytes) -> Labels | None:
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        labels = Labels(**json.loads(text))
        strings = all(isinstance(x, str) and len(x) <= MAX_LABEL for x in labels[:2])
        if strings and isinstance(labels.raw, bool):
            return labels
    return None


def list_segments(slot: Path) -> list[Segment]:
    """Return the segments of a slot in the order of their numbers."""
    segments = []
    for name in os.listdir(slot):
        match = _SEGMENT_NAME.fullmatch(name)
        if match and 0 < int(match[1]) <= MAX_SEQ:
            path = slot / name
            with contextlib.suppress(FileNotFoundError):  # whoever uses the slot removed it
                segments.append(Segment(int(match[1]), path, path.stat().st_size))
    return sorted(segments, key=lambda segment: (segment.first, segment.path.suffix))


def labels_of(segments: list[Segment]) -> Labels | None:
    """Return what the records of the first segment have in common, if that is known."""
    with contextlib.suppress(IndexError, FileNotFoundError):  # whoever uses the slot removed it
        fd = os.open(segments[0].path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return read_header(segments[0], fd).labels
        finally:
            os.close(fd)
    return None


def end_of(segments: list[Segment]) -> int:
    """Return the last sequence number of the last good entry."""
    if not segments:
        return 0
    last = segments[-1]
    end = last.first - 1
    try:
        fd = os.open(last.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # whoever uses the slot removed it
        return end
    try:
        mark, offset, _ = read_header(last, fd)
        while offset < last.size:
            block = read_block(fd, offset, last.size, mark)
            if block is None or block.first != end + 1:
                # Content may look like an entry of format 1, and torn ends are not searched.
                secret = mark != FORMER_MARK
                found = find_block(fd, offset, last.size, mark, end + 1) if secret else None
                if found is None:
                    break
                offset, first = found
                end = first - 1
                continue
            offset += HEADER.size + len(block.payload)
            end = block.end
        return end
    finally:
        os.close(fd)


def read_block(fd: int, offset: int, size: int, mark: bytes) -> Data | None:
    """Return the entry at ``offset``, if it is a good one."""
    header = os.pread(fd, HEADER.size, offset)
    if len(header) < HEADER.size:
        return None
    one, length, two, first, records, crc = HEADER.unpack(header)
    if one + two != mark or not 0 < length <= MAX_PAYLOAD_BYTES:
        return None
    if not first or not 0 < records <= length or first + records - 1 > MAX_SEQ:
        return None
    if offset + HEADER.size + length > size:
        return None
    payload = os.pread(fd, length, offset + HEADER.size)
    if len(payload) < length or checksum(first, records, payload) != crc:
        return None
    if not payload.endswith(b"\n") or payload.count(b"\n") != records:  # no receiver takes it
        return None
    return Data(first, records, payload, crc)


def find_block(fd: int, offset: int, size: int, mark: bytes, number: int) -> tuple[int, int] | None:
    """
    Return where the next good entry is that may follow what is damaged, and its number.

    Args:
        fd: The segment.
        offset: Where the damage begins.
        size: Of the segment.
        mark: What entries begin with.
        number: That of the first record in what is damaged. There are no more records in that
            than bytes.

    """
    rest = os.pread(fd, size - offset, offset)
    at = rest.find(mark[:4], 1)
    while at >= 0:
        block = read_block(fd, offset + at, size, mark)
        if block is not None and number < block.first <= number + at:
            return offset + at, block.first
        at = rest.find(mark[:4], at + 1)
    return None
