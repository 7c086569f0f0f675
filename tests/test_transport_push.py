"""A PUSH socket of ours: whatever receivers do, nothing is lost that they have not taken."""

import asyncio
import contextlib
import socket

from helpers import FRAMINGS
from hostile import COMMAND, connect, frame, greeting, ready
from transports import MIB, Notes, Peer, bound, guard, messages, opened, run, until
from zmqpush.core.records.encode import Payload
from zmqpush.core.records.framing import Framing
from zmqpush.transport.push import PushSocket

PING = frame(b"\x04PING\0\0context", COMMAND)
LINES = [b'{"n":%d}' % n for n in range(6)]


def link(stack, framing="single", notes=None):
    push = PushSocket(bound(), guard(notes), Framing(framing), b"\n")
    return stack.enter_context(opened(push))


def payload(lines=LINES):
    return Payload(b"".join(line + b"\n" for line in lines), len(lines))


def records(data, framing):
    """Return the records of the whole messages in some bytes."""
    found = []
    for parts in messages(data):
        match framing:
            case "lines":
                found += parts[0].splitlines()
            case "array":
                found += [part + b"}" for part in parts[0].strip(b"[]").rstrip(b"}").split(b"},")]
            case _:
                found += parts
    return found


async def one(stack, push, kind=b"PULL"):
    before = len(push._peers)
    peer = stack.enter_context(Peer(push, kind))
    await until(lambda: len(push._peers) > before and peer.is_ready)
    return peer


async def size_of_a_block(stack, framing):
    push = link(stack, framing)
    peer = await one(stack, push)
    push.send(payload())
    return len(peer.received)


@FRAMINGS
def test_a_connection_that_dies_within_a_block_loses_and_repeats_no_message(framing):
    """At each byte, with nobody else at first, and with another receiver that is there."""

    async def die_after(stack, taken, others):
        push = link(stack, framing)
        dying = await one(stack, push)
        dying.ours.room = taken
        push.send(payload())
        assert (push.accepted, push.unsent) == (0, len(LINES))
        rest = [await one(stack, push) for _ in range(others)]
        dying.ours.is_broken = True
        await until(lambda: len(push._peers) == others)
        rest = rest or [await one(stack, push)]
        await until(lambda: push.accepted == len(LINES))
        first = records(dying.received, framing)
        second = records(rest[0].received, framing)
        assert first + second == LINES
        assert (push.unsent, push.has_room) == (0, True)

    async def test(stack):
        size = await size_of_a_block(stack, framing)
        for taken in range(0, size, 1 if framing in ("single", "lines") else 3):
            for others in (0, 1):
                with contextlib.ExitStack() as inner:
                    await die_after(inner, taken, others)

    run(test)


@FRAMINGS
def test_a_block_goes_out_in_pieces_of_any_size(framing):
    async def test(stack):
        size = await size_of_a_block(stack, framing)
        push = link(stack, framing)
        peer = await one(stack, push)
        for cut in range(1, size):
            before = len(peer.received)
            peer.ours.room = cut
            push.send(payload())
            assert push.unsent == len(LINES)
            assert not push.has_room
            peer.ours.room = 1
            await until(lambda: not peer.ours.room or not push.unsent)
            peer.ours.room = size
            await until(lambda: not push.unsent)
            assert records(peer.received[before:], framing) == LINES
        assert push.accepted == (size - 1) * len(LINES)

    run(test)


def test_pings_of_a_receiver_that_is_full_cost_no_records():
    """Their answer waits for room, with no block under way; then it is not a block's."""

    async def test(stack):
        push = link(stack)
        peer = await one(stack, push)
        peer.ours.room = 0
        peer.sock.sendall(PING)
        channel = next(iter(push._peers))
        await until(lambda: channel.unsent)
        assert push.has_room  # a block waits for room behind the answer
        peer.ours.room = 1 << 20
        await until(lambda: not channel.unsent)
        peer.ours.room = 0
        push.send(payload())
        assert not push.has_room
        peer.ours.room = 1 << 20
        await until(lambda: not push.unsent)
        assert push.accepted == len(LINES)
        assert records(peer.received, "single") == LINES

    run(test)


