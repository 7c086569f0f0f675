"""
Standard output, a file, or files named by a template.

Every file that is open is remembered with its length, as a mark by its absolute path. An
opening after a death cuts off what follows, if the journal proves that it was written here: it
comes again, and no record is in a file twice. What is not proven is kept, and reported.
"""

import asyncio
import contextlib
import errno
import os
import re
import resource
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from zmqpush.errors import (
    SettingsError,
    SinkBusyError,
    SinkError,
    SinkSetupError,
    SinkStalledError,
    SinkUndoneError,
)
from zmqpush.runtime.faults import fault_point
from zmqpush.runtime.files import has_no_room
from zmqpush.runtime.reporting import Complaints
from zmqpush.sinks.base import Batch, Context, Deferral, Held, Marks, Rejection, Sink, Synced
from zmqpush.sinks.files.journal import Claim, Journal, Mark, chain
from zmqpush.sinks.files.output import Output, lock, run_of
from zmqpush.sinks.template import Template

_WHAT = "file names", "/var/log/all/{host}/{type}-%Y%m%d.ndjson"
_UNSAFE = re.compile(r"[\x00-\x1f\x7f/\ud800-\udfff]|^\.")
_MAX_FIELD_BYTES = 200
_MAX_NAME_BYTES = 255
# Files that are not written to are closed: after so many seconds, and beyond so many.
_IDLE_INTERVAL = 60.0
_MAX_OPEN = 256
# Where nobody relies on it, whether a file was deleted is looked for so often, in seconds.
_CHECK_INTERVAL = 1.0
# A file that cannot be opened is tried again after so long, in seconds. Records that no
# sender keeps wait for it, as far as they fit into so many bytes.
_RETRY_INTERVAL = 1.0
_WAITING_BYTES = 16 << 20
_MAX_WAITING = 4096  # batches
# Batches for the same file are written as one, up to so many bytes: a copy of large ones would
# take more memory than time is saved.
_PIECE_BYTES = 16 << 10


@dataclass(slots=True)
class _File:
    output: Output
    is_new: bool = True
    is_dirty: bool = False
    used_at: float = 0.0
    checked_at: float = 0.0  # whether it was deleted
    safe_bytes: int = 0  # its length when it was last synced
    plain: int = 0  # records since then, or since it was checked, that no sender keeps

    @property
    def mark(self) -> Mark:
        """What is to be remembered of it."""
        return Mark.of(self.output.fd, self.output.run)


class _Piece:
    """
    Batches that are written into one file at once.

    Args:
        path: Of the file.
        batches: Of these all have senders that keep them, or none has.

    """

    __slots__ = ("batches", "path", "payload", "records")

    def __init__(self, path: str, batches: Sequence[Batch]) -> None:
        self.path = path
        self.batches = batches
        self.records = sum([batch.records for batch in batches])
        self.payload: bytes | memoryview = batches[0].payload
        if len(batches) > 1:
            self.payload = b"".join([batch.payload for batch in batches])


