"""Numbered blocks in bounded memory, when it is full."""

import pytest

from zmqpush.core.protocol.messages import Labels, Skip
from zmqpush.core.records.encode import Payload
from zmqpush.sender.unacked_queue import UnackedQueue
from zmqpush.settings import WhenFull

# Two blocks of two bytes, with what each costs beside them, and not three.
ROOM_FOR_TWO = 600


def put(queue, count=1):
    for _ in range(count):
        queue.put(Payload(b"x\n", 1))


def take_all(queue):
    """Return the first and last number of each block, negative of those that were dropped."""
    entries = list(iter(queue.take, None))
    return [(-e.first, -e.end) if isinstance(e, Skip) else (e.first, e.end) for e in entries]


def test_the_oldest_that_is_not_in_flight_is_dropped():
    queue = UnackedQueue(ROOM_FOR_TWO, WhenFull.DROP_OLDEST, Labels())
    put(queue)
    queue.take()
    put(queue, 4)

    assert take_all(queue) == [(-2, -4), (5, 5)]
    assert (queue.dropped, queue.records) == (3, 2)
    queue.rewind()
    assert take_all(queue) == [(1, 1), (-2, -4), (5, 5)]


def test_with_everything_in_flight_the_newest_is_dropped():
    queue = UnackedQueue(ROOM_FOR_TWO, WhenFull.DROP_OLDEST, Labels())
    put(queue, 2)
    take_all(queue)
    put(queue)

    assert take_all(queue) == []
    assert (queue.dropped, queue.records) == (1, 2)


@pytest.mark.parametrize("more", range(2, 6))
def test_after_a_session_skips_in_a_row_become_one(more):
    queue = UnackedQueue(ROOM_FOR_TWO, WhenFull.DROP_OLDEST, Labels())
    put(queue)
    queue.take()
    put(queue, 3)
    assert take_all(queue) == [(-2, -3), (4, 4)]
    queue.rewind()
    put(queue, more)

    last = 4 + more
    assert take_all(queue) == [(-1, 2 - last), (last - 1, last - 1), (last, last)]
    assert (queue.dropped, queue.records) == (last - 2, 2)


def test_one_block_may_be_larger_than_all_the_room():
    queue = UnackedQueue(ROOM_FOR_TWO, WhenFull.DROP_OLDEST, Labels())
    put(queue, 2)
    queue.put(Payload(b"x" * 600 + b"\n", 1))

    assert take_all(queue) == [(-1, -2), (3, 3)]
    queue.acknowledge(3)
    assert (queue.first, queue.acked, queue.dropped) == (4, 1, 2)
