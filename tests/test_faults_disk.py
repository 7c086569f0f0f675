"""The fault matrix, as far as disks have no room, answer late, or are taken away."""

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from chaos import Pipeline, end, fill_disk, stop
from helpers import (
    NOBODY,
    PATIENCE,
    SUMMARY,
    ZMQPULL,
    ZMQPUSH,
    losses,
    statistics,
    wait_until,
    wait_until_ready,
)

SHIM = Path(__file__).with_name("faulty_disk.c")
NO_ROOM = {"ENOSPC": errno.ENOSPC, "EDQUOT": errno.EDQUOT}


@pytest.fixture
def pipeline(start, tmp_path):
    return Pipeline(start, tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """Return the path of a file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=4m,nr_inodes=64 zmqpush {disk}"
    if subprocess.run(mount, shell=True, check=False).returncode:
        pytest.skip("a small tmpfs cannot be mounted here: that takes root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def take_names(disk, left):
    """Make files until there are only so many left to make; return a function that removes them."""
    made = []
    with contextlib.suppress(OSError):
        while True:
            (disk / f"ballast{len(made)}").touch()
            made.append(disk / f"ballast{len(made)}")
    for _ in range(left):
        made.pop().unlink()

    def free():
        for path in made:
            path.unlink()

    return free


class FaultyDisk:
    """Calls on what is below a directory that fail, or wait, while they are told to."""

    def __init__(self, directory, library):
        self.directory = directory / "faulty"
        self.directory.mkdir()
        self._switch = directory / "switch"
        self._library = library

    def command(self, program, calls, error=0):
        """Return a command that has these calls fail; without an error they wait."""
        values = {
            "LD_PRELOAD": self._library,
            "FAULTY_DIRECTORY": self.directory,
            "FAULTY_CALLS": calls,
            "FAULTY_ERRNO": error,
            "FAULTY_SWITCH": self._switch,
        }
        return ["env", *(f"{name}={value}" for name, value in values.items()), program]

    def fail(self):
        self._switch.touch()

    def heal(self):
        self._switch.unlink()


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if not shutil.which("cc"):
        pytest.skip("there is no C compiler")
    path = tmp_path_factory.mktemp("library") / "faulty_disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, SHIM, "-ldl"], check=True)
    return path


@pytest.fixture
def faulty(tmp_path, library, pipeline):
    """Return a faulty disk, with the spool and the state on it."""
    disk = FaultyDisk(tmp_path, library)
    pipeline.spool, pipeline.state = disk.directory / "spool", disk.directory / "state"
    return disk


def wait_for_line(child, words):
    """Read standard error up to a line with some words; return it."""
    while words not in (line := child.stderr.readline()):
        assert line, f"it ended without saying {words}"
    return line


# No room at a start.


@pytest.mark.parametrize("left", range(6))
def test_52_a_sender_waits_for_room_for_each_file_of_its_spool(pipeline, small_disk, left):
    """The directories, the lock, the name, the state, a segment: lost 0, repeated 0."""
    pipeline.spool = small_disk / "spool"
    free = take_names(small_disk, left)
    sender = pipeline.send()
    pipeline.put(sender, 100)
    wait_for_line(sender, b"reading waits" if left == 5 else b"No space left on device: waiting\n")
    free()

    pipeline_ends(pipeline, sender)


def test_52_a_sender_waits_for_room_on_a_disk_that_is_full(pipeline, small_disk):
    """There are names to be had, and not a byte: lost 0, repeated 0."""
    pipeline.spool = small_disk / "spool"
    fill_disk(small_disk / "ballast")
    sender = pipeline.send()
    pipeline.put(sender, 100)
    wait_for_line(sender, b"No space left on device: waiting\n")
    (small_disk / "ballast").unlink()

    pipeline_ends(pipeline, sender)


def pipeline_ends(pipeline, sender):
    """Deliver all to a receiver that begins now, and look at its file."""
    receiver = pipeline.receive()
    assert end(sender, read=pipeline.fed) == (pipeline.fed, 0, 0, 0)
    stop(receiver)
    pipeline.verify()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_52_a_signal_ends_the_wait_and_the_input_is_not_read(pipeline, small_disk, number):
    """Exit 74, with a line that says so; whoever comes next finds all of the input."""
    pipeline.spool = small_disk / "spool"
    take_names(small_disk, 3)
    reading, writing = os.pipe()
    os.write(writing, b"a line\n")
    sender = pipeline.send(stdin=reading)
    wait_for_line(sender, b"No space left on device: waiting\n")
    sender.send_signal(number)
    out, err = sender.communicate(timeout=PATIENCE)

    assert (sender.returncode, out) == (74, b"")
    assert err.endswith(b"No space left on device: nothing was read\n")
    assert os.read(reading, 100) == b"a line\n"
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("left", range(4))
def test_52_a_receiver_waits_for_room_for_its_state(pipeline, small_disk, left):
    """The directory, the lock, the database, its log: lost 0, repeated 0."""
    pipeline.state = small_disk / "state"
    free = take_names(small_disk, left)
    receiver = pipeline.receive()
    sender = pipeline.send()
    pipeline.put(sender, 100)
    wait_for_line(receiver, b"waiting\n")
    free()

    assert end(sender, read=100) == (100, 0, 0, 0)
    stop(receiver)
    pipeline.verify()


def test_52_a_signal_ends_the_wait_for_a_state(pipeline, small_disk):
    """Exit 0, as nothing was taken from anybody."""
    pipeline.state = small_disk / "state"
    take_names(small_disk, 1)
    receiver = pipeline.receive()
    wait_for_line(receiver, b"No space left on device: waiting\n")
    receiver.terminate()

    assert receiver.wait(PATIENCE) == 0
    assert receiver.stderr.read() == b""


# No room later, and who finds out.


@pytest.mark.parametrize("error", NO_ROOM)
@pytest.mark.parametrize("calls", ["make", "write", "sync"])
def test_53_a_start_waits_for_room_whichever_call_finds_none(pipeline, faulty, calls, error):
    """Of the spool and of the state: lost 0, repeated 0."""
    faulty.fail()
    receiver = pipeline.receive(command=faulty.command(ZMQPULL, calls, NO_ROOM[error]))
    sender = pipeline.send(command=faulty.command(ZMQPUSH, calls, NO_ROOM[error]))
    pipeline.put(sender, 100)
    wait_for_line(sender, b"waiting\n")
    wait_for_line(receiver, b"waiting\n")
    faulty.heal()

    assert end(sender, read=100) == (100, 0, 0, 0)
    stop(receiver)
    pipeline.verify()


@pytest.mark.parametrize("error", NO_ROOM)
@pytest.mark.parametrize("calls", ["write", "sync"])
def test_53_a_spool_waits_for_room_while_its_input_is_idle(pipeline, faulty, calls, error):
    """Also where only a sync finds that there is none, again and again: lost 0, repeated 0."""
    receiver = pipeline.receive()
    sender = pipeline.send(command=faulty.command(ZMQPUSH, calls, NO_ROOM[error]))
    pipeline.put(sender, 100)
    wait_until(lambda: statistics(sender)[1] == 100)
    faulty.fail()
    pipeline.put(sender, 100)
    wait_for_line(sender, b"the spool is full" if calls == "write" else b"waiting for room\n")
    for _ in range(3 if calls == "sync" else 0):  # each try makes a segment
        before = (pipeline.spool / "0").stat().st_mtime_ns
        wait_until(lambda before=before: (pipeline.spool / "0").stat().st_mtime_ns != before)
    assert statistics(sender)[:3] == (200, 100, 100)
    faulty.heal()
    wait_until(lambda: statistics(sender)[1] == 200)

    assert end(sender, read=200) == (200, 0, 0, 0)
    stop(receiver)
    pipeline.verify()


@pytest.mark.parametrize("error", NO_ROOM)
@pytest.mark.parametrize("calls", ["write", "sync"])
def test_53_a_state_waits_for_room(pipeline, faulty, calls, error):
    """Nothing is acknowledged meanwhile: lost 0, repeated 0."""
    receiver = pipeline.receive(command=faulty.command(ZMQPULL, calls, NO_ROOM[error]))
    sender = pipeline.send("--sync", "off")
    pipeline.put(sender, 100)
    wait_until(lambda: statistics(sender)[1] == 100)
    faulty.fail()
    pipeline.put(sender, 100)
    wait_for_line(receiver, b"waiting\n")
    assert statistics(sender)[1] == 100
    faulty.heal()

    assert end(sender, read=200) == (200, 0, 0, 0)
    stop(receiver)
    pipeline.verify()


def test_53_a_state_on_a_disk_that_fails_ends_the_receiver(pipeline, faulty):
    """Not for want of room: exit 74, and the sender keeps what is not acknowledged."""
    receiver = pipeline.receive(command=faulty.command(ZMQPULL, "write", errno.EIO))
    sender = pipeline.send()
    pipeline.put(sender, 100)
    wait_until(lambda: statistics(sender)[1] == 100)
    faulty.fail()
    pipeline.put(sender, 100)

    assert receiver.wait(PATIENCE) == 74
    # What is in the state's directory is written before the state itself.
    told = receiver.stderr.read()
    assert b"cannot write to the journal in" in told or b"cannot use the state" in told
    faulty.heal()
    receiver = pipeline.receive()
    assert end(sender, read=200) == (200, 0, 0, 0)
    stop(receiver)
    pipeline.verify()


@pytest.mark.parametrize("error", [errno.EROFS, errno.EIO])
def test_53_a_spool_that_can_be_written_no_more_ends_the_sender(pipeline, faulty, error):
    """Told with the number of what may be lost, which the summary counts; exit 74."""
    sender = pipeline.send("-c", NOBODY, command=faulty.command(ZMQPUSH, "write", error))
    pipeline.put(sender, 100)
    wait_until(lambda: statistics(sender)[0] == 100)
    faulty.fail()
    pipeline.put(sender, 10)
    out, err = sender.communicate(timeout=PATIENCE)

    assert (sender.returncode, SUMMARY.fullmatch(out)[1]) == (74, b"0")
    assert f"cannot write to the spool {pipeline.spool}/0: {os.strerror(error)}".encode() in err
    lost, left = re.search(rb"0 dropped, (\d+) lost(?:, (\d+) left in the spool)?\n$", err).groups()
    assert int(lost) >= 10
    assert int(lost) + int(left or 0) == 110


# The spool is taken away.


def removed(spool):
    moved(spool)  # all of it at once
    shutil.rmtree(spool.with_name("elsewhere"))


def without_segments(spool):
    for segment in spool.glob("0/*.seg*"):
        segment.unlink()


def moved(spool):
    spool.rename(spool.with_name("elsewhere"))


def replaced(spool):
    shutil.copytree(spool, spool.with_name("copy"))
    shutil.rmtree(spool)
    spool.with_name("copy").rename(spool)


@pytest.mark.parametrize("take", [removed, without_segments, moved, replaced])
@pytest.mark.parametrize("sync", ["interval", "off"])
def test_54_what_was_in_a_spool_that_was_removed_counts_as_lost(pipeline, take, sync):
    """At the end, if nothing more comes: never as left in the spool; exit 74."""
    sender = pipeline.send("-c", NOBODY, "--grace", 0.5, "--sync", sync)
    pipeline.put(sender, 2)
    wait_until(lambda: statistics(sender)[0] == 2)
    take(pipeline.spool)
    sender.terminate()

    assert_lost(sender, 2)


@pytest.mark.parametrize("take", [removed, without_segments, moved])
def test_54_a_spool_that_was_removed_ends_the_sender_with_the_next_line(pipeline, take):
    """As soon as it can be known, with what is in it from an earlier run; exit 74."""
    pipeline.leave(3)
    sender = pipeline.send("-c", NOBODY)
    pipeline.put(sender, 2)
    wait_until(lambda: statistics(sender)[0] == 2)
    take(pipeline.spool)
    with contextlib.suppress(BrokenPipeError):  # the sync of the first two may be the one
        pipeline.put(sender, 1)

    assert_lost(sender, 5, 6)


def test_54_so_does_one_into_which_nothing_can_be_written(pipeline):
    """A spool with a backlog alone, removed: all of it is lost, not left; exit 74."""
    pipeline.leave(3)
    sender = pipeline.send("-c", NOBODY)
    wait_until(lambda: statistics(sender)[2] == 3)
    shutil.rmtree(pipeline.spool)
    pipeline.put(sender, 1)

    assert_lost(sender, 4)


def assert_lost(sender, *lost):
    """See that a sender ends, and says that so many records, or so many, are lost."""
    out, err = sender.communicate(timeout=PATIENCE)
    assert (sender.returncode, SUMMARY.fullmatch(out)[1]) == (74, b"0")
    assert losses(err) in [(0, number) for number in lost]
    assert re.search(rb"was removed or moved while it was in use: \d+ records are lost\n", err)


# A disk that does not answer.


@pytest.mark.parametrize("twice", [False, True])
def test_56_the_last_sync_is_waited_for_but_a_second_signal_means_now(pipeline, faulty, twice):
    """What is not synced counts as lost then; else it is left in the spool."""
    sender = pipeline.send("-c", NOBODY, "--grace", 0.2, command=faulty.command(ZMQPUSH, "sync"))
    wait_until_ready(sender)
    pipeline.put(sender, 3)
    wait_until(lambda: statistics(sender)[0] == 3)
    faulty.fail()
    pipeline.put(sender, 10)
    wait_until(lambda: statistics(sender)[0] == 13)
    sender.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        sender.wait(2)
    if twice:
        sender.terminate()
    else:
        faulty.heal()
    _, err = sender.communicate(timeout=PATIENCE)
    lost, left = re.search(rb"0 dropped, (\d+) lost(?:, (\d+) left|$)", err, re.MULTILINE).groups()

    assert sender.returncode == (1 if twice else 75)
    assert int(lost) + int(left or 0) == 13
    assert int(lost) >= 10 if twice else lost == b"0"


def test_56_a_second_signal_ends_a_start_that_takes_long(pipeline, faulty):
    """The disk does not answer while the spool is made: exit 74, nothing was read."""
    faulty.fail()
    sender = pipeline.send("-c", NOBODY, command=faulty.command(ZMQPUSH, "sync"))
    wait_until_ready(sender)
    wait_until(lambda: (pipeline.spool).exists())
    sender.terminate()
    wait_until(lambda: b"0 read" in hang_up(sender))  # the first one was taken
    sender.terminate()
    out, err = sender.communicate(timeout=PATIENCE)

    assert (sender.returncode, out) == (74, b"")
    assert err == b"zmqpush: the spool was not ready in time: nothing was read\n"


def hang_up(child):
    child.send_signal(signal.SIGHUP)
    return child.stderr.readline()


@pytest.mark.parametrize("where", ["state", "file"])
def test_56_a_second_signal_ends_a_receiver_whose_disk_does_not_answer(pipeline, faulty, where):
    """Exit 74; what is not acknowledged is delivered to the next one: lost 0."""
    if where == "file":
        pipeline.path = faulty.directory / "all"
        pipeline.state = pipeline.state.parent.with_name("state")
    receiver = pipeline.receive(command=faulty.command(ZMQPULL, "sync"))
    sender = pipeline.send()
    pipeline.put(sender, 100)
    wait_until(lambda: statistics(sender)[1] == 100)
    faulty.fail()
    pipeline.put(sender, 100)
    wait_until(lambda: pipeline.path.read_bytes().count(b"\n") == 200)
    receiver.terminate()
    wait_until(lambda: b"records written" in hang_up(receiver))
    receiver.terminate()

    assert receiver.wait(PATIENCE) == 74
    faulty.heal()
    receiver = pipeline.receive()
    assert end(sender, read=200) == (200, 0, 0, 0)
    stop(receiver)
    pipeline.verify()
