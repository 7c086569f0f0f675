"""A file that cannot be opened, or written for now, stops its own records and nothing else."""

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
from itertools import count

import pytest
import zmq

import test_pull
from helpers import ZMQPULL, ZMQPUSH, push, wait_until, wait_until_ready
from peers import bare
from test_pull import finish

endpoint, sender, small_disk = test_pull.endpoint, test_pull.sender, test_pull.small_disk

# Fails so many syncs of the files of records, as a disk without room may.
FAILING_SYNC = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int fdatasync(int fd) {
    static int left = -1;
    char name[64], path[4096] = "";
    if (left < 0)
        left = atoi(getenv("FAIL_SYNCS"));
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    if (readlink(name, path, sizeof path - 1) > 0 && strstr(path, "/to/")
        && left > 0 && !access(getenv("FAIL_FROM"), F_OK)) {
        left--;
        errno = atoi(getenv("FAIL_ERRNO"));
        return -1;
    }
    return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd);
}
"""


def records(path):
    """Return the messages in a file of records, each of which is whole."""
    return [json.loads(line)["message"] for line in path.read_text().splitlines()]


def record(kind, message):
    return json.dumps({"type": kind, "message": message}).encode()


def directory(path):
    path.mkdir(parents=True)
    return path.rmdir


def fifo(path):
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    return path.unlink


def listener(path):
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
    return path.unlink


def loop(path):
    path.parent.mkdir(parents=True)
    path.symlink_to(path)
    return path.unlink


def device(path):
    path.parent.mkdir(parents=True)
    path.symlink_to("/dev/full")
    return path.unlink


KINDS = pytest.mark.parametrize("kind", [directory, fifo, listener, loop, device])


@KINDS
def test_acknowledged_records_wait_at_their_sender_and_others_pass(start, endpoint, tmp_path, kind):
    """The sender is told; what waits arrives once, when the file can be opened."""
    to, spool = tmp_path / "to", tmp_path / "spool"
    mend = kind(to / "archive")
    child = start(ZMQPULL, "-a", endpoint, "--to", to / "{type}")
    lines = b"".join(b"%d\n" % n for n in range(1000))
    refused = push("--spool", spool, "-c", endpoint, "--timeout", "2", "archive", data=lines)
    passed = push("--ack", "-c", endpoint, "app", data=lines)

    assert refused.returncode == 75
    assert b"it refuses: the file for these records cannot be opened" in refused.stderr
    assert str(to).encode() not in refused.stderr  # what is where is not the sender's business
    assert passed.returncode == 0
    mend()
    assert push("--spool", spool, "-c", endpoint, "archive", data=b"last\n").returncode == 0
    child.terminate()
    code, _, err = finish(child)
    assert code == 0
    assert err.count(b"%s/archive: " % str(to).encode()) == 1
    expected = [str(n) for n in range(1000)]
    assert records(to / "app") == expected
    assert records(to / "archive") == [*expected, "last"]


def test_a_file_that_stays_unusable_does_not_fill_the_memory_of_others(start, endpoint, tmp_path):
    """Blocks that are given back free the receiver's budget, however many senders repeat them."""
    (tmp_path / "to/archive").mkdir(parents=True)
    child = start(ZMQPULL, "-a", endpoint, "--to", tmp_path / "to/{type}", "--memory", "4MiB")
    line = b"x" * 1000 + b"\n"
    for _ in range(12):
        done = push("--ack", "-c", endpoint, "--timeout", "0.5", "archive", data=line * 2000)
        assert done.returncode == 69
    assert push("--ack", "-c", endpoint, "app", data=line * 2000).returncode == 0

    child.terminate()
    assert finish(child)[0] == 0
    assert len(records(tmp_path / "to/app")) == 2000


@KINDS
def test_plain_records_wait_for_their_file_in_order(start, endpoint, sender, tmp_path, kind):
    mend = kind(tmp_path / "to/archive")
    child = start(ZMQPULL, "-b", endpoint, "--to", tmp_path / "to/{type}")
    peer = sender()
    for n in range(5):
        peer.send(record("archive", n))
        peer.send(record("app", n))
    wait_until(lambda: (tmp_path / "to/app").exists() and len(records(tmp_path / "to/app")) == 5)
    assert b"/archive" in child.stderr.readline()
    mend()
    wait_until((tmp_path / "to/archive").exists)
    peer.send(record("archive", 5))
    wait_until(lambda: len(records(tmp_path / "to/archive")) == 6)
    child.terminate()
    code, _, err = finish(child)

    assert code == 0
    assert b"lost" not in err
    assert records(tmp_path / "to/archive") == [*range(6)]


