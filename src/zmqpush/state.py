"""
What a receiver remembers, in one SQLite database.

That is the ack floor of each stream, and the marks of the sink: how much of each open file is
committed, say. Both change in one transaction. So a start can bring both together, and records
that come again after a crash are in the sink once.
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
from zmqpush.sinks import Marks
from zmqpush.telemetry import Reporter

_VERSION = 2
_SCHEMA = """
CREATE TABLE streams (
    principal TEXT, stream TEXT, acked INTEGER, run TEXT, seen INTEGER,
    PRIMARY KEY (principal, stream)
) WITHOUT ROWID;
CREATE TABLE marks (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
"""
# From the version before to each.
_MIGRATIONS = {
    2: """
CREATE TABLE marks (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
INSERT INTO marks SELECT path, inode || ' ' || length FROM files;
DROP TABLE files;
"""
}
# A stream that has not moved for so long is forgotten, in seconds.
_EXPIRY = 30 * 86400.0
# A full disk is tried again so often, in seconds.
_FULL_INTERVAL = 1.0


class State:
    """
    The database, locked; for one thread at a time.

    Args:
        directory: Where it lies; made if there is none.
        reporter: Where to tell of a full disk.

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
        elif version < _VERSION:
            steps = "".join(_MIGRATIONS[step] for step in range(version + 1, _VERSION + 1))
            self._db.executescript(f"BEGIN;{steps}PRAGMA user_version={_VERSION};COMMIT")
        with self._transaction():
            self._db.execute("DELETE FROM streams WHERE seen < ?", (time.time() - _EXPIRY,))

    def floors(self) -> dict[Key, Floor]:
        """Return what is remembered of each stream."""
        with self._telling():
            rows = self._db.execute("SELECT principal, stream, acked, run FROM streams")
            return {
                (principal, stream): Floor(acked, run) for principal, stream, acked, run in rows
            }

    def marks(self) -> Marks:
        """Return what sinks want to be remembered."""
        with self._telling():
            rows = self._db.execute("SELECT name, value FROM marks")
            return {_loaded(name): value for name, value in rows}

    def commit(
        self,
        *,
        moved: Iterable[Progress] = (),
        marks: Marks,
        forgotten: Iterable[Key] = (),
    ) -> None:
        """
        Remember what has changed, all of it or nothing. A full disk is waited for.

        Args:
            moved: How far streams have moved.
            marks: What sinks want to be remembered, or forgotten.
            forgotten: Streams that have ended; one that has moved since has begun anew.

        Raises:
            StateError: If it cannot be written for another reason.

        """
        now = int(time.time())
        streams = [(*progress.key, *progress.floor, now) for progress in moved]
        gone = [(_stored(name),) for name, value in marks.items() if value is None]
        kept = [(_stored(name), value) for name, value in marks.items() if value is not None]
        told = False
        while True:
            try:
                with self._transaction():
                    self._db.executemany("DELETE FROM marks WHERE name = ?", gone)
                    self._db.executemany("REPLACE INTO marks VALUES (?, ?)", kept)
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
        End.

        Raises:
            StateError: If that fails.

        """
        with self._telling():
            self._db.close()


def _stored(name: str) -> str | bytes:
    """Return a name as SQLite takes it: one with a path in it may not be text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name)
    return name


def _loaded(name: str | bytes) -> str:
    return os.fsdecode(name) if isinstance(name, bytes) else name
