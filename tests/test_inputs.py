"""What may be on the standard input of ``zmqpush``, and the records that come of it."""

import fcntl
import json
import os
import pty
import re
import socket
import struct

import pytest

from helpers import NOBODY, PATIENCE, SUMMARY, ZMQPUSH, losses, push, sent, statistics

CTRL_D = b"\x04"


def messages(socket, count):
    """Receive so many single records and return their messages."""
    return [json.loads(socket.recv())["message"] for _ in range(count)]


def pair(kind):
    """Return a descriptor for the child to read and the one to write to it."""
    if kind == "pipe":
        return os.pipe()
    if kind == "pty":
        return os.openpty()[::-1]
    return tuple(end.detach() for end in socket.socketpair())


@pytest.mark.parametrize("kind", ["pipe", "pty", "socket"])
def test_a_lone_line_arrives_at_once_and_the_shared_descriptor_still_blocks(pull, start, kind):
    theirs, ours = pair(kind)
    child = start(ZMQPUSH, "-c", pull.last_endpoint, stdin=theirs)
    os.write(ours, b"alone\n")
    arrived = messages(pull, 1)
    while_it_runs = fcntl.fcntl(theirs, fcntl.F_GETFL)
    os.write(ours, b"again\n")
    arrived += messages(pull, 1)
    if kind == "pty":
        os.write(ours, CTRL_D)
    else:
        os.close(ours)
    code = child.wait(PATIENCE)
    afterwards = fcntl.fcntl(theirs, fcntl.F_GETFL)
    os.close(theirs)
    if kind == "pty":
        os.close(ours)

    assert arrived == ["alone", "again"]
    assert not while_it_runs & os.O_NONBLOCK
    assert not afterwards & os.O_NONBLOCK
    assert code == 0


def test_a_terminal_that_goes_away_ends_the_input(pull, start):
    ours, theirs = pty.openpty()
    child = start(ZMQPUSH, "-c", pull.last_endpoint, stdin=theirs)
    os.close(theirs)
    os.write(ours, b"typed\n")
    arrived = messages(pull, 1)
    os.close(ours)

    assert arrived == ["typed"]
    assert child.wait(PATIENCE) == 0


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


@pytest.mark.parametrize("path", ["/dev/null", "/proc/self/mem"])
def test_a_device_without_input_ends_at_once(pull, start, path):
    with open(path, "rb", buffering=0) as file:
        child = start(ZMQPUSH, "-c", pull.last_endpoint, stdin=file)
        out, err = child.communicate(timeout=PATIENCE)

    if path == "/dev/null":
        assert (child.returncode, err) == (0, b"")
        assert SUMMARY.fullmatch(out)[1] == b"0"
    else:
        assert (child.returncode, out) == (74, b"")
        assert err == b"zmqpush: cannot read standard input: Input/output error\n"


def test_a_closed_input_is_one_line_on_standard_error():
    done = push("-c", NOBODY, preexec_fn=lambda: os.close(0))

    assert done.returncode == 74
    assert done.stderr == b"zmqpush: cannot read standard input: Bad file descriptor\n"


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full"])
def test_an_output_that_cannot_be_written_hurts_nothing(pull, start, redirection):
    command = f"exec {ZMQPUSH} -c {pull.last_endpoint.decode()} {redirection}"
    child = start("sh", "-c", command)
    child.communicate(b"not UTF-8: \xff\n", timeout=PATIENCE)

    assert messages(pull, 1) == [r"not UTF-8: \xff"]
    assert child.returncode == 0


def test_what_was_read_before_the_input_fails_is_not_forgotten(start):
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    child = start(ZMQPUSH, "-c", NOBODY, "--timeout", "0.2", stdin=theirs)
    theirs.close()
    ours.sendall(b"one\ntwo\n")
    while statistics(child)[0] < 2:
        pass
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset
    ours.close()
    _, err = child.communicate(timeout=PATIENCE)

    assert b"Connection reset by peer" in err
    assert losses(err) == (0, 2)
    assert child.returncode != 0


