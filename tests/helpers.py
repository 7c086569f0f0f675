"""What several test files share: the installed commands, and waiting for conditions."""

import json
import os
import re
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest

BIN = Path(sysconfig.get_path("scripts"))
ZMQPUSH = str(BIN / "zmqpush")
ZMQPULL = str(BIN / "zmqpull")
ZMQKEYS = str(BIN / "zmqpush-keys")
SUMMARY = re.compile(rb"Processed (\d+) messages in \d+\.\d{4}ms\. Tagged with @pid:(\d+)\n")
LOSSES = re.compile(rb"zmqpush: (\d+) dropped, (\d+) lost\n")
# How long to wait for what must happen, in seconds: the machine may be slow.
PATIENCE = 60.0
# An endpoint where nothing listens.
NOBODY = "tcp://127.0.0.1:9"
# Before a command: even root may then only open what its mode lets root open.
WITHOUT_PRIVILEGE = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
WITHOUT_PRIVILEGE = WITHOUT_PRIVILEGE if os.geteuid() == 0 else []
FRAMINGS = pytest.mark.parametrize("framing", ["single", "frames", "array", "lines"])


def words(*command: object) -> list[str]:
    """Return a command line; ZeroMQ tells endpoints as bytes."""
    return [word.decode() if isinstance(word, bytes) else str(word) for word in command]


def push(*args: object, data: bytes = b"", **kwargs: object) -> subprocess.CompletedProcess[bytes]:
    """Run ``zmqpush`` with ``data`` on its standard input, to its end."""
    command = words(ZMQPUSH, *args)
    return subprocess.run(
        command, input=data, capture_output=True, timeout=PATIENCE, check=False, **kwargs
    )


def wait_until(condition: Callable[[], object]) -> None:
    """Return once ``condition`` is true; fail when it does not become so."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.01)


def wait_until_ready(child: subprocess.Popen[bytes]) -> None:
    """Return once a child handles signals, SIGTERM last: before that, one would just end it."""

    def handles_signals() -> bool:
        status = Path(f"/proc/{child.pid}/status").read_text()
        caught = re.search(r"SigCgt:\s+(\w+)", status)
        return bool(caught and int(caught[1], 16) & 1 << (signal.SIGTERM - 1))

    wait_until(handles_signals)


def statistics(child: subprocess.Popen[bytes]) -> tuple[int, int, int, int]:
    """Return how many records were read, delivered, queued and dropped, as SIGHUP tells."""
    wait_until_ready(child)
    child.send_signal(signal.SIGHUP)
    while line := child.stderr.readline():
        if match := re.search(rb"(\d+) read, (\d+) \w+, (\d+) queued, (\d+) dropped", line):
            return tuple(map(int, match.groups()))
    raise AssertionError("no statistics on standard error")


def lines_of(records: list[bytes] | list[str]) -> list[bytes]:
    """Return what ``zmqpush --ack --format raw`` read, of which ``zmqpull`` made these records."""
    return [json.loads(record)["message"].encode() for record in records]


def text_of(record: bytes) -> bytes:
    """Return the line of a record that was made of a raw one; what is torn as it is."""
    try:
        return lines_of([record])[0]
    except ValueError:
        return record


def sent(done: subprocess.CompletedProcess[bytes]) -> int:
    """Return the number in the summary."""
    match = SUMMARY.fullmatch(done.stdout)
    assert match, done
    return int(match[1])


def losses(stderr: bytes) -> tuple[int, int]:
    """Return how many records were dropped and lost, as standard error tells."""
    match = LOSSES.search(stderr)
    return (int(match[1]), int(match[2])) if match else (0, 0)
