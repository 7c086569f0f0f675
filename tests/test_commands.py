"""The installed commands in real pipes, with a real PULL peer."""

import json
import signal
import subprocess

import pytest

from helpers import SUMMARY, ZMQPULL, ZMQPUSH, push


def test_a_hundred_lines_arrive_byte_for_byte_in_order(pull):
    data = b"".join(b"%d\n" % n for n in range(1, 101))
    done = push("-c", pull.last_endpoint, "nginx", data=data)
    match = SUMMARY.fullmatch(done.stdout)

    assert (done.returncode, done.stderr) == (0, b"")
    assert match[1] == b"100"
    assert [pull.recv_multipart() for _ in range(100)] == [
        [b'{"message":"%d","type":"nginx","@pid":%s}' % (n, match[2])] for n in range(1, 101)
    ]


def test_without_a_receiver_everything_is_counted_as_lost():
    done = push("-c", "tcp://127.0.0.1:9", "--timeout", "0.2", data=b"1\n2\n3")

    assert done.returncode == 69
    assert SUMMARY.fullmatch(done.stdout)[1] == b"0"
    assert b"0 dropped, 3 lost" in done.stderr


def test_a_regular_file_and_dev_null_work_as_input(pull, tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"from a file\n")
    for name, count in ((path, b"1"), ("/dev/null", b"0")):
        with open(name, "rb") as file:
            done = subprocess.run(
                [ZMQPUSH, "-c", pull.last_endpoint], stdin=file, capture_output=True, timeout=60
            )
        assert SUMMARY.fullmatch(done.stdout)[1] == count


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_written_after_the_first_signal_and_before_eof_arrives(pull, number):
    child = subprocess.Popen(
        [ZMQPUSH, "-c", pull.last_endpoint], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    child.stdin.write(b"before\n")
    child.stdin.flush()
    assert json.loads(pull.recv())["message"] == "before"
    child.send_signal(number)
    child.stdin.write(b"after")
    child.stdin.close()

    assert json.loads(pull.recv())["message"] == "after"
    assert child.wait(20) == 0
    assert SUMMARY.fullmatch(child.stdout.read())[1] == b"2"
    child.stdout.close()


def test_a_bad_endpoint_is_a_usage_error_that_shows_a_good_one():
    done = push("-c", "localhost:5014")

    assert done.returncode == 2
    assert b"tcp://collector.example.com:5014" in done.stderr


@pytest.mark.parametrize("framing", ["single", "frames", "array", "lines"])
def test_zmqpull_gives_back_what_zmqpush_was_given(tmp_path, framing):
    endpoint = f"ipc://{tmp_path}/socket"
    lines = [f'line {n} "quoted" \\ \t é' for n in range(5000)]
    out = tmp_path / "out"
    with subprocess.Popen([ZMQPULL, "-q", "-b", endpoint, "-n", "5000", "--to", out]) as receiver:
        done = push("-c", endpoint, "--framing", framing, data="\n".join(lines).encode())

    assert done.returncode == 0
    assert receiver.returncode == 0
    assert [json.loads(line)["message"] for line in out.read_bytes().splitlines()] == lines


def test_zmqpull_ends_quietly_when_its_reader_goes(tmp_path):
    endpoint = f"ipc://{tmp_path}/socket"
    receiver = subprocess.Popen(
        f"{ZMQPULL} -q -b {endpoint} | head -1",
        shell=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    push("-c", endpoint, data=b"only\n")
    out, err = receiver.communicate(timeout=20)

    assert json.loads(out)["message"] == "only"
    assert err == b""


def test_what_is_not_json_becomes_a_message(tmp_path):
    endpoint = f"ipc://{tmp_path}/socket"
    with subprocess.Popen(
        [ZMQPULL, "-b", endpoint, "-n", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as receiver:
        push("-c", endpoint, "--format", "raw", data=b"{no json\n")
        out, err = receiver.stdout.read(), receiver.stderr.read()

    assert json.loads(out) == {"message": "{no json"}
    assert b"1 of them were no JSON object" in err
