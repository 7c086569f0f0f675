"""Sockets of ours with keys at both ends: long messages, which threads encrypt."""

import threading

import pytest

from keyring import Keyring
from transports import MIB, Notes, bound, opened, run, until
from zmqpush.core.records.encode import Payload
from zmqpush.core.records.framing import Framing
from zmqpush.core.zmtp import curve
from zmqpush.security.admission import Guard
from zmqpush.security.keyfile import read_pair
from zmqpush.settings import Endpoints, Security
from zmqpush.transport.dealer import DealerSocket
from zmqpush.transport.pull import PullSocket
from zmqpush.transport.push import PushSocket
from zmqpush.transport.router import RouterSocket

FIRST, SECOND = (
    b"".join(b'{"%s":"%s"}\n' % (name, b"x" * 99) for _ in range(10_000)) for name in (b"a", b"b")
)


@pytest.fixture
def binding(tmp_path):
    ring = Keyring(tmp_path)
    return lambda: Guard(Security(key=ring.file("collector"), allow="any"), (), Notes())


@pytest.fixture
def connecting(tmp_path):
    ring = Keyring(tmp_path)

    def guard(endpoint):
        server = (read_pair(tmp_path / "collector").public,)
        security = Security(key=ring.file("web1"), server_keys=server)
        return Guard(security, (endpoint,), Notes())

    return guard


@pytest.fixture
def gate(monkeypatch):
    """Return what must be set before a thread encrypts something."""
    opened = threading.Event()
    seal = curve.seal_in_place

    def wait(*args):
        if threading.current_thread() is not threading.main_thread():
            opened.wait()
        seal(*args)

    monkeypatch.setattr(curve, "seal_in_place", wait)
    yield opened
    opened.set()


def test_long_and_short_messages_come_in_order(binding, connecting, gate):
    """Also those that are ready before a longer one, and answers between them."""
    sizes = [1, MIB, 10, 2 * MIB, 300_000, 100_000, 5, MIB]
    frames = [bytes((number,)) * size for number, size in enumerate(sizes * 3)]

    async def test(stack):
        router = stack.enter_context(opened(RouterSocket(bound(), binding(), 64 * MIB)))
        address = router.address
        dealer = stack.enter_context(opened(DealerSocket(address, connecting(address))))
        await until(lambda: dealer.connected and router._peers)
        for frame in frames:
            dealer.send(frame)
        (peer,) = router._peers
        router.send(peer, b"answer")
        await until(lambda: b"answer" in dealer.receive())
        got = []
        await until(lambda: got.extend(bytes(it) for _, it, _ in router.receive()) or got)
        assert got == frames[:1]
        gate.set()
        await until(
            lambda: (
                got.extend(bytes(it) for _, it, _ in router.receive()) or len(got) == len(frames)
            )
        )
        assert got == frames

    run(test)


def test_a_block_counts_as_sent_once_it_is_encrypted_and_sent(binding, connecting, gate):
    async def test(stack):
        pull = stack.enter_context(opened(PullSocket(bound(), binding(), 64 * MIB)))
        endpoints = Endpoints(connect=(pull.address,))
        guard = connecting(pull.address)
        push = stack.enter_context(opened(PushSocket(endpoints, guard, Framing("lines"), b"\n")))
        await until(lambda: push.has_room)
        push.send(Payload(FIRST, 10_000))
        assert not push.has_room
        assert (push.accepted, push.unsent) == (0, 10_000)
        gate.set()
        await until(lambda: push.has_room)
        assert (push.accepted, push.unsent) == (10_000, 0)
        push.send(Payload(SECOND, 10_000))
        got = []
        await until(lambda: got.extend(pull.receive()) or len(got) == 2)
        assert b"".join(got) == FIRST + SECOND

    run(test)


def test_a_block_goes_to_another_if_its_connection_breaks_before_it_is_encrypted(
    binding, connecting, gate
):
    async def test(stack):
        pull = stack.enter_context(opened(PullSocket(bound(), binding(), 64 * MIB)))
        endpoints = Endpoints(connect=(pull.address,))
        guard = connecting(pull.address)
        push = stack.enter_context(opened(PushSocket(endpoints, guard, Framing("lines"), b"\n")))
        await until(lambda: push.has_room)
        push.send(Payload(FIRST, 10_000))
        (channel,) = push._peers
        channel.close(ConnectionResetError())
        gate.set()
        got = []
        await until(lambda: got.extend(pull.receive()) or got)
        assert b"".join(got) == FIRST
        assert (push.accepted, push.unsent) == (10_000, 0)

    run(test)
