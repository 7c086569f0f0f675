"""
Other implementations of ZeroMQ at the other end of the installed programs.

libzmq (through pyzmq, czmq and npm's zeromq), omq (through pyomq) and JeroMQ 0.3.6, which knows
ZMTP 2.0 alone, are programs in ``tests/implementations``.
"""

import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from ctypes.util import find_library
from itertools import count
from pathlib import Path

import pytest
import zmq

import test_curve
import test_keys_interop
from helpers import PATIENCE, SUMMARY, ZMQPULL, ZMQPUSH, losses, push, sent, wait_until
from implementations.peer import encode_message, read_messages
from proxy import Proxy
from rsyslogs import needs_module, needs_rsyslogd, numbers
from test_curve import feed, free_endpoint
from zmqpush.security.keyfile import read_pair

keys = test_curve.keys
PROGRAMS = Path(__file__).parent / "implementations"
JEROMQ = Path("/usr/share/java/jeromq.jar")
NODE = {"NODE_PATH": "/usr/local/lib/node_modules:/usr/lib/node_modules"}
FRAMINGS = ["single", "frames", "array", "lines"]

# Lines whose records are about as long as the longest short frame, empty ones, other alphabets,
# and one that is far longer than what is read at once.
TEXTS = [f"{number} {'x' * (number % 300)}" for number in range(3000)]
TEXTS[100:200] = [""] * 100
TEXTS[300:400] = [f'{number} ü€\u2028𝄞 \t\\"' for number in range(100)]
TEXTS[1500] = "y" * (1 << 20)
LINES = "".join(text + "\n" for text in TEXTS).encode()


def record(number, size):
    """Return a record that is so long, if it is not longer."""
    head = f'{{"n":{number},"text":"ü'
    return f'{head}{"x" * (size - len(head.encode()) - 2)}"}}'.encode()


RECORDS = [record(number, number % 300) for number in range(3000)]
RECORDS[1500] = record(1500, 1 << 20)
assert {255, 256} < {*map(len, RECORDS)}


def cut(records, framing):
    """Return the messages with some records, a hundred in each if there may be several."""
    if framing == "single":
        return [[record] for record in records]
    blocks = [records[at : at + 100] for at in range(0, len(records), 100)]
    if framing == "frames":
        return blocks
    if framing == "array":
        return [[b"[%s]" % b",".join(block)] for block in blocks]
    return [[b"\n".join(block) + b"\n"] for block in blocks]


def join(messages, framing):
    """Return the records in some messages."""
    parts = [part for parts in messages for part in parts]
    if framing != "frames":
        assert len(parts) == len(messages)
    if framing == "lines":
        assert all(part.endswith(b"\n") for part in parts)
        parts = [line for part in parts for line in part[:-1].split(b"\n")]
    values = map(json.loads, parts)
    return [value for values in values for value in values] if framing == "array" else [*values]


# The peers.


def node_has(package):
    if (node := shutil.which("node")) is None:
        return False
    script = [node, "-e", f"require.resolve('{package}')"]
    return subprocess.run(script, env=os.environ | NODE, capture_output=True).returncode == 0


WANTED = {
    "pyzmq": (lambda: True, ""),
    "strict pyzmq": (lambda: True, ""),
    "pyomq": (lambda: importlib.util.find_spec("pyomq"), "pyomq from PyPI"),
    "czmq": (lambda: find_library("czmq"), "libczmq4"),
    "zeromq.js": (lambda: node_has("zeromq"), "nodejs, and npm install --global zeromq@6"),
    "JeroMQ": (lambda: JEROMQ.exists() and shutil.which("javac"), "libjeromq-java and a JDK"),
}
# Queues of two messages make it slow, heartbeats come between all else.
_STRICT = {"SNDHWM": 2, "RCVHWM": 2, "HEARTBEAT_IVL": 10, "HEARTBEAT_TIMEOUT": 60_000}
OPTIONS = {
    "strict pyzmq": _STRICT,
    "pyzmq with heartbeats": {"HEARTBEAT_IVL": 50, "HEARTBEAT_TIMEOUT": 5000},
}


def needed(name, *values):
    """Return values of a test that needs an implementation; it is skipped where that is not."""
    is_there, what = WANTED[name]
    return pytest.param(
        name,
        *values,
        marks=pytest.mark.skipif(not is_there(), reason=f"needs {what}"),
        id="-".join([name, *("curve" if value else "null" for value in values)]),
    )


EACH = pytest.mark.parametrize(
    ("name", "encrypts"),
    [
        needed(name, encrypts)
        for name in WANTED
        for encrypts in (False, True)
        if not (name == "JeroMQ" and encrypts)  # it has no CURVE
    ],
)
EITHER_END = pytest.mark.parametrize("how", ["bind", "connect"])


