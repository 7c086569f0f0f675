"""Every row of the endings table, with real signals: ``docs/architecture.md``."""

import contextlib
import json
import os
import pty
import re
import signal
import sys
import time

import pytest
import zmq

from helpers import (
    NOBODY,
    PATIENCE,
    SUMMARY,
    ZMQKEYS,
    ZMQPULL,
    ZMQPUSH,
    losses,
    push,
    statistics,
    wait_until,
    wait_until_ready,
)

FIRST_SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


def connected(start, pull, *args, **kwargs):
    """Start zmqpush and let a first line arrive."""
    child = start(ZMQPUSH, "-c", pull.last_endpoint, *args, **kwargs)
    child.stdin.write(b"first\n")
    child.stdin.flush()
    assert json.loads(pull.recv())["message"] == "first"
    return child


def fill(fd, data):
    """Write until the pipe is full, without blocking; return how many bytes it took."""
    os.set_blocking(fd, False)
    written = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            written += os.write(fd, data)
    return written


def end(child):
    """Wait for the end; return exit code, the number in the summary and standard error."""
    out, err = child.communicate(timeout=PATIENCE)
    return child.returncode, int(SUMMARY.fullmatch(out)[1]), err


def test_end_of_input_delivers_everything(start, pull):
    child = connected(start, pull)
    child.stdin.write(b"second\nlast, without a newline")

    assert end(child) == (0, 3, b"")
    assert [json.loads(pull.recv())["message"] for _ in range(2)] == [
        "second",
        "last, without a newline",
    ]


@FIRST_SIGNALS
def test_a_signal_ends_it_while_the_input_stays_open(start, pull, number):
    child = connected(start, pull)
    child.send_signal(number)
    child.wait(PATIENCE)

    assert SUMMARY.fullmatch(child.stdout.read())[1] == b"1"
    assert child.returncode == 0


@FIRST_SIGNALS
def test_what_is_written_after_the_first_signal_and_before_the_end_arrives(start, pull, number):
    # The order of rsyslog: SIGTERM, then the end of the input.
    child = connected(start, pull)
    child.send_signal(number)
    child.stdin.write(b"last words")

    assert end(child) == (0, 2, b"")
    assert json.loads(pull.recv())["message"] == "last words"


def test_a_signal_ends_it_while_the_writer_never_pauses(start, pull):
    read, write = os.pipe()
    writer = start("yes", stdout=write)
    os.close(write)
    child = start(ZMQPUSH, "-c", pull.last_endpoint, "--grace", 1, stdin=read)
    os.close(read)
    pull.recv()
    child.send_signal(signal.SIGTERM)
    while child.poll() is None:  # a receiver that takes everything
        while pull.poll(10):
            pull.recv()
    writer.wait(PATIENCE)

    assert child.returncode in (0, 1)
    assert SUMMARY.fullmatch(child.stdout.read())


@FIRST_SIGNALS
def test_without_a_receiver_the_grace_period_ends_it_and_the_loss_is_counted(start, number):
    child = start(ZMQPUSH, "-c", NOBODY, "--grace", 0.5)
    child.stdin.write(b"1\n2\n")
    child.stdin.flush()
    wait_until(lambda: statistics(child)[0] == 2)
    child.send_signal(number)
    code, sent, err = end(child)

    assert (code, sent, losses(err)) == (1, 0, (0, 2))


def test_the_second_signal_means_now(start):
    child = start(ZMQPUSH, "-c", NOBODY, "--grace", 10 * PATIENCE)
    child.stdin.write(b"1\n2\n3\n")
    child.stdin.flush()
    wait_until(lambda: statistics(child)[0] == 3)
    child.send_signal(signal.SIGTERM)
    assert statistics(child)[0] == 3  # so the first one was taken
    child.send_signal(signal.SIGINT)
    code, sent, err = end(child)

    assert (code, sent, losses(err)) == (1, 0, (0, 3))


def test_a_signal_during_the_last_delivery_starts_the_grace_period(start):
    child = start(ZMQPUSH, "-c", NOBODY, "--grace", 0.2)
    child.stdin.write(b"1\n")
    child.stdin.close()
    wait_until(lambda: statistics(child)[0] == 1)
    child.send_signal(signal.SIGTERM)
    child.wait(PATIENCE)

    assert child.returncode == 1
    assert losses(child.stderr.read()) == (0, 1)


def test_hangup_prints_statistics_and_nothing_else_happens(start, pull):
    child = connected(start, pull)

    assert statistics(child)[0] == 1
    child.stdin.write(b"second\n")
    assert end(child)[:2] == (0, 2)


