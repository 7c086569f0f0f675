"""What a disk that takes nothing now says, for the spool, the sinks and the state alike."""

import errno

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def has_no_room(error: OSError) -> bool:
    """Whether ``error`` ends when somebody makes room: a reason to wait, not to end."""
    return error.errno in _NO_ROOM
