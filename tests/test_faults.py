"""
The fault matrix, as far as processes, disks and clocks fail: a number for each row.

The links between them fail in ``test_faults_link.py``. Every test is about the installed
commands; ``ZMQPUSH_CHAOS=long`` makes the faults many and long.
"""

import contextlib
import itertools
import json
import os
import random
import re
import secrets
import shutil
import signal
import sqlite3
import subprocess
import threading
import time

import pytest
import zmq

from chaos import (
    DOSE,
    FAILING_SYNC,
    LEAPING_CLOCK,
    SLOW_DISK,
    Pipeline,
    compare,
    end,
    entries,
    fault_points,
    fill_disk,
    kill,
    killed,
    line,
    lines,
    number_of,
    patched,
    resident_bytes,
    spooled,
    stop,
    wait_for_growth,
    written,
)
from helpers import (
    PATIENCE,
    ZMQPULL,
    ZMQPUSH,
    lines_of,
    push,
    sent,
    text_of,
    wait_until,
    wait_until_ready,
)
from peers import bare, deliver, greet
from spools import FORMER_MARK, entry_of
from test_acked import statistics
from zmqpush.core.protocol.messages import Error, encode, public_name

READ_BYTES = 128 << 10  # what zmqpush reads at once, and has not yet in its spool
CREDIT_BYTES = 8 << 20


@pytest.fixture
def pipeline(start, tmp_path):
    return Pipeline(start, tmp_path)


@pytest.fixture
def some():
    """Return a function that returns how many bytes to wait for, the next time other ones."""
    numbers = random.Random(1)
    return lambda: numbers.randrange(1, 1_000_000)


def wait_until_read(sender, count):
    wait_until(lambda: statistics(sender)[0] == count)


# Who dies.


def test_01_a_sender_that_is_killed_loses_and_repeats_nothing(pipeline, some):
    """Killed mid-batch, with a feeder that repeats what is not safe: lost 0, repeated 0."""
    receiver = pipeline.receive()
    for _ in range(DOSE.kills):
        sender = pipeline.send()
        feeder = pipeline.feed(sender)
        wait_for_growth(pipeline.path, some(), sender)
        kill(sender)
        feeder.stop()
        pipeline.look_what_is_safe()

    pipeline.finish(receiver)


def test_02_behind_a_plain_pipe_a_killed_sender_loses_one_read_at_most(pipeline, some):
    """What was read and not yet spooled is lost, what was accepted never; nothing is repeated."""
    receiver = pipeline.receive()
    reading, writing = os.pipe()
    stopped = threading.Event()
    fed = 0

    def write():
        nonlocal fed
        with open(writing, "wb", buffering=0) as pipe:
            while not stopped.wait(0.001):
                pipe.write(lines(range(fed + 1, fed + 1001)))
                fed += 1000

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    accepted = set()
    for _ in range(DOSE.kills):
        sender = pipeline.send(stdin=reading)
        wait_for_growth(pipeline.path, some(), sender)
        kill(sender)
        accepted |= {*spooled(pipeline.spool, cut=True), *written(pipeline.path, cut=True)}
    sender = pipeline.send(stdin=reading)
    os.close(reading)
    stopped.set()
    writer.join(PATIENCE)
    assert sender.wait(PATIENCE) == 0
    stop(receiver)
    # A line that was cut by a kill begins in the middle.
    records = pipeline.path.read_bytes().splitlines()
    whole = [record for record in records if text_of(record).startswith(b"<34> ")]
    lost, too_often = compare(map(number_of, whole), range(1, fed + 1))

    assert too_often == []
    assert len(records) - len(whole) <= DOSE.kills
    assert not accepted & set(lost)
    assert len(lines(lost)) <= DOSE.kills * (READ_BYTES + 100)


def test_03_a_receiver_that_is_killed_loses_and_repeats_nothing(pipeline, some):
    """Files and ack floors are committed as one: lost 0, repeated 0."""
    sender = pipeline.send()
    feeder = pipeline.feed(sender)
    for _ in range(DOSE.kills):
        receiver = pipeline.receive()
        wait_for_growth(pipeline.path, some(), receiver)
        kill(receiver)
    receiver = pipeline.receive()
    pipeline.fed = feeder.stop()

    assert end(sender, read=pipeline.fed) == (pipeline.fed, 0, 0, 0)
    stop(receiver)
    pipeline.verify()


# At a start these are passed once; all others again and again.
ONCE = {
    "all-acknowledged",
    "cut-back",
    "file-opened",
    "files-forgotten",
    "meta-renamed",
    "meta-written",
    "segment-given-up",
    "slot-locked",
    "slot-made",
    "spool-closing",
    "spool-recovered",
    "spool-scanned",
    "spool-state-made",
    "state-made",
}
# Where to die again, if not where each start comes by.
AGAIN = {
    "meta-written": ["meta-written"],
    "slot-made": ["meta-renamed"],
    "state-made": ["files-forgotten"],
    "state-written": ["state-written", "segment-removed"],
}
SENDER_STARTS = ["spool-scanned", "spool-recovered", "spool-state-made", "slot-locked"]
RECEIVER_STARTS = ["cut-back", "file-opened", "files-forgotten", "state-committed"]


def every(program, starts):
    """Return points, the passages there to die at, and where to die after that."""
    starts = itertools.cycle(starts)
    for point in fault_points(program):
        if point.startswith(("message-", "engine-")):
            continue  # of rsyslog's dialogue, and of engines: with their tests
        for passage in (1,) if point in ONCE else DOSE.passages:
            again = AGAIN.get(point, [])
            rest = [p for p in itertools.islice(starts, DOSE.recoveries) if p not in again]
            yield pytest.param(point, passage, again or rest, id=f"{point}-{passage}")


def test_06_the_points_are_those_of_the_sources():
    """So that no point is listed here that is gone: all others die at every passage."""
    points = {*fault_points("zmqpush"), *fault_points("zmqpull")}

    assert {*ONCE, *AGAIN, *SENDER_STARTS, *RECEIVER_STARTS}.union(*AGAIN.values()) <= points


