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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from zmqpush.core.protocol.receiver import FORMER, Floor, Key, Progress
from zmqpush.errors import StateBusyError, StateError, StateForeignError
from zmqpush.runtime.faults import fault_point
from zmqpush.runtime.files import has_no_room, probe_room, why_not_ours
from zmqpush.runtime.reporting import Reporter
from zmqpush.sinks.base import Marks

_VERSION = 3
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
""",
    # Now a name is made of a secret, and only who knows that can greet under it.
    3: f"UPDATE streams SET stream = '{FORMER}' || stream;",
}
# A stream that has not moved for so long is forgotten, in seconds.
_EXPIRY = 30 * 86400.0
_OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
# A full disk is tried again so often, in seconds.
_FULL_INTERVAL = 1.0

_T = TypeVar("_T")


class State:
    """
    The database, locked; for one thread at a time.

    Where there is no room for something it waits until there is, and so does its thread.

    Args:
        directory: Where it lies; made if there is none.
        reporter: Where to tell of a full disk.

    Raises:
        StateBusyError: If another process uses it.
        StateForeignError: If others could change it, or it is of a later version.
        StateError: If it cannot be read or written.

    """

    def __init__(self, directory: Path, reporter: Reporter) -> None:
        self._directory = directory
        self._reporter = reporter
        self._lock = self._when_possible(self._take_lock)
        self._db = self._when_possible(self._connect)

    def _take_lock(self) -> int:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._refuse_foreign(Path(os.path.realpath(self._directory)))
        lock = os.open(self._directory / "lock", _OPEN_FLAGS, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise StateBusyError(f"another process uses the state {self._directory}") from exc
        return lock

    def _connect(self) -> sqlite3.Connection:
        for path in self._directory.iterdir():
            if path.name != "lost+found":  # of a file system of its own
                self._refuse_foreign(path)
        path = self._directory / "state.db"
        os.close(os.open(path, _OPEN_FLAGS, 0o600))
        # A connection of one process: no shared memory, and no other writer.
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(db.close)
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL"):
                db.execute(f"PRAGMA {pragma}")
            self._prepare(db)
            on_failure.pop_all()
        return db

    def _when_possible(self, work: Callable[[], _T]) -> _T:
        """Do something again and again until there is room for it."""
        told = False
        while True:
            try:
                return work()
            except (OSError, sqlite3.Error) as exc:
                reason = self._want_of_room(exc)
                if reason is None:
                    raise self._error(exc) from exc
                if not told:
                    told = True
                    self._reporter.warn(
                        f"cannot write the state {self._directory}: {reason}: waiting"
                    )
            time.sleep(_FULL_INTERVAL)

    def _want_of_room(self, exc: OSError | sqlite3.Error) -> str | None:
        """Return what there is no room for, in words; None if something else is wrong."""
        found: OSError | None = None
        if isinstance(exc, OSError):
            found = exc if has_no_room(exc) else None
        elif (code := getattr(exc, "sqlite_errorcode", 0) & 0xFF) == sqlite3.SQLITE_FULL:
            return str(exc)
        elif code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
            found = probe_room(self._directory)
        return found.strerror if found else None

    def _error(self, exc: OSError | sqlite3.Error) -> StateError:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        return StateError(f"cannot use the state {self._directory}: {reason}")

    def _refuse_foreign(self, path: Path) -> None:
        """Believe nothing that others could have written: a mark says where a file is cut."""
        if reason := why_not_ours(path):
            raise StateForeignError(f"the state {self._directory} is not safe: {reason}")

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as exc:
            raise self._error(exc) from exc

    def _prepare(self, db: sqlite3.Connection) -> None:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise StateForeignError(f"the state {self._directory} is of a later version")
        if not version:
            db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version={_VERSION};COMMIT")
            fault_point("state-made")
        elif version < _VERSION:
            steps = "".join(_MIGRATIONS[step] for step in range(version + 1, _VERSION + 1))
            db.executescript(f"BEGIN;{steps}PRAGMA user_version={_VERSION};COMMIT")
        with _transaction(db):
            db.execute("DELETE FROM streams WHERE seen < ?", (time.time() - _EXPIRY,))

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
        Remember what has changed, all of it or nothing.

        Args:
            moved: How far streams have moved.
            marks: What sinks want to be remembered, or forgotten.
            forgotten: Streams that have ended; one that has moved since has begun anew.

        Raises:
            StateError: If it cannot be written, or was removed.

        """
        if not os.fstat(self._lock).st_nlink:
            raise StateError(f"the state {self._directory} was removed while it was in use")
        now = int(time.time())
        streams = [(*progress.key, *progress.floor, now) for progress in moved]
        gone = [(_stored(name),) for name, value in marks.items() if value is None]
        kept = [(_stored(name), value) for name, value in marks.items() if value is not None]

        def change() -> None:
            with _transaction(self._db) as db:
                db.executemany("DELETE FROM marks WHERE name = ?", gone)
                db.executemany("REPLACE INTO marks VALUES (?, ?)", kept)
                db.executemany("DELETE FROM streams WHERE principal = ? AND stream = ?", forgotten)
                db.executemany("REPLACE INTO streams VALUES (?, ?, ?, ?, ?)", streams)

        self._when_possible(change)
        fault_point("state-committed")

    def close(self) -> None:
        """
        End.

        Raises:
            StateError: If that fails.

        """
        with self._telling():
            self._db.close()


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite may have ended it itself
            db.execute("ROLLBACK")
        raise


def _stored(name: str) -> str | bytes:
    """Return a name as SQLite takes it: one with a path in it may not be text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name)
    return name


def _loaded(name: str | bytes) -> str:
    return os.fsdecode(name) if isinstance(name, bytes) else name
