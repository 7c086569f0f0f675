"""Receivers that are absent, die, or are slow; full queues; memory; an idle process."""

import itertools
import os
import re
import shutil
import signal
import socket
import termios
import threading
import time
from pathlib import Path

import pytest
import zmq

from helpers import (
    FRAMINGS,
    NOBODY,
    PATIENCE,
    SUMMARY,
    ZMQPULL,
    ZMQPUSH,
    losses,
    push,
    sent,
    statistics,
    wait_until,
)
from hostile import greeting, ready
from zmqpush.runtime.fds import pending_bytes

MEMORY_ABOVE_QUEUE = 64 << 20
_find_numbers = re.compile(rb'"message":"(\d+)"').findall


def receive(socket):
    """Return the numbers in the next message, whatever its framing."""
    return [int(n) for n in _find_numbers(b"".join(socket.recv_multipart()))]


def numbers(socket, count, child=None):
    """Receive so many numbers, or until a child has ended and nothing more comes."""
    got = []
    while len(got) < count:
        if socket.poll(100 if child else PATIENCE * 1000):
            got += receive(socket)
        elif not child or child.poll() is not None:
            break
    return got


def listen(context, endpoint, **options):
    """Bind a PULL socket."""
    socket = context.socket(zmq.PULL)
    socket.setsockopt(zmq.LINGER, 0)
    for name, value in options.items():
        socket.setsockopt(getattr(zmq, name), value)
    socket.bind(endpoint)
    return socket


def feed(child, lines):
    """Write numbered lines in a thread, since the pipe may fill; return the thread."""

    def write():
        numbered = iter(lines)
        while chunk := b"".join(b"%d\n" % n for n in itertools.islice(numbered, 1000)):
            child.stdin.write(chunk)
        child.stdin.close()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


def outcome(child):
    """Wait for the end; return standard output and standard error."""
    child.wait(PATIENCE)
    return child.stdout.read(), child.stderr.read()


@FRAMINGS
def test_a_receiver_that_comes_late_gets_everything(start, tmp_path, framing):
    endpoint = f"ipc://{tmp_path}/socket"
    child = start(ZMQPUSH, "-c", endpoint, "--framing", framing)
    feed(child, range(20_000)).join(PATIENCE)
    assert b"no receiver takes messages" in child.stderr.readline()
    with zmq.Context() as context, listen(context, endpoint) as socket:
        got = numbers(socket, 20_000)
    out, err = outcome(child)

    assert got == list(range(20_000))
    assert re.search(rb"a receiver takes messages again: \d+ queued, 0 dropped \(after", err)
    assert (child.returncode, SUMMARY.fullmatch(out)[1]) == (0, b"20000")


@FRAMINGS
def test_a_receiver_that_dies_and_comes_back_costs_no_more_than_what_is_counted(
    start, tmp_path, framing
):
    endpoint = f"ipc://{tmp_path}/socket"
    total = 1_000_000
    child = start(ZMQPUSH, "-c", endpoint, "--framing", framing)
    feed(child, range(total))
    got = []
    with zmq.Context() as context:
        for part in (20_000, 50_000):
            with listen(context, endpoint, RCVHWM=10) as socket:
                got += numbers(socket, part)
        with listen(context, endpoint) as socket:
            got += numbers(socket, total, child)
    out, err = outcome(child)
    dropped, lost = losses(err)

    assert int(SUMMARY.fullmatch(out)[1]) + dropped + lost == total
    assert got == sorted(set(got))
    assert len(got) <= total
    assert got[-1] == total - 1


@FRAMINGS
def test_a_slow_receiver_gets_everything(start, tmp_path, framing):
    endpoint = f"ipc://{tmp_path}/socket"
    total = 30_000
    with zmq.Context() as context, listen(context, endpoint, RCVHWM=1, RCVBUF=4096) as socket:
        child = start(ZMQPUSH, "-c", endpoint, "--framing", framing, "--queue-max", "64KiB")
        feed(child, range(total))
        got = []
        for turn in itertools.count():
            got += receive(socket)
            if len(got) >= total:
                break
            if turn % 500 == 0:
                time.sleep(0.01)
        out, _ = outcome(child)

    assert got == list(range(total))
    assert (child.returncode, SUMMARY.fullmatch(out)[1]) == (0, b"%d" % total)