@pytest.fixture(scope="session")
def jeromq(tmp_path_factory):
    """Return where the program with JeroMQ is, compiled."""
    classes = tmp_path_factory.mktemp("classes")
    command = ["javac", "-cp", JEROMQ, "-d", classes, PROGRAMS / "Peer.java"]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    return classes


class Peer:
    """A program with a socket."""

    def __init__(self, child):
        self._child = child
        self._messages = []  # that it has received, each a list of parts
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            for message in read_messages(self._child.stdout):
                self._messages.append(message)
        except (ValueError, struct.error):  # it was killed
            return

    def send(self, messages):
        self._child.stdin.write(b"".join(map(encode_message, messages)))
        self._child.stdin.flush()

    def received(self, framing):
        return [record["message"] for record in join(list(self._messages), framing)]

    def take(self, framing, number):
        """Return the texts of all records that have come, once so many have."""
        wait_until(lambda: len(self.received(framing)) >= number)
        texts = self.received(framing)
        self._messages.clear()
        return texts

    def kill(self):
        self._child.kill()
        self._child.wait()


class Ends:
    """A peer and one of our programs, of which one binds, with or without keys."""

    def __init__(self, start, directory, keys, jeromq, name, how, *, encrypts):
        self._start, self._keys, self._jeromq = start, keys, jeromq
        self._name, self._how, self._encrypts = name, how, encrypts
        self.endpoint = free_endpoint("tcp", directory)
        self.path = directory / "all"

    @property
    def flags(self):
        """What our program is to be told."""
        if self._how == "connect":
            self._keys.admit("peer")
            return ["-b", self.endpoint, *(self._keys.binds("ours") if self._encrypts else [])]
        connects = self._keys.connects("ours", to="peer") if self._encrypts else []
        return ["-c", self.endpoint, *connects]

    @property
    def _options(self):
        options = dict(OPTIONS.get(self._name, {}))
        if self._encrypts:
            pair = read_pair(self._keys.file("peer"))
            options |= {"public": pair.public, "secret": pair.secret}
            options["file"] = str(self._keys.file("peer"))
            if self._how == "connect":
                options["server"] = self._keys.public("ours")
        return json.dumps(options)

    def peer(self, kind):
        arguments = [kind, self._how, self.endpoint]
        environment = os.environ | NODE
        match self._name:
            case "JeroMQ":
                program = ["java", "-cp", f"{JEROMQ}:{self._jeromq}", "Peer"]
            case "zeromq.js":
                program = ["node", PROGRAMS / "peer.js"]
                arguments.append(self._options)
            case library:
                module = re.search("pyzmq|pyomq|czmq", library)[0]
                program = [sys.executable, PROGRAMS / "peer.py", module]
                arguments.append(self._options)
        return Peer(self._start(*program, *arguments, stderr=None, env=environment))

    def pull(self):
        return self._start(ZMQPULL, "-q", *self.flags, "--to", self.path)

    def push(self, *options):
        return self._start(ZMQPUSH, *options, "--timeout", PATIENCE, *self.flags)

    def written(self):
        return self.path.read_bytes().splitlines() if self.path.exists() else []


@pytest.fixture
def ends(request, start, tmp_path, keys):
    def make(name, how, *, encrypts=False):
        jeromq = request.getfixturevalue("jeromq") if name == "JeroMQ" else None
        return Ends(start, tmp_path, keys, jeromq, name, how, encrypts=encrypts)

    return make


ENCRYPTS = pytest.mark.parametrize("encrypts", [False, True], ids=["null", "curve"])


# What is delivered.


@EACH
@EITHER_END
def test_it_receives_each_record_in_each_framing(ends, name, how, encrypts):
    ends = ends(name, how, encrypts=encrypts)
    peer = ends.peer("PULL")
    for framing in FRAMINGS:
        options = ["--framing", framing, "--timeout", PATIENCE]
        done = push(*options, *ends.flags, data=LINES)

        assert (sent(done), losses(done.stderr)) == (len(TEXTS), (0, 0))
        assert peer.take(framing, len(TEXTS)) == TEXTS


@EACH
@EITHER_END
def test_each_record_that_it_sends_is_written_whatever_the_framing(ends, name, how, encrypts):
    ends = ends(name, how, encrypts=encrypts)
    receiver, peer = ends.pull(), ends.peer("PUSH")
    wanted = []
    for framing in FRAMINGS:
        if name == "pyomq" and encrypts and framing == "frames":
            continue  # see below
        peer.send([*cut(RECORDS, framing), [b""]])
        wanted += [*RECORDS, b'{"message":""}']
    wait_until(lambda: len(ends.written()) >= len(wanted))
    receiver.terminate()

    assert receiver.wait(PATIENCE) == 0
    assert ends.written() == wanted


