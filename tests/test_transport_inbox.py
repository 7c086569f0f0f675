"""What peers have a receiver hold: bounded, fair, and given back."""

import asyncio
import contextlib
import socket

import pytest

from hostile import LONG, MORE, connect, frame, greeting, is_closed, ready
from transports import MIB, Notes, bound, guard, opened, run, until
from zmqpush.transport import inbox
from zmqpush.transport.pull import PullSocket

MEMORY = 4 * MIB


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(inbox, "_PATIENCE", 0.2)


def receiver(stack, notes=None, memory=MEMORY):
    return stack.enter_context(opened(PullSocket(bound(), guard(notes), memory)))


async def connected(stack, pull):
    """Return a connection of a sender that is ready."""
    port = int(pull.address.rpartition(":")[2])
    peer = stack.enter_context(connect(port, greeting() + ready(b"PUSH")))
    name = f"127.0.0.1:{peer.getsockname()[1]}"
    await until(lambda: name in {it.peer for it in pull._channels.keys() - pull._greeting.keys()})
    return peer


async def write(peer, data):
    """Send bytes, however long that takes."""
    peer.setblocking(False)
    await asyncio.get_running_loop().sock_sendall(peer, data)


def taking(stack, pull, frames):
    """Take what comes, as the program does."""

    async def take():
        while True:
            frames.extend(pull.receive())
            await pull.readable()
            await asyncio.sleep(0)

    stack.callback(asyncio.create_task(take()).cancel)


