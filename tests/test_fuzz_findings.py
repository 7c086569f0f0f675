"""What fuzzing has found, each told as it can come about."""

import itertools
import shutil

from spools import entry_of, numbers_in, open_spool, payload, put, segment_header
from zmqpush.core.protocol.messages import DAMAGED, Skip
from zmqpush.core.protocol.receiver import Receiver
from zmqpush.core.protocol.sender import Sender
from zmqpush.settings import Sync


def converse(slot, run, receiver, peer):
    """Open a spool and send all that is in it; return the numbers that the sink is given."""
    spool = open_spool(slot, sync=Sync.OFF)
    sender = Sender(spool, run)
    sender.connect(0)
    numbers = []
    for _ in range(10):
        while frame := sender.next_frame(0):
            if arrival := receiver.receive(peer, frame, 0):
                numbers += map(int, bytes(arrival.block.payload).split())
        receiver.committed(receiver.take_accepted())
        for _, frame in receiver.take_replies():
            sender.receive(frame, 0)
    left = spool.records
    spool.close()
    assert left == 0
    return numbers


def test_the_copy_of_a_machine_goes_on_behind_what_the_other_one_sent_of_the_same_numbers(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("zmqpush.spool.segment.inode_of", lambda slot: 7)  # a file system is copied
    monkeypatch.setattr("zmqpush.spool.spool.inode_of", lambda slot: 7)
    one, other = tmp_path / "one", tmp_path / "other"
    open_spool(one).close()
    shutil.copytree(one, other)
    receiver = Receiver({}, 1 << 20, "disk", itertools.count(1).__next__)
    spool = open_spool(one)
    put(spool, 1, 2, 3)
    spool.close()
    spool = open_spool(other)
    spool.put(payload(101, 102))
    spool.put(payload(103, 104, 105))
    spool.close()

    assert converse(one, "aa" * 16, receiver, b"one") == [1, 2, 3]
    assert converse(other, "bb" * 16, receiver, b"other") == [104, 105]


def fill(slot, *segments):
    slot.mkdir()
    for entries in segments:
        path = slot / f"{entries[0][0]:020d}.seg2"
        path.write_bytes(segment_header() + b"".join(entry_of(*each) for each in entries))


def test_what_no_receiver_would_take_is_passed_over_as_damaged(tmp_path):
    bad = [(2, 1, b"no newline"), (3, 9, b"too few\n")]
    fill(tmp_path / "slot", [(1, 1, b"good\n"), *bad, (12, 1, b"good\n")])
    spool = open_spool(tmp_path / "slot")
    first, skip, last = iter(spool.take, None)
    spool.close()

    assert (first.first, last.first) == (1, 12)
    assert skip == Skip(2, 10, DAMAGED)


def test_a_block_that_reaches_beyond_its_segment_takes_no_numbers_from_new_records(tmp_path):
    fill(tmp_path / "slot", [(1, 9, b"x\n" * 9)], [(5, 1, b"good\n")])
    spool = open_spool(tmp_path / "slot", sync=Sync.OFF)
    spool.put(payload(6))
    skip, good, new = iter(spool.take, None)
    spool.close()

    assert skip == Skip(1, 4, DAMAGED)
    assert (good.first, numbers_in(new)) == (5, [6])