@pytest.mark.parametrize(("point", "passage", "again"), list(every("zmqpush", SENDER_STARTS)))
def test_06_a_sender_may_die_at_any_point(pipeline, point, passage, again):
    """Killed there, and again in recovery: lost 0 of what was accepted, repeated 0."""
    fault = f"{point}:{passage}"
    receiver = None
    if point == "segment-dropped":
        options = ("--spool-max", "1MiB", "--when-full", "drop-oldest")
        sender = pipeline.send(*options, fault=fault)
    else:
        receiver = pipeline.receive()
        failing = patched("zmqpush", FAILING_SYNC.format(n=5, onwards=False))
        command = failing if point == "segment-given-up" else (ZMQPUSH,)
        sender = pipeline.send("--spool-max", "1MiB", fault=fault, command=command)
    if point == "spool-closing":
        pipeline.put(sender, 1000)
        sender.stdin.close()
        assert killed(sender)
    else:
        feeder = pipeline.feed(sender)
        assert killed(sender)
        feeder.stop()
    dropped = set()
    if point == "segment-dropped":
        accepted = spooled(pipeline.spool)
        pipeline.fed = max(accepted)
        dropped = set(range(1, pipeline.fed + 1)) - set(accepted)
        assert dropped
        assert dropped == set(range(1, min(accepted)))
    else:
        pipeline.look_what_is_safe()
    for second in again:
        sender = pipeline.send(fault=second)
        feeder = pipeline.feed(sender)
        assert killed(sender), f"{second} is not passed in recovery"
        feeder.stop()
    receiver = receiver or pipeline.receive()
    sender = pipeline.send()
    pipeline.put(sender, 1000)
    sender.communicate(timeout=PATIENCE)
    stop(receiver)

    assert sender.returncode == 0
    expected = set(range(1, pipeline.fed + 1)) - dropped
    assert compare(written(pipeline.path), expected) == ([], [])


@pytest.mark.parametrize(("point", "passage", "again"), list(every("zmqpull", RECEIVER_STARTS)))
def test_06_a_receiver_may_die_at_any_point(pipeline, point, passage, again):
    """Killed there, and again in recovery: lost 0, repeated 0."""
    receiver = pipeline.receive(fault=f"{point}:{passage}")
    sender = pipeline.send()
    feeder = pipeline.feed(sender)
    if point == "all-acknowledged":
        wait_for_growth(pipeline.path, 1, receiver)
        receiver.terminate()
    assert killed(receiver)
    for second in again:
        assert killed(pipeline.receive(fault=second)), f"{second} is not passed in recovery"
    receiver = pipeline.receive()
    pipeline.fed = feeder.stop()

    assert end(sender, read=pipeline.fed) == (pipeline.fed, 0, 0, 0)
    stop(receiver)
    pipeline.verify()


# Who stops, ends, or stays away.


def test_08_a_receiver_that_stops_is_waited_for_in_little_memory(pipeline):
    """Stopped, and much read meanwhile: lost 0, repeated 0, and the sender stays small."""
    receiver = pipeline.receive()
    # What waits for the disk to sync it would be in memory, too: up to 64 MiB.
    options = ("--sync", "off", "--format", "json", "--field", f"x={'y' * 2000}")
    sender = pipeline.send(*options)
    pipeline.put(sender, 1)
    wait_until(lambda: written(pipeline.path))
    before = resident_bytes(sender)
    receiver.send_signal(signal.SIGSTOP)
    pipeline.put(sender, 30_000)
    wait_until_read(sender, pipeline.fed)
    grown = resident_bytes(sender) - before
    time.sleep(DOSE.receiver_stopped)
    receiver.send_signal(signal.SIGCONT)

    assert sum(path.stat().st_size for path in pipeline.spool.glob("0/*.seg2")) > 60 << 20
    assert grown < 48 << 20
    assert end(sender, read=pipeline.fed) == (pipeline.fed, 0, 0, 0)
    stop(receiver)
    pipeline.verify()


def test_09_a_sender_that_stops_resumes(pipeline, some):
    """Stopped, longer than its session lives: lost 0, repeated 0."""
    receiver = pipeline.receive()
    sender = pipeline.send()
    feeder = pipeline.feed(sender)
    wait_for_growth(pipeline.path, some(), sender, receiver)
    sender.send_signal(signal.SIGSTOP)
    time.sleep(DOSE.sender_stopped)
    sender.send_signal(signal.SIGCONT)
    wait_for_growth(pipeline.path, some(), sender, receiver)
    pipeline.fed = feeder.stop()

    assert end(sender, read=pipeline.fed) == (pipeline.fed, 0, 0, 0)
    stop(receiver)
    pipeline.verify()


def test_10_a_signal_leaves_the_backlog_in_the_spool(pipeline):
    """SIGTERM with a backlog: exit 75, and the next run delivers it: lost 0, repeated 0."""
    receiver = pipeline.receive()
    sender = pipeline.send("--grace", 1)
    pipeline.put(sender, 100)
    wait_until(lambda: statistics(sender)[1] == 100)
    receiver.send_signal(signal.SIGSTOP)
    pipeline.put(sender, DOSE.backlog_lines)
    wait_until_read(sender, pipeline.fed)
    sender.terminate()
    acked, _, _, left = end(sender, read=pipeline.fed)
    receiver.send_signal(signal.SIGCONT)

    assert (acked, left) == (100, DOSE.backlog_lines)
    pipeline.finish(receiver)


