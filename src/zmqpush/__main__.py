"""
The entry points ``zmqpush`` and ``zmqpull``.

Nothing but the standard library's ``signal`` is imported before Ctrl-C is made
quiet, so that one pressed while the program still loads ends it as it would end
a C program, and not with a traceback.
"""

import signal


def _quiet_interrupt() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def push() -> None:
    """Run ``zmqpush``."""
    _quiet_interrupt()
    from zmqpush.cli import push as command

    command(prog_name="zmqpush")


def pull() -> None:
    """Run ``zmqpull``."""
    _quiet_interrupt()
    from zmqpush.cli import pull as command

    command(prog_name="zmqpull")


if __name__ == "__main__":
    push()
