"""
What the spool, the sinks and the state ask of a disk.

That is whether an error means that there is no room now, and whether others could change what
is there.
"""

import errno
import os
import stat
from pathlib import Path

# More than what fails for want of room wants, as a rule: then it is sure to fail, too.
_PROBE_BYTES = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def has_no_room(error: OSError) -> bool:
    """Whether ``error`` ends when somebody makes room: a reason to wait, not to end."""
    return error.errno in _NO_ROOM


def probe_room(directory: Path) -> OSError | None:
    """
    Return why a file in a directory cannot grow, if that is for want of room.

    For libraries that do not say why: to SQLite a quota that is used up is an I/O error.
    """
    path = directory / "probe"
    try:
        largest = max((found.stat().st_size for found in directory.iterdir()), default=0)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb") as file:
            os.unlink(path)
            file.seek(largest)  # there may be a limit on the size of a file
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as exc:
        return exc if has_no_room(exc) else None
    return None


def why_not_ours(path: Path) -> str:
    """
    Return how others could change a file or a directory, and what mends that; empty if not.

    Raises:
        OSError: If that cannot be known.

    """
    status = os.lstat(path)
    if status.st_uid != os.geteuid():
        return f"{path} belongs to somebody else: chown it (uid {status.st_uid}), or use another"
    if status.st_mode & 0o022 and not stat.S_ISLNK(status.st_mode):
        return f"{path} can be written by others: chmod go-w {path}"
    return ""