def test_11_a_receiver_that_was_away_gets_everything_soon(pipeline):
    """Away for long, the spool below its cap: lost 0, repeated 0, delivered within 35 s."""
    receiver = pipeline.receive()
    sender = pipeline.send()
    pipeline.put(sender, 100)
    wait_until(lambda: statistics(sender)[1] == 100)
    stop(receiver)
    pipeline.put(sender, DOSE.backlog_lines)
    time.sleep(DOSE.away)
    receiver = pipeline.receive()
    wait_until_ready(receiver)
    back = time.monotonic()
    wait_for_growth(pipeline.path, 1, sender, receiver)

    assert time.monotonic() - back < 35
    assert end(sender, read=pipeline.fed) == (pipeline.fed, 0, 0, 0)
    stop(receiver)
    pipeline.verify()


# When there is no room.


def test_12_a_full_spool_stops_the_reading(pipeline):
    """Cap reached, `block`: the input waits, nothing grows; lost 0, repeated 0."""
    sender = pipeline.send("--spool-max", "4MiB")
    feeder = pipeline.feed(sender)
    while b"the spool is full: reading waits" not in sender.stderr.readline():
        pass
    read = statistics(sender)[0]
    size = sum(path.stat().st_size for path in pipeline.spool.glob("0/*.seg2"))

    assert 3 << 20 < size <= 4 << 20
    assert resident_bytes(sender) < 100 << 20
    assert statistics(sender)[0] == read
    receiver = pipeline.receive()
    pipeline.fed = feeder.stop()
    assert pipeline.fed >= read
    assert end(sender, read=pipeline.fed) == (pipeline.fed, 0, 0, 0)
    stop(receiver)
    pipeline.verify()


def test_13_the_oldest_records_are_dropped_by_whole_segments(pipeline):
    """Cap reached, `drop-oldest`: lost exactly what the sender and its SKIP say, repeated 0."""
    sender = pipeline.send("--spool-max", "1MiB", "--when-full", "drop-oldest")
    pipeline.put(sender, DOSE.backlog_lines)
    wait_until_read(sender, pipeline.fed)
    first = min(int(path.stem) for path in pipeline.spool.glob("0/*.seg2"))
    receiver = pipeline.receive()
    _, dropped, lost, left = end(sender, read=pipeline.fed)
    said = stop(receiver)

    assert (dropped, lost, left) == (first - 1, 0, 0)
    assert dropped > 0
    assert b"%d were skipped by their senders" % dropped in said
    assert written(pipeline.path) == list(range(first, pipeline.fed + 1))


def test_14_the_newest_records_are_dropped(pipeline):
    """Cap reached, `drop-newest`: lost exactly what the sender says, repeated 0."""
    sender = pipeline.send("--spool-max", "1MiB", "--when-full", "drop-newest")
    pipeline.put(sender, DOSE.backlog_lines)
    wait_until_read(sender, pipeline.fed)
    receiver = pipeline.receive()
    wait_until(lambda: statistics(sender)[2] == 0)
    pipeline.put(sender, 100)  # for these there is room again
    acked, dropped, lost, left = end(sender, read=pipeline.fed)
    stop(receiver)
    numbers = written(pipeline.path)

    assert (lost, left) == (0, 0)
    assert dropped > 0
    assert len(numbers) == acked == pipeline.fed - dropped
    assert numbers == sorted(set(numbers))
    assert numbers[-100:] == list(range(pipeline.fed - 99, pipeline.fed + 1))


