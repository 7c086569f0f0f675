"""The slots of a spool: one directory for each process that uses it at the same time."""

import contextlib
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from zmqpush.core.protocol.messages import Labels
from zmqpush.errors import SpoolBusyError, SpoolForeignError
from zmqpush.runtime.faults import fault_point
from zmqpush.runtime.files import why_not_ours
from zmqpush.spool.segment import end_of, labels_of, list_segments, read_meta, read_state, telling

# Somebody who only looks whether a slot is in use locks it, for a moment.
_LOCK_ATTEMPTS = 10
_LOCK_INTERVAL = 0.02
_SLOT_NAME = re.compile(r"0|[1-9][0-9]*")


class Status(NamedTuple):
    """
    What a slot holds.

    ``labels`` are those of its first records, if they are known; ``pid`` is whose it is now, if
    it is in use.
    """

    path: Path
    stream: str
    acked: int
    end: int
    segments: int
    bytes: int
    labels: Labels | None
    pid: int | None

    @property
    def records(self) -> int:
        """How many records are not acknowledged, if none was dropped or damaged."""
        return self.end - self.acked


def take_slot(directory: Path, slots: int) -> Path:
    """
    Lock a slot for as long as this process lives, and return it.

    Args:
        directory: The spool; it is made if there is none.
        slots: How many processes may use it at once.

    Raises:
        SpoolBusyError: If so many do.
        SpoolForeignError: If it is no spool, or a slot belongs to somebody else.
        SpoolFullError: If there is no room; then it may be called again.
        SpoolError: If it cannot be read or written.

    """
    with telling(directory):
        _make_directory(directory)
        held = {int(slot.name): survey(slot) for slot in _list_slots(directory)}
        pids = [str(status.pid) for status in held.values() if status.pid is not None]
        free = {n for n, status in held.items() if status.pid is None and status.records}
        orphans = sorted(free)
        for number in orphans + [n for n in range(slots) if n not in free]:
            slot = directory / str(number)
            _make_directory(slot)
            if len(pids) < slots and _lock(slot):
                return slot
    whose = f" by process {', '.join(pids)}" if pids else ""
    raise SpoolBusyError(
        f"the spool {directory} is in use{whose}: give this one a --spool of its own, "
        f"or --spool-slots {slots + 1} to each"
    )


def status_of(directory: Path) -> Iterator[Status]:
    """
    Tell what each slot of a spool holds, also while it is in use.

    Raises:
        SpoolForeignError: If it is no spool.
        SpoolError: If it cannot be read.

    """
    with telling(directory):
        for slot in _list_slots(directory):
            yield survey(slot)


def survey(slot: Path) -> Status:
    """Return what a slot holds."""
    segments = list_segments(slot)
    floor = 0
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(slot / "state", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _, floor = read_state(fd)
        finally:
            os.close(fd)
    if segments:
        floor = max(floor, segments[0].first - 1)
    end = max(floor, end_of(segments))
    size = sum(segment.size for segment in segments)
    stream, labels = read_meta(slot).stream, labels_of(segments)
    return Status(slot, stream, floor, end, len(segments), size, labels, _locked_by(slot))


def _make_directory(path: Path) -> None:
    """Make a directory and those above it, so that they survive a power cut."""
    if path.is_dir():
        return
    if not path.parent.exists():
        _make_directory(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError:
        path.rmdir()  # the next attempt is to begin here again
        raise
    finally:
        os.close(fd)


def _list_slots(directory: Path) -> list[Path]:
    names = sorted(os.listdir(directory), key=lambda name: (len(name), name))
    names = [name for name in names if name != "lost+found"]  # of a file system of its own
    for name in names:
        status = os.lstat(directory / name)
        if not (_SLOT_NAME.fullmatch(name) and stat.S_ISDIR(status.st_mode)):
            raise SpoolForeignError(f"{directory} is no spool: it holds {name!r}")
        if reason := why_not_ours(directory / name):
            raise SpoolForeignError(reason)
    return [directory / name for name in names]


def _lock(slot: Path) -> bool:
    fault_point("slot-made")
    fd = os.open(slot / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for attempt in range(_LOCK_ATTEMPTS):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if attempt == _LOCK_ATTEMPTS - 1 or _locked_by(slot) is not None:
                os.close(fd)
                return False
            time.sleep(_LOCK_INTERVAL)
    with contextlib.suppress(OSError):  # it is for people, and the disk may be full
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    fault_point("slot-locked")
    return True  # it stays open, and locked, until the process ends


def _locked_by(slot: Path) -> int | None:
    try:
        fd = os.open(slot / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(fd, 20, 0).strip()
        return int(text) if text.isdigit() else 0
    finally:
        os.close(fd)
    return None
