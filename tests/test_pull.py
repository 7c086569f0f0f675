"""The installed receiver, with bare PUSH peers."""

import array
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import termios
import time

import pytest
import zmq

from helpers import PATIENCE, WITHOUT_PRIVILEGE, ZMQPULL, wait_until

ONE = b'{"n":1}\n'
RECORDS = [b'{"n":%d,"text":"%s"}\n' % (n, b"x" * 80) for n in range(1000)]
DATA = b"".join(RECORDS)
ARRAY = b"[%s]" % b",".join(RECORDS)
FULL = b"zmqpull: cannot write to %s: No space left on device: waiting\n"


@pytest.fixture
def endpoint(tmp_path):
    return f"ipc://{tmp_path}/socket"


@pytest.fixture
def sender(endpoint):
    """Return a function that makes a bare PUSH socket, connected to the endpoint."""
    sockets = []
    with zmq.Context() as context:

        def connect() -> zmq.Socket:
            sockets.append(context.socket(zmq.PUSH))
            sockets[-1].setsockopt(zmq.SNDTIMEO, int(PATIENCE * 1000))
            sockets[-1].setsockopt(zmq.RECONNECT_IVL, 10)
            sockets[-1].connect(endpoint)
            return sockets[-1]

        yield connect
        context.destroy(linger=0)


@pytest.fixture
def small_disk(tmp_path):
    """Return where a file system of one MiB is mounted."""
    mount = f"mount -t tmpfs -o size=1m zmqpull {tmp_path}"
    if subprocess.run(mount, shell=True, check=False).returncode:
        pytest.skip("a small tmpfs cannot be mounted here: that takes root")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def finish(child: subprocess.Popen) -> tuple[int, bytes, bytes]:
    """Return the exit code, and what there is to read, of a program that ends."""
    out, err = child.communicate(timeout=PATIENCE)
    assert b"Traceback" not in err
    return child.returncode, out, err


def wait_until_blocked(child: subprocess.Popen) -> None:
    """Return once the pipe that the program writes to is full."""
    full = fcntl.fcntl(child.stdout, fcntl.F_GETPIPE_SZ) - 4096
    unread = array.array("i", [0])
    wait_until(lambda: fcntl.ioctl(child.stdout, termios.FIONREAD, unread) or unread[0] > full)


@pytest.mark.parametrize(
    "messages",
    [
        [[record.strip()] for record in RECORDS],
        [RECORDS],
        [[ARRAY]],
        [[DATA]],
        [[DATA.strip()]],
        [RECORDS[:5], [b"[%s]" % b",".join(RECORDS[5:9])], [b"".join(RECORDS[9:])]],
    ],
    ids=["single", "frames", "array", "lines", "no final newline", "mixed"],
)
def test_every_framing_of_a_bare_peer_becomes_lines(start, endpoint, sender, messages):
    child = start(ZMQPULL, "-b", endpoint, "-n", "1000")
    push = sender()
    for message in messages:
        push.send_multipart(message)

    assert finish(child) == (0, DATA, b"zmqpull: 1000 records written\n")


def test_garbage_becomes_counted_messages_and_an_array_may_hold_too_much(start, endpoint, sender):
    child = start(ZMQPULL, "-b", endpoint, "-n", "6")
    sender().send_multipart([b"no json", ONE, b"\xff\0", b'{"a":[1', b"2]}", b"[%s,2,3]" % ONE])
    code, out, err = finish(child)
    messages = [json.loads(line).get("message") for line in out.splitlines()]

    assert messages == ["no json", None, "\\xff\0", '{"a":[1', "2]}", None]
    told = b"6 records written, 4 of them were no JSON object, 1 bytes were not UTF-8"
    assert (code, err) == (0, b"zmqpull: %s\n" % told)


