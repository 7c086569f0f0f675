"""
Standard output, a file, or files named by a template.

Every file that is open is remembered with its length, as a mark: the inode and the length
by the absolute path. An opening after a death cuts all of them back to what was remembered,
so that no record is in them twice.
"""

import asyncio
import contextlib
import os
import re
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from zmqpush.errors import SinkError
from zmqpush.faults import fault_point
from zmqpush.sinks import Batch, Context, Held, Marks, Sink, Synced
from zmqpush.sinks.output import Output
from zmqpush.sinks.template import Template

_WHAT = "file names", "/var/log/all/{host}/{type}-%Y%m%d.ndjson"
_UNSAFE = re.compile(r"[\x00-\x1f\x7f/\ud800-\udfff]|^\.")
_MAX_FIELD_BYTES = 200
_MAX_NAME_BYTES = 255
# Files that are not written to are closed: after so many seconds, and beyond so many.
_IDLE_INTERVAL = 60.0
_MAX_OPEN = 256


@dataclass(slots=True)
class _File:
    output: Output
    is_new: bool = True
    is_dirty: bool = False
    used_at: float = 0.0

    @property
    def mark(self) -> str:
        """The inode and the length, in bytes."""
        status = os.fstat(self.output.fd)
        return f"{status.st_ino} {status.st_size}"


