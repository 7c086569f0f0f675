"""
Peers that have finished their handshakes, or nearly, attack both ends by what they then send.

With keys the attacker has a key that is admitted.
"""

import contextlib
import os
import re
import resource
import signal
import socket
import threading
import time

import pytest

from chaos import Feeder, compare, patched, written
from helpers import NOBODY, PATIENCE, ZMQPULL, ZMQPUSH, wait_until, wait_until_ready
from hostile import (
    COMMAND,
    HASTY,
    LONG,
    MORE,
    Intruder,
    Target,
    connect,
    frame,
    greeting,
    intrude,
    is_closed,
    mechanism,
    peak_memory,
)
from keyring import Keyring
from zmqpush.core.zmtp.connection import Connection, Limits
from zmqpush.core.zmtp.metadata import SocketType

MIB = 1 << 20
ROUNDS = 6_000
KINDS = {"port": "DEALER", "plain_port": "PUSH"}
PORTS = pytest.mark.parametrize("port", KINDS)
WITH_KEYS = pytest.mark.parametrize("with_keys", [False, True], ids=["open", "keys"])


@pytest.fixture
def keys(tmp_path, with_keys):
    return Keyring(tmp_path) if with_keys else None


@pytest.fixture
def target(start, tmp_path, keys):
    return Target(start, tmp_path, plain=True, keys=keys)


@WITH_KEYS
@PORTS
def test_frames_and_pings_and_a_reset_end_one_connection(target, port):
    """It made libzmq abort: it answered, and did not expect the reset then."""
    with target.under_attack(f"{ROUNDS} frames and PINGs, and a reset"):
        for _ in range(3):
            intruder = intrude(getattr(target, port), KINDS[port], target.keys)
            intruder.send(intruder.pings(ROUNDS, b"x"))
            intruder.vanish()
            target.wait_for_more()
    target.verify(stranger=b'{"message":"x"}')  # which it is at the plain port


@WITH_KEYS
@PORTS
def test_pings_of_who_does_not_read_take_no_memory(target, port):
    with target.under_attack("PINGs of who does not read"):
        intruder = intrude(getattr(target, port), KINDS[port], target.keys)
        with intruder.sock:
            memory = target.memory
            for _ in range(10):
                intruder.send(intruder.pings(10_000))
            assert not is_closed(intruder.sock)
            grown = target.memory - memory
    print(f"{grown >> 10} KiB more")

    assert grown < 24 * MIB
    target.verify()


@WITH_KEYS
def test_hellos_and_greetings_without_end_stop_nobody(start, tmp_path, keys):
    """Each costs what is dear, and is left alone then; all are cut off in the end."""
    target = Target(start, tmp_path, plain=True, keys=keys, command=patched("zmqpull", HASTY))
    before = target.connections
    with target.under_attack("600 HELLOs"), contextlib.ExitStack() as stack:
        for number in range(600):
            peer = stack.enter_context(connect(target.port if number % 2 else target.plain_port))
            end = Connection(SocketType.DEALER, mechanism(target.keys), Limits(1 << 10))
            peer.sendall(end.take_output())
            if target.keys:
                peer.sendall(greeting(b"CURVE")[11:])
                end.receive(greeting(b"CURVE"))
                hello = end.take_output()
                peer.sendall(hello[-202:])
        target.wait_for_more()
        wait_until(lambda: target.connections < before + 10)

    target.verify()


def test_incomplete_messages_of_many_hold_no_more_than_the_memory(start, tmp_path):
    target = Target(start, tmp_path, plain=True)
    count = 200
    with target.under_attack(f"{count} incomplete messages"), contextlib.ExitStack() as stack:
        for number in range(count):
            port = list(KINDS)[number % 2]
            peer = stack.enter_context(intrude(getattr(target, port), KINDS[port]).sock)
            peer.setblocking(False)
            claim = frame(b"", LONG, claim=15 * MIB) + bytes(MIB)
            with contextlib.suppress(BlockingIOError):
                peer.send(claim if number % 4 < 2 or port == "port" else frame(bytes(MIB), MORE))
        target.wait_for_more()
        target.wait_for_more()

    assert target.peak < 240 * MIB
    target.verify()


def flooding(make, data):
    """Send the same again and again over a connection, until it is cut or the test ends."""

    def run():
        with contextlib.suppress(OSError):
            peer = make()
            with peer:
                peer.settimeout(PATIENCE)
                while True:
                    peer.sendall(data)

    threading.Thread(target=run, daemon=True).start()


def dripping(port, data):
    """Send a byte at a time, over many connections."""

    def run():
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            peers = [stack.enter_context(connect(port)) for _ in range(200)]
            for byte in data:
                for peer in peers:
                    peer.sendall(bytes((byte,)))
                time.sleep(0.05)

    threading.Thread(target=run, daemon=True).start()


