"""What tests see does not depend on who runs them: tests/conftest.py sees to it."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from helpers import PATIENCE
from zmqpush.cli import config_file as config

PYTEST = [sys.executable, "-I", "-m", "pytest"]
# Runs a command with everything as it should not be.
HOSTILE = """
import os, signal, sys
os.umask(0o177)
os.chdir("/")
os.close(0)
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execv(sys.argv[1], sys.argv[1:])
"""
VARIABLES = {
    "GLIBC_TUNABLES": "glibc.malloc.check=0",
    "LANG": "C",
    "LC_ALL": "POSIX",
    "NATS_URL": "nats://nowhere",
    "PYTHONASYNCIODEBUG": "1",
    "PYTHONOPTIMIZE": "2",
    "PYTHONUTF8": "0",
    "PYTHONWARNINGS": "error",
    "TZ": "Asia/Kathmandu",
    "XDG_CONFIG_HOME": "/nonexistent",
    "ZMQPULL_TO": "/nonexistent/file",
    "ZMQPUSH_ACK": "1",
    "ZMQPUSH_FAULT": "written:1",
    "ZMQPUSH_QUIET": "1",
}


def inherited(what):
    """Return what the kernel says of a program that a test starts."""
    command = ["cat", f"/proc/self/{what}"]
    return subprocess.run(command, capture_output=True, check=True).stdout.decode()


def test_a_program_inherits_nothing_of_who_runs_the_tests():
    status = re.findall(r"^(SigBlk|SigIgn|Umask):\s+(\w+)$", inherited("status"), re.MULTILINE)
    environment = dict(word.split("=", 1) for word in inherited("environ").split("\0")[:-1])

    values = {name: int(value, 8 if name == "Umask" else 16) for name, value in status}
    values["SigIgn"] &= ~(0b11 << 31)  # 32 and 33 belong to libc, which lets nobody reset them
    assert values == {"SigBlk": 0, "SigIgn": 0, "Umask": 0o022}
    assert not {*environment} & ({"HOME", *VARIABLES} - {"LC_ALL", "TZ", "XDG_CONFIG_HOME"})
    assert (environment["LC_ALL"], environment["TZ"]) == ("C.UTF-8", "UTC")
    for name in ("zmqpush.toml", "zmqpull.toml"):
        assert config.load(config.find(name), {}) == {}


@pytest.mark.parametrize("processes", [0, 1])
def test_a_hostile_caller_changes_nothing(processes):
    """Run the test above, and two that failed, as children of such a caller."""
    tests = [
        "test_independence.py::test_a_program_inherits_nothing_of_who_runs_the_tests",
        "test_endings.py::test_the_second_signal_means_now",
        "test_pull.py::test_what_was_received_before_a_signal_is_written",
    ]
    paths = [f"{Path(__file__).parent}/{test}" for test in tests]
    with tempfile.TemporaryDirectory() as short:  # the path of a socket has 107 bytes
        options = ["-x", f"-n{processes}", "-p", "no:cacheprovider", f"--basetemp={short}/t"]
        done = subprocess.run(
            [sys.executable, "-I", "-c", HOSTILE, *PYTEST, *options, *paths],
            env={"PATH": os.environ["PATH"]} | VARIABLES,
            capture_output=True,
            timeout=5 * PATIENCE,
        )

    assert done.returncode == 0, done.stdout.decode()
    assert b" 6 passed" in done.stdout
