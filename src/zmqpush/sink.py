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
from typing import NamedTuple

from zmqpush.errors import SinkError
from zmqpush.faults import fault_point
from zmqpush.output import Output
from zmqpush.settings import TEMPLATE_FIELD
from zmqpush.telemetry import Reporter

_UNSAFE = re.compile(r"[\x00-\x1f\x7f/\ud800-\udfff]|^\.")
_MAX_FIELD_BYTES = 200
_MAX_NAME_BYTES = 255
# Files that are not written to are closed: after so many seconds, and beyond so many.
_IDLE_INTERVAL = 60.0
MAX_OPEN = 256


class Length(NamedTuple):
    """How long a file is, in bytes."""

    path: str
    inode: int
    length: int


@dataclass(slots=True)
class Written:
    """A file that was written to: its length, and a descriptor, which is closed when synced."""

    length: Length
    fd: int
    is_new: bool

    def sync(self) -> None:
        """
        Put it on the disk.

        Raises:
            SinkError: If that fails.

        """
        path = self.length.path
        try:
            os.fdatasync(self.fd)
            if self.is_new:
                directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(directory)
                finally:
                    os.close(directory)
        except OSError as exc:
            raise SinkError(f"cannot write to {path}: {exc.strerror}") from exc
        finally:
            os.close(self.fd)


@dataclass(slots=True)
class _File:
    output: Output
    is_new: bool = True
    is_dirty: bool = False
    used_at: float = 0.0


class Sink:
    """
    Writes records, in order.

    Args:
        to: ``-`` for standard output, or a template for file names.
        reporter: Where to tell of a full disk.
        safe: Whether what is written is to be synced.

    Raises:
        SinkError: If a file whose name is known cannot be opened.

    """

    def __init__(self, to: str, reporter: Reporter, *, safe: bool) -> None:
        self._to = to
        self._reporter = reporter
        self._safe = safe
        self._files: OrderedDict[str, _File] = OrderedDict()  # by path; used last, last
        self._opened: list[Length] = []
        self._evicted: dict[str, Length] = {}  # closed, and written to since take_dirty()
        self._closed: set[str] = set()
        self._output: Output | None = None  # that is being written
        self.varies = bool(TEMPLATE_FIELD.search(to)) or "%" in to
        # Absolute, since the state may be read from another working directory.
        self._fixed_path = to if to == "-" else os.path.abspath(to)
        if not self.varies:
            self._open(self._fixed_path)

    @property
    def labelled(self) -> bool:
        """Whether the file depends on who sends."""
        return bool(TEMPLATE_FIELD.search(self._to))

    @property
    def unwritten(self) -> int:
        """How many records of the last write are not written, or not to their end."""
        return self._output.unwritten if self._output else 0

    def path(self, labels: Mapping[str, str]) -> str:
        """Return which file it is now for records with these labels."""
        if not self.varies:
            return self._fixed_path
        template = time.strftime(self._to)
        path = TEMPLATE_FIELD.sub(lambda match: _file_name(labels.get(match[1], "")), template)
        return os.path.abspath("/".join(_cut(name, _MAX_NAME_BYTES) for name in path.split("/")))

    def _open(self, path: str) -> None:
        while len(self._files) >= MAX_OPEN:
            self._evict()
        if self.varies:
            try:
                os.makedirs(os.path.dirname(path) or ".", mode=0o750, exist_ok=True)
            except OSError as exc:
                raise SinkError(f"cannot make the directory of {path}: {exc.strerror}") from exc
        file = self._files[path] = _File(Output(path, self._reporter))
        self._closed.discard(path)
        if self._evicted.pop(path, None):
            file.is_new, file.is_dirty = False, True
        elif file.output.is_regular:
            self._opened.append(_length(path, file))
        fault_point("file-opened")

    def _evict(self) -> None:
        path, file = self._files.popitem(last=False)
        if file.is_dirty:
            written = _written(path, file)
            written.sync()
            self._evicted[path] = written.length
        else:
            self._closed.add(path)
        file.output.close()

    def open(self, paths: Iterable[str]) -> list[Length]:
        """
        Open the files of at most ``MAX_OPEN`` paths; return those that were not open, as they are.

        Raises:
            SinkError: If one cannot be opened.

        """
        for path in paths:
            if path not in self._files:
                self._open(path)
            self._files.move_to_end(path)
            self._files[path].used_at = time.monotonic()
        opened, self._opened = self._opened, []
        return opened

    async def write(self, path: str, data: bytes | memoryview) -> None:
        """
        Write records; the file must be open.

        Raises:
            SinkClosedError: If the reader of the output has gone.
            SinkError: If the output cannot be written, for another reason than a full
                disk.

        """
        file = self._files[path]
        self._output = file.output
        file.is_dirty = self._safe and file.output.is_regular
        await file.output.write(data)

    def take_dirty(self) -> tuple[list[Written], list[Length]]:
        """
        Return the files that were written to since the last call.

        Returns:
            Those that must be synced, and the lengths of those that are closed and synced.

        """
        dirty = []
        for path, file in self._files.items():
            if file.is_dirty:
                dirty.append(_written(path, file))
                file.is_new = file.is_dirty = False
        synced = [*self._evicted.values()]
        self._closed.update(self._evicted)
        self._evicted.clear()
        return dirty, synced

    def take_closed(self) -> set[str]:
        """Close files that are idle and safe; return the paths of all that were closed."""
        too_old = time.monotonic() - _IDLE_INTERVAL
        for path, file in [*self._files.items()] if self.varies else ():
            if file.used_at > too_old:
                break
            if not file.is_dirty:
                self._close(path)
        closed, self._closed = self._closed, set()
        return closed

    def _close(self, path: str) -> None:
        self._files.pop(path).output.close()
        self._closed.add(path)

    def reopen(self) -> None:
        """Open files anew, as after their rotation, when all is safe."""
        for path, file in [*self._files.items()]:
            if self.varies:
                self._close(path)
            elif file.output.reopen():
                file.is_new = True
                self._opened.append(_length(path, file))

    async def closed(self) -> None:
        """
        Wait until the reader of the output goes away, which may never happen.

        Raises:
            SinkClosedError: When it does.

        """
        if self.varies:
            await asyncio.Event().wait()
        await self._files[self._fixed_path].output.closed()


def _length(path: str, file: _File) -> Length:
    status = os.fstat(file.output.fd)
    return Length(path, status.st_ino, status.st_size)


def _written(path: str, file: _File) -> Written:
    return Written(_length(path, file), os.dup(file.output.fd), file.is_new)


def _file_name(label: str) -> str:
    return _cut(_UNSAFE.sub("_", label) or "unknown", _MAX_FIELD_BYTES)


def _cut(name: str, max_bytes: int) -> str:
    encoded = os.fsencode(name)
    return name if len(encoded) <= max_bytes else encoded[:max_bytes].decode("utf-8", "ignore")
