"""
The entry points ``zmqpush`` and ``zmqpull``.

Nothing that takes time is imported before the process is made safe, so that even while
the program loads nothing ends in a traceback.
"""

import contextlib
import os
import signal
import sys

# libzmq allocates a message in one thread and frees it in another, so with glibc's small
# per-thread caches nearly every message waits for the lock of the heap. With these ones
# `--framing single` and `frames` are a fifth faster (docs/performance.md).
_GLIBC_TUNABLES = ":".join(
    (
        "glibc.malloc.tcache_count=2000",
        "glibc.malloc.mmap_threshold=33554432",
        "glibc.malloc.top_pad=16777216",
        "glibc.malloc.trim_threshold=67108864",
    )
)


def _prepare() -> None:
    # A closed standard descriptor would become the next file or socket that is opened.
    # Hold its place with one that can only be used the wrong way round.
    for fd, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)
    # Signals wait until there are handlers (endings.py unblocks them).
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))
    # A shipper has no call to preempt the programs that it serves. As a batch process it
    # does not; turns are longer, and `--framing single` is faster.
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    _tune_malloc()


def _tune_malloc() -> None:
    # glibc reads its tunables only when a process starts, so start again, once.
    if "GLIBC_TUNABLES" in os.environ or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return
    os.environ["GLIBC_TUNABLES"] = _GLIBC_TUNABLES
    with contextlib.suppress(OSError):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


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
