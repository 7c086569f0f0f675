"""Named points where tests let a program die, as by ``kill -9``."""

import os
import signal

# ``ZMQPUSH_FAULT=name:n`` kills the process when it comes to the point for the nth time.
_NAME, _, _COUNT = os.environ.get("ZMQPUSH_FAULT", "").partition(":")
_left = int(_COUNT) if _COUNT.isdecimal() else 1


def fault_point(name: str) -> None:
    """Die here, if that is what the environment says."""
    global _left
    if name == _NAME:
        _left -= 1
        if not _left:
            os.kill(os.getpid(), signal.SIGKILL)
