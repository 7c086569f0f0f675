"""What may be on the standard input of ``zmqpush``, and the records that come of it."""

import asyncio
import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import tty
from pathlib import Path

import pytest
import zmq

from helpers import (
    FRAMINGS,
    NOBODY,
    PATIENCE,
    SUMMARY,
    WITHOUT_PRIVILEGE,
    ZMQPULL,
    ZMQPUSH,
    losses,
    push,
    sent,
    statistics,
    wait_until,
    wait_until_ready,
)
from zmqpush.sender.source import Source


def messages(socket, count):
    """Receive so many single records and return their messages."""
    return [json.loads(socket.recv())["message"] for _ in range(count)]


def shell(start, endpoint, redirection, data=b""):
    """Run ``zmqpush`` to its end with a redirection; return its exit code and outputs."""
    endpoint = endpoint if isinstance(endpoint, str) else endpoint.decode()
    child = start("sh", "-c", f"exec {ZMQPUSH} -c {endpoint} {redirection}")
    out, err = child.communicate(data, timeout=PATIENCE)
    return child.returncode, out, err


@pytest.mark.parametrize("kind", ["pipe", "socket", "terminal", "terminal that goes away"])
def test_a_lone_line_arrives_at_once_and_the_shared_descriptor_still_blocks(pull, start, kind):
    if kind == "socket":
        theirs, ours = (end.detach() for end in socket.socketpair())
    else:
        theirs, ours = os.pipe() if kind == "pipe" else os.openpty()[::-1]
    with open(theirs, "rb", buffering=0) as theirs, open(ours, "wb", buffering=0) as ours:
        child = start(ZMQPUSH, "-c", pull.last_endpoint, stdin=theirs)
        ours.write(b"alone\n")
        arrived, flags = messages(pull, 1), [fcntl.fcntl(theirs, fcntl.F_GETFL)]
        ours.write(b"again\n")
        arrived += messages(pull, 1)
        if kind == "terminal":
            ours.write(b"\x04")  # ctrl-D
        else:
            ours.close()
        code = child.wait(PATIENCE)
        flags.append(fcntl.fcntl(theirs, fcntl.F_GETFL))

    assert (arrived, code) == (["alone", "again"], 0)
    assert not any(flag & os.O_NONBLOCK for flag in flags)


