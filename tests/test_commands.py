"""The installed commands in real pipes, with a real PULL peer."""

import json
import subprocess

from helpers import FRAMINGS, SUMMARY, ZMQPULL, push


def test_a_hundred_lines_arrive_byte_for_byte_in_order(pull):
    data = b"".join(b"%d\n" % n for n in range(1, 101))
    done = push("-c", pull.last_endpoint, "nginx", data=data)
    match = SUMMARY.fullmatch(done.stdout)

    assert (done.returncode, done.stderr) == (0, b"")
    assert match[1] == b"100"
    assert [pull.recv_multipart() for _ in range(100)] == [
        [b'{"message":"%d","type":"nginx","@pid":%s}' % (n, match[2])] for n in range(1, 101)
    ]


@FRAMINGS
def test_zmqpull_gives_back_what_zmqpush_was_given(tmp_path, framing):
    endpoint = f"ipc://{tmp_path}/socket"
    lines = [f'line {n} "quoted" \\ \t é' for n in range(5000)]
    out = tmp_path / "out"
    with subprocess.Popen([ZMQPULL, "-q", "-b", endpoint, "-n", "5000", "--to", out]) as receiver:
        done = push("-c", endpoint, "--framing", framing, data="\n".join(lines).encode())

    assert done.returncode == 0
    assert receiver.returncode == 0
    assert [json.loads(line)["message"] for line in out.read_bytes().splitlines()] == lines