@pytest.fixture
def small_disk(pipeline, tmp_path):
    """Put the spool on a file system of 4 MiB; return a function that fills it up."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=4m zmqpush {disk}"
    if subprocess.run(mount, shell=True, check=False).returncode:
        pytest.skip("a small tmpfs cannot be mounted here: that takes root")
    pipeline.spool = disk / "spool"

    def fill():
        ballast = disk / "ballast"
        fill_disk(ballast)
        return ballast

    yield fill
    subprocess.run(["umount", "-l", disk], check=True)


def test_15_a_full_disk_is_waited_for(pipeline, small_disk):
    """Full to the last byte, then freed: it goes on without a restart; lost 0, repeated 0."""
    sender = pipeline.send()
    pipeline.put(sender, 100)
    wait_until_read(sender, pipeline.fed)
    ballast = small_disk()
    feeder = pipeline.feed(sender)
    while b"the spool is full: reading waits" not in sender.stderr.readline():
        pass
    stuck = statistics(sender)[0]
    ballast.unlink()
    wait_until(lambda: statistics(sender)[0] > stuck)
    receiver = pipeline.receive()
    pipeline.fed = feeder.stop()

    assert end(sender, read=pipeline.fed) == (pipeline.fed, 0, 0, 0)
    stop(receiver)
    pipeline.verify()


def test_15_a_backlog_on_a_full_disk_makes_room_for_itself(pipeline, small_disk):
    """A start on a full disk delivers what is there, and reads on as acks make room."""
    pipeline.leave(10_000)
    ballast = small_disk()
    receiver = pipeline.receive()
    sender = pipeline.send()
    pipeline.put(sender, 10_000)

    assert end(sender, read=10_000, before=10_000) == (20_000, 0, 0, 0)
    assert ballast.exists()
    stop(receiver)
    pipeline.verify()


def test_16_a_sync_that_fails_loses_nothing(pipeline):
    """Whichever sync fails, a new segment takes its place: lost 0, repeated 0."""
    receiver = pipeline.receive()
    for number in range(1, DOSE.syncs + 1):
        code = FAILING_SYNC.format(n=number, onwards=False)
        sender = pipeline.send(command=patched("zmqpush", code))
        before = pipeline.fed
        feeder = pipeline.feed(sender)
        assert b"fails: Input/output error: a new segment\n" in sender.stderr.readline()
        pipeline.fed = feeder.stop()
        read = pipeline.fed - before
        assert end(sender, read=read) == (read, 0, 0, 0)

    pipeline.finish(receiver)


def test_16_a_disk_that_fails_for_good_ends_the_sender(pipeline):
    """All later syncs fail: exit 74, and only what was not confirmed may have to be repeated."""
    receiver = pipeline.receive()
    for number in range(1, DOSE.syncs + 1):
        code = FAILING_SYNC.format(n=number, onwards=True)
        sender = pipeline.send(command=patched("zmqpush", code))
        feeder = pipeline.feed(sender)
        first, second = sender.stderr.readline(), sender.stderr.readline()
        assert first.endswith(b"fails: Input/output error: a new segment\n")
        assert re.search(rb"cannot write to the spool .*: \d+ records may not be safe$", second)
        assert sender.wait(PATIENCE) == 74
        feeder.stop()
        pipeline.look_what_is_safe()

    pipeline.finish(receiver)


# What happens to the files.


class Trials:
    """Copies of one spool, each with something done to it, delivered to one receiver."""

    def __init__(self, pipeline):
        self.pipeline = pipeline
        self.receiver = pipeline.receive()
        self.original = pipeline.spool

    def deliver(self, change, *, read, before):
        """Deliver a copy of the spool and some new lines; return the numbers that came."""
        self.pipeline.spool = self.original.with_name("copy")
        shutil.copytree(self.original, self.pipeline.spool)
        slot = self.pipeline.spool / "0"
        # A stream of its own, so that the receiver takes everything.
        (slot / "meta").write_text(json.dumps({"format": 2, "secret": secrets.token_hex(16)}))
        change(slot)
        size = self.pipeline.path.stat().st_size if self.pipeline.path.exists() else 0
        sender = self.pipeline.send()
        sender.stdin.write(lines(read))
        account = end(sender, read=len(read), before=before)
        shutil.rmtree(self.pipeline.spool)
        with open(self.pipeline.path, "rb") as file:
            file.seek(size)
            return list(map(number_of, file.read().splitlines())), account


def test_17_a_torn_end_costs_what_was_not_synced(pipeline):
    """The last segment cut off within its last block: all before it is delivered, in order."""
    pipeline.leave(5)
    sender = pipeline.send("--timeout", 0)
    pipeline.put(sender, 2)
    wait_until_read(sender, 2)
    pipeline.put(sender, 1)
    end(sender, read=3, before=5)
    trials = Trials(pipeline)
    segment = max((pipeline.spool / "0").glob("*.seg2"))
    size = segment.stat().st_size
    last = 32 + len(line(8))
    for missing in range(1, last + 1, DOSE.stride):

        def tear(slot, length=size - missing):
            os.truncate(slot / segment.name, length)

        numbers, account = trials.deliver(tear, read=[9, 10], before=7)
        assert numbers == [1, 2, 3, 4, 5, 6, 7, 9, 10], f"without the last {missing} bytes"
        assert account == (9, 0, 0, 0)


def test_18_a_flipped_bit_costs_the_records_of_its_block(pipeline):
    """Any byte of a sealed segment damaged: exactly its block is lost, and told with a SKIP."""
    sender = pipeline.send("--timeout", 0)
    for count in (1, 2, 1):
        pipeline.put(sender, count)
        wait_until_read(sender, pipeline.fed)
    end(sender, read=4)
    pipeline.leave(2)
    segment = (pipeline.spool / "0" / f"{1:020d}.seg2").read_bytes()
    blocks = list(entries(segment))
    assert blocks == [(1, line(1)), (2, line(2) + line(3)), (4, line(4))]
    sizes = [32 + len(payload) for _, payload in blocks]
    # Of the header everything is there twice.
    spans = [(len(segment) - sum(sizes), []), *zip(sizes, ([1], [2, 3], [4]), strict=True)]
    trials = Trials(pipeline)
    begin = skipped = 0
    for size, gone in spans:
        for offset in range(begin, begin + size, DOSE.stride):

            def flip(slot, offset=offset):
                with open(slot / f"{1:020d}.seg2", "r+b") as file:
                    byte = os.pread(file.fileno(), 1, offset)[0]
                    os.pwrite(file.fileno(), bytes([byte ^ 1 << offset % 8]), offset)

            numbers, account = trials.deliver(flip, read=[7], before=6)
            assert numbers == [n for n in range(1, 8) if n not in gone], f"byte {offset}"
            assert account == (7 - len(gone), 0, len(gone), 0)
            skipped += len(gone)
        begin += size

    assert b"%d were skipped by their senders" % skipped in stop(trials.receiver)


def removed(state):
    state.unlink()


def emptied(state):
    state.write_bytes(b"")


def of_zeros(state):
    state.write_bytes(bytes(state.stat().st_size))


def of_garbage(state):
    state.write_bytes(random.Random(1).randbytes(state.stat().st_size))


@pytest.mark.parametrize("trouble", [removed, emptied, of_zeros, of_garbage])
def test_19_without_the_senders_floor_the_receivers_counts(pipeline, some, trouble):
    """Both slots of the state gone: WELCOME tells the floor; lost 0, repeated 0."""
    receiver = pipeline.receive()
    sender = pipeline.send()
    feeder = pipeline.feed(sender)
    wait_for_growth(pipeline.path, some(), sender)
    kill(sender)
    feeder.stop()
    trouble(pipeline.spool / "0" / "state")
    pipeline.look_what_is_safe()

    pipeline.finish(receiver)


@pytest.mark.parametrize("left", [True, False])
def test_20_segments_below_the_floor_do_not_matter(pipeline, tmp_path, left):
    """One left over, or one missing: nothing of it is sent to anybody; lost 0, repeated 0."""
    receiver = pipeline.receive()
    sender = pipeline.send("--spool-max", "1MiB", fault="state-written")
    feeder = pipeline.feed(sender)
    assert killed(sender)
    feeder.stop()
    pipeline.look_what_is_safe()
    segments = sorted(pipeline.spool.glob("0/*.seg2"))
    below = [first for first, _ in entries(segments[0].read_bytes())]
    assert below[0] == 1
    assert len(segments) > 1
    if not left:
        segments[0].unlink()
    stop(receiver)
    # A receiver that knows nothing would take everything that is sent.
    first = int(segments[1].stem)
    assert set(range(1, first)) <= set(written(pipeline.path))
    known = written(pipeline.path)
    pipeline.path, pipeline.state = tmp_path / "other", tmp_path / "other state"
    receiver = pipeline.receive()
    sender = pipeline.send()
    pipeline.put(sender, 10)
    assert end_without_accounting(sender) == 0
    stop(receiver)
    numbers = written(pipeline.path)

    assert not segments[0].exists()
    assert min(numbers) >= first
    assert compare(numbers, range(min(numbers), pipeline.fed + 1)) == ([], [])
    assert compare({*known, *numbers}, range(1, pipeline.fed + 1)) == ([], [])


def end_without_accounting(sender):
    sender.communicate(timeout=PATIENCE)
    return sender.returncode


def test_22_a_spool_from_a_backup_is_sent_again_under_a_new_name(pipeline, tmp_path):
    """Restored from an older copy: lost 0, repeated at most what the copy holds."""
    pipeline.leave(100)
    shutil.copytree(pipeline.spool, tmp_path / "backup")
    receiver = pipeline.receive()
    sender = pipeline.send()
    pipeline.put(sender, 50)
    assert end(sender, read=50, before=100) == (150, 0, 0, 0)
    shutil.rmtree(pipeline.spool)
    shutil.copytree(tmp_path / "backup", pipeline.spool)
    stream = (pipeline.spool / "0" / "meta").read_bytes()
    sender = pipeline.send()
    pipeline.put(sender, 70)

    assert end(sender, read=70, before=100) == (170, 0, 0, 0)
    assert (pipeline.spool / "0" / "meta").read_bytes() != stream
    stop(receiver)
    lost, too_often = compare(written(pipeline.path), range(1, pipeline.fed + 1))
    assert (lost, too_often) == ([], list(range(1, 101)))


@pytest.mark.parametrize("first", ["original", "copy"])
def test_23_a_spool_that_is_copied_and_used_twice_loses_nothing(pipeline, tmp_path, first):
    """Both deliver at once: lost 0, repeated at most what the copy held."""
    pipeline.leave(1000)
    original, copy = pipeline.spool, tmp_path / "copy"
    shutil.copytree(original, copy)
    senders, feeders = [], []
    receiver = pipeline.receive()
    for spool, offset in sorted(
        ((original, 1000), (copy, 500_000_000)),
        key=lambda pair: (pair[0] == copy) != (first == "copy"),
    ):
        pipeline.spool, pipeline.fed = spool, offset
        senders.append(pipeline.send())
        feeders.append((pipeline.feed(senders[-1]), offset))
        wait_for_growth(pipeline.path, 200_000, *senders)
    wait_for_growth(pipeline.path, 500_000, *senders)
    expected = set(range(1, 1001))
    for sender, (feeder, offset) in zip(senders, feeders, strict=True):
        expected |= set(range(offset + 1, feeder.stop() + 1))
        sender.stdin.close()
    assert [sender.wait(PATIENCE) for sender in senders] == [0, 0]
    stop(receiver)
    lost, too_often = compare(written(pipeline.path), expected)

    assert lost == []
    assert set(too_often) <= set(range(1, 1001))
    assert len(too_often) <= 1000


def test_24_without_the_receivers_state_only_what_was_not_yet_acknowledged_comes_twice(pipeline):
    """The state deleted: lost 0, repeated at most the credit."""
    receiver = pipeline.receive(fault="files-synced:5")
    sender = pipeline.send()
    feeder = pipeline.feed(sender)
    assert killed(receiver)
    shutil.rmtree(pipeline.state)
    receiver = pipeline.receive()
    wait_for_growth(pipeline.path, 100_000, receiver)
    pipeline.fed = feeder.stop()
    assert end(sender, read=pipeline.fed) == (pipeline.fed, 0, 0, 0)
    stop(receiver)
    lost, too_often = compare(written(pipeline.path), range(1, pipeline.fed + 1))

    assert lost == []
    assert too_often
    assert len(lines(too_often)) <= CREDIT_BYTES


def test_57_two_receivers_take_turns_at_one_file(pipeline, some, tmp_path):
    """
    Each with a state of its own, each killed: lost 0, of no one, and never two on one line.

    Repeated: what one had written and not acknowledged, as far as the other wrote after it;
    the next start of the first reports that.
    """
    sender = pipeline.send()
    feeder = pipeline.feed(sender)
    kept = 0
    for turn in range(2 * DOSE.kills):
        pipeline.state = tmp_path / f"state-{turn % 2}"
        receiver = pipeline.receive()
        wait_for_growth(pipeline.path, some(), receiver)
        kill(receiver)
        kept += sum(map(int, re.findall(rb"kept the last (\d+) bytes", receiver.stderr.read())))
    pipeline.fed = feeder.stop()
    receiver = pipeline.receive()
    assert end(sender, read=pipeline.fed) == (pipeline.fed, 0, 0, 0)
    kept += sum(map(int, re.findall(rb"kept the last (\d+) bytes", stop(receiver))))
    pipeline.state = tmp_path / "state-0"
    last = stop(pipeline.receive())
    kept += sum(map(int, re.findall(rb"kept the last (\d+) bytes", last)))

    whole = {line(number)[:-1]: number for number in range(1, pipeline.fed + 1)}
    records = [text_of(record) for record in pipeline.path.read_bytes().splitlines()]
    numbers = [whole[record] for record in records if record in whole]
    lost, too_often = compare(numbers, range(1, pipeline.fed + 1))
    assert lost == []
    assert len(lines(too_often)) <= kept
    # The torn end of a write is a line of its own.
    torn = [record for record in records if record not in whole]
    assert len(torn) <= 2 * DOSE.kills
    begin = b'{"message":"<34> '
    assert all(piece.startswith(begin[: len(piece)]) for piece in torn)


def test_28_the_wall_clock_may_leap(pipeline, some):
    """A day to and fro at both ends, all the time: lost 0, repeated 0."""
    command = patched("zmqpull", LEAPING_CLOCK)
    sender = pipeline.send(command=patched("zmqpush", LEAPING_CLOCK))
    feeder = pipeline.feed(sender)
    receiver = pipeline.receive(command=command)
    wait_for_growth(pipeline.path, some(), receiver, sender)
    kill(receiver)
    receiver = pipeline.receive(command=command)
    wait_for_growth(pipeline.path, some(), receiver, sender)
    pipeline.fed = feeder.stop()

    assert end(sender, read=pipeline.fed) == (pipeline.fed, 0, 0, 0)
    stop(receiver)
    pipeline.verify()


def test_30_no_byte_of_an_odd_line_is_lost(pipeline):
    """Ten MiB long, NUL bytes, no UTF-8, no last newline: split and escaped, lost 0, repeated 0."""
    data = (
        b"a" * (10 << 20)
        + b"\n\n\0\x01 NUL\0\n"
        + "ä€😀".encode() * 200_000
        + b"\n\xff\xfe\n"
        + b"\xc3\n\nlast \0"
    )
    sender = pipeline.send("--format", "json", "--timeout", 0)
    sender.stdin.write(data)
    sender.communicate(timeout=PATIENCE)
    assert sender.returncode == 75
    receiver = pipeline.receive()
    sender = pipeline.send()
    assert end_without_accounting(sender) == 0
    stop(receiver)
    got = b""
    for record in map(json.loads, pipeline.path.read_bytes().splitlines()):
        # What is no UTF-8 becomes text: \xNN.
        text = record["message"].encode()
        got += text + (b"" if record.get("@partial") else b"\n")

    expected = data.replace(b"\xff\xfe", rb"\xff\xfe").replace(b"\xc3\n", b"\\xc3\n")
    assert got == expected + b"\n"


# Who meets.


def test_42_the_slots_of_a_spool_keep_processes_apart(pipeline):
    """One too many exits 73; what killed ones left is delivered by those that come: lost 0."""
    options = ("--spool-slots", 2)
    senders = [pipeline.send(*options) for _ in range(2)]
    for sender in senders:
        pipeline.put(sender, 100)
        wait_until_read(sender, 100)
    third = pipeline.send(*options)
    out, err = third.communicate(lines(range(201, 301)), timeout=PATIENCE)
    assert (third.returncode, out, err.count(b"\n")) == (73, b"", 1)
    assert b"is in use by process " in err
    for sender in senders:
        kill(sender)
    receiver = pipeline.receive()
    for first in (201, 301):  # with one slot only: those that are left come first, too
        sender = pipeline.send()
        sender.stdin.write(lines(range(first, first + 100)))
        assert end(sender, read=100, before=100) == (200, 0, 0, 0)
    stop(receiver)

    assert sorted(written(pipeline.path)) == list(range(1, 401))


def test_43_a_receiver_of_another_version_is_told_and_the_records_stay(pipeline):
    """Nothing in common: told in one line, the records stay in the spool; lost 0, repeated 0."""
    with bare(zmq.ROUTER, pipeline.endpoint) as receiver:
        sender = pipeline.send("--timeout", 1)
        pipeline.put(sender, 100)
        peer, _ = receiver.recv_multipart()
        receiver.send_multipart((peer, encode(Error(505, "this receiver speaks version 1"), 0)))
        _, err = sender.communicate(timeout=PATIENCE)
    line = f"zmqpush: {pipeline.endpoint}: it refuses: this receiver speaks version 1 (505); "
    line += "this sender speaks version 2: upgrade the older one\n"

    assert sender.returncode == 75
    assert err.startswith(line.encode())
    assert err.endswith(b"zmqpush: 0 dropped, 0 lost, 100 left in the spool\n")
    pipeline.finish()


def test_44_a_switch_to_another_receiver_repeats_what_was_in_flight_at_most(
    pipeline, start, tmp_path, some
):
    """Both receivers killed in turn, under load: lost 0, repeated at most the credit a switch."""
    endpoints = [f"ipc://{tmp_path}/{name}.socket" for name in "ab"]
    paths = [tmp_path / name for name in "ab"]

    def receive(at):
        state = tmp_path / f"state{at}"
        return start(ZMQPULL, "-a", endpoints[at], "--state", state, "--to", paths[at])

    receivers = [receive(0), receive(1)]
    pipeline.endpoint = endpoints[0]
    sender = pipeline.send("-c", endpoints[1])
    feeder = pipeline.feed(sender)
    for switch in range(DOSE.switches):
        at = switch % 2
        wait_for_growth(paths[at], some(), sender, *receivers)
        kill(receivers[at])
        wait_for_growth(paths[1 - at], 1, sender, receivers[1 - at])
        receivers[at] = receive(at)
    pipeline.fed = feeder.stop()
    assert end(sender, read=pipeline.fed) == (pipeline.fed, 0, 0, 0)
    for receiver in receivers:
        stop(receiver)
    numbers = [written(path) for path in paths]
    lost, too_often = compare(itertools.chain(*numbers), range(1, pipeline.fed + 1))

    assert lost == []
    assert len(lines(too_often)) <= DOSE.switches * (CREDIT_BYTES + READ_BYTES)
    assert all(len(set(each)) == len(each) for each in numbers)


def test_45_an_end_in_order_loses_and_repeats_nothing(pipeline, some):
    """SIGTERM to the receiver again and again, under load: exit 0, lost 0, repeated 0."""
    sender = pipeline.send()
    feeder = pipeline.feed(sender)
    for _ in range(2 * DOSE.kills):
        receiver = pipeline.receive()
        wait_for_growth(pipeline.path, some() // 10, sender, receiver)
        stop(receiver)
    receiver = pipeline.receive()
    pipeline.fed = feeder.stop()

    assert end(sender, read=pipeline.fed) == (pipeline.fed, 0, 0, 0)
    stop(receiver)
    pipeline.verify()


def test_45_an_end_in_order_leaves_nothing_to_repeat(pipeline):
    """A sender that is busy hears the last acks and GOODBYE: repeated 0, without any state."""
    sender = pipeline.send(command=patched("zmqpush", SLOW_DISK))
    feeder = pipeline.feed(sender)
    for _ in range(3):
        receiver = pipeline.receive()
        wait_for_growth(pipeline.path, 1, sender, receiver)
        stop(receiver)
        shutil.rmtree(pipeline.state)
    receiver = pipeline.receive()
    pipeline.fed = feeder.stop()

    assert end(sender, read=pipeline.fed) == (pipeline.fed, 0, 0, 0)
    stop(receiver)
    pipeline.verify()


def test_both_ends_killed_at_random_write_each_line_once(pipeline, some):
    """As a user would look: `sort | uniq -c` of the file shows each line once."""
    chance = random.Random(2)
    receiver = pipeline.receive()
    sender = pipeline.send()
    feeder = pipeline.feed(sender)
    for _ in range(2 * DOSE.kills):
        wait_for_growth(pipeline.path, some(), sender, receiver)
        who = chance.choice(["sender", "receiver", "both"])
        if who != "sender":
            kill(receiver)
            receiver = pipeline.receive()
        if who != "receiver":
            kill(sender)
            feeder.stop()
            pipeline.look_what_is_safe()
            sender = pipeline.send()
            feeder = pipeline.feed(sender)
    pipeline.fed = feeder.stop()
    sender.stdin.close()
    assert sender.wait(PATIENCE) == 0
    stop(receiver)
    counts = f"sort {pipeline.path} | uniq -c | awk '{{print $1}}' | sort | uniq -c"
    shown = subprocess.run(counts, shell=True, capture_output=True, check=True)

    assert shown.stdout.split() == [b"%d" % pipeline.fed, b"1"]
    pipeline.verify()


# Whose records they are.


@pytest.mark.parametrize("who", ["sender", "receiver", "either"])
def test_47_records_stay_under_the_labels_of_their_runs(pipeline, tmp_path, some, who):
    """Runs of two types take turns in one spool, killed: each record is in its file once."""
    paths = {kind: tmp_path / f"of-{kind}" for kind in "ab"}
    pipeline.path = tmp_path / "of-{type}"
    kinds = {}
    receiver = None
    for run in range(2 * DOSE.kills):
        if receiver is None and run % 3:  # every third run leaves all that it reads
            receiver = pipeline.receive()
        kind = "ab"[run % 2]
        sender = pipeline.send(kind)
        feeder = pipeline.feed(sender)
        if receiver is None:
            wait_until(lambda: len(spooled(pipeline.spool)) > 10_000)
        else:
            wait_for_growth(paths[kind], some(), sender)
        if receiver and who != "sender" and run % 2:
            kill(receiver)
            receiver = None
        if who == "receiver":
            feeder.stop()
            sender.terminate()
            sender.communicate(timeout=PATIENCE)
        else:
            kill(sender)
            feeder.stop()
        before = pipeline.fed
        safe = {*spooled(pipeline.spool), *written(*paths.values())}
        pipeline.fed = max(safe, default=0)
        assert compare(safe, range(1, pipeline.fed + 1)) == ([], [])
        kinds |= dict.fromkeys(range(before + 1, pipeline.fed + 1), kind)
    receiver = receiver or pipeline.receive()
    sender = pipeline.send("b", "--grace", PATIENCE)
    assert end_without_accounting(sender) == 0
    stop(receiver)

    for kind, path in paths.items():
        assert written(path) == [number for number, of in kinds.items() if of == kind]


def test_48_who_knows_the_name_of_a_stream_cannot_speak_for_it(pipeline):
    """A stranger in that name, by all that a greeting can say: lost 0, repeated 0."""
    pipeline.leave(1000)
    receiver = pipeline.receive()
    secret = json.loads((pipeline.spool / "0" / "meta").read_bytes())["secret"]
    name = public_name(secret)  # as in a key of Kafka, an id of NATS and a dead letter
    wait_until_ready(receiver)
    with bare(zmq.DEALER, pipeline.endpoint) as stranger:
        for values in ({"secret": name}, {"was": name}, {"stream": name}, {"first": 1001}):
            _, session = greet(stranger, **{"secret": secrets.token_hex(16), **values})
            first = values.get("first", 1)
            deliver(stranger, session, first, *(b"<34> stranger" for _ in range(1000)))
        sender = pipeline.send()
        pipeline.put(sender, 10)
        assert end(sender, read=10, before=1000) == (1010, 0, 0, 0)
    stop(receiver)
    records = pipeline.path.read_bytes().splitlines()
    honest = [record for record in records if b"stranger" not in record]

    assert list(map(number_of, honest)) == list(range(1, 1011))
    assert len(records) == 1010 + 4 * 1000


@pytest.mark.parametrize("number", [3, 1 << 40, (1 << 63) - 2])
def test_49_content_is_never_taken_for_the_spool(start, tmp_path, number):
    """Raw lines that are entries of either format, behind a torn write: not one is delivered."""
    spool, path, endpoint = tmp_path / "spool", tmp_path / "all", f"ipc://{tmp_path}/socket"
    forged = [entry_of(number, 1, b"forged\n", mark)[:-1] for mark in (FORMER_MARK, b"ABCDabcd")]
    torn = b"".join(line + b"\n" for line in [b"torn", *forged, b"end"])
    assert torn.count(b"\n") == 4
    args = ("--format", "raw", "--spool", spool, "-c", endpoint)
    for data in (b"1\n2\n", torn):
        assert push(*args, "--timeout", 0, data=data).returncode == 75
    segment = max(spool.glob("0/*.seg2"))
    os.truncate(segment, segment.stat().st_size - 2)
    for data in (b"3\n", b"4\n"):
        assert push(*args, "--timeout", 0, data=data).returncode == 75
    receiver = start(ZMQPULL, "-a", endpoint, "--to", path)
    done = push(*args, data=b"5\n")
    stop(receiver)

    assert (done.returncode, sent(done)) == (0, 5)
    assert lines_of(path.read_bytes().splitlines()) == [b"1", b"2", b"3", b"4", b"5"]


@pytest.mark.parametrize("known", [True, False])
def test_50_a_spool_and_a_state_of_earlier_versions_go_over_by_themselves(pipeline, known):
    """The receiver has more than the sender knows: lost 0, repeated 0; its file is gone on."""
    slot = pipeline.spool / "0"
    slot.mkdir(parents=True, mode=0o700)
    pipeline.spool.chmod(0o700)
    former = {"format": 1, "stream": "ab" * 16, "inode": slot.stat().st_ino}
    (slot / "meta").write_text(json.dumps(former))
    (slot / f"{1:020d}.seg").write_bytes(
        b"".join(entry_of(n, 1, line(n), FORMER_MARK) for n in range(1, 11))
    )
    pipeline.fed = 10
    pipeline.state.mkdir()
    with contextlib.closing(sqlite3.connect(pipeline.state / "state.db")) as database:
        database.executescript(
            "CREATE TABLE streams (principal TEXT, stream TEXT, acked INTEGER, run TEXT,"
            " seen INTEGER, PRIMARY KEY (principal, stream)) WITHOUT ROWID;"
            "CREATE TABLE marks (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;"
            "PRAGMA user_version = 2;"
        )
        row = ("anonymous", ("ab" if known else "cd") * 16, 7, "12" * 16, int(time.time()))
        database.execute("INSERT INTO streams VALUES (?, ?, ?, ?, ?)", row)
        database.commit()
    for count in (5, 5):
        receiver = pipeline.receive()
        sender = pipeline.send()
        pipeline.put(sender, count)
        sender.communicate(timeout=PATIENCE)
        assert sender.returncode == 0
        stop(receiver)
    with contextlib.closing(sqlite3.connect(pipeline.state / "state.db")) as database:
        found = dict(database.execute("SELECT stream, acked FROM streams"))
    meta = json.loads((slot / "meta").read_bytes())

    assert written(pipeline.path) == list(range(8 if known else 1, 21))
    assert (meta["format"], meta["was"]) == (2, "ab" * 16)
    assert found == {public_name(meta["secret"]): 20} | ({} if known else {"v1/" + "cd" * 16: 7})


# What cannot be used.


def of_a_later_version(slot):
    (slot / "meta").write_text('{"format": 3, "secret": "' + "ab" * 16 + '"}')


def of_somebody_else(slot):
    try:
        os.chown(slot, 12345, 12345)
    except PermissionError:
        pytest.skip("to give a directory away takes root")


def beside_something(slot):
    (slot.parent / "notes").touch()


def a_link(slot):
    slot.rename(slot.parent.parent / "elsewhere")
    slot.symlink_to(slot.parent.parent / "elsewhere")


def with_a_directory_as_state(slot):
    (slot / "state").unlink()
    (slot / "state").mkdir()


def with_a_directory_as_lock(slot):
    (slot / "lock").unlink()
    (slot / "lock").mkdir()


def with_a_directory_as_segment(slot):
    (slot / f"{9:020d}.seg2").mkdir()


@pytest.mark.parametrize(
    ("trouble", "code", "told"),
    [
        (of_a_later_version, 78, "{}/0 is a spool of a later version"),
        (of_somebody_else, 78, "{}/0 belongs to somebody else: chown it .*, or use another"),
        (beside_something, 78, "{} is no spool: it holds 'notes'"),
        (a_link, 78, "{} is no spool: it holds '0'"),
        (with_a_directory_as_state, 74, "cannot use the spool {}.*: Is a directory"),
        (with_a_directory_as_lock, 74, "cannot use the spool {}.*: Is a directory"),
        (with_a_directory_as_segment, 74, "cannot use the spool {}.*: Is a directory"),
    ],
)
def test_a_spool_that_cannot_be_used_keeps_what_it_holds(pipeline, tmp_path, trouble, code, told):
    """Told in one line, nothing is read, nothing changed; set right, all of it is delivered."""
    pipeline.leave(10)
    good = tmp_path / "good"
    shutil.copytree(pipeline.spool, good)
    trouble(pipeline.spool / "0")
    before = spooled(pipeline.spool)
    sender = pipeline.send()
    out, err = sender.communicate(lines(range(11, 21)), timeout=PATIENCE)

    assert (sender.returncode, out) == (code, b"")
    assert re.fullmatch(f"zmqpush: {told.format(pipeline.spool)}\n", err.decode())
    assert spooled(pipeline.spool) == before == list(range(1, 11))
    pipeline.spool = good
    pipeline.finish()


def test_without_its_meta_a_spool_is_delivered_under_a_new_name(pipeline):
    """Unreadable `meta`: what is there is delivered all the same; lost 0, repeated 0."""
    for meta in (b"", b"{}", b"\xff", b'{"format": 2, "secret": "AB"}', b'{"format": "2"}'):
        pipeline.leave(10)
        (pipeline.spool / "0" / "meta").write_bytes(meta)

    pipeline.finish()


def test_an_output_that_cannot_be_opened_ends_the_receiver_and_the_sender_keeps_all(
    pipeline, start, tmp_path
):
    """Told in one line, exit 74, nothing acknowledged; the next receiver gets all of it once."""
    (tmp_path / "file").touch()
    to = tmp_path / "file" / "{type}"
    receiver = start(ZMQPULL, "-qa", pipeline.endpoint, "--state", pipeline.state, "--to", to)
    sender = pipeline.send()
    pipeline.put(sender, 100)
    out, err = receiver.communicate(timeout=PATIENCE)

    assert (receiver.returncode, out) == (74, b"")
    assert err.decode() == f"zmqpull: cannot make the directory {tmp_path}/file: File exists\n"
    receiver = pipeline.receive()
    assert end(sender, read=pipeline.fed) == (100, 0, 0, 0)
    stop(receiver)
    pipeline.verify()