def test_it_appends_to_a_file_and_opens_it_anew_on_sighup(start, endpoint, sender, tmp_path):
    path, old = tmp_path / "out", tmp_path / "out.1"
    path.write_bytes(ONE)
    child = start(ZMQPULL, "-b", endpoint, "-n", "1000", "--to", path)
    push = sender()
    for number, record in enumerate(RECORDS[:-1]):
        push.send(record)
        if number == 100:
            wait_until(lambda: path.stat().st_size > len(ONE))
            path.rename(old)
        if number == 200:
            child.send_signal(signal.SIGHUP)
    wait_until(path.exists)
    push.send(RECORDS[-1])

    assert finish(child)[:2] == (0, b"")
    assert path.read_bytes().endswith(RECORDS[-1])
    assert old.read_bytes() + path.read_bytes() == ONE + DATA


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("frames", [[DATA * 20], RECORDS * 20], ids=["few", "many"])
def test_what_was_received_before_a_signal_is_written(start, endpoint, sender, number, frames):
    child = start(ZMQPULL, "-b", endpoint, "--grace", PATIENCE)
    sender().send_multipart(frames)
    wait_until_blocked(child)
    child.send_signal(number)

    assert finish(child) == (0, DATA * 20, b"zmqpull: 20000 records written\n")


def test_an_interrupt_that_the_parent_ignored_stays_ignored(start, endpoint, sender):
    child = start("sh", "-c", f"trap '' INT; exec {ZMQPULL} -q -b {endpoint} -n 2")
    push = sender()
    push.send(ONE)

    assert child.stdout.readline() == ONE
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGINT)
    push.send(ONE)
    assert finish(child) == (0, ONE, b"")


def test_it_ends_quietly_by_itself_when_its_reader_goes(start, endpoint, sender):
    child = start(ZMQPULL, "-q", "-b", endpoint)
    sender().send(ONE)

    assert child.stdout.readline() == ONE
    child.stdout.close()
    assert child.wait(PATIENCE) == 0
    assert child.stderr.read() == b""


def test_a_full_disk_is_waited_for_and_nothing_is_lost(small_disk, start, endpoint, sender):
    ballast, path = small_disk / "ballast", small_disk / "out"
    ballast.write_bytes(bytes(960 << 10))
    child = start(ZMQPULL, "-b", endpoint, "-n", "3000", "--to", path)
    push = sender()
    push.send(ARRAY)

    assert child.stderr.readline() == FULL % bytes(path)
    push.send_multipart(RECORDS)
    push.send(DATA)
    ballast.unlink()
    code, out, err = finish(child)
    again = rb"zmqpull: writing to %s again \(after \d+\.\d s\)\n" % bytes(path)
    assert (code, out) == (0, b"")
    assert re.fullmatch(again + b"zmqpull: 3000 records written\n", err)
    assert path.read_bytes() == DATA * 3


@pytest.mark.parametrize("frames", [[DATA * 20], RECORDS * 20], ids=["few", "many"])
def test_what_a_full_output_did_not_take_in_time_is_told_as_lost(start, endpoint, sender, frames):
    with open("/dev/full", "wb") as full:
        child = start(ZMQPULL, "-b", endpoint, "--grace", "0.2", stdout=full)
    sender().send_multipart(frames)

    assert child.stderr.readline() == FULL % b"standard output"
    child.send_signal(signal.SIGTERM)
    code, _, err = finish(child)
    assert (code, re.findall(rb"(\d+) lost", err)) == (74, [b"20000"])


@pytest.mark.parametrize("to", ["-", "/dev/stdout"])
def test_what_is_written_and_what_is_told_as_lost_make_up_all(start, endpoint, sender, to):
    child = start(ZMQPULL, "-b", endpoint, "--to", to)
    sender().send(ARRAY)
    wait_until_blocked(child)
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGINT)

    assert child.wait(PATIENCE) == 74  # though nobody reads
    _, out, err = finish(child)
    written = out.count(b"\n")
    assert out == DATA[: len(out)]
    assert re.findall(rb"(\d+) records written", err) == [b"%d" % written]
    assert re.findall(rb"(\d+) lost", err) == [b"%d" % (1000 - written)]


