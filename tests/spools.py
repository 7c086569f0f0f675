"""What the tests of the spool share: spools with tiny segments, a receiver, a faulty disk."""

import os
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from zmqpush.core.protocol.messages import DAMAGED, DROPPED, Data, Labels, Skip
from zmqpush.core.records.encode import Payload
from zmqpush.settings import Sync, WhenFull
from zmqpush.spool.spool import Spool

MARK = b"ZS\n\0mark"
FORMER_MARK = b"ZS\1\1\0\0\0\0"  # of every entry in a segment of format 1


def segment_header(mark: bytes = MARK, labels: bytes | None = None) -> bytes:
    """Return the header of a segment as the specification says, independently of the code."""
    labels = b'{"type":"","host":"","raw":false}' if labels is None else labels
    beginning = struct.pack(">4sII8s", b"ZS\x02\x01", len(labels), zlib.crc32(labels), mark)
    return 2 * (beginning + struct.pack(">I", zlib.crc32(beginning))) + 2 * labels


HEADER_BYTES = len(segment_header())  # of a segment of open_spool()


def entry_of(first: int, count: int, payload: bytes, mark: bytes = MARK) -> bytes:
    """Return the bytes of an entry, as the specification says."""
    numbers = struct.pack(">QQ", first, count)
    crc = struct.pack(">I", zlib.crc32(numbers + payload))
    length = struct.pack(">I", len(payload))
    return mark[:4] + length + mark[4:] + numbers + crc + payload


class Reports(list):
    """A reporter that keeps what it is told."""

    def warn(self, text: str) -> None:
        """Keep a line."""
        self.append(text)


def open_spool(slot: Path, **options: object) -> Spool:
    """Open a slot as the program does, but for its sizes."""
    slot.mkdir(mode=0o700, exist_ok=True)
    defaults = {
        "max_bytes": 1 << 20,
        "when_full": WhenFull.BLOCK,
        "sync": Sync.BLOCK,
        "segment_bytes": 256,
        "reporter": Reports(),
        "labels": Labels(),
    }
    return Spool(slot, **defaults | options)


def payload(*numbers: int, size: int = 40) -> Payload:
    """Return a payload of one record of ``size`` bytes for each number."""
    return Payload(b"".join(b"%0*d\n" % (size - 1, n) for n in numbers), len(numbers))


def numbers_in(block: Data) -> list[int]:
    """Return the numbers in a block's payload, which has to be whole."""
    head = block.first.to_bytes(8, "big") + block.records.to_bytes(8, "big")
    assert zlib.crc32(head + block.payload) == block.crc
    assert block.payload.endswith(b"\n")
    numbers = [int(line) for line in bytes(block.payload).splitlines()]
    assert len(numbers) == block.records
    return numbers


def put(spool: Spool, *numbers: int, size: int = 40) -> None:
    """Put a block for each number."""
    for number in numbers:
        spool.put(payload(number, size=size))


def sync(spool: Spool) -> None:
    """Sync as the program does, but for the thread."""
    job = spool.begin_sync()
    try:
        job.run()
    except OSError as exc:
        spool.end_sync(job, exc)
    else:
        spool.end_sync(job)


class Receiver:
    """What accepts blocks by the rules of the protocol; ``numbers`` are those it was given."""

    def __init__(self, end: int = 0) -> None:
        self.end = end
        self.numbers: list[int] = []
        self.skipped = {DROPPED: 0, DAMAGED: 0}

    def accept(self, entry: Data | Skip) -> None:
        """Take an entry; fail if there is a gap or an overlap."""
        assert entry.records > 0
        if entry.end <= self.end:
            return
        if isinstance(entry, Skip):
            assert entry.first <= self.end + 1
            self.skipped[entry.reason] += entry.end - self.end
        else:
            assert entry.first == self.end + 1
            self.numbers += numbers_in(entry)
        self.end = entry.end

    def take_all(self, spool: Spool, *, acknowledge: bool = True) -> list[int]:
        """Accept all that may be sent; return all numbers so far."""
        while entry := spool.take():
            self.accept(entry)
        if acknowledge:
            spool.acknowledge(self.end)
        return self.numbers


def account(spool: Spool) -> int:
    """Return how many records came into this spool, by what became of them."""
    return spool.acked + spool.dropped + spool.damaged + spool.records


class FaultyDisk:
    """Lets system calls fail, by their number; what synced badly must not be synced again."""

    def __init__(self, monkeypatch: object) -> None:
        self.calls: dict[str, int] = {}
        self.failing: Callable[[str, int], OSError | None] = lambda name, count: None
        self.written = 0  # so many bytes does a failing write write
        self._broken: list[int] = []  # their descriptors, so that no inode is used again
        self._real = {name: getattr(os, name) for name in ("fdatasync", "pwritev", "open")}
        for name in self._real:
            monkeypatch.setattr(os, name, getattr(self, name))

    def fail(self, name: str, error: int, *nth: int) -> None:
        """Let the nth calls fail, from now on; all of them if there is no number."""
        self.calls.clear()

        def failing(called: str, count: int) -> OSError | None:
            if called == name and (count in nth or not nth):
                return OSError(error, os.strerror(error))
            return None

        self.failing = failing

    def _failure(self, name: str) -> OSError | None:
        self.calls[name] = self.calls.get(name, 0) + 1
        return self.failing(name, self.calls[name])

    def fdatasync(self, fd: int) -> None:
        """Sync, or fail."""
        status = os.fstat(fd)
        assert not any(os.path.samestat(status, os.fstat(broken)) for broken in self._broken)
        if failure := self._failure("fdatasync"):
            if stat.S_ISREG(status.st_mode):  # there is but one directory
                self._broken.append(os.dup(fd))
            raise failure
        self._real["fdatasync"](fd)

    def pwritev(self, fd: int, buffers: tuple[bytes, ...], offset: int) -> int:
        """Write, or write a part and fail."""
        if failure := self._failure("pwritev"):
            if self.written:
                os.pwrite(fd, b"".join(buffers)[: self.written], offset)
            raise failure
        return self._real["pwritev"](fd, buffers, offset)

    def open(self, path: object, flags: int, *args: int, **kwargs: object) -> int:
        """Open a file, or fail if that is to make a segment."""
        if flags & os.O_EXCL and str(path).endswith(".seg2") and (failure := self._failure("open")):
            raise failure
        return self._real["open"](path, flags, *args, **kwargs)

    def reboot(self) -> None:
        """Work again, and forget which files synced badly."""
        self.fail("", 0, 0)
        while self._broken:
            os.close(self._broken.pop())
