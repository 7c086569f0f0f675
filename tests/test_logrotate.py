"""The configuration of ``contrib/logrotate``, run by the real logrotate."""

import gzip
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import PATIENCE, ZMQPULL, ZMQPUSH, wait_until

CONTRIB = Path(__file__).parent.parent / "contrib" / "logrotate"
CONFIGURATION = CONTRIB / "zmqpull"
LOGROTATE = shutil.which("logrotate", path=f"{os.environ['PATH']}:/usr/sbin")
TURNS = 5
LINES = 2000

pytestmark = pytest.mark.skipif(
    not LOGROTATE, reason="logrotate is not installed: package logrotate"
)


def numbers(*directories):
    """Return the numbers in all files of some directories, the oldest file first."""
    paths = [path for each in directories for path in each.iterdir() if path.is_file()]
    files = sorted(paths, key=lambda path: -int((re.findall(r"\d+", path.name) or [0])[0]))
    text = b"".join(
        gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for path in files
    )
    whole, _, _ = text.rpartition(b"\n")
    return [int(json.loads(line)["message"]) for line in whole.splitlines()]


def local(configuration, here):
    """Return a configuration whose paths lie in a directory of ours."""
    return configuration.read_text().replace("/var/", f"{here}/").replace("su zmqpull zmqpull", "")


def rotate(text, here):
    """Rotate what a configuration names."""
    (here / "configuration").write_text(text)
    (here / "configuration").chmod(0o644)
    command = [LOGROTATE, "--force", "--state", here / "status", here / "configuration"]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_what_zmqpush_says_is_rotated_while_it_is_open(tmp_path):
    log = tmp_path / "log" / "zmqpush-syslog-ng.log"
    log.parent.mkdir()
    with log.open("ab", buffering=0) as file:  # as a shell's >> does
        for turn in range(6):
            file.write(b"turn %d\n" % turn)
            rotate(local(CONTRIB / "zmqpush", tmp_path), tmp_path)
        file.write(b"after\n")
    kept = [gzip.decompress(path.read_bytes()) for path in sorted(log.parent.glob("*.gz"))]

    assert kept == [b"turn 5\n", b"turn 4\n", b"turn 3\n", b"turn 2\n"]
    assert log.read_bytes() == b"after\n"


def test_every_file_of_contrib_that_grows_is_rotated():
    contrib = CONTRIB.parent
    files = {*contrib.glob("rsyslog/*.conf"), contrib / "syslog-ng" / "zmqpush.conf"}
    grow = {
        log for file in files for log in re.findall(r'(?:output="|>>)(/[^"]+)', file.read_text())
    }
    (line,) = re.findall(r"^(/.*) \{$", (CONTRIB / "zmqpush").read_text(), re.MULTILINE)

    assert {*line.split()} == grow


@pytest.mark.parametrize("olddir", ["", "old", "../beside"])
@pytest.mark.parametrize("kills", [False, True])
def test_each_record_is_in_one_of_the_files_however_they_are_rotated(
    start, tmp_path, kills, olddir
):
    logs, endpoint = tmp_path / "logs", f"ipc://{tmp_path}/acked"
    logs.mkdir()
    old = (logs / olddir).resolve()
    old.mkdir(exist_ok=True)
    to = logs / "{type}.ndjson"
    options = ("-q", "--ack-bind", endpoint, "--state", tmp_path / "state", "--to", to)

    def receive():
        receiver = start(ZMQPULL, *options)
        (tmp_path / "pid").write_text(f"{receiver.pid}")
        return receiver

    receiver = receive()
    sender = start(ZMQPUSH, "-q", "--spool", tmp_path / "spool", "-c", endpoint, "app")
    text = local(CONFIGURATION, tmp_path).replace(f"{tmp_path}/log/zmqpull", str(logs))
    if olddir:
        text = text.replace("daily", f"daily\n    olddir {old}")
    text, count = re.subn("systemctl .*zmqpull.service", f"kill -HUP $(cat {tmp_path}/pid)", text)
    configuration = tmp_path / "zmqpull"
    configuration.write_text(text)
    configuration.chmod(0o644)
    current = logs / "app.ndjson"
    command = [LOGROTATE, "--force", "--state", tmp_path / "status", configuration]
    for turn in range(TURNS):
        lines = [b"%d\n" % number for number in range(turn * LINES, turn * LINES + LINES)]
        sender.stdin.write(b"".join(lines[: LINES // 2]))
        sender.stdin.flush()
        wait_until(lambda: current.exists() and current.stat().st_size)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as rotation:
            for line in lines[LINES // 2 :]:
                sender.stdin.write(line)
                sender.stdin.flush()
            if kills:
                receiver.kill()
                receiver.wait()
            output = rotation.communicate(timeout=PATIENCE)[0]
        if kills:
            receiver = receive()
        else:
            assert (rotation.returncode, output) == (0, b"")
    sender.stdin.close()
    assert sender.wait(PATIENCE) == 0
    receiver.terminate()
    assert receiver.wait(PATIENCE) == 0

    assert count == 1
    assert numbers(*{logs, old}) == list(range(TURNS * LINES))
    names = {f"app.ndjson.{n}{'.gz' if n > 1 else ''}" for n in range(1, TURNS + 1)}
    assert {path.name for path in old.iterdir()} - {"app.ndjson"} == names
