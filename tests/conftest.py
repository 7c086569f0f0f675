"""Fixtures of all tests."""

import contextlib
import subprocess
from collections.abc import Iterator

import hypothesis
import pytest
import zmq

from helpers import PATIENCE, words

hypothesis.settings.register_profile("busy machine", deadline=None)
hypothesis.settings.load_profile("busy machine")


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