def test_plain_records_that_wait_at_the_end_are_lost_and_counted(start, endpoint, sender, tmp_path):
    (tmp_path / "to/archive").mkdir(parents=True)
    child = start(ZMQPULL, "-b", endpoint, "--to", tmp_path / "to/{type}")
    sender().send(b"\n".join(record("archive", n) for n in range(3)))
    assert b"/archive: " in child.stderr.readline()
    child.terminate()
    code, _, err = finish(child)

    assert code == 1
    assert b"0 records written\n" in err
    assert b"3 lost" in err


def test_plain_records_wait_in_bounded_memory(start, endpoint, sender, tmp_path):
    (tmp_path / "to/archive").mkdir(parents=True)
    child = start(ZMQPULL, "-b", endpoint, "--to", tmp_path / "to/{type}")
    peer = sender()
    for _ in range(20):
        peer.send(b"\n".join([record("archive", "x" * 1000)] * 1000))
    peer.send(record("app", "last"))
    wait_until((tmp_path / "to/app").exists)
    child.terminate()
    code, _, err = finish(child)

    assert code == 1
    assert b"records for it are lost" in err
    assert b"zmqpull: 20000 lost" in err


@pytest.mark.parametrize("acked", [False, True])
def test_dead_letters_take_what_cannot_be_written(start, endpoint, tmp_path, acked):
    (tmp_path / "to/archive").mkdir(parents=True)
    letters = tmp_path / "letters"
    kind, mode = ("-a", "--ack") if acked else ("-b", "--quiet")
    to = tmp_path / "to/{type}"
    child = start(ZMQPULL, kind, endpoint, "--to", to, "--dead-letters", letters)
    done = push(mode, "-c", endpoint, "archive", data=b"one\ntwo\n")
    assert done.returncode == 0
    wait_until(lambda: letters.exists() and letters.read_bytes().count(b"\n") == 2)
    child.terminate()
    code, _, err = finish(child)

    found = [json.loads(line) for line in letters.read_text().splitlines()]
    assert [json.loads(letter["record"])["message"] for letter in found] == ["one", "two"]
    assert [letter["seq"] for letter in found] == ([1, 2] if acked else [0, 0])
    assert all("Is a directory" in letter["reason"] for letter in found)
    assert code == 0
    assert b"0 records written, 2 were refused by the sink" in err


def test_dead_letters_that_cannot_be_written_are_waited_for(start, endpoint, tmp_path):
    (tmp_path / "to/archive").mkdir(parents=True)
    letters = tmp_path / "letters/file"
    letters.parent.mkdir()
    child = start(
        ZMQPULL, "-a", endpoint, "--to", tmp_path / "to/{type}", "--dead-letters", letters
    )
    wait_until(letters.exists)
    letters.unlink()
    letters.parent.rmdir()
    shipping = start(ZMQPUSH, "--ack", "-c", endpoint, "archive")
    shipping.stdin.write(b"one\n")
    shipping.stdin.close()
    while b": waiting" not in child.stderr.readline():
        pass
    letters.parent.mkdir()

    assert shipping.wait(60) == 0
    assert letters.read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("name", ["letters", "linked"])
def test_labels_cannot_name_the_dead_letters(start, endpoint, tmp_path, name):
    """Neither by their name nor by another one of the same file."""
    letters = tmp_path / "to/letters"
    letters.parent.mkdir()
    child = start(
        ZMQPULL, "-a", endpoint, "--to", tmp_path / "to/{type}", "--dead-letters", letters
    )
    wait_until(letters.exists)
    os.link(letters, tmp_path / "to/linked")
    assert push("--ack", "-c", endpoint, name, data=b"one\n").returncode == 0

    child.terminate()
    assert finish(child)[0] == 0
    (letter,) = map(json.loads, letters.read_text().splitlines())
    assert "it is for files of zmqpull itself" in letter["reason"]


@pytest.mark.parametrize("name", ["state.db", "lock", "state.db-wal", "anything"])
def test_labels_cannot_name_a_file_of_the_state(start, endpoint, tmp_path, name):
    """Not even where the directory itself is named by a label."""
    (tmp_path / "host").mkdir()
    state = tmp_path / "host" / "state"
    child = start(
        ZMQPULL, "-a", endpoint, "--state", state, "--to", tmp_path / "host/{type}" / name
    )
    refused = push("--ack", "-c", endpoint, "--timeout", "1", "state", data=b"one\n")
    passed = push("--ack", "-c", endpoint, "app", data=b"one\n")

    assert (refused.returncode, passed.returncode) == (69, 0)
    child.terminate()
    assert finish(child)[0] == 0


