"""
What a receiver remembers, in one SQLite database.

That is the ack floor of each stream, and how much of each open file is committed. Both
change in one transaction. So a start can cut every file back to what the floors say
it holds, and records that come again after a crash are in it once.
"""

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from zmqpush.core.receiver import Floor, Key, Progress
from zmqpush.errors import StateBusyError, StateError, StateForeignError
from zmqpush.faults import fault_point
from zmqpush.sink import Length
from zmqpush.telemetry import Reporter

_VERSION = 1
_SCHEMA = """
CREATE TABLE streams (
    principal TEXT, stream TEXT, acked INTEGER, run TEXT, seen INTEGER,
    PRIMARY KEY (principal, stream)
) WITHOUT ROWID;
CREATE TABLE files (path TEXT PRIMARY KEY, inode INTEGER, length INTEGER) WITHOUT ROWID;
"""
# A stream that has not moved for so long is forgotten, in seconds.
_EXPIRY = 30 * 86400.0
# A full disk is tried again so often, in seconds.
_FULL_INTERVAL = 1.0


class State:
    """
    The database, locked; for one thread at a time.

    Args:
        directory: Where it lies; made if there is none.
        reporter: Where to tell of what is cut off, and of a full disk.

    Raises:
        StateBusyError: If another process uses it.
        StateForeignError: If it is of a later version.
        StateError: If it cannot be read or written.

    """

    def __init__(self, directory: Path, reporter: Reporter) -> None:
        self._directory = directory
        self._reporter = reporter
        with self._telling():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise StateBusyError(f"another process uses the state {directory}") from exc
            database = directory / "state.db"
            os.close(os.open(database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            # A connection of one process: no shared memory, and no other writer.
            self._db = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL"):
                self._db.execute(f"PRAGMA {pragma}")
            self._prepare()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else exc
            raise StateError(f"cannot use the state {self._directory}: {reason}") from exc

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:  # SQLite may have done so itself
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _prepare(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise StateForeignError(f"the state {self._directory} is of a later version")
        if not version:
            self._db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version={_VERSION};COMMIT")
            fault_point("state-made")
        with self._transaction():
            self._db.execute("DELETE FROM streams WHERE seen < ?", (time.time() - _EXPIRY,))

    def floors(self) -> dict[Key, Floor]:
        """Return what is remembered of each stream."""
        with self._telling():
            rows = self._db.execute("SELECT principal, stream, acked, run FROM streams")
            return {
                (principal, stream): Floor(acked, run) for principal, stream, acked, run in rows
            }

    def cut_back(self) -> None:
        """
        Cut every file back to what was committed when the last process ended.

        Raises:
            StateError: If that fails.

        """
        with self._telling():
            for path, inode, length in self._db.execute("SELECT path, inode, length FROM files"):
                if found := _find(path, inode):
                    self._cut(found, length)
            fault_point("cut-back")
            with self._transaction():
                self._db.execute("DELETE FROM files")
            fault_point("files-forgotten")

    def _cut(self, path: str, length: int) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            excess = os.fstat(fd).st_size - length
            if excess > 0:
                os.ftruncate(fd, length)
                os.fsync(fd)
                self._reporter.notice(f"cut off {excess} bytes of {path}: they were not committed")
        finally:
            os.close(fd)

    def commit(
        self,
        *,
        moved: Iterable[Progress] = (),
        lengths: Iterable[Length] = (),
        closed: Iterable[str] = (),
        forgotten: Iterable[Key] = (),
    ) -> None:
        """
        Remember what has changed, all of it or nothing. A full disk is waited for.

        Args:
            moved: How far streams have moved.
            lengths: How long open files are.
            closed: Paths of files that are closed, and hold only what was committed.
            forgotten: Streams that have ended; one that has moved since has begun anew.

        Raises:
            StateError: If it cannot be written for another reason.

        """
        now = int(time.time())
        streams = [(*progress.key, *progress.floor, now) for progress in moved]
        told = False
        while True:
            try:
                with self._transaction():
                    self._db.executemany("DELETE FROM files WHERE path = ?", [(p,) for p in closed])
                    self._db.executemany("REPLACE INTO files VALUES (?, ?, ?)", lengths)
                    self._db.executemany(
                        "DELETE FROM streams WHERE principal = ? AND stream = ?", forgotten
                    )
                    self._db.executemany("REPLACE INTO streams VALUES (?, ?, ?, ?, ?)", streams)
                break
            except sqlite3.Error as exc:
                if getattr(exc, "sqlite_errorcode", 0) != sqlite3.SQLITE_FULL:
                    raise StateError(f"cannot use the state {self._directory}: {exc}") from exc
                if not told:
                    told = True
                    self._reporter.warn(f"cannot write the state {self._directory}: {exc}: waiting")
                time.sleep(_FULL_INTERVAL)
        fault_point("state-committed")

    def close(self) -> None:
        """
        Note that all files hold only what was committed, so that none is cut back.

        Raises:
            StateError: If that fails.

        """
        with self._telling():
            self._db.execute("DELETE FROM files")
            self._db.close()


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
