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

from zmqpush.core.frames import MAX_PAYLOAD_BYTES, MAX_SEQ, Data, checksum
from zmqpush.disk import has_no_room
from zmqpush.errors import SpoolError, SpoolForeignError, SpoolFullError

FORMAT = 1
MAGIC = b"ZS\x01\x01"
HEADER = struct.Struct(">4sIIQQI")  # magic, payload length, zero, first, count, CRC
STATE_SLOTS = (0, 4096)
STATE_BYTES = 28

_STATE = struct.Struct(">8sQQ")  # magic, generation, ack floor
_STATE_MAGIC = b"SPOOLST1"
_CRC = struct.Struct(">I")
_SEGMENT_NAME = re.compile(r"(\d{20})\.seg")
_STREAM = re.compile(r"[0-9a-f]{32}")


@dataclass(slots=True)
class Segment:
    """A file of blocks: the number of its first record, and its size in bytes."""

    first: int
    path: Path
    size: int


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


def read_stream(slot: Path) -> str:
    """
    Return the name of the stream; empty if it cannot be read, or is that of another slot.

    Raises:
        SpoolForeignError: If the slot is of a later version.

    """
    try:
        values = json.loads((slot / "meta").read_bytes())
        if values["format"] > FORMAT:
            raise SpoolForeignError(f"{slot} is a spool of a later version")
        named = _STREAM.fullmatch(values["stream"]) and values["inode"] == inode_of(slot)
        return values["stream"] if named else ""
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return ""


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


def list_segments(slot: Path) -> list[Segment]:
    """Return the segments of a slot in the order of their numbers."""
    segments = []
    for name in os.listdir(slot):
        match = _SEGMENT_NAME.fullmatch(name)
        if match and 0 < int(match[1]) <= MAX_SEQ:
            path = slot / name
            with contextlib.suppress(FileNotFoundError):  # whoever uses the slot removed it
                segments.append(Segment(int(match[1]), path, path.stat().st_size))
    return sorted(segments, key=lambda segment: segment.first)


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
        offset = 0
        while offset < last.size:
            block = read_block(fd, offset, last.size)
            if block is None or block.first <= end:
                found = find_block(fd, offset, last.size, end, MAX_SEQ)
                if found is None:
                    break
                offset, _ = found
                continue
            offset += HEADER.size + len(block.payload)
            end = block.end
        return end
    finally:
        os.close(fd)


def read_block(fd: int, offset: int, size: int) -> Data | None:
    """Return the entry at ``offset``, if it is a good one."""
    header = os.pread(fd, HEADER.size, offset)
    if len(header) < HEADER.size:
        return None
    magic, length, zero, first, records, crc = HEADER.unpack(header)
    if magic != MAGIC or zero or not 0 < length <= MAX_PAYLOAD_BYTES:
        return None
    if not first or not 0 < records <= length or first + records - 1 > MAX_SEQ:
        return None
    if offset + HEADER.size + length > size:
        return None
    payload = os.pread(fd, length, offset + HEADER.size)
    if len(payload) < length or checksum(first, records, payload) != crc:
        return None
    if not payload.endswith(b"\n"):  # no receiver takes it
        return None
    return Data(first, records, payload, crc)


def find_block(fd: int, offset: int, size: int, above: int, below: int) -> tuple[int, int] | None:
    """Return where the next good entry is that lies between two numbers, and its number."""
    rest = os.pread(fd, size - offset, offset)
    at = rest.find(MAGIC, 1)
    while at >= 0:
        block = read_block(fd, offset + at, size)
        if block is not None and above < block.first < below:
            return offset + at, block.first
        at = rest.find(MAGIC, at + 1)
    return None
