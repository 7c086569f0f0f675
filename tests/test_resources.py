"""The installed programs where the system gives too little memory or too few descriptors."""

import contextlib
import re
import resource
import signal
import subprocess
import threading
from functools import partial

import pytest
import zmq

from helpers import NOBODY, PATIENCE, SUMMARY, ZMQKEYS, ZMQPULL, ZMQPUSH, losses, wait_until, words
from peers import bare

LINE = b"x" * 200 + b"\n"


def limit(kind, most):
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(kind, (most, most))


def limited(kind, most, *command, data=b""):
    """Run a program with a limit, to its end."""
    return subprocess.run(
        words(*command),
        input=data,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
        preexec_fn=partial(limit, kind, most),
    )


COMMANDS = {
    "plain": (ZMQPUSH, "-c", NOBODY),
    "acknowledged": (ZMQPUSH, "--ack", "-c", NOBODY),
    "spooled": (ZMQPUSH, "--spool", "{}/spool", "-c", NOBODY),
    "receiver": (ZMQPULL, "-b", "ipc://{}/plain"),
    "receiver with a state": (
        ZMQPULL,
        "-a",
        "ipc://{}/acked",
        "--state",
        "{}/state",
        "--to",
        "{}/all",
    ),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("most", [*range(5, 21), 50])
def test_too_few_descriptors_are_one_line_before_anything_is_read(tmp_path, command, most):
    command = [word.format(tmp_path) for word in command]
    done = limited(resource.RLIMIT_NOFILE, most, *command, data=b"line\n")

    assert (done.returncode, done.stdout) == (71, b"")
    assert re.fullmatch(
        rb"zmqpu(sh|ll): too few file descriptors: %d are allowed and \d+ in use: "
        rb"raise the limit to \d\d or more \(ulimit -n, LimitNOFILE=\)\n" % most,
        done.stderr,
    )
    assert not list(tmp_path.iterdir())


def test_a_soft_limit_that_is_low_is_raised(pull):
    command = words("sh", "-c", f"ulimit -Sn 20; exec {ZMQPUSH} -c {pull.last_endpoint.decode()}")
    done = subprocess.run(command, input=b"1\n", capture_output=True, timeout=PATIENCE, check=False)

    assert (done.returncode, done.stderr) == (0, b"")


def fed_until_out_of_memory(start, *command):
    """Return a sender that has read as much as it has memory for."""
    child = start(
        *command, "--queue-max", "4GiB", preexec_fn=partial(limit, resource.RLIMIT_AS, 200 << 20)
    )
    fed, child.stdin = child.stdin, None

    def feed():
        with contextlib.suppress(BrokenPipeError), fed:
            while True:
                fed.write(LINE * 1000)

    threading.Thread(target=feed, daemon=True).start()
    while b"zmqpush: out of memory: raise the limit (ulimit" not in (
        line := child.stderr.readline()
    ):
        assert line
    return child


@pytest.mark.parametrize("options", [[], ["--ack"]], ids=["plain", "acknowledged"])
def test_out_of_memory_what_was_read_is_counted(start, options):
    child = fed_until_out_of_memory(start, ZMQPUSH, *options, "-c", NOBODY)
    child.terminate()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=PATIENCE)

    assert (child.returncode, SUMMARY.fullmatch(out)[1]) == (71, b"0")
    dropped, lost = losses(err)
    assert (dropped, 100_000 < lost < 1_000_000) == (0, True)
    assert not re.search(b"internal error|Traceback", err)


@pytest.mark.parametrize("framing", ["single", "frames", "array", "lines"])
def test_what_was_read_before_memory_ran_out_is_delivered(start, tmp_path, framing):
    endpoint, path = f"ipc://{tmp_path}/socket", tmp_path / "all"
    child = fed_until_out_of_memory(start, ZMQPUSH, "-c", endpoint, "--framing", framing)
    receiver = start(ZMQPULL, "-qb", endpoint, "--to", path)
    out, err = child.communicate(timeout=PATIENCE)
    # But for what was being made records of: one read.
    assert (child.returncode, losses(err)[1] <= 2 * (128 << 10) // len(LINE)) == (71, True), err
    receiver.terminate()
    assert receiver.wait(PATIENCE) == 0

    assert int(SUMMARY.fullmatch(out)[1]) == path.read_bytes().count(b"\n") > 100_000
    assert not re.search(b"internal error|Traceback", err)


def test_a_message_that_does_not_fit_into_the_memory_ends_the_receiver_in_one_line(start, tmp_path):
    endpoint, path = f"ipc://{tmp_path}/socket", tmp_path / "all"
    command = (ZMQPULL, "-b", endpoint, "--to", path)
    child = start(*command, preexec_fn=partial(limit, resource.RLIMIT_AS, 300 << 20))
    with bare(zmq.PUSH, endpoint) as peer:
        peer.send(b"{}")
        wait_until(lambda: path.exists() and path.read_bytes() == b"{}\n")
        peer.send(b"\1" * (60 << 20))  # six times as much in JSON
        code = child.wait(PATIENCE)
    err = child.stderr.read()

    assert code == 71, err
    assert err.startswith(b"zmqpull: out of memory: raise the limit (ulimit -v, MemoryMax=)")
    assert b"1 records written" in err
    assert b"Traceback" not in err
    assert b"internal error" not in err


@pytest.mark.parametrize("program", [ZMQPUSH, ZMQPULL, ZMQKEYS])
@pytest.mark.parametrize("most", [24, 28, 32, 36, 40, 44])
def test_memory_that_is_too_little_to_start_with_is_one_line(program, most):
    done = limited(resource.RLIMIT_AS, most << 20, program, "--help")

    if b"Fatal Python error" in done.stderr:
        pytest.skip("Python needs more")
    if done.returncode:
        assert done.stderr.count(b"\n") == 1, done
        assert b"out of memory" in done.stderr
        assert done.returncode == 71