def greeting_again_and_again(port, data):
    def run():
        with contextlib.suppress(OSError):
            while True:
                connect(port, data).close()

    threading.Thread(target=run, daemon=True).start()


FLOODS = {
    "pings": lambda kind, port: flooding(
        lambda: intrude(port, kind).sock, frame(PING_COMMAND, COMMAND) * 1000
    ),
    "messages": lambda kind, port: flooding(lambda: intrude(port, kind).sock, frame(b"x") * 1000),
    "empty messages": lambda kind, port: flooding(
        lambda: intrude(port, kind).sock, frame(b"") * 1000
    ),
    "parts": lambda kind, port: flooding(
        lambda: intrude(port, kind).sock, frame(bytes(1000), MORE)
    ),
    "bytes": lambda _, port: dripping(port, greeting()),
    "connections": lambda _, port: greeting_again_and_again(port, b""),
    "greetings": lambda _, port: greeting_again_and_again(port, greeting()),
    "garbage": lambda _, port: greeting_again_and_again(port, os.urandom(1000)),
}
PING_COMMAND = b"\x04PING\0\0context"


@pytest.mark.parametrize("flood", FLOODS)
@pytest.mark.parametrize("kind", ["DEALER", "PUSH"])
def test_a_receiver_hears_its_end_whatever_comes(start, tmp_path, kind, flood):
    errors = tmp_path / "errors"
    option = {"DEALER": "-a", "PUSH": "-b"}[kind]
    with errors.open("wb") as file:
        args = (option, "tcp://127.0.0.1:*", "--to", tmp_path / "all", "--state", tmp_path / "s")
        child = start(ZMQPULL, *args, stderr=file)
    wait_until(lambda: b"listening" in errors.read_bytes())
    port = int(errors.read_text().split()[-1].rpartition(":")[2])
    for _ in range(3):
        FLOODS[flood](kind, port)
    before = cpu(child.pid)
    wait_until(lambda: cpu(child.pid) > before + 0.05 or b"cut off" in errors.read_bytes())
    began = time.monotonic()
    child.terminate()
    code = child.wait(PATIENCE)
    print(f"{flood}: SIGTERM heard after {time.monotonic() - began:.2f} s")

    assert code in (0, 1), errors.read_text()  # the last of a flood of records may be lost
    assert "internal error" not in errors.read_text()