class FileSink(Sink):
    """
    Writes records to files.

    Args:
        to: ``-`` for standard output, or a template for file names.
        context: What comes from outside.

    Raises:
        ValueError: If ``to`` is no template.

    """

    def __init__(self, to: str, context: Context) -> None:
        if context.options:
            raise ValueError("-X is for what --to SCHEME:// names")
        self._context = context
        self._template = Template(to, _WHAT, _file_name)
        self._files: OrderedDict[str, _File] = OrderedDict()  # by path; used last, last
        self._todo: deque[tuple[str, Batch]] = deque()
        self._opened: dict[str, str] = {}  # not yet remembered
        # Closed: written to since the last sync; before it; and remembered as they are.
        self._evicted: dict[str, str] = {}
        self._settled: set[str] = set()
        self._closed: set[str] = set()
        self._marks: dict[str, str | None] = {}  # of the last sync
        self._output: Output | None = None  # that is being written
        self._fixed_path = to if to == "-" else os.path.abspath(to)
        self.name = "standard output" if to == "-" else to
        self.durability = "sink" if to == "-" else "disk"
        self.labelled = self._template.labelled
        self.buffers = self._template.varies or (context.safe and to != "-")

    @property
    def unwritten(self) -> int:  # type: ignore[override]  # it is computed
        """How many records of the last write are not written, or not to their end."""
        begun = self._output.unwritten if self._output else 0
        waiting = islice(self._todo, 1 if begun else 0, None)
        return begun + sum(batch.records for _, batch in waiting)

    def _path(self, batch: Batch) -> str:
        if not self._template.varies:
            return self._fixed_path
        names = self._template.fill(batch.labels).split("/")
        return os.path.abspath("/".join(_cut(name, _MAX_NAME_BYTES) for name in names))

    async def open(self, marks: Marks) -> Sequence[Held]:
        """
        Cut every file back to what is remembered; open the one whose name is known.

        Raises:
            SinkError: If a file cannot be cut or opened.

        """
        ours = {path: mark for path, mark in marks.items() if path.startswith("/") and mark}
        for path, mark in ours.items():
            inode, length = map(int, mark.split())
            if found := _find(path, inode):
                self._cut_back(found, length)
        fault_point("cut-back")
        if ours:
            await self._context.remember(dict.fromkeys(ours))
        fault_point("files-forgotten")
        if not self._template.varies:
            self._open(self._fixed_path)
        return ()

    def _cut_back(self, path: str, length: int) -> None:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                excess = os.fstat(fd).st_size - length
                if excess > 0:
                    os.ftruncate(fd, length)
                    os.fsync(fd)
                    self._context.reporter.notice(
                        f"cut off {excess} bytes of {path}: they were not committed"
                    )
            finally:
                os.close(fd)
        except OSError as exc:
            raise SinkError(f"cannot cut {path} back: {exc.strerror}") from exc

    def _open(self, path: str) -> None:
        while len(self._files) >= _MAX_OPEN:
            self._evict()
        if self._template.varies:
            try:
                os.makedirs(os.path.dirname(path) or ".", mode=0o750, exist_ok=True)
            except OSError as exc:
                raise SinkError(f"cannot make the directory of {path}: {exc.strerror}") from exc
        file = self._files[path] = _File(Output(path))
        if path in self._evicted or path in self._settled:
            # What is remembered stays until all that is in the file is acknowledged.
            self._evicted.pop(path, None)
            self._settled.discard(path)
            file.is_new, file.is_dirty = False, True
        elif file.output.is_regular:
            self._closed.discard(path)
            self._marks.pop(path, None)  # it is not to be forgotten any more
            self._opened[path] = file.mark
        fault_point("file-opened")

    def _evict(self) -> None:
        path, file = self._files.popitem(last=False)
        if file.is_dirty:
            _sync(path, os.dup(file.output.fd), is_new=file.is_new)
            self._evicted[path] = file.mark
        else:
            self._closed.add(path)
        file.output.close()

    async def write(self, batches: Sequence[Batch]) -> None:
        """
        Write records.

        Raises:
            SinkClosedError: If the reader of the output has gone.
            SinkStalledError: If the disk is full.
            SinkError: If a file cannot be opened or written.

        """
        if not self._todo:
            self._todo.extend((self._path(batch), batch) for batch in batches)
        while self._todo:
            await self._open_next()
            for path, batch in [*islice(self._todo, _MAX_OPEN)]:
                self._output = self._files[path].output
                self._files[path].is_dirty = self._context.safe and self._output.is_regular
                await self._output.write(batch.payload)
                self._todo.popleft()

    async def _open_next(self) -> None:
        for path, _ in islice(self._todo, _MAX_OPEN):
            if path not in self._files:
                self._open(path)
            self._files.move_to_end(path)
            self._files[path].used_at = time.monotonic()
        if self._opened:
            # Before anything is written to them, so that it can be cut off again.
            opened, self._opened = self._opened, {}
            await self._context.remember(opened)

    async def sync(self) -> Synced:
        """
        Put on the disk what was written before this call.

        Raises:
            SinkError: If that fails.

        """
        self._close_idle()
        marks = self._marks = dict.fromkeys(self._closed | self._settled) | self._evicted
        self._settled = {*self._evicted}
        self._closed.clear()
        self._evicted.clear()
        work = []
        for path, file in self._files.items():
            if file.is_dirty:
                marks[path] = file.mark
                fd = os.dup(file.output.fd)
                work.append(partial(_sync, path, fd, is_new=file.is_new))
                file.is_new = file.is_dirty = False

        def sync_all() -> None:
            for sync in work:
                sync()
            fault_point("files-synced")

        if work:
            await asyncio.get_running_loop().run_in_executor(None, sync_all)
        return Synced(marks)

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
            if self._template.varies:
                self._close(path)
                continue
            if not file.output.is_regular:
                continue
            try:
                file.output.reopen()
            except SinkError as exc:
                self._context.reporter.warn(f"{exc}: still writing to the old file")
                continue
            file.is_new = True
            self._opened[path] = file.mark

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
            directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except OSError as exc:
        raise SinkError(f"cannot write to {path}: {exc.strerror}") from exc
    finally:
        os.close(fd)


def _find(path: str, inode: int) -> str | None:
    """
    Return where the file is now: somebody may have renamed it within its directory.

    To a name that begins alike, as after a rotation: another file may have got its inode.
    """
    with contextlib.suppress(OSError):
        if os.stat(path).st_ino == inode:
            return path
    stem = os.path.basename(path).partition(".")[0]
    with contextlib.suppress(OSError), os.scandir(os.path.dirname(path) or ".") as entries:
        for entry in entries:
            if entry.inode() == inode and entry.name.startswith(stem):
                return entry.path
    return None


def _file_name(label: str) -> str:
    return _cut(_UNSAFE.sub("_", label) or "unknown", _MAX_FIELD_BYTES)


def _cut(name: str, max_bytes: int) -> str:
    encoded = os.fsencode(name)
    return name if len(encoded) <= max_bytes else encoded[:max_bytes].decode("utf-8", "ignore")