@pytest.mark.parametrize(
    ("args", "data", "expected"),
    [
        ([], b"whole\npartial", ["whole", "partial"]),
        ([], b"\n\nx\n\n", ["", "", "x", ""]),
        ([], b"a\r\nb\rc\n\r\n\r\r\nd\r", ["a", "b\rc", "", "\r", "d\r"]),
        ([], "Gr\u00fc\u00dfe \U0001f600\n".encode(), ["Gr\u00fc\u00dfe \U0001f600"]),
        (["-0"], b"a\nb\0c\r\n\0\0", ["a\nb", "c\r\n", ""]),
        (["--null"], b"a\0b", ["a", "b"]),
        (["--delimiter", ";"], b"a;b\nc;", ["a", "b\nc"]),
        (["--delimiter", r"\r\n"], b"a\nb\r\nc\rd\r\n", ["a\nb", "c\rd"]),
        (["--delimiter", r"\x1e"], b"a\x1eb", ["a", "b"]),
        (["--delimiter", "\u00e9"], "a\u00e9b\u00e8\u00e9".encode(), ["a", "b\u00e8"]),
        (["--delimiter", "aa"], b"xaaaya", ["x", "aya"]),
    ],
)
def test_lines_end_at_the_delimiter_and_with_the_input(pull, args, data, expected):
    done = push("-c", pull.last_endpoint, *args, data=data)

    assert (sent(done), done.stderr) == (len(expected), b"")
    assert messages(pull, len(expected)) == expected


def test_a_writer_may_pause_within_a_line_and_within_a_delimiter(pull, start):
    child = start(ZMQPUSH, "-c", pull.last_endpoint, "--delimiter", "::", bufsize=0)
    arrived = []
    for piece in (b"one::tw", b"o::thr:", b"ee::four:", b":five::"):
        child.stdin.write(piece)
        arrived += messages(pull, 1)

    assert arrived == ["one", "two", "thr:ee", "four"]
    assert messages(pull, 1) == ["five"]


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


@pytest.mark.parametrize("framing", ["single", "lines"])
@pytest.mark.parametrize("end", ["\n", ";", ""])
def test_a_line_that_is_too_long_is_split_and_its_pieces_are_marked(pull, framing, end):
    line = "0123\u00e9\u00e9\u00e9\U0001f600\U0001f600end"
    args = ["--framing", framing, "--max-line", "5", "--delimiter", end or r"\n"]
    done = push("-c", pull.last_endpoint, *args, data=f"{line}{end}".encode())
    received = []
    while len(received) < sent(done):
        received += map(json.loads, pull.recv_multipart()[0].splitlines())

    assert "".join(record["message"] for record in received) == line
    assert max(len(record["message"].encode()) for record in received) <= 5
    assert [record.get("@partial") for record in received] == [True] * (len(received) - 1) + [None]


def test_a_raw_record_may_end_with_a_part_of_the_delimiter(pull):
    done = push(
        "-c", pull.last_endpoint, "--format", "raw", "--delimiter", r"\n\n", data=b"a\n\nb\n"
    )

    assert [pull.recv() for _ in range(sent(done))] == [b"a", b"b\n"]


@pytest.mark.parametrize("format", ["json", "raw"])
@pytest.mark.parametrize("framing", ["single", "frames", "array", "lines"])
def test_a_message_has_the_shape_that_the_framing_says(pull, framing, format):
    if (framing, format) == ("array", "raw"):
        pytest.skip("raw records are not JSON")
    args = ["-c", pull.last_endpoint, "--framing", framing, "--format", format, "nginx"]
    done = push(*args, data=b"a\nb\t\nc")
    pid = SUMMARY.fullmatch(done.stdout)[2]
    records = [b"a", b"b\t", b"c"]
    if format == "json":
        head, tail = b'{"message":"', b'","type":"nginx","@pid":%s}' % pid
        records = [head + text + tail for text in (b"a", rb"b\t", b"c")]

    assert done.stderr == b""
    if framing == "single":
        assert [pull.recv_multipart() for _ in records] == [[record] for record in records]
    else:
        assert pull.recv_multipart() == {
            "frames": records,
            "array": [b"[" + b",".join(records) + b"]"],
            "lines": [b"".join(record + b"\n" for record in records)],
        }.get(framing)


def test_every_format_has_its_fields_and_those_that_are_added(pull):
    logtype = os.fsdecode(b'"caf\xe9" \\')
    args = ["-c", pull.last_endpoint, "--field", 'a=b="c"', "--field", "\u00e9=", logtype]
    common = {"message": "x", "a": 'b="c"', "\u00e9": ""}
    host, text = socket.gethostname(), '"caf\\xe9" \\'
    received, expected = [], []
    for format in ("json", "logstash", "ecs"):
        done = push(*args, "--format", format, data=b"x\n")
        pid = int(SUMMARY.fullmatch(done.stdout)[2])
        received.append(json.loads(pull.recv()))
        expected.append(
            common
            | {
                "json": {"type": text, "@pid": pid},
                "logstash": {"type": text, "@pid": pid, "@version": "1", "host": host},
                "ecs": {
                    "ecs": {"version": "8.11.0"},
                    "event": {"dataset": text},
                    "host": {"name": host},
                    "process": {"pid": pid},
                },
            }[format]
        )
    moments = [record.pop("@timestamp", "none") for record in received]

    assert received == expected
    assert moments[0] == "none"
    for moment in moments[1:]:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", moment)