@pytest.mark.parametrize("to", ["state/{type}", "state/{host}.%Y"])
def test_a_template_for_files_among_those_of_the_state_is_refused(start, tmp_path, to):
    child = start(ZMQPULL, "--state", tmp_path / "state", "--to", tmp_path / to)
    code, _, err = finish(child)

    assert code == 78
    assert err == b"zmqpull: %s/state is for files of zmqpull itself: not for --to\n" % (
        str(tmp_path).encode()
    )


def test_a_stray_message_stops_nobody(start, endpoint, sender, tmp_path):
    """Whatever a label holds, the process goes on, and so do the others."""
    (tmp_path / "to/archive").mkdir(parents=True)
    child = start(ZMQPULL, "-b", endpoint, "--to", tmp_path / "to/{type}")
    peer = sender()
    for kind in ("archive", "", ".", "..", "/", "a/b", "\0", "x" * 5000, "\ud800", "é" * 300):
        peer.send(json.dumps({"type": kind, "message": "odd"}).encode())
    peer.send(record("app", "last"))
    wait_until((tmp_path / "to/app").exists)
    wait_until(lambda: records(tmp_path / "to/app") == ["last"])

    assert child.poll() is None
    assert {path.parent for path in tmp_path.rglob("*")} <= {tmp_path, tmp_path / "to"}


@pytest.fixture
def full_of_files(tmp_path):
    """Return a directory with room for bytes, but for no further file."""
    path = tmp_path / "full"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "nr_inodes=8", "zmqpull", path]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("a small tmpfs cannot be mounted here: that takes root")
    with contextlib.suppress(OSError):  # no room for another one
        for at in count():
            (path / f"ballast{at}").touch()
    yield path
    subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.parametrize("name", ["all", "{type}", "deep/{type}"])
def test_no_room_for_a_file_or_directory_is_waited_for(start, endpoint, full_of_files, name):
    """From the start on, and without an end of the process."""
    child = start(ZMQPULL, "-a", endpoint, "--to", full_of_files / name)
    shipping = start(ZMQPUSH, "--ack", "-c", endpoint, "app")
    shipping.stdin.write(b"one\n")
    shipping.stdin.close()
    assert b": No space left on device: waiting" in child.stderr.readline()
    for path in full_of_files.glob("ballast*"):
        path.unlink()

    assert shipping.wait(60) == 0
    child.terminate()
    assert finish(child)[0] == 0
    assert records(full_of_files / name.replace("{type}", "app")) == ["one"]


@pytest.fixture
def failing_sync(tmp_path):
    """Return an environment in which syncs can fail."""
    source, library = tmp_path / "sync.c", tmp_path / "sync.so"
    source.write_text(FAILING_SYNC)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "FAIL_FROM": str(tmp_path / "now")}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("state", [False, True])
def test_no_room_when_files_are_synced_is_waited_for(
    start, endpoint, tmp_path, failing_sync, number, state
):
    """What was written and not synced is written again, once."""
    to = tmp_path / "to/{type}"
    options = ("--state", tmp_path / "state") if state else ()
    environment = {**os.environ, **failing_sync, "FAIL_SYNCS": "3", "FAIL_ERRNO": str(number)}
    child = start(ZMQPULL, "-a", endpoint, "--to", to, *options, env=environment)
    assert push("--ack", "-c", endpoint, "app", data=b"before\n").returncode == 0
    (tmp_path / "now").touch()
    lines = b"".join(b"%d\n" % n for n in range(5000))
    assert push("--ack", "-c", endpoint, "app", data=lines).returncode == 0
    assert push("--ack", "-c", endpoint, "web", data=lines).returncode == 0

    child.send_signal(signal.SIGTERM)
    code, _, err = finish(child)
    assert code == 0
    assert b": %s: waiting" % os.strerror(number).encode() in err
    assert b"10001 records written\n" in err
    assert records(tmp_path / "to/app") == ["before", *map(str, range(5000))]
    assert records(tmp_path / "to/web") == [*map(str, range(5000))]


def test_plain_records_that_a_failed_sync_undoes_are_counted(
    start, endpoint, tmp_path, failing_sync
):
    environment = {
        **os.environ, **failing_sync, "FAIL_SYNCS": "1", "FAIL_ERRNO": str(errno.ENOSPC)
    }  # fmt: skip
    (tmp_path / "now").touch()
    plain = f"ipc://{tmp_path}/plain"
    child = start(ZMQPULL, "-a", endpoint, "-b", plain, "--to", tmp_path / "to/%Y", env=environment)
    with bare(zmq.PUSH, plain) as peer:
        peer.send(record("app", "one"))
        assert b": waiting" in child.stderr.readline()
    wait_until_ready(child)
    child.terminate()
    code, _, err = finish(child)

    assert code == 1
    assert [path.read_bytes() for path in (tmp_path / "to").iterdir()] == [b""]
    assert b"zmqpull: 0 records written\nzmqpull: 1 lost" in err