def test_an_answer_that_breaks_the_connection_repeats_no_block():
    """The kernel has taken the whole block before; the peer has sent a PING meanwhile."""

    async def test(stack):
        push = link(stack, "lines")
        size = await size_of_a_block(stack, "lines")
        peer = await one(stack, push)
        peer.ours.room = size - 1
        push.send(payload())
        peer.sock.sendall(PING)
        channel = next(iter(push._peers))
        await until(lambda: channel.connection._pong)
        peer.ours.is_broken = True
        peer.ours.room = 1
        await until(lambda: channel.closed)
        other = await one(stack, push)
        assert (push.accepted, push.unsent) == (len(LINES), 0)
        assert records(peer.received, "lines") == LINES
        assert not other.received

    run(test)


def test_a_receiver_that_pings_at_the_end_gets_everything():
    """We have said that no more comes: to answer it would break the connection."""

    async def test(stack):
        push = link(stack, "lines")
        port = int(push.address.rpartition(":")[2])
        with socket.socket() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            peer.connect(("127.0.0.1", port))
            peer.sendall(greeting() + ready(b"PULL"))
            await until(lambda: push.has_room)
            for _ in range(4):
                push.send(payload([b"x" * (MIB // 8)]))
                await until(lambda: push.has_room or push.unsent)
                if push.unsent:
                    break
            closing = asyncio.create_task(push.close())
            peer.setblocking(False)
            came = b""
            while not closing.done():
                await asyncio.sleep(0)
                if not closing.done():
                    peer.send(PING)
                try:
                    data = peer.recv(16384)
                except BlockingIOError:
                    continue
                if not data:
                    break
                came += data
            peer.shutdown(socket.SHUT_WR)
            await closing
        whole = [parts[0] for parts in messages(came[len(greeting()) + len(ready(b"PUSH")) :])]
        assert len(whole) == push.accepted
        assert push.doubtful == 0

    run(test)


def test_the_end_does_not_wait_for_who_has_not_said_what_it_is():
    async def test(stack):
        push = link(stack)
        port = int(push.address.rpartition(":")[2])
        with connect(port):
            await until(lambda: push._channels)
            closing = asyncio.create_task(push.close())
            await asyncio.sleep(0)
            assert closing.done() or not push._channels

            await closing

    run(test)


def test_what_was_taken_of_a_block_is_in_doubt_when_its_connection_breaks():
    """Even of the first one: what the receiver's kernel had is not known."""

    async def test(stack):
        notes = Notes()
        push = link(stack, "single", notes)
        peer = await one(stack, push)
        lines = [b"x" * 100] * 1000
        peer.ours.room = 50 * 102
        push.send(payload(lines))
        peer.sock.close()  # it has read nothing
        await until(lambda: not push._peers)
        assert push.accepted == 50
        assert push.doubtful == 50
        assert "up to 50 records" in notes

    run(test)


def test_receivers_that_all_break_at_once_are_no_recursion():
    async def test(stack):
        push = link(stack, "lines")
        stuck = await one(stack, push)
        peers = [await one(stack, push) for _ in range(400)]
        for peer in (stuck, *peers):
            peer.ours.room, peer.ours.is_broken = 0, True
        push.send(payload())
        await until(lambda: not push._peers)
        good = await one(stack, push)
        await until(lambda: push.accepted == len(LINES))
        assert records(good.received, "lines") == LINES

    run(test)


def test_one_that_is_stuck_keeps_neither_the_others_nor_the_turn():
    async def test(stack):
        push = link(stack, "lines")
        peers = [await one(stack, push) for _ in range(3)]
        peers[1].ours.room = 5
        for _ in range(7):
            assert push.has_room
            push.send(payload())
        assert push.unsent == len(LINES)
        taken = [len(records(peer.received, "lines")) for peer in peers]
        assert taken == [3 * len(LINES), 0, 3 * len(LINES)]
        peers[1].ours.room = MIB
        await until(lambda: not push.unsent)
        assert records(peers[1].received, "lines") == LINES

    run(test)
