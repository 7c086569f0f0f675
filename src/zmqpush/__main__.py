"""
The entry points ``zmqpush`` and ``zmqpull``.

Nothing that takes time is imported before the process is made safe, so that even while
the program loads nothing ends in a traceback.
"""

import os
import signal


def _prepare() -> None:
    # A closed standard descriptor would become the next file or socket that is opened.
    # Hold its place with one that can only be used the wrong way round.
    for fd, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)
    # Ctrl-C ends the program as it would end a C program, until it has handlers.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def push() -> None:
    """Run ``zmqpush``."""
    _prepare()
    from zmqpush.cli import push as command

    command(prog_name="zmqpush")


def pull() -> None:
    """Run ``zmqpull``."""
    _prepare()
    from zmqpush.cli import pull as command

    command(prog_name="zmqpull")


if __name__ == "__main__":
    push()