def test_a_slow_reader_loses_nothing(start, endpoint, sender):
    child = start(ZMQPULL, "-q", "-b", endpoint, "-n", "40000")
    push = sender()
    for _ in range(20):
        push.send(DATA)
        push.send_multipart(RECORDS)
    wait_until_blocked(child)

    assert finish(child) == (0, DATA * 40, b"")


def test_several_senders_send_at_once(start, endpoint, sender):
    child = start(ZMQPULL, "-q", "-b", endpoint, "-n", "4000")
    begins = {b'{"from":%d,' % number: sender() for number in range(4)}
    for record in RECORDS:
        for begin, push in begins.items():
            push.send(begin + record[1:])
    lines = finish(child)[1].splitlines(True)

    for begin in begins:
        assert [b"{" + ln.removeprefix(begin) for ln in lines if ln.startswith(begin)] == RECORDS


def test_it_connects_to_a_sender_that_binds(start):
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.bind("tcp://127.0.0.1:*")
        child = start(ZMQPULL, "-q", "-c", push.last_endpoint, "-n", "1000")
        push.send_multipart(RECORDS)

        assert finish(child) == (0, DATA, b"")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--to /", 74, "cannot open /: Is a directory"),
        ("--to /nowhere/out", 74, "cannot open /nowhere/out: No such file or directory"),
        ("-b tcp://127.0.0.1:{port}", 69, "cannot bind tcp://127.0.0.1:{port}: Address already in"),
        ("-b localhost:5014", 2, "'localhost:5014' is not an endpoint"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(start, endpoint, options, code, message):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        child = start(ZMQPULL, "-b", endpoint, *options.format(port=port).split())
        done = finish(child)

    assert (done[0], done[1]) == (code, b"")
    assert message.format(port=port) in done[2].decode()
    assert done[2].count(b"\n") == 1 or code == 2  # with the usage


def test_a_pipe_that_cannot_be_opened_again_gets_everything_in_order(start, endpoint, sender):
    read, write = os.pipe()
    os.fchmod(write, 0)
    command = [*WITHOUT_PRIVILEGE, ZMQPULL, "-q", "-b", endpoint, "-n", "20000"]
    child = start(*command, stdout=write)
    os.close(write)
    sender().send(DATA * 20)
    with open(read, "rb") as out:
        assert out.read() == DATA * 20

    assert child.wait(PATIENCE) == 0


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_of_several_writers_to_what_cannot_be_opened_again_none_hangs(start, tmp_path, kind):
    read, write = os.pipe() if kind == "pipe" else os.openpty()
    os.fchmod(write, 0)
    command = [*WITHOUT_PRIVILEGE, ZMQPULL, "--grace", "0.2", "-b"]
    children = [start(*command, f"ipc://{tmp_path}/{n}", stdout=write) for n in range(3)]
    unread = array.array("i", [0])

    def is_full():
        before = fcntl.ioctl(read, termios.FIONREAD, unread) or unread[0]
        time.sleep(0.2)
        fcntl.ioctl(read, termios.FIONREAD, unread)
        return before == unread[0] > 2000

    with zmq.Context() as context:
        pushes = [context.socket(zmq.PUSH) for _ in children]
        for n, push in enumerate(pushes):
            push.connect(f"ipc://{tmp_path}/{n}")
            push.send(DATA * 20)
        for _ in range(5):
            wait_until(is_full)
            os.read(read, 4096)  # wakes all of them
        wait_until(is_full)
        for child in children:
            child.send_signal(signal.SIGTERM)
        codes = [child.wait(PATIENCE) for child in children]
        context.destroy(linger=0)
    os.close(read)
    os.close(write)

    assert codes == [74, 74, 74]
