"""Every command that the documentation shows is run, with its names made local."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from helpers import BIN, PATIENCE, wait_until

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
APP = "#!/bin/sh\necho from app\necho an error from app >&2\n"


def blocks(language):
    """Return the code blocks of a language, in all pages."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [code for page in PAGES for code in fence.findall(page.read_text())]


def commands():
    """Return the commands of all ``sh`` blocks, each once, without those of make."""
    lines = "".join(blocks("sh")).splitlines()
    return [line for line in dict.fromkeys(lines) if not line.startswith("make ")]


def engine_commands(scheme):
    """Return the commands that write to an engine."""
    return [command for command in commands() if re.search(rf"--to '?{scheme}://", command)]


@pytest.fixture
def local(tmp_path, pull):
    """Return a function that makes a command's hosts, ports and paths local."""
    (tmp_path / "bin").mkdir()
    app = tmp_path / "bin" / "app"
    app.write_text(APP)
    app.chmod(0o755)
    (tmp_path / "app.log").write_text("from app\n")
    port = pull.last_endpoint.decode().rsplit(":", 1)[1]

    def translate(text):
        text = re.sub(r"tcp://logs\.example\.com:\d+", f"tcp://127.0.0.1:{port}", text)
        text = text.replace("tcp://*:5014", f"ipc://{tmp_path}/socket")
        text = re.sub(r"/var/(log|lib|spool)", str(tmp_path), text)
        return text.replace("/usr/local/bin", str(BIN))

    return translate


@pytest.fixture
def shell(tmp_path):
    """Start a command in bash, in a process group that is ended with the test."""
    started = []

    def run(command):
        path = f"{BIN}:{tmp_path}/bin:{os.environ['PATH']}"
        with open(tmp_path / "out", "wb") as out:
            started.append(
                subprocess.Popen(
                    ["bash", "-c", command],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env=os.environ | {"PATH": path},
                    start_new_session=True,
                )
            )
        return started[-1]

    yield run
    for child in started:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
        child.wait(PATIENCE)


RECEIVES = [c for c in commands() if c.startswith("zmqpull") and not re.search(r"--to '?\w+://", c)]
SHIPS = [c for c in commands() if re.search(r"\bzmqpush --", c) and "--spool-status" not in c]
ACKED = re.compile(r"--(ack|spool|ack-bind)\b")


@pytest.mark.parametrize("command", [c for c in SHIPS if not ACKED.search(c)])
def test_a_command_that_ships_delivers(command, local, shell, pull):
    assert "zmqpull" not in command
    shell(local(command))

    while b"app" not in pull.recv():  # fails when nothing more comes
        pass


@pytest.mark.parametrize("command", [c for c in SHIPS if ACKED.search(c)])
def test_a_command_that_ships_is_acknowledged_by_the_command_that_receives(
    command, local, shell, tmp_path
):
    (receive,) = [c for c in RECEIVES if ACKED.search(c)]
    endpoint = f"ipc://{tmp_path}/acked"
    shell(local(receive.replace("tcp://*:5015", endpoint)))
    command = re.sub(r"tcp://logs2?\.example\.com:5015", endpoint, command)
    assert shell(local(command)).wait(PATIENCE) == 0

    (file,) = (tmp_path / "all").iterdir()
    assert file.read_bytes().startswith(b'{"message":"from app","type":"app","@pid":')


def test_the_command_that_looks_into_the_spool_does(local, shell, tmp_path):
    (status,) = [c for c in commands() if "--spool-status" in c]
    fill = f"echo x | zmqpush --timeout 0 --spool {tmp_path}/zmqpush -c ipc://{tmp_path}/nobody"
    shell(fill).wait(PATIENCE)

    assert shell(local(status)).wait(PATIENCE) == 0
    assert b"1 records to be acknowledged" in (tmp_path / "out").read_bytes()


@pytest.mark.parametrize("command", [c for c in RECEIVES if not ACKED.search(c)])
def test_a_command_that_receives_writes(command, local, shell, tmp_path):
    if "jq" in command and not shutil.which("jq"):
        pytest.skip("jq is not installed")
    shell(local(command))
    endpoint = f"ipc://{tmp_path}/socket"
    probe = [BIN / "zmqpush", "-q", "-c", endpoint]
    subprocess.run(probe, input=b"probe\n", timeout=PATIENCE, check=True)
    out = tmp_path / ("all.ndjson" if "--to" in command else "out")
    wait_until(lambda: b"probe" in out.read_bytes())


def test_every_command_is_one_of_those():
    known = re.compile(r"\bzmqpush --|^zmqpull|^eval ")

    assert [command for command in commands() if not known.search(command)] == []


def test_the_completion_works_in_bash(shell):
    (command,) = [c for c in commands() if c.startswith("eval ")]
    child = shell(f"{command} && complete -p zmqpush zmqpull")

    assert child.wait(PATIENCE) == 0


def test_the_configuration_file_is_one(local, pull, tmp_path):
    (toml,) = blocks("toml")
    path = tmp_path / "zmqpush.toml"
    path.write_text(local(toml))
    subprocess.run([BIN / "zmqpush", "--config", path], input=b"x", timeout=PATIENCE, check=True)

    assert b'"environment":"production"' in pull.recv()


@pytest.mark.parametrize("config", blocks("rsyslog"))
def test_a_rsyslog_configuration_parses(config, local, tmp_path):
    rsyslogd = shutil.which("rsyslogd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if not rsyslogd:
        pytest.skip("rsyslogd is not installed (Debian: rsyslog)")
    if "czmq" in config and not list(Path("/usr/lib").glob("*/rsyslog/omczmq.so")):
        pytest.skip("rsyslog's ZeroMQ modules are not installed (Debian: rsyslog-czmq)")
    path = tmp_path / "rsyslog.conf"
    path.write_text(f'global(workDirectory="{tmp_path}")\n{local(config)}')
    done = subprocess.run([rsyslogd, "-N1", "-f", path], capture_output=True, timeout=PATIENCE)

    assert done.returncode == 0, done.stderr
    assert b"error" not in done.stderr


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
