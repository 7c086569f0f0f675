"""
Bounded disk: every block from before it is sent until it is acknowledged.

``docs/spool.md`` specifies the files. Everything is done at once but for syncing, which
:meth:`Spool.begin_sync` prepares for another thread.
"""

import bisect
import contextlib
import errno
import json
import os
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from zmqpush.core.holes import Holes
from zmqpush.core.protocol.messages import DAMAGED, DROPPED, MAX_PAYLOAD_BYTES, Data, Labels, Skip
from zmqpush.core.records.encode import Payload
from zmqpush.errors import SpoolError, SpoolFullError
from zmqpush.runtime.faults import fault_point
from zmqpush.runtime.files import has_no_room
from zmqpush.runtime.reporting import Reporter
from zmqpush.settings import Sync, WhenFull
from zmqpush.spool.reader import SegmentReader
from zmqpush.spool.segment import (
    FORMAT,
    HEADER,
    STATE_BYTES,
    STATE_SLOTS,
    Segment,
    end_of,
    inode_of,
    list_segments,
    new_header,
    pack_state,
    read_meta,
    read_state,
    telling,
)

_SEGMENT_BYTES = 16 << 20
_MIN_FREE = 0.05  # of the file system
_STATE_INTERVAL = 0.1  # seconds
# What is written and not yet sent stays in memory, too, as far as this.
_RECENT_BYTES = 8 << 20
# What is not yet synced must stay in memory, so reading waits for a disk that is so far
# behind.
_UNSYNCED_BYTES = 64 << 20
# What a block in memory costs beside its payload, rounded up.
_BLOCK_BYTES = 256


class _NoSpaceError(Exception):
    """There is no room on the disk."""


@dataclass(slots=True)
class SyncJob:
    """What is to be synced: descriptors, and how much of the stream that makes safe."""

    end: int
    unsynced_bytes: int
    sealed: list[int]  # of segments that are no longer written
    fds: list[int] = field(default_factory=list)  # of others
    given_up: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _done: bool = False
    _failure: OSError | None = None

    def run(self) -> None:
        """
        Sync; may be called in another thread.

        It is done once: whoever comes second waits for the first, and learns the same.

        Raises:
            OSError: If that fails.

        """
        with self._lock:
            if not self._done:
                self._done = True
                try:
                    for fd in self.sealed + self.fds:
                        os.fdatasync(fd)
                except OSError as exc:
                    self._failure = exc
            if self._failure:
                raise self._failure


