"""CURVE as a user meets it: delivery, usage errors, revocation, rotation, and the recipe."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest
import zmq

from helpers import (
    BIN,
    FRAMINGS,
    NOBODY,
    PATIENCE,
    ZMQPULL,
    ZMQPUSH,
    losses,
    push,
    sent,
    statistics,
    wait_until,
    wait_until_ready,
)
from keyring import Keyring
from test_pull import finish
from zmqpush.core.frames import Error, Hello, decode, encode
from zmqpush.guard import Doorman, Guard
from zmqpush.keys import KeyPair, read_pair
from zmqpush.settings import Security
from zmqpush.telemetry import Reporter

LINES = b"".join(b"%d\n" % number for number in range(1, 1001))
NUMBERS = LINES.decode().split()
AT_ONCE = ["--timeout", PATIENCE]
EITHER_END = pytest.mark.parametrize("sender_binds", [False, True], ids=["connects", "binds"])


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "keys").mkdir()
    return Keyring(tmp_path / "keys")


@pytest.fixture
def collector(start, keys):
    """Return a function that starts zmqpull on a port of its own; it returns that, too."""

    def run(*args, flag="-a", options=None):
        options = keys.binds() if options is None else options
        child = start(ZMQPULL, flag, "tcp://127.0.0.1:*", *options, *args)
        line = child.stderr.readline()
        assert line.startswith(b"zmqpull: listening at "), line + child.stderr.read()
        return child, line.split()[3].decode()

    return run


def free_endpoint(where, tmp_path):
    if where == "ipc":
        return f"ipc://{tmp_path}/socket"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def records(path):
    """Return what is in a file, even if its last line is not yet whole."""
    data = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]


def messages(path):
    return [record["message"] for record in records(path)]


def feed(child, data):
    child.stdin.write(data)
    child.stdin.flush()


def reload(child):
    """Have a program read its list anew; return once it has."""
    child.send_signal(signal.SIGHUP)
    told = []
    while not re.search(rb"records written|\d+ read, ", line := child.stderr.readline()):
        assert line
        told.append(line)
    return b"".join(told)


# What is delivered.


@FRAMINGS
@EITHER_END
def test_every_framing_is_delivered_encrypted(start, keys, tmp_path, framing, sender_binds):
    endpoint = free_endpoint("ipc" if framing == "array" else "tcp", tmp_path)
    if sender_binds:
        ends = ["-b", endpoint, *keys.binds()], ["-c", endpoint, *keys.connects()]
    else:
        ends = ["-c", endpoint, *keys.connects()], ["-b", endpoint, *keys.binds()]
    receiver = start(ZMQPULL, "-q", "-n", 1000, *ends[1])
    done = push("--framing", framing, *AT_ONCE, *ends[0], data=LINES)
    code, out, err = finish(receiver)

    assert (done.returncode, sent(done), losses(done.stderr)) == (0, 1000, (0, 0))
    assert (code, err) == (0, b"")
    assert [json.loads(line)["message"] for line in out.splitlines()] == NUMBERS


@pytest.mark.parametrize("where", ["tcp", "ipc"])
@pytest.mark.parametrize("options", [["--ack"], ["--spool", "spool"]], ids=["ack", "spool"])
@pytest.mark.parametrize("allow", ["file", "directory", "any"])
def test_acknowledged_records_are_delivered_encrypted(start, keys, tmp_path, where, options, allow):
    endpoint = free_endpoint(where, tmp_path)
    path = tmp_path / "all"
    *key, _ = keys.binds()
    admitted = {"file": keys.list, "any": "any", "directory": tmp_path / "admitted"}[allow]
    (tmp_path / "admitted").mkdir()
    shutil.copy(keys.file("web1"), tmp_path / "admitted")
    state = ["--state", tmp_path / "state"] if where == "ipc" else []
    receiver = start(ZMQPULL, "-q", "-a", endpoint, *key, admitted, "--to", path, *state)
    done = push(*options, *AT_ONCE, "-c", endpoint, *keys.connects(), data=LINES, cwd=tmp_path)
    receiver.terminate()

    assert (done.returncode, sent(done), losses(done.stderr)) == (0, 1000, (0, 0))
    assert (finish(receiver)[0], messages(path)) == (0, NUMBERS)


@pytest.mark.parametrize("each", [True, False], ids=["one for each", "one for all"])
def test_several_receivers_have_keys_of_their_own_or_one(start, keys, tmp_path, each):
    names = ["c1", "c2"] if each else ["c1", "c1"]
    keys.admit("web1")
    endpoints = [f"ipc://{tmp_path}/{at}" for at in (1, 2)]
    paths = [tmp_path / f"all{at}" for at in (1, 2)]
    for name, endpoint, path in zip(names, endpoints, paths, strict=True):
        start(ZMQPULL, "-q", "-b", endpoint, *keys.binds(name), "--to", path)
    wait_until(lambda: all(path.exists() for path in paths))
    server_keys = list(dict.fromkeys(keys.public(name) for name in names))
    sender = start(
        *(ZMQPUSH, "-q", "--key", keys.file("web1"), *AT_ONCE),
        *(word for endpoint in endpoints for word in ("-c", endpoint)),
        *(word for key in server_keys for word in ("--server-key", key)),
    )

    def both_have_some():
        feed(sender, b"x\n" * 10)
        return all(map(records, paths))

    wait_until(both_have_some)
    assert finish(sender) == (0, b"", b"")


def test_the_next_receiver_of_a_list_has_another_key(collector, keys, tmp_path):
    keys.admit("web1")
    _, endpoint = collector("--to", tmp_path / "all", options=keys.binds("c2"))
    options = ["-c", NOBODY, "-c", endpoint, "--key", keys.file("web1")]
    options += ["--server-key", keys.public("c1"), "--server-key", keys.file("c2")]
    done = push("-q", "--ack", *AT_ONCE, *options, data=LINES)

    assert (done.returncode, done.stderr) == (0, b"")
    assert messages(tmp_path / "all") == NUMBERS


def test_keys_come_from_the_environment_and_from_toml(collector, keys, tmp_path):
    _, path, _, admitted = keys.binds()
    toml = tmp_path / "zmqpull.toml"
    toml.write_text(f'key = "{path}"\nallow = "{admitted}"\nto = "{tmp_path}/all"\n')
    _, endpoint = collector("--config", toml, options=[])
    toml = tmp_path / "zmqpush.toml"
    toml.write_text(f'server-key = ["{keys.public("collector")}"]\nack = true\n')
    env = os.environ | {"ZMQPUSH_KEY": str(keys.file("web1"))}
    done = push("-q", *AT_ONCE, "--config", toml, "-c", endpoint, data=LINES, env=env)

    assert (done.returncode, done.stderr) == (0, b"")
    assert messages(tmp_path / "all") == NUMBERS


# How it is used wrongly.

KEY, ALLOW = ["--key", "collector"], ["--allow", "senders"]
SERVER_KEY = ["--server-key", "collector"]
ANYWHERE = "tcp://*:5014"


@pytest.mark.parametrize(
    ("program", "args", "told"),
    [
        (ZMQPUSH, SERVER_KEY, "--server-key and --allow need a --key"),
        (ZMQPULL, ALLOW, "--server-key and --allow need a --key"),
        (ZMQPULL, [*KEY, *ALLOW, "--insecure"], "--key and --insecure exclude each other"),
        (ZMQPULL, KEY, "--key needs --allow"),
        (ZMQPUSH, ["-b", NOBODY, *KEY], "--key needs --allow"),
        (ZMQPUSH, KEY, "--key needs --server-key"),
        (ZMQPUSH, ["-c", NOBODY, *KEY, *SERVER_KEY * 2], "one for all --connect, or one for"),
        (ZMQPUSH, ["-b", NOBODY, "-c", NOBODY, *KEY, *ALLOW], "either --bind or --connect"),
        (ZMQPULL, [*KEY, *ALLOW, *SERVER_KEY], "--server-key is for --connect"),
        (ZMQPUSH, ["-c", NOBODY, *KEY, *SERVER_KEY, *ALLOW], "--allow is for"),
        *[
            (program, [flag, f"tcp://{host}:5014"], f"the network can reach tcp://{host}:5014")
            for program, flag in ((ZMQPULL, "-b"), (ZMQPULL, "-a"), (ZMQPUSH, "-b"))
            for host in ("*", "0.0.0.0", "[::]", "collector.example.com", "lo")
        ],
    ],
)
def test_flags_that_do_not_go_together_are_told_of_in_one_line(keys, program, args, told):
    keys.binds()
    command = [program, *map(str, args)]
    done = subprocess.run(
        command, input=b"", capture_output=True, timeout=PATIENCE, cwd=keys.list.parent
    )

    assert (done.returncode, done.stdout) == (2, b"")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith(b"Error: ")]
    assert told.encode() in line


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "[::1]", "ipc"])
def test_this_machine_may_be_bound_without_keys(start, tmp_path, host):
    if host == "[::1]" and not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("this machine has no IPv6")
    endpoint = f"ipc://{tmp_path}/socket" if host == "ipc" else f"tcp://{host}:*"
    child = start(ZMQPULL, "-b", endpoint)
    if host == "ipc":
        wait_until_ready(child)
    else:
        assert child.stderr.readline().startswith(b"zmqpull: listening at ")
    child.terminate()
    assert finish(child)[0] == 0


def test_an_address_that_the_network_reaches_may_be_bound_insecurely(start):
    child = start(ZMQPULL, "-b", "tcp://*:*", "--insecure")
    assert child.stderr.readline().startswith(b"zmqpull: listening at ")


def corrupt(path, text, mode=0o600):
    path.write_text(text)
    path.chmod(mode)


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda k: k.file("collector_secret").unlink(), "collector holds no secret key"),
        (lambda k: k.file("collector_secret").chmod(0o644), "others may read"),
        (lambda k: corrupt(k.file("collector_secret"), "x"), "collector_secret holds no secret"),
        (lambda k: corrupt(k.list, "# all\n\nnonsense web1\n"), "senders, line 3: 'nonsense'"),
        (lambda k: k.list.unlink(), "cannot read {list}: No such file"),
        (lambda k: corrupt(k.list, "\0" * 50), "senders, line 1: "),
    ],
    ids=["no secret", "open", "nonsense", "bad line", "no list", "binary list"],
)
def test_a_file_that_cannot_be_used_is_named_with_the_line(keys, start, break_it, told):
    options = keys.binds()
    break_it(FilesOf(keys))
    child = start(ZMQPULL, "-b", "tcp://127.0.0.1:*", *options)
    code, out, err = finish(child)

    assert (code, out, err.count(b"\n")) == (78, b"", 1)
    assert told.format(list=keys.list) in err.decode()


class FilesOf:
    """The files of a keyring, without making any."""

    def __init__(self, keys):
        self.list = keys.list

    def file(self, name):
        return self.list.parent / name


@pytest.mark.parametrize("key", ["x" * 39, "/no/such/file"])
def test_a_server_key_that_is_none_is_told_of(keys, key):
    done = push("--key", keys.file("web1"), "--server-key", key, "-c", NOBODY)

    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (78, b"", 1)
    assert key.encode() in done.stderr
    assert b"--server-key" in done.stderr
