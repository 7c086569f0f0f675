"""What may be on the standard input of ``zmqpush``, and the records that come of it."""

import fcntl
import json
import os
import re
import socket
import struct

import pytest

from helpers import FRAMINGS, NOBODY, PATIENCE, SUMMARY, ZMQPUSH, losses, push, sent, statistics


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


@pytest.mark.parametrize("redirection", ["<&-", "0>/dev/null"])
def test_an_input_that_cannot_be_read_is_one_line_and_exit_74(start, redirection):
    code, _, err = shell(start, NOBODY, redirection)

    assert (code, err) == (74, b"zmqpush: cannot read standard input: Bad file descriptor\n")


def test_what_was_read_before_the_input_fails_is_sent_or_counted(start):
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
