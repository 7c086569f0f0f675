"""
Where the receiver's records go: standard output, a file, or files named by a template.

What is written becomes safe in two steps: :meth:`Sink.take_dirty` tells what was written
since the last call, and :meth:`Written.sync` puts it on the disk, in any thread.
"""

import asyncio
import os
import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from zmqpush.errors import SinkError
from zmqpush.faults import fault_point
from zmqpush.output import Output
from zmqpush.settings import TEMPLATE_FIELD
from zmqpush.telemetry import Reporter

_UNSAFE = re.compile(r"[\x00-\x1f\x7f/\ud800-\udfff]|^\.")
_MAX_FIELD_BYTES = 200
# Files that are not written to are closed: after so many seconds, and beyond so many.
_IDLE_INTERVAL = 60.0
_MAX_OPEN = 256


@dataclass(slots=True)
class Written:
    """A file that was written to, and how long it is now, in bytes."""

    path: str
    fd: int
    inode: int
    length: int
    is_new: bool

    def sync(self) -> None:
        """
        Put it on the disk.

        Raises:
            SinkError: If that fails.

        """
        try:
            os.fdatasync(self.fd)
            if self.is_new:
                directory = os.open(os.path.dirname(self.path) or ".", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(directory)
                finally:
                    os.close(directory)
        except OSError as exc:
            raise SinkError(f"cannot write to {self.path}: {exc.strerror}") from exc


@dataclass(slots=True)
class _File:
    output: Output
    is_new: bool = True
    is_dirty: bool = False
    written_at: float = 0.0


class Sink:
    """
    Writes records, in order.

    Args:
        to: ``-`` for standard output, or a template for file names.
        reporter: Where to tell of a full disk.

    Raises:
        SinkError: If a file whose name is known cannot be opened.

    """

    def __init__(self, to: str, reporter: Reporter) -> None:
        self._to = to
        self._reporter = reporter
        self._files: OrderedDict[str, _File] = OrderedDict()  # by path; written last, last
        self._output: Output | None = None  # that is being written
        self._varies = bool(TEMPLATE_FIELD.search(to)) or "%" in to
        if not self._varies:
            self._open(to)

    @property
    def labelled(self) -> bool:
        """Whether the file depends on who sends."""
        return bool(TEMPLATE_FIELD.search(self._to))

    @property
    def unwritten(self) -> int:
        """How many records of the last write are not written, or not to their end."""
        return self._output.unwritten if self._output else 0

    def _path(self, labels: Mapping[str, str]) -> str:
        if not self._varies:
            return self._to
        template = time.strftime(self._to)
        return TEMPLATE_FIELD.sub(lambda match: _file_name(labels.get(match[1], "")), template)

    def _open(self, path: str) -> _File:
        if self._varies:
            try:
                os.makedirs(os.path.dirname(path) or ".", mode=0o750, exist_ok=True)
            except OSError as exc:
                raise SinkError(f"cannot make the directory of {path}: {exc.strerror}") from exc
        file = self._files[path] = _File(Output(path, self._reporter))
        fault_point("file-opened")
        return file

    def open(self, labels: Iterable[Mapping[str, str]]) -> list[Written]:
        """
        Open the files that are needed; return those that were not open, as they are.

        Raises:
            SinkError: If one cannot be opened.

        """
        opened = []
        for path in {self._path(each) for each in labels}:
            file = self._files.get(path) or self._open(path)
            if file.is_new and file.output.is_regular:
                opened.append(self._written(path, file))
        return opened

    async def write(self, data: bytes | memoryview, labels: Mapping[str, str]) -> None:
        """
        Write records; the file must be open.

        Raises:
            SinkClosedError: If the reader of the output has gone.
            SinkError: If the output cannot be written, for another reason than a full
                disk.

        """
        path = self._path(labels)
        file = self._files.get(path) or self._open(path)
        self._files.move_to_end(path)
        self._output = file.output
        file.is_dirty = True
        file.written_at = time.monotonic()
        await file.output.write(data)

    def take_dirty(self) -> list[Written]:
        """Return the files that were written to since the last call."""
        dirty = []
        for path, file in self._files.items():
            if file.is_dirty and file.output.is_regular:
                dirty.append(self._written(path, file))
                file.is_new = False
            file.is_dirty = False
        return dirty

    def _written(self, path: str, file: _File) -> Written:
        status = os.fstat(file.output.fd)
        return Written(path, file.output.fd, status.st_ino, status.st_size, file.is_new)

    def close_idle(self) -> list[str]:
        """Close files that are not written to any more, if all is safe; return their paths."""
        if not self._varies:
            return []
        too_old = time.monotonic() - _IDLE_INTERVAL
        closed = []
        for path, file in list(self._files.items()):
            if len(self._files) <= _MAX_OPEN and file.written_at > too_old:
                break
            if not file.is_dirty:
                file.output.close()
                del self._files[path]
                closed.append(path)
        return closed

    def reopen(self) -> list[str]:
        """Open files anew, as after their rotation, when all is safe; return their paths."""
        paths = list(self._files)
        for path, file in list(self._files.items()):
            file.is_new = True
            if self._varies:
                file.output.close()
                del self._files[path]
            else:
                file.output.reopen()
        return paths

    async def closed(self) -> None:
        """
        Wait until the reader of the output goes away, which may never happen.

        Raises:
            SinkClosedError: When it does.

        """
        if self._varies:
            await asyncio.Event().wait()
        await self._files[self._to].output.closed()


def _file_name(label: str) -> str:
    name = _UNSAFE.sub("_", label) or "unknown"
    return name.encode()[:_MAX_FIELD_BYTES].decode("utf-8", "ignore")
