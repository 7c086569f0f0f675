"""CURVE as a user meets it: delivery, usage errors, revocation, rotation, and the recipe."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

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
    wait_until,
    wait_until_ready,
)
from keyring import Keyring
from test_pull import finish

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

    assert done.returncode == 0
    # It takes a while until the second one is tried.
    assert all(b": no receiver " in line for line in done.stderr.splitlines())
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
        (ZMQPUSH, [*["-c", NOBODY, *SERVER_KEY] * 2, *KEY], "a --connect is given twice"),
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
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"{Path(program).name}: ")
    assert told in line


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
        (lambda k: corrupt(k.list, "# all\n\nnonsense web1\n"), "senders, line 3: no public key"),
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
    assert b"is not a public key, nor a file with one" in done.stderr


# Whose key is admitted no longer.


def test_a_revoked_sender_is_told_and_others_go_on(collector, keys, start, tmp_path):
    path = tmp_path / "all"
    keys.admit("web1", "web2")
    receiver, endpoint = collector("--to", path)
    senders = [
        start(ZMQPUSH, "-q", "--ack", "-c", endpoint, *keys.connects(name))
        for name in ("web1", "web2")
    ]
    for sender, line in zip(senders, (b"one\n", b"two\n"), strict=True):
        feed(sender, line)
    wait_until(lambda: set(messages(path)) == {"one", "two"})
    keys.admit("web2")
    reload(receiver)
    feed(senders[0], b"too late\n")
    refused = senders[0].stderr.readline()
    feed(senders[1], b"three\n")
    wait_until(lambda: "three" in messages(path))

    key = keys.public("web1")
    assert refused.startswith(f"zmqpush: {endpoint} does not admit the key {key}".encode())
    assert sorted(messages(path)) == ["one", "three", "two"]


def test_a_sender_that_is_admitted_again_delivers_what_it_kept(collector, keys, tmp_path):
    path = tmp_path / "all"
    receiver, endpoint = collector("--to", path)
    keys.admit("nobody")
    reload(receiver)
    spool = tmp_path / "spool"
    options = ["--spool", spool, "-c", endpoint, "--timeout", "0.2", *keys.connects()]
    assert push(*options, data=b"kept\n").returncode == 75
    keys.admit("web1")
    reload(receiver)
    options[options.index("0.2")] = PATIENCE
    done = push(*options, data=b"after\n")

    assert (done.returncode, losses(done.stderr)) == (0, (0, 0))
    assert messages(path) == ["kept", "after"]


def test_without_acknowledgements_a_revoked_sender_keeps_what_it_has(
    collector, keys, start, tmp_path
):
    path = tmp_path / "all"
    keys.admit("web1", "web2")
    receiver, endpoint = collector("--to", path, flag="-b")
    first, second = [
        start(ZMQPUSH, "-q", "-c", endpoint, *keys.connects(name)) for name in ("web1", "web2")
    ]
    feed(first, b"one\n")
    feed(second, b"two\n")
    wait_until(lambda: set(messages(path)) == {"one", "two"})
    keys.admit("web2")
    reload(receiver)
    feed(first, b"too late\n")
    while b"does not admit the key" not in (line := first.stderr.readline()):
        assert line, "it has ended"
    feed(second, b"three\n")
    wait_until(lambda: "three" in messages(path))
    first.terminate()
    assert (first.wait(PATIENCE), losses(first.stderr.read())) == (1, (0, 1))

    receiver.terminate()
    receiver.wait(PATIENCE)
    assert sorted(messages(path)) == ["one", "three", "two"]


def test_a_sender_that_binds_cuts_off_a_revoked_receiver(keys, start, tmp_path):
    endpoint = free_endpoint("tcp", tmp_path)
    paths = [tmp_path / name for name in ("revoked", "admitted")]
    keys.admit("c1", "c2")
    sender = start(ZMQPUSH, "-b", endpoint, *keys.binds("web1"))
    for name, path in zip(("c1", "c2"), paths, strict=True):
        start(ZMQPULL, "-q", "-c", endpoint, "--to", path, *keys.connects(name, to="web1"))

    def more():
        feed(sender, b"x\n" * 10)
        return all(map(messages, paths))

    wait_until(more)
    keys.admit("c2")
    reload(sender)
    feed(sender, b"y\n" * 100)
    wait_until(lambda: messages(paths[1]).count("y") == 100)

    assert "y" not in messages(paths[0])


def test_a_list_with_a_mistake_changes_nothing(collector, keys, tmp_path):
    path = tmp_path / "all"
    receiver, endpoint = collector("--to", path)
    keys.admit("web2")
    with keys.list.open("a") as file:
        file.write("mistake\n")
    told = reload(receiver)
    done = push("-q", "--ack", *AT_ONCE, "-c", endpoint, *keys.connects(), data=b"old\n")
    assert (done.returncode, messages(path)) == (0, ["old"])
    assert told.count(b"\n") == 1
    assert b"%s, line 2: no public key" % bytes(keys.list) in told
    assert told.endswith(b"the keys that were admitted before still are\n")
    options = ["--ack", "--timeout", "0.2", "-c", endpoint, *keys.connects("web2")]
    assert push("-q", *options, data=b"new\n").returncode == 69


def test_a_key_is_for_the_hosts_in_the_list(collector, keys, tmp_path):
    path = tmp_path / "all"
    keys.admit("web1 other.example", f"web2 other.example {socket.gethostname()}", "web3")
    _, endpoint = collector("--to", path)
    options = ["--ack", "-q", "-c", endpoint]
    done = push(*options, "--timeout", "2", *keys.connects("web1"), data=b"1\n")
    assert done.returncode == 69
    assert b"it refuses: this key is not for the host" in done.stderr
    for name in ("web2", "web3"):
        done = push(*options, *AT_ONCE, *keys.connects(name), data=b"%s\n" % name.encode())
        assert (done.returncode, done.stderr) == (0, b"")

    assert messages(path) == ["web2", "web3"]


def test_a_key_that_is_restricted_to_another_host_is_so_in_its_session_too(
    collector, keys, start, tmp_path
):
    path = tmp_path / "all"
    keys.admit("web1")
    receiver, endpoint = collector("--to", path)
    sender = start(ZMQPUSH, "-q", "--ack", "-c", endpoint, *keys.connects("web1"))
    feed(sender, b"one\n")
    wait_until(lambda: messages(path) == ["one"])
    keys.admit("web1 other.example")
    reload(receiver)
    refused = sender.stderr.readline()
    feed(sender, b"too late\n")

    assert b"it refuses: this key is not for the host" in refused
    assert messages(path) == ["one"]


# Whose numbers are whose.


def fill(spool, *options):
    done = push("--spool", spool, "-c", NOBODY, "--timeout", "0", *options, data=b"1\n2\n")
    assert done.returncode == 75


def test_two_keys_with_copies_of_one_spool_do_not_disturb_each_other(collector, keys, tmp_path):
    keys.admit("web1", "web2")
    _, endpoint = collector("--to", tmp_path / "all", "--state", tmp_path / "state")
    fill(tmp_path / "spool1")
    shutil.copytree(tmp_path / "spool1", tmp_path / "spool2")
    for at in "12":
        options = ["--spool", tmp_path / f"spool{at}", *AT_ONCE, "-c", endpoint]
        done = push(*options, *keys.connects(f"web{at}"), data=b"of %s\n" % at.encode())
        assert (done.returncode, losses(done.stderr)) == (0, (0, 0))

    assert messages(tmp_path / "all") == ["1", "2", "of 1", "1", "2", "of 2"]


def test_a_new_key_loses_nothing_and_repeats_what_was_not_known_as_acknowledged(
    collector, keys, start, tmp_path
):
    path = tmp_path / "all"
    receiver, endpoint = collector("--to", path, "--state", tmp_path / "state")
    options = ["-q", "--spool", tmp_path / "spool", "-c", endpoint]
    env = os.environ | {"ZMQPUSH_FAULT": "acked:1"}  # before it takes the ack
    sender = start(ZMQPUSH, *options, *keys.connects(), env=env)
    feed(sender, b"first\n")
    sender.wait(PATIENCE)
    assert messages(path) == ["first"]
    keys.admit("web1", "new")
    reload(receiver)
    done = push(*options, *AT_ONCE, *keys.connects("new"), data=b"second\n")
    assert (done.returncode, losses(done.stderr)) == (0, (0, 0))
    keys.admit("new")
    reload(receiver)
    done = push(*options, *AT_ONCE, *keys.connects("new"), data=b"third\n")
    assert (done.returncode, losses(done.stderr)) == (0, (0, 0))

    # The old key's number is not the new key's: what was in flight may come twice.
    assert [m for m in messages(path) if m != "first"] == ["second", "third"]
    assert 1 <= messages(path).count("first") <= 2


# The README's recipe, on two hosts.

README = (Path(__file__).parent.parent / "README.md").read_text()
RECIPE = re.findall(r"^\$ (.*)", README.partition("### Encrypt")[2].partition("\n### ")[0], re.M)


@pytest.fixture
def hosts(tmp_path):
    """Return two network namespaces that see each other, ``collector`` at 10.99.0.1."""
    if not shutil.which("ip"):
        pytest.skip("ip is not installed (Debian: iproute2)")
    names = {at: f"zmqpush-{os.getpid()}-{at}" for at in ("collector", "web1")}

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)

    try:
        for name in names.values():
            if ip("netns", "add", name).returncode:
                pytest.skip("network namespaces cannot be made here: that takes root")
        ends = [f"zp{os.getpid()}{at}" for at in "cw"]
        made = ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        if made.returncode:
            pytest.skip(f"network interfaces cannot be made here: {made.stderr.strip()}")
        for number, (end, name) in enumerate(zip(ends, names.values(), strict=True), 1):
            for words in (
                ["link", "set", end, "netns", name],
                ["-n", name, "addr", "add", f"10.99.0.{number}/24", "dev", end],
                ["-n", name, "link", "set", end, "up"],
            ):
                done = ip(*words)
                assert not done.returncode, done.stderr
        yield names
    finally:
        for name in names.values():
            ip("netns", "del", name)


def test_the_recipe_makes_an_encrypted_pipeline_of_two_hosts(hosts, start, tmp_path):
    new_collector, new_sender, allow, pull, send = RECIPE
    shown = re.findall(r"'([^']{40})'", allow + send)

    def run(host, command):
        home = tmp_path / host
        home.mkdir(exist_ok=True)
        env = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
        shell = ["ip", "netns", "exec", hosts[host], "sh", "-c", f"exec {command}"]
        if "|" in command:
            shell[-1] = command
        return start(*shell, cwd=home, env=env)

    def output(host, command):
        code, out, err = finish(run(host, command))
        assert code == 0, err
        return out.decode()

    def public(text):
        return re.search(r"(?<!\S)[^\s']{40}(?!\S)", text)[0]

    server_key = public(output("collector", new_collector))
    key = public(output("web1", new_sender))
    output("collector", allow.replace(shown[0], key))
    run("collector", pull)
    send = send.replace(shown[1], server_key).replace("app |", "seq 100 |")
    code, out, err = finish(run("web1", send.replace("logs.example.com", "10.99.0.1")))

    assert code == 0, err
    assert b"Processed 100 messages" in out
    assert messages(tmp_path / "collector" / "all.ndjson") == [str(n) for n in range(1, 101)]