class Spool:
    """
    The spool of one process: a ``core.protocol.sender.Store``.

    Args:
        slot: The directory, locked, as :func:`zmqpush.spool.slots.take_slot` returns it.
        max_bytes: Most bytes to hold.
        when_full: What happens to records when there is no room.
        sync: When a block may be sent.
        labels: What the records of this run have in common.
        reporter: Where to tell of damage.
        segment_bytes: How long a segment grows.

    Raises:
        SpoolError: If the files cannot be read or written.
        SpoolFullError: If there is no room for them.
        SpoolForeignError: If they are of a later version.

    Attributes:
        secret: What the name of the stream is made of.
        was: The name that it had under version 1, if it had one.
        labels: What the records of this run have in common.
        recovered: The last sequence number of earlier runs.
        acked: How many records were acknowledged, so far in this run.
        dropped: How many were dropped by policy.
        damaged: How many could not be read, or were removed.
        failed: Whether the files cannot be relied on any more.
        unsynced_bytes: How much waits for a sync.

    """

    def __init__(
        self,
        slot: Path,
        *,
        max_bytes: int,
        when_full: WhenFull,
        sync: Sync,
        labels: Labels,
        reporter: Reporter,
        segment_bytes: int = _SEGMENT_BYTES,
    ) -> None:
        self._slot = slot
        self._max_bytes = max_bytes
        self._header_bytes = new_header(bytes(8), labels)[0].size  # of each new segment
        self._segment_bytes = min(segment_bytes, max(1, max_bytes // 4)) + self._header_bytes
        self._when_full = when_full
        self._sync = sync
        self._reporter = reporter
        self.labels = labels
        self.acked = self.dropped = self.damaged = 0
        self._holes = Holes()
        self._held: deque[Payload] = deque()  # there is no room for them
        self.spooled = True  # the stream goes on after this process
        self._recent: OrderedDict[int, Data] = OrderedDict()
        self._recent_bytes = self.unsynced_bytes = 0
        self._fd: int | None = None  # of the last segment, if it is of this run
        self._sealed: list[int] = []  # descriptors of older ones that are not synced
        self._new_names = False  # the directory is not synced
        self._removable: deque[Path] = deque()  # files of acknowledged segments
        self._job: SyncJob | None = None  # from begin_sync() to end_sync()
        self._failing = False  # nothing was synced since a segment was given up
        self.failed = False
        self._reader = SegmentReader(slot)
        self._generation = 0
        self._state_written = time.monotonic()
        with telling(slot), contextlib.ExitStack() as on_failure:
            self._directory = os.open(slot, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            on_failure.callback(os.close, self._directory)
            self.secret, self.was = read_meta(slot)
            if not self.secret and not self.was and (slot / "meta").exists():
                self.rename_stream()
            elif not self.secret:
                self._name_stream()
            self._state = os.open(slot / "state", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            on_failure.callback(os.close, self._state)
            self._lengthen_state()
            self._recover()
            on_failure.pop_all()

    def _lengthen_state(self) -> None:
        length = os.fstat(self._state).st_size
        missing = STATE_SLOTS[-1] + STATE_BYTES - length
        if missing > 0 and os.pwrite(self._state, bytes(missing), length) < missing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fault_point("spool-state-made")

    def _recover(self) -> None:
        self._generation, floor = read_state(self._state)
        self._segments = list_segments(self._slot)
        self._bytes = sum(segment.size for segment in self._segments)
        if self._segments:
            floor = max(floor, self._segments[0].first - 1)
        self._floor = floor
        self._next = max(floor + 1, end_of(self._segments) + 1)
        self.recovered = self._synced = self._next - 1
        self._cursor = floor + 1
        fault_point("spool-scanned")
        self._remove_acknowledged()
        self.unlink_removable()
        self._sync_earlier_run()
        fault_point("spool-recovered")

    def _sync_earlier_run(self) -> None:
        # What it wrote last may be nowhere but in the page cache, if it was killed.
        if self._sync is Sync.OFF or not self._segments:
            return
        unsynced_bytes = _UNSYNCED_BYTES + MAX_PAYLOAD_BYTES
        for segment in reversed(self._segments):
            fd = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
            unsynced_bytes -= segment.size
            if unsynced_bytes <= 0:
                break
        os.fsync(self._directory)

    def _name_stream(self) -> None:
        secret = os.urandom(16).hex()
        meta = self._slot / "meta"
        new = self._slot / "meta.new"
        with telling(self._slot):
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                values = {"format": FORMAT, "secret": secret, "inode": inode_of(self._slot)}
                former = {"was": self.was} if self.was else {}
                os.write(fd, json.dumps(values | former).encode() + b"\n")
                os.fsync(fd)
            finally:
                os.close(fd)
            fault_point("meta-written")
            os.rename(new, meta)
            fault_point("meta-renamed")
            os.fsync(self._directory)
        self.secret = secret

    def rename_stream(self) -> None:
        """
        Give the stream a new secret, and so a new name; the records keep their numbers.

        If there is no room for it the stream keeps its name, and whoever asked asks again.

        Raises:
            SpoolError: If it cannot be stored.

        """
        was, self.was = self.was, ""
        try:
            self._name_stream()
        except SpoolFullError as exc:
            self.was = was
            if not self.secret:
                raise
            self._reporter.warn(f"{exc}: waiting")
            return
        self._reporter.warn(
            f"the spool {self._slot} is a copy, or has lost something: it goes on as a new stream"
        )

    @property
    def has_removable(self) -> bool:
        """Whether :meth:`unlink_removable` has something to do."""
        return bool(self._removable)

    @property
    def first(self) -> int:
        """The lowest sequence number that is not acknowledged."""
        return self._floor + 1

    @property
    def records(self) -> int:
        """How many records are not acknowledged, those included that wait for room."""
        return self._holes.present(self._floor + 1, self._next - 1) + self.unsafe

    @property
    def unsafe(self) -> int:
        """How many records would not survive the end of the process."""
        return sum(payload.records for payload in self._held)

    @property
    def at_risk(self) -> int:
        """How many records would not survive a power cut now, whatever the policy makes safe."""
        return self._holes.present(self._synced + 1, self._next - 1) + self.unsafe

    @property
    def synced(self) -> bool:
        """Whether every record is as safe as the policy makes it."""
        return not self._held and self._synced == self._next - 1

    @property
    def full(self) -> bool:
        """Whether reading must wait for room."""
        return bool(self._held) or self._recent_bytes >= _UNSYNCED_BYTES

    @property
    def ahead(self) -> bool:
        """Whether so much waits that it will have to be read back, if it goes on."""
        return self._recent_bytes >= _RECENT_BYTES // 2

    def put(self, payload: Payload) -> None:
        """
        Append a payload as the next block, or do as the policy says.

        Raises:
            SpoolError: If the disk fails.

        """
        self._held.append(payload)
        self.retry()

    def retry(self) -> None:
        """
        Append what had to wait for room, if there is some now.

        Raises:
            SpoolError: If the disk fails.

        """
        while self._held:
            payload = self._held[0]
            try:
                if not self._has_room(len(payload.data)):
                    raise _NoSpaceError
                self._write(Data.of(self._next, payload.records, payload.data))
            except _NoSpaceError:
                if self._make_room():
                    continue
                if self._when_full is WhenFull.BLOCK:
                    return
                self.dropped += payload.records
            except OSError as exc:
                self._give_up_segment(exc)
                continue
            self._held.popleft()

    def _has_room(self, payload_bytes: int) -> bool:
        if self._floor == self._next - 1:
            return True  # one block always may
        begun = self._fd is not None and self._segments[-1].size < self._segment_bytes
        needed = HEADER.size + payload_bytes + (0 if begun else self._header_bytes)
        if self._bytes + needed > self._max_bytes:
            return False
        if begun:
            return True
        disk = os.fstatvfs(self._directory)
        return disk.f_bavail >= disk.f_blocks * _MIN_FREE

    def _make_room(self) -> bool:
        """Remove a segment, if one may be; whether there was one."""
        if self._floor == self._next - 1 and self._bytes:
            self._seal()
            self._write_state(time.monotonic())
            for segment in [*self._segments]:
                self._remove(segment)
            return True
        if self._when_full is not WhenFull.DROP_OLDEST:
            return False
        for segment, follows in zip(self._segments, self._segments[1:], strict=False):
            if self._cursor == self._floor + 1 or segment.first >= self._cursor:
                first = max(segment.first, self._floor + 1)
                last = follows.first - 1
                self.dropped += self._holes.present(first, last)
                self._holes.add(first, last, DROPPED)
                self._remove(segment)
                for number in [n for n in self._recent if first <= n <= last]:
                    self._pop_recent(number)
                fault_point("segment-dropped")
                return True
        return False

    def _write(self, block: Data) -> None:
        if self._fd is None or self._segments[-1].size >= self._segment_bytes:
            self._seal()
            self._begin_segment(block.first)
        assert self._fd is not None
        segment = self._segments[-1]
        assert segment.header is not None
        mark, size = segment.header.mark, len(block.payload)
        header = HEADER.pack(mark[:4], size, mark[4:], block.first, block.records, block.crc)
        if not segment.size:
            header = self._beginning + header
        fault_point("append")
        try:
            written = os.pwritev(self._fd, (header, block.payload), segment.size)
        except OSError as exc:
            if not has_no_room(exc):
                raise
            written = 0
        if written < len(header) + size:
            os.ftruncate(self._fd, segment.size)
            raise _NoSpaceError
        fault_point("appended")
        segment.size += written
        self._bytes += written
        self._next += block.records
        self._recent[block.first] = block
        self._recent_bytes += size + _BLOCK_BYTES
        if self._sync is Sync.OFF:
            self._note_synced(block.end)
        else:
            self.unsynced_bytes += written

    def _note_synced(self, end: int) -> None:
        self._synced = end
        self._failing = False
        while self._recent_bytes > _RECENT_BYTES:
            oldest = next(iter(self._recent.values()))
            if oldest.end > end:
                break
            self._pop_recent(oldest.first)

    def _pop_recent(self, first: int) -> Data | None:
        if block := self._recent.pop(first, None):
            self._recent_bytes -= len(block.payload) + _BLOCK_BYTES
        return block

    def _begin_segment(self, first: int) -> None:
        path = self._slot / f"{first:020d}.seg2"
        if self._segments and self._segments[-1].first == first:
            self._remove_unreadable(self._segments[-1])
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o600)
        except OSError as exc:
            if has_no_room(exc):
                raise _NoSpaceError from exc
            raise
        header, self._beginning = new_header(os.urandom(8), self.labels)
        self._segments.append(Segment(first, path, 0, header))
        self._new_names = True
        fault_point("segment-created")

    def _remove_unreadable(self, segment: Segment) -> None:
        """Remove a segment without a good entry; it is kept as damaged if its header is bad."""
        if segment.size and segment.header and not segment.header.size:
            with contextlib.suppress(OSError):
                self._reader.read(segment, segment.first, segment.first + 1)
            self._reporter.warn(
                f"{segment.size} bytes at the end of the spool {self._slot} cannot be read: "
                "they are in its directory damaged, as far as there is room"
            )
        self._remove(segment)

    def _seal(self) -> None:
        if self._fd is None:
            return
        self._verify_place()
        if self.unsynced_bytes or self._job:
            self._sealed.append(self._fd)
        else:
            os.close(self._fd)
        self._fd = None

    def _give_up_segment(self, reason: OSError, *, no_room: bool = False) -> None:
        # The kernel may have forgotten what was not synced, and that it failed. The
        # segments are valid up to what was synced; the rest is to be written anew.
        if self._failing and not no_room:
            self._fail(reason)
        if not self._failing:
            what = "waiting for room" if no_room else "a new segment"
            self._reporter.warn(f"the spool {self._slot} fails: {reason.strerror}: {what}")
        self._failing = True
        fds = {*self._sealed} | (set() if self._fd is None else {self._fd})
        if self._job:  # which closes its own
            self._job.given_up = True
            self._job.sealed += fds & set(self._job.fds)
            fds -= set(self._job.fds)
        for fd in fds:
            os.close(fd)
        self._fd = None
        self._sealed.clear()
        self.unsynced_bytes = 0
        while self._segments and self._segments[-1].first > self._synced:
            self._remove(self._segments[-1])
        self._holes.clip(self._floor + 1, self._synced)
        self._next = self._synced + 1
        fault_point("segment-given-up")
        for block in [b for b in reversed(self._recent.values()) if b.first > self._synced]:
            assert isinstance(block.payload, bytes)
            self._pop_recent(block.first)
            self._held.appendleft(Payload(block.payload, block.records))

    def _fail(self, reason: OSError) -> NoReturn:
        if missing := self._count_missing():
            self._fail_for(missing)
        self.failed = True
        raise SpoolError(
            f"cannot write to the spool {self._slot}: {reason.strerror}: "
            f"{self.at_risk} records may not be safe"
        )

    def _is_there(self, segment: Segment) -> bool:
        """Whether the next run will find a segment."""
        try:
            found = os.stat(segment.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True  # a disk that fails says so elsewhere
        written = self._fd is not None and segment is self._segments[-1]
        return not written or os.path.samestat(found, os.fstat(self._fd))  # type: ignore[arg-type]

    def _verify_place(self) -> None:
        if self._segments and not self._is_there(self._segments[-1]):
            self._fail_for(self._count_missing())

    def _fail_for(self, missing: int) -> NoReturn:
        self.failed = True
        raise SpoolError(
            f"the spool {self._slot} was removed or moved while it was in use: "
            f"{missing + self.at_risk} records are lost"
        )

    def _count_missing(self) -> int:
        """Count what is in segments that somebody has removed as damaged; return how much."""
        ends = [segment.first for segment in self._segments[1:]] + [self._next]
        before = self.damaged
        for segment, end in zip(self._segments, ends, strict=False):
            if not self._is_there(segment):
                first = max(segment.first, self._floor + 1)
                self.damaged += self._holes.present(first, end - 1)
                self._holes.add(first, end - 1, DAMAGED)
        return self.damaged - before

    def begin_sync(self) -> SyncJob:
        """Return what is to be synced now."""
        job = SyncJob(self._next - 1, self.unsynced_bytes, self._sealed)
        self._sealed = []
        if self._fd is not None:
            job.fds.append(self._fd)
        if self._new_names:
            self._new_names = False
            job.fds.append(self._directory)
        self._job = job
        fault_point("syncing")
        return job

    def end_sync(self, job: SyncJob, failure: OSError | None = None) -> None:
        """
        Take note of a job that was run.

        If there was no room the records wait for it, or the policy drops them.

        Raises:
            SpoolError: If it failed and the records cannot be written anew; or if somebody
                has removed the files.

        """
        self._job = None
        for fd in job.sealed:
            os.close(fd)
        if job.given_up:
            return
        if failure:
            no_room = has_no_room(failure)  # on some file systems only a sync finds that out
            self._give_up_segment(failure, no_room=no_room)
            if not no_room or self._make_room():
                self.retry()
            elif self._when_full is not WhenFull.BLOCK:
                self.dropped += self.unsafe
                self._held.clear()
            return
        self._verify_place()
        self.unsynced_bytes -= job.unsynced_bytes
        self._note_synced(job.end)
        fault_point("synced")

    @property
    def next_labels(self) -> Labels | None:
        """What the records of the next block have in common; None if no block may be sent."""
        if self._cursor > self._synced:
            return None
        if self._cursor > self.recovered:
            return self.labels
        segment, _ = self._segment_of(self._cursor)
        with telling(self._slot):
            found = self._reader.labels(segment, self._cursor) if segment else None
        # Of records with other labels, or of the former format, nothing is known: if they are
        # raw they are to become JSON, and what is JSON stays as it is.
        return found or self.labels._replace(raw=True)

    def take(self) -> Data | Skip | None:
        """Return the next block that may be sent, and pass over it."""
        if self._cursor > self._synced:
            return None
        block: Data | Skip | None = self._pop_recent(self._cursor)
        if block is None:
            with telling(self._slot):
                block = self._read()
        self._cursor = block.end + 1
        return block

    def rewind(self) -> None:
        """Begin again at the first block that is not acknowledged."""
        self._cursor = self._floor + 1

    def _read(self) -> Data | Skip:
        first = self._cursor
        segment, follows = self._segment_of(first)
        found: Data | int = follows
        if segment:
            found = self._reader.read(segment, first, follows)
        if isinstance(found, Data) and found.first < first:
            found = _rest_of(found, first)
        if isinstance(found, Data):
            return found
        last = min(found - 1, self._synced)
        hole = self._holes.find(first)
        if hole and hole.first <= first:
            return Skip(first, min(last, hole.end) - first + 1, hole.reason)
        if hole:
            last = min(last, hole.first - 1)
        damaged = last - first + 1
        self._holes.add(first, last, DAMAGED)
        self.damaged += damaged
        self._reporter.warn(f"{damaged} records are missing in the spool {self._slot}")
        return Skip(first, damaged, DAMAGED)

    def _segment_of(self, number: int) -> tuple[Segment | None, int]:
        """Return where a record must be, and the number that the next segment begins with."""
        at = bisect.bisect_right(self._segments, number, key=lambda s: s.first)
        follows = self._segments[at].first if at < len(self._segments) else self._next
        return self._segments[at - 1] if at else None, follows

    def acknowledge(self, acked: int) -> None:
        """Forget every record up to sequence number ``acked``."""
        acked = min(acked, self._synced)  # no more can have been sent
        if acked <= self._floor:
            return
        self.acked += self._holes.present(self._floor + 1, acked)
        self._floor = acked
        self._cursor = max(self._cursor, acked + 1)
        self._holes.clip(acked + 1, self._next - 1)
        while self._recent and (first := next(iter(self._recent))) <= acked:
            self._pop_recent(first)
        now = time.monotonic()
        if now - self._state_written >= _STATE_INTERVAL:
            self._write_state(now)
            self._verify_place()
        self._remove_acknowledged()

    def _remove_acknowledged(self) -> None:
        done = [
            segment
            for segment, follows in zip(self._segments, self._segments[1:], strict=False)
            if follows.first <= self._floor + 1
        ]
        if not done:
            return
        self._write_state(time.monotonic())
        fault_point("state-written")
        for segment in done:
            self._forget(segment)
            self._removable.append(segment.path)

    def unlink_removable(self) -> None:
        """Remove files that are needed no more: slow, and safe in another thread."""
        with contextlib.suppress(IndexError):
            while path := self._removable.popleft():
                with contextlib.suppress(OSError):  # the next start removes it
                    os.unlink(path)
                fault_point("segment-removed")

    def _forget(self, segment: Segment) -> None:
        self._segments.remove(segment)
        self._bytes -= segment.size
        self._reader.forget(segment)

    def _remove(self, segment: Segment) -> None:
        self._forget(segment)
        with contextlib.suppress(OSError):
            os.unlink(segment.path)

    def _write_state(self, now: float) -> None:
        self._generation += 1
        slot = pack_state(self._generation, self._floor)
        with contextlib.suppress(OSError):  # an old floor does no harm
            os.pwrite(self._state, slot, STATE_SLOTS[self._generation % 2])
        self._state_written = now

    def close(self) -> None:
        """
        Sync, as the policy says, note the ack floor and close all files.

        Slow if the disk is; while nobody else uses the spool, safe in another thread.

        Raises:
            SpoolError: If that fails, or if somebody has removed files.

        """
        if missing := self._count_missing():
            self._fail_for(missing)
        if self._job:  # whoever ran it has gone
            self._finish(self._job)
        while self.unsynced_bytes:
            self._finish(self.begin_sync())
        fault_point("spool-closing")
        self._write_state(time.monotonic())
        self.unlink_removable()
        self._seal()
        self._reader.close()
        for fd in (*self._sealed, self._state, self._directory):
            os.close(fd)

    def _finish(self, job: SyncJob) -> None:
        failure = None
        try:
            job.run()
        except OSError as exc:
            failure = exc
        self.end_sync(job, failure)


def _rest_of(block: Data, first: int) -> Data | int:
    """
    Return what follows the acknowledged beginning of a block, or else the number after it.

    Blocks are acknowledged whole, but where another sender has used the same numbers.
    """
    rest = bytes(block.payload).split(b"\n", first - block.first)[-1]
    records = block.end + 1 - first
    return Data.of(first, records, rest) if rest.count(b"\n") == records else block.end + 1
