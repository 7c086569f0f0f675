"""
Proof that the end of a file is what this receiver wrote: only that may be cut off.

What is about to be written is noted before it is, in two files of the state that are used in
turn. The notes are never synced: they are for the death of a process, which leaves the memory
of the kernel as it is. After a power cut they may be missing, and then nothing is proven.

A note holds where the bytes go and how many they are, the first of them, one out of 1,024, and
checksums of both edges. So it proves what was written in full, and in part: a kill ends a write
at the end of a page, and the byte there is one of those.
"""

import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

_ENTRY = struct.Struct(">IIQ")  # CRC of what follows it, length of all, generation
_CLAIM = struct.Struct(">QQIIH")  # offset, length, CRCs of the edges, length of the path
_HEAD_BYTES = 64
_STRIDE = 1024
_EDGE_BYTES = 1024


class Claim(NamedTuple):
    """What was to be written into a file, and as much of it as proves that."""

    offset: int
    length: int
    first_crc: int
    last_crc: int
    head: bytes
    samples: bytes

    @property
    def end(self) -> int:
        """Where in the file it ends."""
        return self.offset + self.length

    @classmethod
    def of(cls, offset: int, data: bytes | memoryview) -> Self:
        """Return the claim for data that go to an offset."""
        first, last = zlib.crc32(data[:_EDGE_BYTES]), zlib.crc32(data[-_EDGE_BYTES:])
        head = bytes(data[:_HEAD_BYTES])
        return cls(offset, len(data), first, last, head, _samples(offset, data))

    def holds(self, fd: int, size: int) -> bool:
        """Whether a file of a size holds this, or as much of it as the size lets it."""
        data = os.pread(fd, max(0, min(self.length, size - self.offset)), self.offset)
        found = Claim.of(self.offset, data)
        if found.length == self.length:
            return found == self
        return (
            self.head.startswith(found.head)
            and self.samples.startswith(found.samples)
            and (found.length < _EDGE_BYTES or found.first_crc == self.first_crc)
            # Others end what they append with a newline, and hardly where a sample is.
            and (found.end % _STRIDE == 0 or not data.endswith(b"\n"))
        )


class Mark(NamedTuple):
    """
    What is remembered of a file; ``-`` is for what is not known.

    Attributes:
        inode: Its number, to find it when it was renamed.
        length: How much of it is committed, in bytes.
        crc: The checksum of the last bytes before that.
        run: Which run of zmqpull was the last to open the file.

    """

    inode: int
    length: int
    crc: str = "-"
    run: str = "-"

    @classmethod
    def of(cls, fd: int, run: str) -> Self:
        """Return the mark of a file as it is now."""
        status = os.fstat(fd)
        return cls(status.st_ino, status.st_size, _crc_before(fd, status.st_size), run)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what :meth:`to_text` has made, now or before there was a proof."""
        inode, length, *proof = text.split()
        return cls(int(inode), int(length), *proof)

    def to_text(self) -> str:
        """Return the mark as one line."""
        return f"{self.inode} {self.length} {self.crc} {self.run}"

    def fits(self, fd: int) -> bool:
        """Whether this is the file: all that is committed is in it."""
        status = os.fstat(fd)
        return (
            status.st_ino == self.inode
            and status.st_size >= self.length
            and self.crc in ("-", _crc_before(fd, self.length))
        )


class Journal:
    """
    The notes.

    Args:
        directory: Where they are.

    Attributes:
        claims: What earlier runs have noted, by path.

    Raises:
        OSError: If they cannot be read or made.

    """

    NAMES = ("journal.0", "journal.1")

    def __init__(self, directory: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fds = [os.open(directory / name, flags, 0o600) for name in self.NAMES]
        self._end = 0
        entries = [entry for fd in self._fds for entry in _read(fd)]
        entries.sort(key=lambda entry: entry[0])
        self._generation = entries[-1][0] + 1 if entries else 1
        self.claims: dict[str, list[Claim]] = {}
        for _, path, claim in entries:
            self.claims.setdefault(path, []).append(claim)

    def clear(self) -> None:
        """Forget what earlier runs have noted."""
        self.claims.clear()
        for fd in self._fds:
            os.ftruncate(fd, 0)

    def note(self, claims: Iterable[tuple[str, Claim]]) -> None:
        """
        Note what is about to be written, by path.

        Raises:
            OSError: If that is impossible.

        """
        entries = b"".join(_pack(self._generation, path, claim) for path, claim in claims)
        if entries:
            os.pwrite(self._fds[self._generation % 2], entries, self._end)
            self._end += len(entries)

    def turn(self) -> None:
        """Note in the other file: what is in that was committed."""
        self._generation += 1
        self._end = 0


def chain(claims: Sequence[Claim], length: int) -> list[Claim]:
    """Return the claims, in order, to what follows a length without a gap."""
    at = {claim.offset: claim for claim in claims if claim.end > length}
    end = max((offset for offset in at if offset <= length), default=-1)
    chained = []
    while claim := at.get(end):
        chained.append(claim)
        end = claim.end
    return chained


def _samples(offset: int, data: bytes | memoryview) -> bytes:
    """Return each byte whose place in the file is the last of a stride."""
    return bytes(data[(-1 - offset) % _STRIDE :: _STRIDE])


def _crc_before(fd: int, length: int) -> str:
    first = max(0, length - _EDGE_BYTES)
    try:
        return f"{zlib.crc32(os.pread(fd, length - first, first)):08x}"
    except OSError:  # it may only be written
        return "-"


def _pack(generation: int, path: str, claim: Claim) -> bytes:
    name = os.fsencode(path)
    offset, length, first_crc, last_crc, head, samples = claim
    fields = _CLAIM.pack(offset, length, first_crc, last_crc, len(name))
    body = b"".join((fields, name, head, samples))
    rest = _ENTRY.pack(0, _ENTRY.size + len(body), generation)[4:] + body
    return zlib.crc32(rest).to_bytes(4) + rest


def _read(fd: int) -> list[tuple[int, str, Claim]]:
    """Return the notes of one file, up to the first that is torn or older."""
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    entries: list[tuple[int, str, Claim]] = []
    at = 0
    while at + _ENTRY.size + _CLAIM.size <= len(data):
        crc, size, generation = _ENTRY.unpack_from(data, at)
        entry = data[at : at + size]
        if not _ENTRY.size + _CLAIM.size < size == len(entry) or zlib.crc32(entry[4:]) != crc:
            break
        if entries and generation != entries[0][0]:
            break
        offset, length, first_crc, last_crc, name_bytes = _CLAIM.unpack_from(entry, _ENTRY.size)
        rest = entry[_ENTRY.size + _CLAIM.size :]
        name, proof = rest[:name_bytes], rest[name_bytes:]
        split = min(length, _HEAD_BYTES)
        claim = Claim(offset, length, first_crc, last_crc, proof[:split], proof[split:])
        entries.append((generation, os.fsdecode(name), claim))
        at += size
    return entries
