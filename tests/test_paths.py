"""Paths of any bytes: what Unix calls a file need not be text."""

import json
import os
import signal

import pytest

from helpers import NOBODY, PATIENCE, ZMQKEYS, ZMQPULL, ZMQPUSH, push, wait_until_ready
from test_curve import free_endpoint

ODD = os.fsdecode(b"odd-\xff-\xc3")


@pytest.fixture
def odd(tmp_path):
    """Return a directory whose name is not UTF-8."""
    path = tmp_path / ODD
    path.mkdir()
    return path


def finish(child):
    out, err = child.communicate(timeout=PATIENCE)
    return child.returncode, out, err


def test_a_spool_and_what_is_said_of_it(odd):
    done = push("--spool", odd / "spool", "--timeout", 0, "-c", NOBODY, data=b"x\n")
    told = push("--spool", odd / "spool", "--spool-status")

    assert done.returncode == 75
    assert (told.returncode, told.stderr) == (0, b"")
    assert told.stdout.startswith(os.fsencode(odd / "spool/0") + b": 1 records to be acknowledged")


@pytest.mark.parametrize("to", ["all.ndjson", "%Y-{type}.ndjson", f"{ODD}/{{host}}"])
def test_a_state_remembers_files_with_such_names_across_a_death(start, odd, tmp_path, to):
    endpoint = free_endpoint("tcp", tmp_path)
    command = (ZMQPULL, "-a", endpoint, "--to", odd / to, "--state", odd / "state")
    child = start(*command, "--dead-letters", odd / "letters")

    def records():
        files = [path for path in odd.rglob("*") if path.is_file() and path.parent.name != "state"]
        lines = b"".join(path.read_bytes() for path in files).splitlines()
        return [json.loads(line)["message"] for line in lines]

    assert push("-c", endpoint, "--ack", data=b"1\n").returncode == 0
    child.kill()
    child.wait()
    child = start(*command, "--dead-letters", odd / "letters")
    assert push("-c", endpoint, "--ack", data=b"2\n").returncode == 0
    child.send_signal(signal.SIGTERM)
    code, _, err = finish(child)

    assert (code, err) == (0, b"zmqpull: 1 records written\n")
    assert sorted(records()) == ["1", "2"]


def test_keys_lists_and_configuration(start, odd, tmp_path):
    for name in ("collector", "web1"):
        assert finish(start(ZMQKEYS, "new", odd / name))[0] == 0
    assert finish(start(ZMQKEYS, "allow", odd / "allowed", odd / "web1"))[0] == 0
    endpoint = free_endpoint("tcp", tmp_path)
    receiver = start(
        *(ZMQPULL, "-a", endpoint, "--key", odd / "collector", "--allow", odd / "allowed"),
        *("--to", odd / "all"),
    )
    (odd / "file.toml").write_text(f'connect = "{endpoint}"\nack = true')
    sender = start(
        *(ZMQPUSH, "--config", odd / "file.toml", "--key", odd / "web1"),
        *("--server-key", odd / "collector"),
    )
    sender.communicate(b"x\n", timeout=PATIENCE)

    assert sender.returncode == 0
    assert b'"x"' in (odd / "all").read_bytes()
    wait_until_ready(receiver)
    receiver.terminate()
    assert finish(receiver)[0] == 0


def test_such_a_name_is_told_byte_by_byte(odd):
    done = push("--config", odd / "none")

    assert done.stderr.decode().startswith("zmqpush: --config: File '")
    (odd / "bad.toml").write_text("x")
    done = push("--config", odd / "bad.toml")
    assert rb"/odd-\xff-\xc3/bad.toml is not TOML: " in done.stderr


@pytest.mark.parametrize("flag", ["-b", "-c"])
def test_libzmq_takes_no_such_path(odd, flag):
    done = push(flag, f"ipc://{odd}/socket")

    assert done.returncode == 2
    assert b"is not an endpoint; " in done.stderr
