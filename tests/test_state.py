"""What zmqpull remembers: after a crash every record is in its file once, and whole."""

import contextlib
import json
import os
import re
import signal
import sqlite3
import time

import pytest
import zmq

import test_pull
from helpers import PATIENCE, ZMQPULL, ZMQPUSH, wait_until, wait_until_ready
from peers import STREAM, bare, deliver, greet
from test_pull import finish

endpoint, small_disk = test_pull.endpoint, test_pull.small_disk


@pytest.fixture
def path(tmp_path):
    """Return where the records go."""
    return tmp_path / "to" / "all"


@pytest.fixture
def receiver(start, endpoint, tmp_path, path):
    """Return a function that starts a receiver with a state."""
    path.parent.mkdir()

    def receive(*options, to=path, **kwargs):
        args = ("-a", endpoint, "--state", tmp_path / "state", "--to", to, *options)
        return start(ZMQPULL, *args, **kwargs)

    return receive


def change(directory, *statement):
    """Change the database of a state that is not in use."""
    database = sqlite3.connect(directory / "state.db", isolation_level=None)
    with contextlib.closing(database):
        database.execute(*statement)


def kill(child):
    child.kill()
    child.wait(PATIENCE)


def end(child):
    """Have a receiver end; return what it said, but for its statistics."""
    wait_until_ready(child)
    child.terminate()
    code, out, err = finish(child)
    assert (code, out) == (0, b"")
    return re.sub(rb"zmqpull: \d+ records written.*\n", b"", err)


def left(path):
    path.write_bytes(path.read_bytes() + b'{"half')
    return path, b"1\n2\n", True


def renamed(path):
    left(path)
    path.with_suffix(".1").write_bytes(b"older\n")
    return path.rename(path.with_suffix(".2")), b"1\n2\n", True


def renamed_and_made_anew(path):
    new = renamed(path)
    path.write_bytes(b"1\n2\nnot ours")
    return new


def replaced(path):
    path.rename(path.parent.parent / "elsewhere")
    path.write_bytes(b"1\n2\nnot ours")
    return path, b"1\n2\nnot ours", False


def truncated(path):
    path.write_bytes(b"")
    return path, b"", False


def deleted(path):
    path.unlink()
    return path, b"", False


@pytest.mark.parametrize("to", ["all", "a%%l"])
@pytest.mark.parametrize(
    "meanwhile", [left, renamed, renamed_and_made_anew, replaced, truncated, deleted]
)
def test_what_was_not_committed_is_cut_off_where_the_file_is_now(
    receiver, endpoint, path, tmp_path, meanwhile, to
):
    to = path.with_name(to)
    path = path.with_name(to.name.replace("%%", "%"))
    child = receiver(to=to)
    with bare(zmq.DEALER, endpoint) as peer:
        deliver(peer, greet(peer)[1], 1, b"1", b"2")
    kill(child)
    now, content, cut = meanwhile(path)
    child = receiver(to=to)
    with bare(zmq.DEALER, endpoint) as peer:
        welcome, session = greet(peer, first=3)
        deliver(peer, session, 3, b"3")
    told = end(child)

    assert welcome["acked"] == 2
    line = f"zmqpull: cut off 6 bytes of {now}: they were not committed\n"
    assert told.decode() == (line if cut else "")
    assert now.read_bytes() == content + (b"3\n" if now == path else b"")
    assert path.read_bytes().endswith(b"3\n")


def test_plain_records_in_the_same_file_survive_and_are_never_cut_in_half(
    receiver, start, endpoint, path, tmp_path
):
    plain = f"ipc://{tmp_path}/plain"
    child = receiver("-b", plain)
    with bare(zmq.DEALER, endpoint) as peer, bare(zmq.PUSH, plain) as push:
        _, session = greet(peer)
        for number in range(1, 50):
            push.send(b'{"plain":%d}' % number)
            deliver(peer, session, number, b'{"acked":%d}' % number)
        wait_until(lambda: b'{"plain":49}\n' in path.read_bytes())
        # What comes after it is committed with it.
        deliver(peer, session, 50, b'{"acked":50}')
    kill(child)
    before = path.read_bytes()

    assert end(receiver()) == b""
    assert path.read_bytes() == before
    records = [next(iter(json.loads(line).items())) for line in before.splitlines()]
    for kind in ("plain", "acked"):
        numbers = [number for name, number in records if name == kind]
        assert numbers == list(range(1, 50 + (kind == "acked")))


def test_plain_records_alone_are_committed_too(start, endpoint, tmp_path):
    args = ("-b", endpoint, "--to", tmp_path / "all", "--state", tmp_path / "state")
    # It dies when the state has the length of the file for the second time, no more 0.
    fault = os.environ | {"ZMQPUSH_FAULT": "state-committed:2"}
    child = start(ZMQPULL, *args, env=fault)
    with bare(zmq.PUSH, endpoint) as push:
        push.send(b'{"n":1}')
        assert child.wait(PATIENCE) == -signal.SIGKILL

    assert end(start(ZMQPULL, *args)) == b""
    assert (tmp_path / "all").read_bytes() == b'{"n":1}\n'