def test_several_receivers_share_the_work_and_one_may_be_missing(start, tmp_path):
    endpoints = [f"ipc://{tmp_path}/{name}" for name in "abc"]
    with (
        zmq.Context() as context,
        listen(context, endpoints[0]) as first,
        listen(context, endpoints[1]) as second,
    ):
        args = [word for endpoint in endpoints for word in ("-c", endpoint)]
        child = start(ZMQPUSH, *args)
        feed(child, range(100)).join(PATIENCE)
        out, _ = outcome(child)
        got = [numbers(socket, 100, child) for socket in (first, second)]

    assert SUMMARY.fullmatch(out)[1] == b"100"
    assert sorted(got[0] + got[1]) == list(range(100))


def test_when_full_block_makes_the_writer_wait_and_loses_nothing(start, tmp_path):
    endpoint = f"ipc://{tmp_path}/socket"
    total = 200_000
    child = start(ZMQPUSH, "-c", endpoint, "--queue-max", "1MiB")
    writing = feed(child, range(total))
    assert b"--when-full block" in child.stderr.readline()
    assert writing.is_alive()
    with zmq.Context() as context, listen(context, endpoint) as socket:
        got = numbers(socket, total)
    out, _ = outcome(child)

    assert got == list(range(total))
    assert (child.returncode, SUMMARY.fullmatch(out)[1]) == (0, b"%d" % total)


@pytest.mark.parametrize("policy", ["drop-oldest", "drop-newest"])
def test_when_full_drops_from_the_right_end_and_counts(start, tmp_path, policy):
    endpoint = f"ipc://{tmp_path}/socket"
    total = 200_000
    child = start(ZMQPUSH, "-c", endpoint, "--queue-max", "1MiB", "--when-full", policy)
    feed(child, range(total)).join(PATIENCE)  # the writer never waits
    with open(f"/proc/{child.pid}/fd/0", "rb") as pipe:
        wait_until(lambda: pending_bytes(pipe.fileno(), termios.FIONREAD) == 0)  # all is read
    with zmq.Context() as context, listen(context, endpoint) as socket:
        got = numbers(socket, total, child)
    out, err = outcome(child)
    dropped, lost = losses(err)

    assert child.returncode == 1
    assert dropped > total / 2
    assert (len(got) + dropped, lost) == (total, 0)
    assert int(SUMMARY.fullmatch(out)[1]) == len(got)
    assert got == sorted(got)
    # The end was kept, or the beginning.
    assert (got[-1] == total - 1) == (policy == "drop-oldest")
    assert (got[0] == 0) == (policy == "drop-newest")


@pytest.mark.parametrize("policy", ["drop-oldest", "drop-newest"])
def test_nothing_is_dropped_while_a_receiver_takes_it(start, pull, policy):
    child = start(ZMQPUSH, "-c", pull.last_endpoint, "--queue-max", 1, "--when-full", policy)
    child.stdin.write(b"1\n")
    child.stdin.flush()
    assert receive(pull) == [1]  # so it is connected
    child.stdin.write(b"2\n" * 900)
    child.stdin.close()
    out, err = outcome(child)

    assert (SUMMARY.fullmatch(out)[1], losses(err)) == (b"901", (0, 0))


def test_a_message_stays_small_however_much_is_added_to_each_line(pull):
    text = "x" * 700
    options = ("--framing", "lines", "--field", f"text={text}")
    done = push("-c", pull.last_endpoint, *options, data=b"\n" * 100_000)
    sizes = []
    while pull.poll(100):
        sizes.append(len(pull.recv()))

    assert sent(done) == 100_000
    assert max(sizes) <= 16 << 20
    assert sum(sizes) > 100_000 * 700


@FRAMINGS
def test_a_receiver_that_is_killed_and_restarted_over_tcp(start, tmp_path, framing):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    total = 2_000_000
    child = start(ZMQPUSH, "-c", endpoint, "--framing", framing)
    feed(child, range(total))
    got = []
    for name in ("first", "second", "last"):
        path = tmp_path / name
        path.touch()
        receiver = start(ZMQPULL, "-qb", endpoint, "--to", path)
        if name == "last":
            child.wait(PATIENCE)
            receiver.terminate()
        else:  # the first one may take it all: it has room for a thousand messages
            wait_until(lambda path=path: path.stat().st_size > 5 << 20 or child.poll() is not None)
            receiver.kill()
        receiver.wait(PATIENCE)
        got += [int(n) for n in _find_numbers(path.read_bytes())]
    out, err = outcome(child)

    assert int(SUMMARY.fullmatch(out)[1]) + sum(losses(err)) == total
    assert got == sorted(set(got))