class FileSink(Sink):
    """
    Writes records to files.

    Args:
        to: ``-`` for standard output, or a template for file names.
        context: What comes from outside.

    Raises:
        SettingsError: If ``to`` is no template.

    """

    def __init__(self, to: str, context: Context) -> None:
        if context.options:
            raise SettingsError("-X is for what --to SCHEME:// names")
        self._context = context
        self._template = Template(to, _WHAT, _file_name)
        self._files: OrderedDict[str, _File] = OrderedDict()  # by path; used last, last
        self._given: Sequence[Batch] | None = None  # to the write that goes on
        self._todo: deque[_Piece] = deque()
        self._opened: dict[str, str] = {}  # not yet remembered
        # Closed: written to since the last sync; before it; and remembered as they are.
        self._evicted: dict[str, str] = {}
        self._settled: set[str] = set()
        self._closed: set[str] = set()
        self._marks: dict[str, str | None] = {}  # of the last sync
        self._output: Output | None = None  # that is being written
        self._journal: Journal | None = None
        self._own = [*context.own]
        if context.directory:
            self._own += [context.directory / name for name in Journal.NAMES]
        self._is_cut_back = False
        self._has_turned = False  # since the last sync that was good
        self._unsynced: list[_Piece] = []  # that senders keep
        self._again: list[_Piece] = []  # what a failed sync or a deletion has undone
        # By path, why it cannot be opened, until it is time to try again.
        self._unusable: dict[str, str] = {}
        self._retry_at = 0.0
        self._waiting: deque[tuple[str, Batch]] = deque()
        self._waiting_bytes = 0
        self._deferred: dict[str, Deferral] = {}  # by stream
        self._rejected: list[Rejection] = []
        self._complaints = Complaints(context.reporter)
        self._fixed_path = to if to == "-" else os.path.abspath(to)
        self.name = "standard output" if to == "-" else to
        self.durability = "sink" if to == "-" else "disk"
        self.labelled = self._template.labelled
        self.buffers = self._template.varies or context.buries or (context.safe and to != "-")
        # A file takes two descriptors while it is synced, and connections want some, too.
        self._max_open = min(_MAX_OPEN, max(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))

    @property
    def unwritten(self) -> int:  # type: ignore[override]  # it is computed
        """How many records of the last write are not written, or not to their end."""
        begun = self._output.unwritten if self._output else 0
        waiting = islice(self._todo, 1 if begun else 0, None)
        return begun + sum(piece.records for piece in [*self._again, *waiting])

    @property
    def waiting(self) -> int:  # type: ignore[override]  # it is computed
        """How many records that no sender keeps wait for files that cannot be opened."""
        return sum(batch.records for _, batch in self._waiting)

    @property
    def deferred(self) -> int:  # type: ignore[override]  # it is computed
        """How many records are left to their senders, since the last sync."""
        return sum(deferral.records for deferral in self._deferred.values())

    def _path(self, labels: Mapping[str, str]) -> str:
        names = self._template.fill(labels).split("/")
        return os.path.abspath("/".join(_cut(name, _MAX_NAME_BYTES) for name in names))

    def _pieces(self, batches: Sequence[Batch]) -> Iterator[_Piece]:
        """Put batches for the same file together, in order."""
        # Each name is made once: if that of a stream changed with the time in between, its later
        # records could be written before it is known that the earlier ones are deferred.
        paths: dict[tuple[str | None, ...], str] = {}
        by_path: dict[str, list[Batch]] = {}
        sizes: dict[str, int] = {}
        for batch in batches:
            path = self._fixed_path
            if self._template.varies:
                names = batch.labels.get("type"), batch.labels.get("host")
                path = paths[names] = paths.get(names) or self._path(batch.labels)
            size = sizes.get(path, 0) + len(batch.payload)
            if size > _PIECE_BYTES and path in by_path:
                yield _Piece(path, by_path.pop(path))
                size = len(batch.payload)
            sizes[path] = size
            by_path.setdefault(path, []).append(batch)
        for path, rest in by_path.items():
            yield _Piece(path, rest)

    async def open(self, marks: Marks) -> Sequence[Held]:
        """
        Cut every file back to what is remembered; open the one whose name is known.

        Raises:
            SinkSetupError: If senders would name files among those of ``zmqpull`` itself.
            SinkStalledError: If there is no room for the one whose name is known.
            SinkError: If a file cannot be cut or opened.

        """
        directory = os.path.dirname(self._fixed_path)
        if self.labelled and not set("{%") & set(directory) and self._is_own(self._fixed_path):
            raise SinkSetupError(f"{directory} is for files of zmqpull itself: not for --to")
        ours = {path: mark for path, mark in marks.items() if path.startswith("/") and mark}
        if self._context.directory and not self._journal:
            with _telling(f"the journal in {self._context.directory}"):
                self._journal = Journal(self._context.directory)
        if self._journal and not self._is_cut_back:
            places = _Places()
            for path, mark in ours.items():
                claims = self._journal.claims.get(path, [])
                self._cut_back(path, Mark.parse(mark), claims, places)
            fault_point("cut-back")
            if ours:
                await self._context.remember(dict.fromkeys(ours))
            fault_point("files-forgotten")
            self._journal.clear()
            self._is_cut_back = True  # and not again after a stall
        if self._template.varies:
            # What no label can change shall fail now, and not with each record.
            constant = re.split("[{%]", self._fixed_path, maxsplit=1)[0]
            _make_directory(os.path.dirname(constant))
        else:
            self._open(self._fixed_path)
        return ()

    def _cut_back(self, path: str, mark: Mark, claims: Sequence[Claim], places: "_Places") -> None:
        """Cut off what was written and not committed, wherever the file is now."""
        claims = chain(claims, mark.length)
        claimed = claims[-1].end - mark.length if claims else 0
        for place in places.of(path, mark.inode, far=claimed > 0):
            try:
                fd = os.open(place, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as exc:
                if path == self._fixed_path and exc.errno != errno.ENOENT:
                    raise SinkError(f"cannot cut {path} back: {exc.strerror}") from exc
                continue
            try:
                if mark.fits(fd):
                    self._cut(fd, place, mark, claims)
                    return
            except SinkStalledError:
                raise
            except SinkError as exc:
                if isinstance(exc, SinkBusyError) and path == self._fixed_path:
                    raise
                self._report_kept(fd, place, mark, str(exc))
                return
            finally:
                os.close(fd)
        if claimed:
            self._context.reporter.warn(
                f"cannot find what {path} was: up to {claimed} bytes that were not acknowledged "
                f"are in it, and come again"
            )

    def _cut(self, fd: int, place: str, mark: Mark, claims: Sequence[Claim]) -> None:
        with _telling(place):
            lock(fd, place)
            size = os.fstat(fd).st_size
            if size == mark.length:
                return
            may_be_ours = claims and size <= claims[-1].end and mark.run in ("-", run_of(fd))
            if not may_be_ours or not all(claim.holds(fd, size) for claim in claims):
                reason = "nothing proves that they were written here"
                self._report_kept(fd, place, mark, reason)
                return
            os.ftruncate(fd, mark.length)
            os.fsync(fd)
        self._context.reporter.notice(
            f"cut off {size - mark.length} bytes of {place}: they were not committed"
        )

    def _report_kept(self, fd: int, place: str, mark: Mark, reason: str) -> None:
        if excess := os.fstat(fd).st_size - mark.length:
            self._context.reporter.warn(
                f"kept the last {excess} bytes of {place} ({reason}): records that were not "
                f"acknowledged may be there twice"
            )

    def _open(self, path: str) -> None:
        if self._template.varies:
            _make_directory(os.path.dirname(path))
        if self._is_own(path):
            raise SinkError(f"cannot use {path}: it is for files of zmqpull itself")
        output = Output(path, self._context.reporter)
        if self._template.varies and not output.is_regular:
            output.close()
            raise SinkError(f"cannot use {path}: it is no regular file")
        file = self._files[path] = _File(output)
        if output.is_regular:
            file.safe_bytes = output.status.st_size
        if path in self._evicted or path in self._settled:
            # What is remembered stays until all that is in the file is acknowledged.
            self._evicted.pop(path, None)
            self._settled.discard(path)
            file.is_new, file.is_dirty = False, True
        elif file.output.is_regular:
            self._closed.discard(path)
            self._marks.pop(path, None)  # it is not to be forgotten any more
            self._opened[path] = file.mark.to_text()
        fault_point("file-opened")

    def _is_own(self, path: str) -> bool:
        """Whether a file is one of ours, or could be: labels may be anything."""
        return any(
            path == os.path.abspath(own)
            or _is_same(own, path)
            or (self.labelled and _is_same(own, os.path.dirname(path)))
            for own in self._own
        )

    def _evict(self) -> None:
        path, file = next(iter(self._files.items()))
        if file.output.is_deleted:
            self._take_back(path)
            return
        if file.is_dirty:
            written = self._take_unsynced(path)
            try:
                _sync(path, os.dup(file.output.fd), is_new=file.is_new)
            except SinkStalledError:
                self._cut_unsynced({path: file})
                self._again += written
                raise
            self._evicted[path] = file.mark.to_text()
        else:
            self._closed.add(path)
        del self._files[path]
        file.output.close()

    def _take_unsynced(self, path: str) -> list[_Piece]:
        taken = [piece for piece in self._unsynced if piece.path == path]
        self._unsynced = [piece for piece in self._unsynced if piece.path != path]
        return taken

    async def write(self, batches: Sequence[Batch]) -> None:
        """
        Write records, but for those whose files cannot be opened now.

        Raises:
            SinkClosedError: If the reader of the output has gone.
            SinkStalledError: If the disk is full.
            SinkError: If a file cannot be written.

        """
        if batches is not self._given:
            self._given = batches
            self._todo.extend(self._pieces(batches))
        if self._unusable and time.monotonic() >= self._retry_at:
            self._unusable.clear()
            self._todo.extendleft(_Piece(path, [batch]) for path, batch in reversed(self._waiting))
            self._waiting.clear()
            self._waiting_bytes = 0
        self._todo.extendleft(reversed(self._again))
        self._again.clear()
        while self._todo:
            await self._open_next()
            if self._unusable:
                await asyncio.sleep(0)  # many labels may name such files
            pieces = self._choose_next()
            self._note(pieces)
            for piece in pieces:
                await self._write(piece)
                self._todo.popleft()
        self._given = None

    async def _write(self, piece: _Piece) -> None:
        file = self._files[piece.path]
        self._output = file.output
        file.is_dirty = self._context.safe and file.output.is_regular
        await file.output.write(piece.payload)
        if file.is_dirty and piece.batches[0].stream:
            self._unsynced.append(piece)
        elif file.output.is_regular:
            file.plain += piece.records

    async def _open_next(self) -> None:
        paths = {piece.path: None for piece in islice(self._todo, self._max_open)}
        for path in paths.keys() & self._files.keys():
            file = self._files[path]
            if self._context.safe or time.monotonic() > file.checked_at + _CHECK_INTERVAL:
                self._check(path, file)
        self._refuse_again()
        for path in paths:
            if path in self._unusable:
                continue
            if path not in self._files:
                while len(self._files) >= self._max_open:
                    self._evict()
                try:
                    self._open(path)
                except SinkStalledError:
                    raise
                except SinkError as exc:
                    self._note_unusable(path, exc)
                    continue
            self._files.move_to_end(path)
            self._files[path].used_at = time.monotonic()
        if self._opened:
            # Before anything is written to them, so that it can be cut off again.
            opened, self._opened = self._opened, {}
            await self._context.remember(opened)

    def _check(self, path: str, file: _File) -> None:
        """Close a file that somebody has deleted, so that it is made anew."""
        if file.output.is_deleted:
            self._take_back(path)
        elif not self._context.safe:
            file.checked_at = time.monotonic()
            file.plain = 0

    def _take_back(self, path: str) -> None:
        """Have all that is in a deleted file, and not safe, written again."""
        file = self._files[path]
        self._close(path)
        if self._output is file.output:  # if a batch is half written, all of it is to come
            self._output = None
        self._again += self._take_unsynced(path)
        self.lost += file.plain
        self._complaints.warn(f"{path} was deleted: making it anew", kind=f"deleted {path}")

    def _refuse_again(self) -> None:
        if self._again:
            raise SinkUndoneError(f"{self._again[0].path}: it was deleted")

    def _choose_next(self) -> list[_Piece]:
        """Return what is written next; set aside what cannot be."""
        pieces = []
        for _ in range(min(len(self._todo), self._max_open)):
            piece = self._todo.popleft()
            usable = piece.path not in self._unusable
            if usable and not self._deferred:
                pieces.append(piece)
                continue
            kept = []
            for batch in piece.batches:
                if usable and batch.stream not in self._deferred:
                    kept.append(batch)
                else:
                    self._set_aside(piece.path, batch)
            if kept:
                pieces.append(_Piece(piece.path, kept))
        self._todo.extendleft(reversed(pieces))
        return pieces

    def _note(self, pieces: Sequence[_Piece]) -> None:
        """Note in the journal what is written next, so that it can be cut off again."""
        if not self._journal:
            return
        ends: dict[str, int] = {}
        claims = []
        for piece in pieces:
            path, payload = piece.path, piece.payload
            output = self._files[path].output
            if not output.is_regular:
                continue
            if path not in ends:
                begun = len(payload) - output.begun_bytes if output.begun_bytes else 0
                ends[path] = output.status.st_size - begun
            if payload:
                claims.append((path, Claim.of(ends[path], payload)))
                ends[path] += len(payload)
        with _telling(f"the journal in {self._context.directory}"):
            self._journal.note(claims)
        fault_point("files-noted")

    def _note_unusable(self, path: str, error: SinkError) -> None:
        if not self._unusable:
            self._retry_at = time.monotonic() + _RETRY_INTERVAL
        self._unusable[path] = str(error)
        what = "its records wait; --dead-letters FILE would take them"
        if self._context.buries:
            what = "its records are dead letters"
        self._complaints.warn(f"{error}: {what}", kind=str(error))

    def _set_aside(self, path: str, batch: Batch) -> None:
        """Reject what cannot be written now, leave it to its sender, or let it wait."""
        reason = self._unusable.get(path, "")
        if self._context.buries:
            records = bytes(batch.payload).split(b"\n")[:-1]
            self._rejected += [
                Rejection(record, reason, batch.stream, batch.first + at if batch.stream else 0)
                for at, record in enumerate(records)
            ]
        elif batch.stream:
            first = Deferral(
                batch.stream, batch.first, 0, "the file for these records cannot be opened"
            )
            deferral = self._deferred.get(batch.stream, first)
            self._deferred[batch.stream] = deferral._replace(
                records=deferral.records + batch.records
            )
        elif (
            self._waiting_bytes + len(batch.payload) > _WAITING_BYTES
            or len(self._waiting) >= _MAX_WAITING
        ):
            self.lost += batch.records
            self._complaints.warn(f"{reason}: records for it are lost", kind=f"lost {path}")
        else:
            self._waiting.append((path, batch))
            self._waiting_bytes += len(batch.payload)

    async def sync(self) -> Synced:
        """
        Put on the disk what was written before this call.

        Raises:
            SinkUndoneError: If there is no room for it, or a file was deleted.
            SinkError: If that fails for another reason.

        """
        for path, file in [*self._files.items()]:
            if file.is_dirty and file.output.is_deleted:
                self._take_back(path)
        self._refuse_again()
        self._close_idle()
        closed, evicted, settled = self._closed, self._evicted, self._settled
        marks = self._marks = dict.fromkeys(closed | settled) | evicted
        self._closed, self._evicted, self._settled = set(), {}, {*evicted}
        written, self._unsynced = self._unsynced, []
        dirty = {path: file for path, file in self._files.items() if file.is_dirty}
        plain = {path: file.plain for path, file in dirty.items()}
        lengths = {}
        work = []
        for path, file in dirty.items():
            mark = file.mark
            marks[path], lengths[path] = mark.to_text(), mark.length
            work.append(partial(_sync, path, os.dup(file.output.fd), is_new=file.is_new))
            file.is_new = file.is_dirty = False
        if self._journal and not self._has_turned:
            self._journal.turn()
            self._has_turned = True

        def sync_all() -> None:
            for sync in work:
                sync()
            fault_point("files-synced")

        if work:
            try:
                await asyncio.get_running_loop().run_in_executor(None, sync_all)
            except SinkStalledError as exc:
                self._cut_unsynced(dirty)
                self._again = written
                self._closed |= closed - self._files.keys()
                self._settled |= settled
                self._evicted = evicted | self._evicted
                raise SinkUndoneError(str(exc)) from exc
        self._has_turned = False
        for path, file in dirty.items():
            file.safe_bytes = lengths[path]
            file.plain -= plain[path]
        rejected, self._rejected = self._rejected, []
        deferred, self._deferred = [*self._deferred.values()], {}
        return Synced(marks, rejected, deferred)

    def _cut_unsynced(self, dirty: Mapping[str, _File]) -> None:
        # There was no room for what was not synced, and the kernel may have forgotten it.
        for file in (file for path, file in dirty.items() if self._files.get(path) is file):
            size = os.fstat(file.output.fd).st_size  # somebody else may have truncated it
            os.ftruncate(file.output.fd, min(size, file.safe_bytes))
            file.output.forget_rest()  # of what is half written all is to come
            self.lost += file.plain
            file.plain = 0
            file.is_new = file.is_dirty = True

    def _close_idle(self) -> None:
        too_old = time.monotonic() - _IDLE_INTERVAL
        for path, file in [*self._files.items()] if self._template.varies else ():
            if file.used_at > too_old:
                break
            if not file.is_dirty:
                self._close(path)

    def _close(self, path: str) -> None:
        self._files.pop(path).output.close()
        self._closed.add(path)

    def rotate(self) -> None:
        """Open files anew."""
        for path, file in [*self._files.items()]:
            if file.output.is_deleted:
                self._take_back(path)
                if not self._template.varies:
                    with contextlib.suppress(SinkError):  # the next write reports it
                        self._open(path)
            elif self._template.varies:
                self._close(path)
            elif file.output.is_regular:
                try:
                    if file.output.reopen():
                        file.is_new = True
                        file.safe_bytes = file.output.status.st_size
                        self._opened[path] = file.mark.to_text()
                except SinkError as exc:
                    self._context.reporter.warn(f"{exc}: still writing to the old file")

    async def close(self) -> Marks:
        """Note that all files hold only what is remembered, so that none is cut back."""
        return dict.fromkeys([*self._files, *self._evicted, *self._settled, *self._closed])

    async def gone(self) -> None:
        """
        Wait until the reader of the output goes away, which may never happen.

        Raises:
            SinkClosedError: When it does.

        """
        if not self._template.varies:
            await self._files[self._fixed_path].output.closed()


def _sync(path: str, fd: int, *, is_new: bool) -> None:
    """Put a file on the disk, and close the descriptor."""
    try:
        os.fdatasync(fd)
        if is_new:
            _sync_directory(os.path.dirname(path) or ".")
    except OSError as exc:
        if has_no_room(exc):
            raise SinkStalledError(f"{path}: {exc.strerror}") from exc
        raise SinkError(f"cannot write to {path}: {exc.strerror}") from exc
    finally:
        os.close(fd)


def _sync_directory(path: str) -> None:
    try:
        directory = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (PermissionError, FileNotFoundError):
        return  # it may be written and not read, or it was renamed: a label can name such
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _make_directory(path: str) -> None:
    try:
        os.makedirs(path, mode=0o750, exist_ok=True)
    except OSError as exc:
        if has_no_room(exc):
            raise SinkStalledError(f"{path}: {exc.strerror}") from exc
        raise SinkError(f"cannot make the directory {path}: {exc.strerror}") from exc


def _is_same(path: Path, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
    """Make a :class:`SinkError` of what the system says."""
    try:
        yield
    except OSError as exc:
        if has_no_room(exc):
            raise SinkStalledError(f"{what}: {exc.strerror}") from exc
        raise SinkError(f"cannot write to {what}: {exc.strerror}") from exc


class _Places:
    """Where files are now: somebody may have renamed them, as a rotation does."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[dict[int, str], list[str]]] = {}

    def of(self, path: str, inode: int, *, far: bool) -> Iterator[str]:
        """
        Yield where a file may be that had a path and an inode.

        There, in that directory, and if it is ``far``, in those below, beside and above it.
        """
        yield path
        near = os.path.dirname(path)
        directories = [near]
        if far:
            above = os.path.dirname(near)
            directories += [*self._look(near)[1], above, *self._look(above)[1]]
        for directory in directories:
            if place := self._look(directory)[0].get(inode):
                yield place

    def _look(self, directory: str) -> tuple[dict[int, str], list[str]]:
        """Return the files of a directory by inode, and the directories in it."""
        if directory not in self._seen:
            files, directories = self._seen[directory] = {}, []
            with contextlib.suppress(OSError), os.scandir(directory) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.path)
                    else:
                        files[entry.inode()] = entry.path
        return self._seen[directory]


def _file_name(label: str) -> str:
    return _cut(_UNSAFE.sub("_", label) or "unknown", _MAX_FIELD_BYTES)


def _cut(name: str, max_bytes: int) -> str:
    encoded = os.fsencode(name)
    return name if len(encoded) <= max_bytes else encoded[:max_bytes].decode("utf-8", "ignore")