def cpu(pid):
    """Return how much processor time a process has taken, in seconds."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


@pytest.mark.parametrize("most", [12, 20, 32, 64])
def test_without_descriptors_a_receiver_does_not_spin(start, tmp_path, most):
    """The limit is lowered while it runs: below 64 it would not start."""
    errors = tmp_path / "errors"
    with errors.open("wb") as file:
        child = start(ZMQPULL, "-b", "tcp://127.0.0.1:*", "-a", "tcp://127.0.0.1:*", stderr=file)
    wait_until(lambda: errors.read_bytes().count(b"listening") == 2)
    ports = [int(port) for port in re.findall(r":(\d+) for", errors.read_text())]
    resource.prlimit(child.pid, resource.RLIMIT_NOFILE, (most, most))
    with contextlib.ExitStack() as stack:
        for number in range(200):
            stack.enter_context(connect(ports[number % 2]))
        wait_until(lambda: b"limit on open descriptors" in errors.read_bytes())
        before, began = cpu(child.pid), time.monotonic()
        wait_until(lambda: time.monotonic() > began + 1)
        taken = cpu(child.pid) - before
        print(f"{most} descriptors: {taken:.2f} s of CPU in a second")
    began = time.monotonic()
    child.terminate()
    assert child.wait(PATIENCE) == 0, errors.read_text()
    print(f"SIGTERM heard after {time.monotonic() - began:.2f} s")
    assert taken < 0.5
    assert errors.read_bytes().count(b"limit on open") == 1


@pytest.mark.parametrize("options", [(), ("--ack",)], ids=["plain", "acknowledged"])
def test_without_descriptors_a_sender_does_not_spin(start, options):
    child = start(ZMQPUSH, *options, "-c", NOBODY)
    wait_until_ready(child)
    resource.prlimit(child.pid, resource.RLIMIT_NOFILE, (8, 8))
    child.stdin.write(b"a line\n")
    child.stdin.flush()
    before, began = cpu(child.pid), time.monotonic()
    wait_until(lambda: time.monotonic() > began + 1)
    taken = cpu(child.pid) - before
    print(f"{taken:.2f} s of CPU in a second")
    child.terminate()
    child.send_signal(signal.SIGTERM)
    assert child.wait(PATIENCE) == 1
    assert taken < 0.5


# The other end: what zmqpush connects to, or what connects to it.


class Hostile:
    """
    A server that finishes handshakes, and attacks whoever connects.

    Attributes:
        attacks: How many there were.

    """

    def __init__(self, kind, attack, keys=None):
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self._kind, self._attack, self._keys = kind, attack, keys
        self.attacks = 0
        self.peers = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        self._server.close()
        for peer in self.peers:
            peer.close()

    def _run(self):
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self._server.accept()
                self.peers.append(peer)
                with contextlib.suppress(OSError):
                    self._attack(Intruder(peer, self._kind, mechanism(self._keys, binds=True)))
                self.attacks += 1


def reset(intruder):
    intruder.send(intruder.pings(ROUNDS, b"x"))
    intruder.vanish()


def ping(intruder):
    for _ in range(5):
        intruder.send(intruder.pings(10_000))
    # It stays there, and reads nothing.


def drop(intruder):
    intruder.vanish()


ATTACKS = pytest.mark.parametrize("attack", [reset, ping, drop])


@WITH_KEYS
@ATTACKS
def test_a_sender_with_acknowledgements_goes_on_to_an_honest_receiver(
    start, tmp_path, keys, attack
):
    path = tmp_path / "all"
    binds, connects = (keys.binds(), keys.connects()) if keys else ([], [])
    endpoint = f"ipc://{tmp_path}/socket"
    start(ZMQPULL, "-a", endpoint, "--to", path, "--state", tmp_path / "state", *binds)
    with Hostile("ROUTER", attack, keys) as hostile:
        command = ("--ack", "--format", "raw", "-c", hostile.endpoint, "-c", endpoint)
        child = start(ZMQPUSH, *command, *connects)
        feeder = Feeder(child, 1, seed=1)
        wait_until(lambda: path.exists() and path.stat().st_size > MIB)
        assert hostile.attacks
        peak = peak_memory(child)
        last = feeder.stop()
        _, err = child.communicate(timeout=PATIENCE)

    assert child.returncode == 0, err
    wait_until(lambda: path.read_bytes().count(b"\n") >= last)
    assert compare(written(path), range(1, last + 1)) == ([], [])
    assert b"internal error" not in err
    assert peak < 128 * MIB


@WITH_KEYS
@ATTACKS
def test_a_sender_without_acknowledgements_goes_on_to_an_honest_receiver(
    start, tmp_path, keys, attack
):
    """What a hostile receiver has taken is gone; the honest one gets all others, once."""
    path = tmp_path / "all"
    binds, connects = (keys.binds(), keys.connects()) if keys else ([], [])
    endpoint = f"ipc://{tmp_path}/socket"
    start(ZMQPULL, "-b", endpoint, "--to", path, *binds)
    with Hostile("PULL", attack, keys) as hostile:
        command = ("--format", "raw", "-c", hostile.endpoint, "-c", endpoint)
        child = start(ZMQPUSH, *command, *connects)
        feeder = Feeder(child, 1, seed=1)
        wait_until(lambda: hostile.attacks)
        wait_until(lambda: path.exists() and path.stat().st_size > MIB)
        peak = peak_memory(child)
        last = feeder.stop()
        child.stdin.close()
        child.stdin = None
        for peer in hostile.peers:  # it does not wait for those that read nothing
            peer.close()
        _, err = child.communicate(timeout=PATIENCE)

    assert child.returncode in (0, 1), err
    assert b"internal error" not in err
    found = raw_numbers(path)
    assert len(found) == len(set(found))
    assert set(found) <= set(range(1, last + 1))
    assert peak < 160 * MIB


def raw_numbers(path):
    """Return the numbers of the lines, which zmqpull has made records of."""
    return [int(number) for number in re.findall(rb"(\d{9})#", path.read_bytes())]


@WITH_KEYS
@ATTACKS
def test_a_sender_that_is_bound_goes_on_to_an_honest_receiver(start, tmp_path, keys, attack):
    path, errors = tmp_path / "all", tmp_path / "errors"
    binds, connects = (keys.binds(), keys.connects()) if keys else ([], [])
    with errors.open("wb") as file:
        command = ("--format", "raw", "-b", "tcp://127.0.0.1:*")
        child = start(ZMQPUSH, *command, *binds, stderr=file)
    wait_until(lambda: b"listening" in errors.read_bytes())
    port = int(errors.read_text().rpartition(":")[2])
    start(ZMQPULL, "-c", f"tcp://127.0.0.1:{port}", "--to", path, *connects)
    feeder = Feeder(child, 1, seed=1)
    wait_until(lambda: path.exists() and path.stat().st_size)
    for _ in range(3):
        intruder = intrude(port, "PULL", keys)
        size = path.stat().st_size
        attack(intruder)
        wait_until(lambda size=size: path.stat().st_size > size + (MIB >> 2))
        intruder.sock.close()
    peak = peak_memory(child)
    feeder.stop()
    child.stdin.close()
    child.wait(PATIENCE)

    assert child.returncode in (0, 1), errors.read_text()
    assert "internal error" not in errors.read_text()
    found = raw_numbers(path)
    assert len(found) == len(set(found))
    assert peak < 160 * MIB