@pytest.mark.parametrize("form", ["json", "raw"])
def test_killed_again_and_again_every_record_is_in_the_file_once(
    receiver, start, endpoint, path, form
):
    total = 300_000
    child = receiver()
    shipping = start(ZMQPUSH, "--ack", "-c", endpoint, "--format", form)
    feed = start("seq", total, stdout=shipping.stdin)
    shipping.stdin.close()
    shipping.stdin = None
    for part in range(1, 5):
        wait_until(lambda part=part: path.exists() and path.stat().st_size > part * 200_000)
        kill(child)
        child = receiver()
    code = shipping.wait(PATIENCE)
    feed.wait(PATIENCE)
    end(child)
    lines = path.read_bytes().splitlines()
    numbers = [json.loads(line)["message"] for line in lines]

    assert list(map(int, numbers)) == list(range(1, total + 1))
    assert code == 0


def test_a_duplicate_is_recognised_after_a_restart(receiver, endpoint, path):
    child = receiver()
    with bare(zmq.DEALER, endpoint) as peer:
        deliver(peer, greet(peer)[1], 1, b"1", b"2")
        deliver(peer, greet(peer, "ef" * 16)[1], 1, b"another stream")
    kill(child)
    child = receiver()
    with bare(zmq.DEALER, endpoint) as peer:
        welcome, session = greet(peer)
        deliver(peer, session, 1, b"1", b"2")
        deliver(peer, session, 3, b"3")
    child.terminate()

    assert (welcome["acked"], welcome["run"]) == (2, "cd" * 16)
    assert finish(child)[2] == b"zmqpull: 1 records written, 2 came twice\n"
    assert path.read_bytes() == b"1\n2\nanother stream\n3\n"


def test_a_stream_that_was_not_seen_for_30_days_is_forgotten(receiver, endpoint, tmp_path):
    day = 86400
    ages = {STREAM: 0, "1" * 32: 29 * day, "2" * 32: 31 * day}
    child = receiver()
    with bare(zmq.DEALER, endpoint) as peer:
        for stream in ages:
            deliver(peer, greet(peer, stream)[1], 1, b"1")
    kill(child)
    for stream, age in ages.items():
        seen = (int(time.time()) - age, stream)
        change(tmp_path / "state", "UPDATE streams SET seen = ? WHERE stream = ?", seen)
    receiver()
    with bare(zmq.DEALER, endpoint) as peer:
        acked = [greet(peer, stream)[0]["acked"] for stream in ages]

    assert acked == [1, 1, 0]


def of_a_later_version(directory):
    change(directory, "PRAGMA user_version = 99")


def corrupt(directory):
    (directory / "state.db").write_bytes(b"no database" * 1000)


def no_directory_above(directory):
    directory.rmdir()
    directory.parent.rmdir()
    directory.parent.touch()


def without_a_lock(directory):
    (directory / "lock").mkdir()


@pytest.mark.parametrize(
    ("trouble", "code", "line"),
    [
        (of_a_later_version, 78, "the state {} is of a later version"),
        (corrupt, 74, "cannot use the state {}: file is not a database"),
        (no_directory_above, 74, "cannot use the state {}: Not a directory"),
        (without_a_lock, 74, "cannot use the state {}: Is a directory"),
    ],
)
def test_a_state_that_cannot_be_used_is_told_in_one_line(
    start, endpoint, tmp_path, trouble, code, line
):
    directory = tmp_path / "above" / "state"
    directory.mkdir(parents=True)
    trouble(directory)
    child = start(ZMQPULL, "-a", endpoint, "--state", directory)

    assert finish(child) == (code, b"", f"zmqpull: {line.format(directory)}\n".encode())


def test_a_state_in_use_is_told_in_one_line(receiver, start, endpoint, tmp_path):
    receiver()
    with bare(zmq.DEALER, endpoint) as peer:
        greet(peer)
    directory = tmp_path / "state"
    second = start(ZMQPULL, "-a", f"ipc://{tmp_path}/second", "--state", directory)

    line = f"zmqpull: another process uses the state {directory}\n"
    assert finish(second) == (73, b"", line.encode())


def test_what_is_appended_while_no_receiver_runs_stays_after_an_end_in_order(
    receiver, endpoint, path
):
    child = receiver()
    with bare(zmq.DEALER, endpoint) as peer:
        deliver(peer, greet(peer)[1], 1, b"1")
    end(child)
    path.write_bytes(path.read_bytes() + b"by hand\n")

    assert end(receiver()) == b""
    assert path.read_bytes() == b"1\nby hand\n"


def test_new_files_for_plain_records_while_others_are_committed(start, endpoint, tmp_path):
    options = ("--state", tmp_path / "state", "--to", tmp_path / "to/{type}")
    child = start(ZMQPULL, "-b", endpoint, "-n", 1000, *options)
    with bare(zmq.PUSH, endpoint) as push:
        for number in range(1000):
            push.send(b'{"type":"t%d"}' % (number % 250))
            time.sleep(0.001)
        assert finish(child) == (0, b"", b"zmqpull: 1000 records written\n")


def test_only_its_owner_can_read_what_is_remembered(receiver, endpoint, tmp_path):
    receiver(umask=0)
    with bare(zmq.DEALER, endpoint) as peer:
        deliver(peer, greet(peer)[1], 1, b"1")
    state = tmp_path / "state"

    assert {path.stat().st_mode & 0o077 for path in (state, *state.iterdir())} == {0}