def test_it_does_not_wait_for_a_receiver_that_dies_at_the_end(start, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    receiver = start(ZMQPULL, "-b", endpoint, "--to", tmp_path / "out")
    child = start(ZMQPUSH, "-c", endpoint)
    child.stdin.write(b"first\n")
    child.stdin.flush()
    wait_until(lambda: statistics(child)[1] == 1)
    wait_until((tmp_path / "out").read_bytes)
    receiver.send_signal(signal.SIGSTOP)
    wait_until(lambda: b") T " in Path(f"/proc/{receiver.pid}/stat").read_bytes())
    child.stdin.write((b"x" * 2000 + b"\n") * 500)  # which only our kernel takes
    child.stdin.close()
    slow = b"zmqpush: the receiver is slow to take the last records\n"
    assert slow in iter(child.stderr.readline, b"")
    receiver.kill()

    assert child.wait(PATIENCE) == 1
    assert b"0 dropped, 0 lost, up to 50" in child.stderr.read()  # and the one that was taken


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_what_a_receiver_has_not_read_when_it_goes_is_reported(start, tmp_path, kind):
    """Its system has it, and forgets it with the connection."""
    family, path = (socket.AF_UNIX, f"{tmp_path}/x") if kind == "ipc" else (socket.AF_INET, None)
    with socket.socket(family) as server:
        server.bind(path or ("127.0.0.1", 0))
        server.listen()
        where = path or f"127.0.0.1:{server.getsockname()[1]}"
        child = start(ZMQPUSH, "-c", f"{kind}://{where}")
        peer, _ = server.accept()
        with peer:
            peer.sendall(greeting() + ready(b"PULL"))
            wait_until(lambda: b"READY" in peer.recv(4096))
            child.stdin.write(b"line\n" * 1000)
            child.stdin.close()
            wait_until(lambda: statistics(child)[1] == 1000)
    code, err = child.wait(PATIENCE), child.stderr.read()

    assert code == 1
    assert b"broke: of what was sent up to 1000 records may be lost\n" in err
    assert b"0 dropped, 0 lost, up to 1000 more may be" in err


def test_giving_up_counts_what_was_dropped_and_what_is_lost():
    data = b"".join(b"%d\n" % n for n in range(100_000))
    options = ("--queue-max", "1MiB", "--when-full", "drop-newest", "--timeout", "0.1")
    done = push("-c", NOBODY, *options, data=data)
    dropped, lost = losses(done.stderr)

    assert done.returncode == 69
    assert min(dropped, lost) > 0
    assert sent(done) + dropped + lost == 100_000


@pytest.mark.parametrize("policy", ["drop-oldest", "drop-newest", "block"])
def test_memory_is_bounded_while_a_gigabyte_meets_an_absent_receiver(start, policy):
    size = 1 << 30
    read, write = os.pipe()
    line = b"%0127d\n" % 0
    child = start(ZMQPUSH, "-c", NOBODY, "--when-full", policy, "--grace", "0.1", stdin=read)
    os.close(read)
    block = line * 1024
    os.set_blocking(write, policy != "block")
    written = 0
    while written < size:
        try:
            written += os.write(write, block)
        except BlockingIOError:
            if statistics(child)[2] * 170 > 60 << 20:
                break
            time.sleep(0.001)
    os.close(write)
    wait_until(lambda: statistics(child)[0] == -(-written // len(line)))
    peak = peak_memory(child)
    child.terminate()
    out, err = outcome(child)

    assert (written == size) == (policy != "block")
    assert peak < (64 << 20) + MEMORY_ABOVE_QUEUE
    assert SUMMARY.fullmatch(out)[1] == b"0"
    assert sum(losses(err)) == -(-written // len(line))


def peak_memory(child):
    with open(f"/proc/{child.pid}/status") as status:
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read())[1]) * 1024


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_an_idle_connected_process_makes_no_system_calls(start, pull, tmp_path):
    options = [("--framing", framing) for framing in ("single", "frames", "array", "lines")]
    options += [("--timeout", 1)]  # which is not looked at while nothing waits
    children = [start(ZMQPUSH, "-c", pull.last_endpoint, *words) for words in options]

    def ship(line):
        for child in children:
            child.stdin.write(line)
            child.stdin.flush()
            pull.recv()

    ship(b"first\n")
    trace = tmp_path / "trace"
    attach = [word for child in children for word in ("-p", child.pid)]
    strace = start("strace", "-f", "-o", trace, *attach)
    line = strace.stderr.readline()
    if b"attached" not in line:
        pytest.skip(f"strace cannot attach: {line.decode()}")

    def made_no_call_for_five_seconds():
        before = trace.read_bytes()
        time.sleep(5)
        return trace.read_bytes() == before

    wait_until(made_no_call_for_five_seconds)
    ship(b"second\n")
    wait_until(lambda: trace.read_bytes().count(b"second") >= len(children))