def test_a_fifo_ends_when_its_writer_goes(pull, start, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    child = start("sh", "-c", f"exec {ZMQPUSH} -c {pull.last_endpoint.decode()} <{fifo}")
    with fifo.open("wb", buffering=0) as writer:
        writer.write(b"one\n")
        arrived = messages(pull, 1)
        writer.write(b"two\n")

    assert arrived + messages(pull, 1) == ["one", "two"]
    assert child.wait(PATIENCE) == 0


def test_a_regular_file_is_read_from_where_its_offset_is(pull, start, tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"skipped\none\ntwo")
    with path.open("rb", buffering=0) as file:
        file.seek(len(b"skipped\n"))
        out, _ = start(ZMQPUSH, "-c", pull.last_endpoint, stdin=file).communicate(timeout=PATIENCE)

    assert messages(pull, 2) == ["one", "two"]
    assert SUMMARY.fullmatch(out)[1] == b"2"


def test_dev_null_is_an_empty_input(start):
    code, out, err = shell(start, NOBODY, "</dev/null")

    assert (code, err, SUMMARY.fullmatch(out)[1]) == (0, b"", b"0")


@pytest.mark.parametrize("redirection", ["<&-", "0>/dev/null", "0>>file"])
def test_an_input_that_is_closed_or_only_written_to_is_one_line_and_exit_74(
    start, redirection, tmp_path
):
    code, _, err = shell(start, NOBODY, redirection.replace("file", f"{tmp_path}/file"))
    expected = b"zmqpush: cannot read standard input: it is closed, or not open for reading\n"

    assert (code, err) == (74, expected)


def epoll():
    with select.epoll() as instance:
        return os.dup(instance.fileno())


def listening():
    return socket.create_server(("127.0.0.1", 0)).detach()


@pytest.mark.parametrize(
    ("opened", "reason"),
    [
        (lambda: os.pipe()[1], "not open for reading"),
        (lambda: os.open("/etc/passwd", os.O_PATH), "not open for reading"),
        (lambda: os.open("/dev/null", os.O_PATH), "not open for reading"),
        (lambda: os.eventfd(0), "no file, pipe, terminal or socket"),
        (lambda: os.pidfd_open(os.getpid()), "no file, pipe, terminal or socket"),
        (epoll, "no file, pipe, terminal or socket"),
        (listening, "listens"),
        (lambda: socket.socket(socket.AF_UNIX).detach(), "Invalid argument"),
        (lambda: socket.socket().detach(), "not connected"),
        (lambda: os.open("/proc/self/ns/mnt", os.O_RDONLY), "Invalid argument"),
        (lambda: os.open("/proc/self/mem", os.O_RDONLY), "Input/output error"),
    ],
    ids=[
        *("write end", "path", "path of a device", "eventfd", "pidfd", "epoll", "listening"),
        *("unconnected", "unconnected TCP", "namespace", "memory"),
    ],
)
def test_what_is_no_input_is_one_line_and_exit_74(start, opened, reason):
    fd = opened()
    child = start(ZMQPUSH, "-c", NOBODY, stdin=fd)
    os.close(fd)
    _, err = child.communicate(timeout=PATIENCE)

    assert (child.returncode, err.count(b"\n")) == (74, 1)
    assert err.startswith(b"zmqpush: cannot read standard input: ")
    assert reason.encode() in err


def connection():
    """Return the two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        return server.accept()[0], ours


def reset(ours):
    """Close a TCP connection so that it fails at the other end."""
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ours.close()


def test_a_line_that_the_failure_of_the_input_cuts_is_marked(pull, start):
    theirs, ours = connection()
    child = start(ZMQPUSH, "-c", pull.last_endpoint, stdin=theirs)
    theirs.close()
    ours.sendall(b"whole\nha")
    whole = pull.recv()
    reset(ours)
    piece = json.loads(pull.recv())

    assert b"@partial" not in whole
    assert (piece["message"], piece["@partial"]) == ("ha", True)
    assert child.wait(PATIENCE) == 74


def test_what_was_read_before_the_input_fails_is_sent_or_counted(start):
    theirs, ours = connection()
    child = start(ZMQPUSH, "-c", NOBODY, "--timeout", "0.2", stdin=theirs)
    theirs.close()
    ours.sendall(b"one\ntwo\n")
    while statistics(child)[0] < 2:
        pass
    reset(ours)
    _, err = child.communicate(timeout=PATIENCE)

    assert b"Connection reset by peer" in err
    assert losses(err) == (0, 2)
    assert child.returncode != 0


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full"])
def test_an_output_that_cannot_be_written_hurts_nothing(pull, start, redirection):
    code, _, _ = shell(start, pull.last_endpoint, redirection, b"not UTF-8: \xff\n")

    assert messages(pull, 1) == [r"not UTF-8: \xff"]
    assert code == 0


@pytest.mark.parametrize(
    ("args", "data", "expected"),
    [
        ([], b"whole\npartial", ["whole", "partial"]),
        ([], b"\n\nx\n\n", ["", "", "x", ""]),
        ([], b"a\r\nb\rc\n\r\n\r\r\nd\r", ["a", "b\rc", "", "\r", "d\r"]),
        (["-0"], b"a\nb\0c\r\n\0\0", ["a\nb", "c\r\n", ""]),
        (["--null"], b"a\0b", ["a", "b"]),
        (["--delimiter", ";"], b"a;b\nc;", ["a", "b\nc"]),
        (["--delimiter", r"\r\n"], b"a\nb\r\nc\rd\r\n", ["a\nb", "c\rd"]),
        (["--delimiter", r"\x1e"], b"a\x1eb", ["a", "b"]),
        (["--delimiter", "é"], "aébèé".encode(), ["a", "bè"]),
        (["--delimiter", "aa"], b"xaaaya", ["x", "aya"]),
    ],
)
def test_lines_end_at_the_delimiter_and_with_the_input(pull, args, data, expected):
    done = push("-c", pull.last_endpoint, *args, data=data)

    assert (sent(done), done.stderr) == (len(expected), b"")
    assert messages(pull, len(expected)) == expected


def test_a_raw_record_may_end_with_a_part_of_the_delimiter(pull):
    args = ["--format", "raw", "--delimiter", r"\n\n"]
    done = push("-c", pull.last_endpoint, *args, data=b"a\n\nb\n")

    assert [pull.recv() for _ in range(sent(done))] == [b"a", b"b\n"]


def test_a_writer_may_pause_within_a_line_and_within_a_delimiter(pull, start):
    child = start(ZMQPUSH, "-c", pull.last_endpoint, "--delimiter", "::", bufsize=0)
    arrived = []
    for piece in (b"one::tw", b"o::thr:", b"ee::four:", b":five::"):
        child.stdin.write(piece)
        arrived += messages(pull, 1)

    assert arrived + messages(pull, 1) == ["one", "two", "thr:ee", "four", "five"]


@pytest.mark.parametrize("delimiter", [r"\n", r"\0", "::"])
def test_every_byte_comes_back_and_what_is_not_utf_8_is_counted(pull, delimiter):
    end = delimiter.encode().decode("unicode_escape").encode()
    values = [n for n in range(256) if bytes((n,)) != end]
    data = b"".join(b"<%c>%s" % (n, end) for n in values)
    done = push("-c", pull.last_endpoint, "--delimiter", delimiter, data=data)

    assert done.stderr == b"zmqpush: 128 bytes were not UTF-8\n"
    assert messages(pull, len(values)) == [
        f"<{chr(n)}>" if n < 0x80 else rf"<\x{n:02x}>" for n in values
    ]


@pytest.mark.parametrize("end", ["\n", ";", ""])
def test_a_line_that_is_too_long_is_split_and_its_pieces_are_marked(pull, end):
    line = "0123éééè😀😀end"
    args = ["--max-line", "5", "--delimiter", end or r"\n"]
    done = push("-c", pull.last_endpoint, *args, data=(line + end).encode())
    *pieces, last = (json.loads(pull.recv()) for _ in range(sent(done)))

    assert "".join(record["message"] for record in [*pieces, last]) == line
    assert all(len(record["message"].encode()) <= 5 for record in [*pieces, last])
    assert all(record["@partial"] is True for record in pieces)
    assert "@partial" not in last


@FRAMINGS
def test_a_message_has_the_shape_that_the_framing_says(pull, framing):
    done = push("-c", pull.last_endpoint, "--framing", framing, "app", data=b'a\n"\t\nc\n')
    pid = SUMMARY.fullmatch(done.stdout)[2]
    texts = (b"a", rb"\"\t", b"c")
    records = [b'{"message":"%s","type":"app","@pid":%s}' % (text, pid) for text in texts]
    expected = {
        "single": [[record] for record in records],
        "frames": [records],
        "array": [[b"[" + b",".join(records) + b"]"]],
        "lines": [[b"".join(record + b"\n" for record in records)]],
    }[framing]

    assert done.stderr == b""
    assert [pull.recv_multipart() for _ in expected] == expected


@pytest.mark.parametrize(
    ("framing", "frames"), [("frames", [b"a", b'"\xff']), ("lines", [b'a;"\xff;'])]
)
def test_raw_records_are_the_bytes_of_the_lines(pull, framing, frames):
    args = ["--format", "raw", "--framing", framing, "--delimiter", ";"]
    push("-c", pull.last_endpoint, *args, data=b'a;"\xff;')

    assert pull.recv_multipart() == frames


@pytest.mark.parametrize("format", ["json", "logstash", "ecs"])
def test_every_format_has_its_fields_and_those_that_are_added(pull, format):
    args = ["--field", 'a=b="c"', "--field", "é=", os.fsdecode(b'"caf\xe9" \\')]
    done = push("-c", pull.last_endpoint, "--format", format, *args, data=b"x\n")
    record = json.loads(pull.recv())
    moment = record.pop("@timestamp", None)
    pid, host, logtype = (
        int(SUMMARY.fullmatch(done.stdout)[2]),
        socket.gethostname(),
        '"caf\\xe9" \\',
    )
    tagged = {"type": logtype, "@pid": pid}
    ecs = {"ecs": {"version": "8.11.0"}, "event": {"dataset": logtype}}
    ecs |= {"host": {"name": host}, "process": {"pid": pid}}
    logstash = tagged | {"@version": "1", "host": host}
    own = {"json": tagged, "logstash": logstash, "ecs": ecs}[format]

    added = {"a": 'b="c"', "é": ""}
    added = {"labels": added} if format == "ecs" else added
    assert record == {"message": "x"} | added | own
    if format == "json":
        assert moment is None
    else:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", moment)


def records(socket, count):
    """Receive so many single records."""
    return [json.loads(socket.recv()) for _ in range(count)]


def shared_pipe():
    """Return a pipe that can only be read through this descriptor, and its other end."""
    read, write = os.pipe()
    os.fchmod(read, 0)
    return read, write


def shared_terminal():
    """Return a terminal that can only be read through this descriptor, and its other end."""
    other, terminal = os.openpty()
    os.fchmod(terminal, 0)
    return terminal, other


@pytest.mark.parametrize("opened", [shared_pipe, shared_terminal], ids=["pipe", "terminal"])
def test_of_several_readers_of_what_cannot_be_opened_again_none_hangs(start, pull, opened):
    read, write = opened()
    command = [*WITHOUT_PRIVILEGE, ZMQPUSH, "-c", pull.last_endpoint]
    children = [start(*command, stdin=read) for _ in range(3)]
    for child in children:
        statistics(child)
    arrived = []
    for number in range(20):  # each wakes all of them
        os.write(write, b"%d\n" % number)
        arrived += messages(pull, 1)
    for child in children:
        child.send_signal(signal.SIGTERM)

    assert [child.wait(PATIENCE) for child in children] == [0, 0, 0]
    assert arrived == [str(number) for number in range(20)]
    assert sum(int(SUMMARY.fullmatch(child.stdout.read())[1]) for child in children) == 20
    os.close(read)
    os.close(write)


def test_a_pipe_that_cannot_be_opened_again_is_read_whole_and_stays_as_it_is(start, pull):
    read, write = shared_pipe()
    flags = fcntl.fcntl(read, fcntl.F_GETFL)
    lines = [f"{number} {'x' * (number % 300)}" for number in range(20_000)]
    endpoint = pull.last_endpoint
    child = start(*WITHOUT_PRIVILEGE, ZMQPUSH, "-c", endpoint, "--framing", "lines", stdin=read)
    feeder = start("sh", "-c", "cat", stdout=write)
    os.close(write)
    feeder.stdin.write("\n".join(lines).encode())
    feeder.stdin.close()
    arrived = []
    while len(arrived) < len(lines):
        arrived += [json.loads(line)["message"] for line in pull.recv().splitlines()]

    assert child.wait(PATIENCE) == 0
    assert arrived == lines
    assert fcntl.fcntl(read, fcntl.F_GETFL) == flags
    os.close(read)


@contextlib.contextmanager
def half_a_line(start, pull, kind, *args):
    """Start ``zmqpush``, write a line and a half, and let the line arrive."""
    if kind == "socket":
        theirs, ours = (end.detach() for end in socket.socketpair())
    elif kind == "pipe that cannot be opened again":
        theirs, ours = shared_pipe()
    elif kind == "terminal":
        ours, theirs = os.openpty()
        tty.setraw(theirs)
    else:
        theirs, ours = os.pipe()
    command = [*WITHOUT_PRIVILEGE, ZMQPUSH, "-c", pull.last_endpoint, *args]
    child = start(*command, stdin=theirs)
    os.write(ours, b"whole\nha")
    assert b"whole" in pull.recv()
    yield child, theirs, ours
    os.close(theirs)
    with contextlib.suppress(OSError):
        os.close(ours)


KINDS = pytest.mark.parametrize(
    "kind", ["pipe", "pipe that cannot be opened again", "socket", "terminal"]
)


@KINDS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_line_that_a_signal_cuts_is_marked_and_its_rest_is_for_the_next_reader(
    start, pull, kind, number
):
    with half_a_line(start, pull, kind) as (child, theirs, ours):
        child.send_signal(number)
        assert child.wait(PATIENCE) == 0
        os.write(ours, b"lf\n")
        (piece,) = records(pull, 1)
        start(ZMQPUSH, "-c", pull.last_endpoint, stdin=theirs)
        (rest,) = records(pull, 1)

    assert (piece["message"], piece["@partial"]) == ("ha", True)
    assert (rest["message"], "@partial" in rest) == ("lf", False)


@KINDS
def test_a_line_that_ends_with_the_input_is_whole_though_a_signal_comes(start, pull, kind):
    with half_a_line(start, pull, kind) as (child, _, ours):
        child.send_signal(signal.SIGSTOP)
        os.close(ours)
        child.send_signal(signal.SIGTERM)
        child.send_signal(signal.SIGCONT)
        (record,) = records(pull, 1)
        assert child.wait(PATIENCE) == 0

    assert (record["message"], "@partial" in record) == ("ha", False)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--format", "ecs"], lambda text: json.loads(text)["tags"] == ["partial"]),
        (["--format", "logstash"], lambda text: json.loads(text)["@partial"] is True),
        (["--format", "raw"], lambda text: text == b"ha"),
    ],
)
def test_the_mark_of_a_line_that_is_cut_is_that_of_the_format(start, pull, args, expected):
    with half_a_line(start, pull, "pipe", *args) as (child, _, _):
        child.send_signal(signal.SIGTERM)

        assert expected(pull.recv())


@pytest.mark.parametrize(
    ("args", "data", "first", "rest"),
    [
        (["--delimiter", "::"], b"one::two:|:", "two:", ":"),
        ([], b"one\ntwo\r|\n", "two\r", ""),
        ([], b"one\ncaf\xc3|\xa9\n", r"caf\xc3", r"\xa9"),
    ],
)
def test_a_line_may_be_cut_anywhere_and_no_byte_is_lost(start, pull, args, data, first, rest):
    read, write = os.pipe()
    begin, end = data.split(b"|")
    child = start(ZMQPUSH, "-c", pull.last_endpoint, *args, stdin=read)
    os.write(write, begin)
    messages(pull, 1)
    child.send_signal(signal.SIGTERM)
    (piece,) = records(pull, 1)
    os.write(write, end)
    os.close(write)
    start(ZMQPUSH, "-c", pull.last_endpoint, *args, stdin=read)
    os.close(read)

    assert (piece["message"], piece["@partial"]) == (first, True)
    assert messages(pull, 1) == [rest]


def test_a_file_that_a_signal_leaves_in_mid_line_is_told_and_the_line_is_marked(start, tmp_path):
    path, endpoint = tmp_path / "log", f"ipc://{tmp_path}/socket"
    path.write_bytes(b"".join(b"%d %s\n" % (n, b"x" * 1000) for n in range(1000)))
    with path.open("rb") as file:
        child = start(ZMQPUSH, "-c", endpoint, "--queue-max", 1, "--grace", PATIENCE, stdin=file)
        assert b"no receiver" in child.stderr.readline()  # it has read what it may
        child.send_signal(signal.SIGTERM)
        with zmq.Context() as context, context.socket(zmq.PULL) as pull:
            pull.bind(endpoint)
            arrived = []
            while child.poll() is None or pull.poll(100):
                if pull.poll(10):
                    arrived.append(json.loads(pull.recv()))
        rest = path.stat().st_size - file.seek(0, os.SEEK_CUR)
    *whole, last = arrived

    assert child.returncode == 1
    assert f"before {rest} bytes of the input were read".encode() in child.stderr.read()
    assert last["@partial"] is True
    assert not any("@partial" in record for record in whole)


@pytest.mark.parametrize("kind", ["truncated", "grown", "/proc/cpuinfo", "/sys/kernel/mm/ksm/run"])
def test_a_file_whose_size_says_nothing_was_read_to_its_end(start, tmp_path, kind):
    path = tmp_path / "log"
    if kind.startswith("/"):
        path = Path(kind)
    else:
        path.write_bytes(b"a line\n" * 1000)
    with path.open("rb", buffering=0) as file:
        child = start(ZMQPUSH, "-c", f"ipc://{tmp_path}/socket", "--grace", PATIENCE, stdin=file)
        wait_until(lambda: statistics(child)[0])
        wait_until(lambda: not os.pread(file.fileno(), 1, file.seek(0, os.SEEK_CUR)))
        if kind == "truncated":
            os.truncate(path, 7)
        elif kind == "grown":
            with path.open("ab") as more:
                more.write(b"more\n")
        child.send_signal(signal.SIGTERM)
        with zmq.Context() as context, context.socket(zmq.PULL) as pull:
            pull.bind(f"ipc://{tmp_path}/socket")
            while child.poll() is None or pull.poll(100):
                if pull.poll(10):
                    pull.recv()

    assert child.returncode == 0
    assert b"a signal came" not in child.stderr.read()


def datagrams(kind, tmp_path):
    """Return a socket that keeps the borders of messages, and one that sends to it."""
    if kind == "seqpacket":
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if kind == "pair":
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
    theirs, ours = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(2))
    theirs.bind(f"{tmp_path}/datagrams" if kind == "unix" else ("127.0.0.1", 0))
    ours.connect(theirs.getsockname())
    return theirs, ours


DATAGRAMS = pytest.mark.parametrize("kind", ["unix", "udp", "pair", "seqpacket"])


@DATAGRAMS
@pytest.mark.parametrize(
    ("args", "sent", "expected"),
    [
        ([], [b"one", b"two\n", b"three\r\n"], ["one", "two", "three"]),
        ([], [b"", b"one", b"", b"", b"two"], ["one", "two"]),
        ([], [b"\n", b"one\n\n", b" two\nthree", b"\n"], ["", "one", "", " two", "three", ""]),
        (["-0"], [b"one\n", b"two\0three", b"four\0"], ["one\n", "two", "three", "four"]),
        (["--delimiter", "::"], [b"one:", b":two::", b"::"], ["one:", ":two", ""]),
        (["--delimiter", "aa"], [b"xa", b"xaaa", b"a"], ["xa", "x", "a", "a"]),
    ],
)
def test_a_datagram_ends_a_line(pull, start, tmp_path, kind, args, sent, expected):
    theirs, ours = datagrams(kind, tmp_path)
    with theirs, ours:
        for datagram in sent[:-1]:
            ours.send(datagram)
        child = start(ZMQPUSH, "-c", pull.last_endpoint, *args, stdin=theirs)
        before = messages(pull, len(expected) - 1)
        ours.send(sent[-1])
        before += messages(pull, 1)
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=PATIENCE)

    assert before == expected
    assert (child.returncode, err) == (0, b"")
    assert SUMMARY.fullmatch(out)[1] == b"%d" % len(expected)


@DATAGRAMS
def test_a_datagram_is_read_whole_and_split_like_any_line(pull, start, tmp_path, kind):
    theirs, ours = datagrams(kind, tmp_path)
    size = 65_000 if kind == "udp" else 150_000
    lines = ["é" * (size // 2), "short", "x" * size]
    with theirs, ours:
        child = start(ZMQPUSH, "-c", pull.last_endpoint, "--max-line", 10_000, stdin=theirs)
        joined = [""]
        for line in lines:
            ours.send(line.encode())
            while joined[-1] != line:
                (record,) = records(pull, 1)
                joined[-1] += record["message"]
                assert record.get("@partial", False) == (joined[-1] != line)
            joined.append("")
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=PATIENCE)

    assert joined == [*lines, ""]
    assert (child.returncode, err) == (0, b"")


def test_a_datagram_of_many_lines_is_acknowledged_like_any_input(start, tmp_path):
    theirs, ours = datagrams("unix", tmp_path)
    endpoint = f"ipc://{tmp_path}/ack"
    with theirs, ours:
        puller = start(ZMQPULL, "-a", endpoint, "--to", tmp_path / "out", "-n", "150000")
        child = start(ZMQPUSH, "--ack", "-c", endpoint, "x" * 200, stdin=theirs)
        ours.send(b"\n" * 150_000)
        assert puller.wait(PATIENCE) == 0
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=PATIENCE)

    assert (child.returncode, err) == (0, b"")
    assert (tmp_path / "out").read_bytes().count(b"\n") == 150_000


@pytest.mark.parametrize("last", [[], [b""], [b"", b"", b"three"]])
def test_a_connection_of_packets_ends_when_it_is_closed(pull, start, tmp_path, last):
    theirs, ours = datagrams("seqpacket", tmp_path)
    child = start(ZMQPUSH, "-c", pull.last_endpoint, stdin=theirs)
    theirs.close()
    for packet in (b"one", b"", b"two", *last):
        ours.send(packet)
    ours.close()
    expected = ["one", "two"] + [packet.decode() for packet in last if packet]

    assert messages(pull, len(expected)) == expected
    assert child.wait(PATIENCE) == 0
    assert SUMMARY.fullmatch(child.stdout.read())[1] == b"%d" % len(expected)


@DATAGRAMS
def test_a_socket_of_datagrams_that_is_shut_down_is_at_its_end(pull, start, tmp_path, kind):
    theirs, ours = datagrams(kind, tmp_path)
    with theirs, ours:
        child = start(ZMQPUSH, "-c", pull.last_endpoint, stdin=theirs)
        ours.send(b"one")
        assert messages(pull, 1) == ["one"]
        theirs.shutdown(socket.SHUT_RD) if kind != "udp" else shut_down(theirs)

        assert child.wait(PATIENCE) == 0


def shut_down(theirs):
    # UDP wants a peer for that; the system does it all the same.
    with contextlib.suppress(OSError):
        theirs.shutdown(socket.SHUT_RD)


@pytest.mark.skipif(not hasattr(socket, "AF_NETLINK"), reason="no netlink")
def test_a_datagram_that_is_cut_is_marked_and_told_and_the_next_one_is_not(pull, start):
    # A kind whose size the system does not say.
    usersock = 2
    theirs, ours = (socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, usersock) for _ in "12")
    with theirs, ours:
        theirs.bind((0, 0))
        child = start(ZMQPUSH, "-c", pull.last_endpoint, stdin=theirs)
        for datagram in (b"one\n" + b"x" * 100_000, b"two"):
            ours.sendto(datagram, theirs.getsockname())
        one, piece, two = records(pull, 3)
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=PATIENCE)

    assert (one["message"], two["message"]) == ("one", "two")
    assert piece["message"] == "x" * (65_536 - 4)
    assert [record.get("@partial") for record in (one, piece, two)] == [None, True, None]
    assert b"longer than 65536 bytes" in err
    assert child.returncode == 1


def test_datagrams_that_had_no_room_are_told(pull, start, tmp_path):
    theirs, ours = datagrams("udp", tmp_path)
    with theirs, ours:
        child = start(ZMQPUSH, "-c", pull.last_endpoint, stdin=theirs)
        ours.send(b"first")
        first = messages(pull, 1)
        child.send_signal(signal.SIGSTOP)
        for _ in range(10_000):
            ours.send(b"x" * 1000)
        child.send_signal(signal.SIGTERM)
        child.send_signal(signal.SIGCONT)
        out, err = child.communicate(timeout=PATIENCE)
    (lost,) = re.findall(rb"(\d+) datagrams are lost", err)

    assert first == ["first"]
    assert int(SUMMARY.fullmatch(out)[1]) + int(lost) == 10_001
    assert child.returncode == 1


@DATAGRAMS
def test_datagrams_without_end_do_not_keep_a_signal_from_being_heard(pull, start, tmp_path, kind):
    theirs, ours = datagrams(kind, tmp_path)
    with theirs, ours:
        child = start(ZMQPUSH, "-c", pull.last_endpoint, "--grace", 1, stdin=theirs)
        wait_until_ready(child)
        child.send_signal(signal.SIGTERM)
        ours.setblocking(False)
        for number in itertools.count():
            with contextlib.suppress(BlockingIOError, ConnectionError):
                ours.send(b"" if number % 100 else b"x")
            if child.poll() is not None:
                break

    assert child.returncode in (0, 1)
    assert SUMMARY.fullmatch(child.stdout.read())


@pytest.mark.skipif(not shutil.which("logger"), reason="logger is not installed: bsdutils")
def test_what_logger_sends_to_a_socket_of_datagrams_is_a_record_each(pull, start, tmp_path):
    theirs, ours = datagrams("unix", tmp_path)
    with theirs, ours:
        start(ZMQPUSH, "-c", pull.last_endpoint, stdin=theirs)
        command = ["logger", "-d", "-u", f"{tmp_path}/datagrams", "-t", "app"]
        for text in ("one", "two"):
            subprocess.run([*command, text], check=True, timeout=PATIENCE)
        first, second = messages(pull, 2)

    assert first.startswith("<13>")
    assert (first.endswith("app: one"), second.endswith("app: two")) == (True, True)


@pytest.fixture
def tracing():
    """Return an instance of the kernel's tracing of our own, if that can be had."""
    instance = Path("/sys/kernel/tracing/instances") / f"zmqpush-test-{os.getpid()}"
    try:
        instance.mkdir()
    except OSError as exc:
        pytest.skip(f"the kernel's tracing cannot be used: {exc}")
    yield instance
    wait_until(lambda: removes(instance))


def removes(instance):
    with contextlib.suppress(OSError):
        instance.rmdir()
    return not instance.exists()


def test_a_trace_pipe_is_waited_for_and_ends_with_a_signal(pull, start, tracing):
    marker = tracing / "trace_marker"
    with (tracing / "trace_pipe").open("rb", buffering=0) as pipe:
        child = start(ZMQPUSH, "-c", pull.last_endpoint, stdin=pipe)
        for text in ("one", "two"):
            marker.write_text(text)
            (message,) = messages(pull, 1)
            assert message.endswith(f": {text}")
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=PATIENCE)

    assert (child.returncode, err, SUMMARY.fullmatch(out)[1]) == (0, b"", b"2")