@pytest.mark.parametrize("name", [needed("pyomq")])
@EITHER_END
def test_flags_that_it_repeats_in_the_clear_are_refused_by_name(ends, name, how):
    ends = ends(name, how, encrypts=True)
    receiver, peer = ends.pull(), ends.peer("PUSH")
    peer.send(cut(RECORDS[:1], "single"))
    wait_until(ends.written)
    peer.send(cut(RECORDS[:100], "frames"))

    assert b"a frame with flags in the clear" in receiver.stderr.readline()
    assert ends.written() == RECORDS[:1]


@pytest.mark.parametrize("kind", ["PUSH", "PULL"])
def test_heartbeats_are_answered_while_nothing_else_happens(ends, kind):
    ends = ends("pyzmq with heartbeats", "bind")
    peer = ends.peer(kind)
    passed = []
    with Proxy(int(ends.endpoint.rpartition(":")[2])) as proxy:
        proxy.change = lambda data: passed.append(data) or data
        ends.endpoint = f"tcp://127.0.0.1:{proxy.port}"
        child = ends.pull() if kind == "PUSH" else ends.push()
        wait_until(lambda: b"".join(passed).count(b"PONG") > 0)
        connections = proxy.connections
        wait_until(lambda: b"".join(passed).count(b"PONG") > 20)

        assert child.poll() is None
        assert proxy.connections == connections
    peer.kill()


class Relay:
    """
    A ROUTER and a DEALER of libzmq, and what passes from one to the other while it lasts.

    Attributes:
        endpoint: Where the ROUTER is bound, for one sender.

    """

    def __init__(self, receiver, keys, *, encrypts):
        self._context = zmq.Context()
        self._front, self._back = self._context.socket(zmq.ROUTER), self._context.socket(zmq.DEALER)
        for socket, name in ((self._front, "front"), (self._back, "back")):
            for option, value in {**_STRICT, "LINGER": 0}.items():
                socket.setsockopt(getattr(zmq, option), value)
            if encrypts:
                pair = read_pair(keys.file(name))
                socket.curve_publickey = pair.public.encode()
                socket.curve_secretkey = pair.secret.encode()
        self._front.setsockopt(zmq.ROUTER_MANDATORY, 1)  # else it drops what is too much
        if encrypts:
            self._front.curve_server = True
            self._back.curve_serverkey = keys.public("collector").encode()
        self._front.bind("tcp://127.0.0.1:*")
        self._back.connect(receiver)
        self.endpoint = self._front.last_endpoint.decode()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()
        self._context.destroy()

    def _run(self):
        poller, sender = zmq.Poller(), b""
        poller.register(self._front, zmq.POLLIN)
        poller.register(self._back, zmq.POLLIN)
        while not self._ended.is_set():
            for socket, _ in poller.poll(20):
                if socket is self._front:
                    sender, frame = socket.recv_multipart()
                    self._back.send(frame)
                else:
                    self._front.send_multipart([sender, socket.recv()])


@ENCRYPTS
def test_acknowledged_records_pass_a_router_and_a_dealer_of_libzmq(start, tmp_path, keys, encrypts):
    keys.admit("back")
    path, endpoint = tmp_path / "all", free_endpoint("tcp", tmp_path)
    start(ZMQPULL, "-q", "-a", endpoint, "--to", path, *(keys.binds() if encrypts else []))
    with Relay(endpoint, keys, encrypts=encrypts) as relay:
        options = keys.connects("web1", to="front") if encrypts else []
        done = push("--ack", "--format", "raw", "-c", relay.endpoint, *options, data=LINES)

    assert (sent(done), done.stderr) == (len(TEXTS), b"")
    assert test_curve.messages(path) == TEXTS


# Restarts.


@EACH
@EITHER_END
def test_zmqpush_goes_on_when_it_is_killed_and_comes_back(ends, name, how, encrypts):
    ends = ends(name, how, encrypts=encrypts)
    peer, sender = ends.peer("PULL"), ends.push()
    feed(sender, LINES)
    texts = peer.take("single", len(TEXTS))
    peer.kill()
    feed(sender, LINES)
    peer = ends.peer("PULL")
    feed(sender, LINES)
    out, err = sender.communicate(timeout=PATIENCE)
    delivered, (dropped, lost) = int(SUMMARY.fullmatch(out)[1]), losses(err)
    texts += peer.take("single", delivered - len(TEXTS))

    assert (delivered + lost, dropped) == (3 * len(TEXTS), 0)
    assert texts[: len(TEXTS)] == texts[-len(TEXTS) :] == TEXTS
    again = iter(TEXTS)  # some may have gone to the one that was killed
    assert all(text in again for text in texts[len(TEXTS) : -len(TEXTS)])


