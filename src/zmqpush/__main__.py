"""
The entry points ``zmqpush``, ``zmqpull`` and ``zmqpush-keys``.

Nothing that takes time is imported before the process is made safe, so that even while
the program loads a signal does not end in a traceback.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable

from zmqpush.errors import EXIT_IO, EXIT_RESOURCES, ResourceError

# glibc's mallopt: blocks of records are large, and to give each back to the system and to
# fault it in again halves `--framing lines` (docs/performance.md). In bytes.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_MALLOC_OPTIONS = {_TRIM_THRESHOLD: 64 << 20, _TOP_PAD: 16 << 20, _MMAP_THRESHOLD: 32 << 20}


def _hold_standard_descriptors() -> None:
    # A closed standard descriptor would become the next file or socket that is opened.
    # Hold its place with one that can only be used the wrong way round.
    for fd, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)


def _never_stop_for_a_terminal() -> None:
    # With `stty tostop` a line that a background job writes to its terminal would stop it.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)


def _prepare() -> None:
    _never_stop_for_a_terminal()
    _hold_standard_descriptors()
    # What we make is not for others, ipc sockets least of all, whatever our parent's umask.
    os.umask(os.umask(0o077) | 0o007)
    # Signals wait until there are handlers (runtime/shutdown.py unblocks them).
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))
    # A shipper has no call to preempt the programs that it serves. As a batch process it
    # does not; turns are longer, and `--framing single` is faster.
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _tune_malloc() -> None:
    from ctypes import CDLL

    with contextlib.suppress(AttributeError):  # another C library
        mallopt = CDLL(None).mallopt
        for option, value in _MALLOC_OPTIONS.items():
            mallopt(option, value)


def _run(load: Callable[[], Callable[..., object]], program: str) -> None:
    try:
        _tune_malloc()
        _execute(load(), program)
    except Exception as exc:
        try:
            from zmqpush.runtime.failures import report_failure

            code = report_failure(exc, program)
        except (ImportError, MemoryError, OSError):  # there is not even room to say why
            os.write(2, f"{program}: out of memory\n".encode())
            code = EXIT_RESOURCES
        sys.exit(code)


def _execute(command: Callable[..., object], program: str) -> None:
    # While options are read (a configuration file may be a pipe) Ctrl-C just ends it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        command(prog_name=program, standalone_mode=False)
    except OSError as exc:  # what is printed, such as the help, cannot be written
        if ResourceError.of(exc):
            raise
        from zmqpush.runtime.reporting import Reporter

        Reporter(program).warn(str(exc.strerror))
        os._exit(EXIT_IO)


def _load_push() -> Callable[..., object]:
    from zmqpush.cli.push import push

    return push


def _load_pull() -> Callable[..., object]:
    from zmqpush.cli.pull import pull

    return pull


def _load_keys() -> Callable[..., object]:
    from zmqpush.cli.keys import keys

    return keys


def push() -> None:
    """Run ``zmqpush``."""
    _prepare()
    _run(_load_push, "zmqpush")


def pull() -> None:
    """Run ``zmqpull``."""
    _prepare()
    _run(_load_pull, "zmqpull")


def keys() -> None:
    """Run ``zmqpush-keys``."""
    _never_stop_for_a_terminal()
    _hold_standard_descriptors()
    _run(_load_keys, "zmqpush-keys")


if __name__ == "__main__":
    push()