@pytest.mark.skipif(not os.access("/dev/kmsg", os.R_OK), reason="/dev/kmsg cannot be read")
def test_the_kernels_messages_are_read_from_the_oldest_on_and_waited_for(pull, start):
    with open("/dev/kmsg", "rb", buffering=0) as kmsg:
        oldest = os.read(kmsg.fileno(), 8192).decode(errors="replace").partition("\n")[0]
        kmsg.seek(0)
        child = start(ZMQPUSH, "-c", pull.last_endpoint, stdin=kmsg)
        (message,) = messages(pull, 1)
        child.send_signal(signal.SIGTERM)

        assert message == oldest
        while child.poll() is None:  # it waits until all is read, however much that is
            if pull.poll(10):
                pull.recv()
        assert child.wait(PATIENCE) == 0


@pytest.mark.skipif(not os.access("/dev/kmsg", os.R_OK), reason="/dev/kmsg cannot be read")
def test_messages_of_the_kernel_that_were_overwritten_are_told(monkeypatch):
    read, told = os.read, []
    failures = [BrokenPipeError(errno.EPIPE, "Broken pipe")]

    def read_after_a_gap(fd, size):
        if failures and size == 4096:
            raise failures.pop()
        return read(fd, size)

    async def first():
        with open("/dev/kmsg", "rb", buffering=0) as kmsg:
            source = Source(kmsg.fileno(), 4096, warn=told.append)
            monkeypatch.setattr(os, "read", read_after_a_gap)
            return await source.read(), source.gaps

    chunk, gaps = asyncio.run(first())

    assert (chunk.endswith(b"\n"), gaps) == (True, 1)
    assert told == ["standard input: the kernel has overwritten messages"]