def test_all_that_is_held_is_given_back():
    async def test(stack):
        pull = receiver(stack)
        kinds = [
            frame(b"a line"),
            frame(b"x" * 100) * 1000,
            frame(b"part", MORE) * 10 + frame(b"last"),
            frame(b"x" * MIB),
            frame(b"x" * (MIB // 8)) * 4,
            frame(b"") * 1000,
        ]
        frames = []
        for data in kinds:
            for cut in (0, 1, len(data) // 2, len(data)):  # the last: it ends without it
                with await connected(stack, pull) as peer:
                    await write(peer, data + data[:cut])
                await until(lambda: not pull._channels)
                while some := pull.receive(7):
                    frames += some
                assert pull._inbox._held == 0
        taking(stack, pull, frames)
        peers = [await connected(stack, pull) for _ in range(5)]
        before = len(frames)
        await asyncio.gather(*(write(peer, frame(b"x" * MIB) * 3) for peer in peers))
        await until(lambda: len(frames) == before + 15)
        assert pull._inbox._held == 0
        assert not pull._inbox._paused

    run(test)


def test_who_is_not_admitted_any_more_leaves_nothing():
    async def test(stack):
        pull = receiver(stack)
        peers = [await connected(stack, pull) for _ in range(3)]
        for peer in peers:
            await write(peer, frame(b"a line") * 3 + frame(b"half")[:4])
        channels = list(pull._channels)
        await until(lambda: all(channel.partial for channel in channels))
        channels[1].principal = "somebody"
        pull._guard.reviewers[0]()
        await until(lambda: is_closed(peers[1]))
        assert [is_closed(peer) for peer in peers] == [False, True, False]
        assert len(pull.receive()) == 6
        for peer in peers:
            peer.close()
        await until(lambda: not pull._channels)
        assert pull._inbox._held == 0

    run(test)


def test_messages_larger_than_the_memory_of_each_come_from_several_peers():
    async def test(stack):
        notes = Notes()
        pull = receiver(stack, notes)
        frames = []
        taking(stack, pull, frames)
        peers = [await connected(stack, pull) for _ in range(6)]
        message = frame(b"x" * (MEMORY - 1))
        await asyncio.gather(*(write(peer, message * 3) for peer in peers))
        await until(lambda: len(frames) == 18)
        assert not notes.lines
        assert len(pull._channels) == 6

    run(test)


def test_who_has_finished_a_large_message_is_not_cut_off_while_the_output_is_slow():
    """It was let go on beyond the budget, and then it is we who do not read."""

    async def test(stack):
        notes = Notes()
        pull = receiver(stack, notes)
        peers = [await connected(stack, pull) for _ in range(2)]
        message = frame(b"x" * (3 * MIB))
        writing = [asyncio.create_task(write(peer, message * 4)) for peer in peers]
        await until(lambda: pull._inbox)
        await asyncio.sleep(5 * inbox._PATIENCE)  # the output takes nothing
        frames = []
        taking(stack, pull, frames)
        await until(lambda: len(frames) == 8)
        assert not notes.lines
        await asyncio.gather(*writing)

    run(test)


def test_one_that_may_go_on_beyond_the_budget_may_not_for_ever():
    async def test(stack):
        pull = receiver(stack)
        endless, honest = [await connected(stack, pull) for _ in range(2)]

        async def flood():
            with contextlib.suppress(ConnectionError):
                while True:
                    await write(endless, frame(b"x" * (3 * MIB)))

        stack.callback(asyncio.create_task(flood()).cancel)
        frames = []
        taking(stack, pull, frames)
        await until(lambda: len(frames) > 3)
        await write(honest, frame(b"y" * (3 * MIB)) * 5)
        await until(lambda: sum(it[:1] == b"y" for it in frames) == 5)

    run(test)


@pytest.mark.parametrize("claim", [None, 3 * MIB], ids=["parts", "frames"])
def test_messages_without_an_end_from_many_are_bounded_and_stop_nobody(claim):
    """Each has brought more than its share before it can be told from the others."""

    async def test(stack):
        notes = Notes()
        pull = receiver(stack, notes)
        frames = []
        taking(stack, pull, frames)
        honest = await connected(stack, pull)
        part = frame(bytes(1000), MORE) * 200 if claim is None else bytes(200_000)
        data = part if claim is None else frame(b"", LONG, claim=claim) + part
        held = 0
        attackers = []
        for _ in range(200):
            attackers.append(await connected(stack, pull))
            attackers[-1].setblocking(False)
            with contextlib.suppress(BlockingIOError):
                attackers[-1].send(data)
            await asyncio.sleep(0)
            held = max(held, pull._inbox._held)
        await write(honest, frame(b"y" * 100_000) * 20)
        await until(lambda: len(frames) == 20)
        held = max(held, pull._inbox._held)
        assert held < 2 * MEMORY
        assert "memory is short" in notes
        assert not is_closed(honest)

    run(test)


def test_who_goes_on_with_a_message_a_byte_at_a_time_is_cut_off_as_well():
    async def test(stack):
        notes = Notes()
        pull = receiver(stack, notes)
        slow = await connected(stack, pull)
        honest = await connected(stack, pull)
        await write(slow, frame(b"", LONG, claim=MEMORY - 1) + bytes(MEMORY // 2 + 1000))
        await until(lambda: pull._inbox._favoured)

        async def drip():
            with contextlib.suppress(ConnectionError):
                while True:
                    await write(slow, b"x")
                    await asyncio.sleep(0.01)

        stack.callback(asyncio.create_task(drip()).cancel)
        frames = []
        taking(stack, pull, frames)
        await write(honest, frame(b"y" * (2 * MIB)))
        await until(lambda: frames)
        assert "cut off" in notes

    run(test)


def test_a_thousand_that_are_paused_cost_no_look_at_all_for_each_message():
    """Each is paused, with little; the program takes one after the other."""

    async def test(stack):
        pull = receiver(stack)
        peers = [await connected(stack, pull) for _ in range(300)]
        looks = 0
        inner = pull._inbox._go_on

        def count(channel):
            nonlocal looks
            looks += 1
            inner(channel)

        pull._inbox._go_on = count
        data = frame(b"x" * 100) * 200
        await asyncio.gather(*(write(peer, data) for peer in peers))
        await until(lambda: len(pull._inbox._paused) > 100)
        taken = 0
        while taken < 300 * 200:
            taken += len(pull.receive())
            await asyncio.sleep(0)
        await until(lambda: not pull._inbox._paused)
        assert looks < 10_000

    run(test)


def test_a_kernel_that_says_no_ends_one_connection():
    """ENOBUFS and the like: errors of one socket, and no memory."""

    async def test(stack):
        notes = Notes()
        pull = receiver(stack, notes)
        bad, good = [await connected(stack, pull) for _ in range(2)]
        first = next(iter(pull._channels))

        class Failing(socket.socket):
            def recv(self, *_):
                raise OSError(105, "no buffer space")

        first._sock = Failing(fileno=first._sock.detach())
        bad.sendall(frame(b"x"))
        await until(lambda: first.closed)
        await write(good, frame(b"y"))
        await until(lambda: pull._inbox)
        assert pull.receive() == [b"y"]

    run(test)


def test_want_of_memory_ends_the_program_in_order():
    async def test(stack):
        pull = receiver(stack)
        peer = await connected(stack, pull)
        channel = next(iter(pull._channels))

        class Failing(socket.socket):
            def recv(self, *_):
                raise MemoryError

        channel._sock = Failing(fileno=channel._sock.detach())
        peer.sendall(frame(b"x"))
        await until(lambda: channel.closed)
        with pytest.raises(MemoryError):
            pull.receive()

    run(test)
