"""
Fixtures of all tests, and what makes them independent of who runs them.

Programs inherit settings from the shell, script or service that runs pytest: ignored and blocked
signals, the environment, the umask. Here, and nowhere else, they are set to what tests expect.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import zmq

from helpers import PATIENCE, words

# The only variables of the caller that reach tests and the programs that they start.
_KEPT = {"PATH", "LD_LIBRARY_PATH", "TMPDIR", "TERM", "NO_COLOR", "CI"}
_KEPT |= {"ZMQPUSH_CHAOS", "ZMQPUSH_SEED", "ZMQPUSH_TEST_SYSLOG_NG"}  # meant for tests
_SET = {
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    # Holds empty configuration files, which programs find before those of the machine.
    "XDG_CONFIG_HOME": str(Path(__file__).parent / "config"),
}
# Stops and the end of a child take no handler: their default is to ignore, or is wanted.
_NO_HANDLER = {signal.SIGCHLD, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
# Python ignores these, and gives its children the default.
_LEFT_TO_PYTHON = {signal.SIGPIPE, signal.SIGXFSZ}

for _name in [*os.environ]:
    if _name not in _KEPT and not _name.startswith("PYTEST_"):
        del os.environ[_name]
os.environ.update(_SET)
time.tzset()

hypothesis.settings.register_profile("busy machine", deadline=None)
hypothesis.settings.load_profile("busy machine")


def pytest_configure(config: pytest.Config) -> None:
    """Have the programs that tests start begin with default signals and the usual umask."""
    if config.getoption("numprocesses", None):
        return  # the workers run the tests, and are to inherit what the caller wants
    os.umask(0o022)
    for number in signal.valid_signals() - _LEFT_TO_PYTHON:
        if signal.getsignal(number) is signal.SIG_IGN:
            # Pytest goes on ignoring it, as under nohup; its children do not inherit a handler.
            handler = signal.SIG_DFL if number in _NO_HANDLER else lambda *_: None
            signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


@pytest.fixture
def pull() -> Iterator[zmq.Socket]:
    """Return a bare PULL socket, bound to a TCP port of its own."""
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.setsockopt(zmq.RCVTIMEO, int(PATIENCE * 1000))
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind("tcp://127.0.0.1:*")
        yield socket


@pytest.fixture
def start() -> Iterator[object]:
    """Return ``subprocess.Popen`` with pipes; what still runs at the end is killed."""
    children: list[subprocess.Popen[bytes]] = []

    def popen(*command: object, **kwargs: object) -> subprocess.Popen[bytes]:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        child = subprocess.Popen(words(*command), **pipes | kwargs)
        children.append(child)
        return child

    yield popen
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