@EACH
@EITHER_END
def test_it_goes_on_when_zmqpull_ends_and_comes_back(ends, name, how, encrypts):
    ends = ends(name, how, encrypts=encrypts)
    receiver, peer = ends.pull(), ends.peer("PUSH")
    peer.send(cut(RECORDS, "single"))
    wait_until(lambda: len(ends.written()) == len(RECORDS))
    receiver.terminate()
    assert receiver.wait(PATIENCE) == 0
    ends.pull()
    tries = count()

    def gets_through():  # what it sends before it notices is lost
        peer.send([[b'{"try":%d}' % next(tries)]])
        return len(ends.written()) > len(RECORDS)

    wait_until(gets_through)
    peer.send(cut(RECORDS, "single"))
    wait_until(lambda: ends.written()[-1] == RECORDS[-1])
    between = [json.loads(record) for record in ends.written()[len(RECORDS) : -len(RECORDS)]]

    assert ends.written()[-len(RECORDS) :] == RECORDS
    assert between == [{"try": number} for number in range(next(tries))][-len(between) :]


# The wrong type.


@EACH
def test_another_type_that_connects_is_named(ends, name, encrypts):
    ends = ends(name, "connect", encrypts=encrypts)
    receiver = ends.pull()
    ends.peer("DEALER")

    line = receiver.stderr.readline().decode()
    assert "it is a DEALER socket, not a PUSH" in line
    assert f"connects to {ends.endpoint}" in line


@EACH
def test_another_type_that_binds_is_named_as_far_as_it_says_what_it_is(ends, name, encrypts):
    ends = ends(name, "bind", encrypts=encrypts)
    ends.peer("PUB")
    sender = ends.push("-q")
    feed(sender, LINES[:100])

    line = sender.stderr.readline().decode()
    assert line.startswith(f"zmqpush: {ends.endpoint} ")
    assert "a port for --ack" in line
    if not encrypts:
        assert "or another kind of ZeroMQ socket" in line
    if name == "JeroMQ" or (name == "pyomq" and not encrypts):  # others close without a word
        assert "it is a PUB socket, not a PULL" in line


# rsyslog's modules, beside what tests/test_rsyslog.py and tests/test_keys_interop.py have.

WHERE = {"bind": "@", "connect": ">"}
SHORT = [text for text in TEXTS if len(text) < 8000]  # as rsyslog's messages are


rsyslog = test_keys_interop.rsyslog


@needs_rsyslogd
@needs_module("imczmq")
@EITHER_END
def test_imczmq_receives_each_record_of_each_zmqpush(rsyslog, ends, how):
    ends = ends("imczmq", how)
    rsyslog.configure(
        'module(load="imczmq")',
        f'input(type="imczmq" endpoints="{WHERE[how]}{ends.endpoint}" socktype="PULL"'
        ' ruleset="in")',
        'template(name="raw" type="string" string="%rawmsg%\n")',
        f'ruleset(name="in") {{ action(type="omfile" file="{rsyslog.path}" template="raw") }}',
    )
    rsyslog.run()
    lines = "".join(text + "\n" for text in SHORT).encode()
    for number, framing in enumerate(["single", "frames", "single"], 1):
        done = push("--framing", framing, "--timeout", PATIENCE, *ends.flags, data=lines)

        assert (sent(done), losses(done.stderr)) == (len(SHORT), (0, 0))
        wait_until(lambda most=number: len(test_curve.messages(rsyslog.path)) >= most * len(SHORT))
    assert test_curve.messages(rsyslog.path) == 3 * SHORT


@needs_rsyslogd
@needs_module("omczmq")
@EITHER_END
def test_omczmq_goes_on_when_zmqpull_ends_and_comes_back(rsyslog, ends, how):
    ends = ends("omczmq", how)
    receiver = ends.pull()
    rsyslog.configure(
        'module(load="omczmq")',
        'template(name="json" type="string" string="{\\"message\\":\\"%msg:::json%\\"}")',
        f'*.* action(type="omczmq" endpoints="{WHERE[how]}{ends.endpoint}" socktype="PUSH"'
        ' template="json")',
    )
    rsyslog.run()
    rsyslog.send(range(2000))
    wait_until(lambda: set(range(2000)) <= set(numbers(ends.path)))
    receiver.terminate()
    assert receiver.wait(PATIENCE) == 0
    ends.pull()
    tries = count(2000)

    def gets_through():  # what it sends before it notices is lost
        rsyslog.send([next(tries)])
        return max(numbers(ends.path)) >= 2000

    wait_until(gets_through)
    first = next(tries)
    rsyslog.send(range(first, first + 2000))
    wait_until(lambda: max(numbers(ends.path)) == first + 1999)
    found = numbers(ends.path)

    assert found == sorted(set(found))
    assert set(range(2000)) | set(range(first, first + 2000)) <= set(found)