def test_a_closed_standard_output_does_no_harm(start, pull):
    child = connected(start, pull)
    child.stdout.close()
    child.stdin.write(b"second\n")
    child.stdin.close()
    child.wait(PATIENCE)

    assert child.returncode == 0
    assert json.loads(pull.recv())["message"] == "second"
    assert b"summary" in child.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_the_parent_ignores_stays_ignored(start, pull, number):
    child = connected(start, pull, "-q", preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
    child.send_signal(number)
    child.send_signal(number)
    child.stdin.write(b"second\n")
    child.stdin.flush()
    assert json.loads(pull.recv())["message"] == "second"
    out, err = child.communicate(b"third\n", timeout=PATIENCE)

    assert (child.returncode, out, err) == (0, b"", b"")
    assert json.loads(pull.recv())["message"] == "third"


def test_a_stopped_terminal_job_goes_on(start, pull):
    child = connected(start, pull)
    child.send_signal(signal.SIGSTOP)
    child.stdin.write(b"second\n")
    child.stdin.flush()
    child.send_signal(signal.SIGCONT)

    assert json.loads(pull.recv())["message"] == "second"
    assert end(child)[:2] == (0, 2)


# Runs a command as a background job of a terminal with `stty tostop`.
IN_BACKGROUND = """
import fcntl, os, sys, termios
fcntl.ioctl(1, termios.TIOCSCTTY, 0)
settings = termios.tcgetattr(1)
settings[3] |= termios.TOSTOP
termios.tcsetattr(1, termios.TCSANOW, settings)
if not (job := os.fork()):
    os.setpgid(0, 0)
    os.execv(sys.argv[1], sys.argv[1:])
_, status = os.waitpid(job, os.WUNTRACED)
if os.WIFSTOPPED(status):
    os.kill(job, 9)
    sys.exit("stopped")
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ((ZMQPUSH, "-c", NOBODY, "--timeout", 0), 69, b"1 lost"),
        ((ZMQPULL, "--memory", 1), 2, b"they need 1MiB"),
        ((ZMQKEYS, "--help"), 0, b"--version"),
    ],
)
def test_a_background_job_may_write_to_its_terminal(start, command, code, words):
    terminal, end = pty.openpty()
    args = (sys.executable, "-c", IN_BACKGROUND, *command)
    job = start(*args, stdout=end, stderr=end, start_new_session=True)
    os.close(end)
    job.stdin.write(b"a line\n")
    job.stdin.close()
    shown = b""
    with open(terminal, "rb", buffering=0) as screen, contextlib.suppress(OSError):
        while True:  # until nobody has the other end any more
            shown += screen.read(65536)

    assert job.wait(PATIENCE) == code
    assert words in shown


def test_the_time_limit_counts_from_the_last_delivery():
    done = push("-c", NOBODY, "--timeout", "0.3", data=b"1\n2\n")

    assert done.returncode == 69
    assert done.stderr == b"zmqpush: 0 dropped, 2 lost\n"


def test_a_signal_while_the_queue_is_full_does_not_forget_what_is_in_the_pipe(start, tmp_path):
    endpoint = f"ipc://{tmp_path}/socket"
    child = start(ZMQPUSH, "-c", endpoint, "--queue-max", 1, "--grace", PATIENCE)
    line = b"x" * 99 + b"\n"
    written = fill(child.stdin.fileno(), line)
    assert b"no receiver" in child.stderr.readline()  # it has read what it may
    written += fill(child.stdin.fileno(), line)
    child.send_signal(signal.SIGTERM)
    child.stdin.close()
    time.sleep(0.5)  # longer than the input must be quiet
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        pull.bind(endpoint)
        while child.poll() is None or pull.poll(100):
            if pull.poll(10):
                written -= len(json.loads(pull.recv())["message"]) + 1

    assert (child.returncode, written) == (0, 0)


def test_input_that_a_signal_left_unread_is_told(start):
    child = start(ZMQPUSH, "-c", NOBODY, "--queue-max", 1, "--grace", 0.2)
    wait_until_ready(child)
    fill(child.stdin.fileno(), b"a line\n")
    child.send_signal(signal.SIGTERM)
    child.wait(PATIENCE)

    assert child.returncode == 1
    assert re.search(rb"a signal came before \d+ bytes of the input were read", child.stderr.read())


@pytest.mark.parametrize("full", ["stdout", "stderr"])
def test_an_output_that_nobody_reads_never_stops_it(start, pull, full):
    read, write = os.pipe()
    fill(write, bytes(1024))
    os.set_blocking(write, True)
    child = start(ZMQPUSH, "-c", pull.last_endpoint, **{full: write})
    os.close(write)
    wait_until_ready(child)
    child.send_signal(signal.SIGHUP)
    child.stdin.write(b"a line\n")
    child.stdin.close()

    assert child.wait(PATIENCE) == 0
    assert json.loads(pull.recv())["message"] == "a line"
    os.close(read)


@FIRST_SIGNALS
def test_signals_at_the_very_end_end_it_in_order(start, pull, number):
    for _ in range(10):
        child = start(ZMQPUSH, "-c", pull.last_endpoint)
        wait_until_ready(child)
        child.stdin.write(b"a line\n")
        child.stdin.close()
        child.send_signal(number)
        assert json.loads(pull.recv())["message"] == "a line"
        while child.poll() is None:
            child.send_signal(number)
            time.sleep(0.001)

        assert child.returncode in (0, 1)
        assert b"Traceback" not in child.stderr.read()
