"""What zmqpull remembers: after a crash every record is in its file once, and whole."""

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import tempfile
import time

import pytest
import zmq

import test_pull
from chaos import patched
from helpers import PATIENCE, ZMQPULL, ZMQPUSH, wait_until, wait_until_ready
from peers import SECRET, bare, deliver, greet
from test_pull import finish
from zmqpush.core.protocol.messages import Data, encode, public_name

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


CUT = "zmqpull: cut off {} bytes of {}: they were not committed\n"
KEPT = (
    "zmqpull: kept the last {} bytes of {} (nothing proves that they were written here): "
    "records that were not acknowledged may be there twice\n"
)
TORN = (
    "zmqpull: {} ends within a line: {} bytes of it are kept, and what follows begins on a "
    "line of its own\n"
)
MOVED = (
    "zmqpull: cannot find what {} was: up to {} bytes that were not acknowledged are in it, and "
    "come again\n"
)
COMMITTED, TAIL = b"1\n2\n", b"the third\n" * 1000


def look(child, endpoint):
    """Have a receiver open its files and end; return what it said."""
    with bare(zmq.DEALER, endpoint) as peer:
        greet(peer, "12" * 16)
    return end(child)


def left(path):
    return path, COMMITTED, CUT.format(len(TAIL), path)


def half_written(path):
    os.truncate(path, len(COMMITTED) + 8192 - 4)  # a page ends there
    return path, COMMITTED, CUT.format(8192 - 4, path)


def torn_by_a_full_disk(path):
    os.truncate(path, len(COMMITTED) + 5)
    return path, COMMITTED, CUT.format(5, path)


def not_written_at_all(path):
    os.truncate(path, len(COMMITTED))
    return path, COMMITTED, ""


def renamed(path):
    path.with_suffix(".1").write_bytes(b"older\n")
    new = path.rename(path.with_suffix(".2"))
    return new, COMMITTED, CUT.format(len(TAIL), new)


def renamed_and_made_anew(path):
    new = renamed(path)
    path.write_bytes(b"not ours\n")
    return new


def moved_to(name):
    def move(path):
        directory = (path.parent / name).resolve()
        directory.mkdir(exist_ok=True)
        new = path.rename(directory / "rotated-by.name")
        return new, COMMITTED, CUT.format(len(TAIL), new)

    move.__name__ = name
    return move


def moved_far_away(path):
    directory = path.parent / "below" / "further"
    directory.mkdir(parents=True)
    new = path.rename(directory / path.name)
    return new, COMMITTED + TAIL, MOVED.format(path, len(TAIL))


def compressed(path):
    path.unlink()
    return path, b"", MOVED.format(path, len(TAIL))


def truncated(path):
    path.write_bytes(b"")
    return path, b"", MOVED.format(path, len(TAIL))


def appended_to(path):
    with path.open("ab") as file:
        file.write(b"by hand\n")
    return path, COMMITTED + TAIL + b"by hand\n", KEPT.format(len(TAIL) + 8, path)


def half_written_and_appended_to(path):
    os.truncate(path, len(COMMITTED) + 500)
    with path.open("ab") as file:
        file.write(b"\nby hand\n")
    return path, COMMITTED + TAIL[:500] + b"\nby hand\n", KEPT.format(509, path)


def of_another_content(path):
    tail = TAIL.replace(b"third", b"THIRD")
    path.write_bytes(COMMITTED + tail)
    return path, COMMITTED + tail, KEPT.format(len(TAIL), path)


def edited_in_place(path):
    with path.open("r+b") as file:
        file.write(b"x")
    return path, b"x\n2\n" + TAIL, MOVED.format(path, len(TAIL))


def replaced_by_a_copy(path):
    content = path.read_bytes()
    path.rename(path.with_suffix(".old"))
    path.write_bytes(content)  # what is renamed is the file, and is cut back
    return path, content, CUT.format(len(TAIL), path.with_suffix(".old"))


def linked_from_elsewhere(path):
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    return path, COMMITTED, CUT.format(len(TAIL), path)


def written_by_another_receiver(path):
    with ended_receiver("--to", str(path).replace("%", "%%")) as (peer, session):
        deliver(peer, session, 1, b"x")
    os.truncate(path, len(COMMITTED + TAIL))
    return path, COMMITTED + TAIL, KEPT.format(len(TAIL), path)


@contextlib.contextmanager
def ended_receiver(*options):
    """Run another receiver, which ends in order when a test has used it."""
    with tempfile.TemporaryDirectory() as directory:
        endpoint = f"ipc://{directory}/another"
        child = subprocess.Popen([ZMQPULL, "-qa", endpoint, *map(str, options)])
        try:
            with bare(zmq.DEALER, endpoint) as peer:
                yield peer, greet(peer, "ef" * 16)[1]
            child.terminate()
            assert child.wait(PATIENCE) == 0
        finally:
            child.kill()
            child.wait(PATIENCE)


def leave_uncommitted(receiver, endpoint, **kwargs):
    """Have a receiver die between the write of a block and its commit."""
    child = receiver(env=os.environ | {"ZMQPUSH_FAULT": "output-written:2"}, **kwargs)
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer)
        deliver(peer, session, 1, b"1", b"2")
        peer.send(encode(Data.of(3, TAIL.count(b"\n"), TAIL), session))
        assert child.wait(PATIENCE) == -signal.SIGKILL


@pytest.mark.parametrize("to", ["all", "a%%l"])
@pytest.mark.parametrize(
    "meanwhile",
    [
        left,
        half_written,
        torn_by_a_full_disk,
        not_written_at_all,
        renamed,
        renamed_and_made_anew,
        moved_to("below"),
        moved_to("../beside"),
        moved_to(".."),
        moved_far_away,
        compressed,
        truncated,
        appended_to,
        half_written_and_appended_to,
        of_another_content,
        edited_in_place,
        replaced_by_a_copy,
        linked_from_elsewhere,
        written_by_another_receiver,
    ],
    ids=lambda meanwhile: meanwhile.__name__,
)
def test_what_was_not_committed_is_cut_off_where_it_is_proven_to_be_ours(
    receiver, endpoint, path, meanwhile, to
):
    """What is not is kept, byte for byte, and reported; the next start says nothing more."""
    to = path.with_name(to)
    path = path.with_name(to.name.replace("%%", "%"))
    leave_uncommitted(receiver, endpoint, to=to)
    assert path.read_bytes() == COMMITTED + TAIL
    now, content, line = meanwhile(path)
    child = receiver(to=to)
    with bare(zmq.DEALER, endpoint) as peer:
        welcome, session = greet(peer, first=3)
        deliver(peer, session, 3, b"3")
    told = end(child)

    assert welcome["acked"] == 2
    assert told.decode() == line
    same = path.exists() and now.exists() and now.samefile(path)
    assert now.read_bytes() == content + (b"3\n" if same else b"")
    assert path.read_bytes().endswith(b"3\n")
    assert look(receiver(to=to), endpoint) == b""


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("fault", [None, "output-written:2", "files-noted:2"])
def test_what_another_receiver_appended_after_a_kill_stays(
    receiver, endpoint, path, tmp_path, state, fault
):
    """3 lines of one, 10 of the other: 13 are left, whatever the first was about to write."""
    child = receiver(env=os.environ | ({"ZMQPUSH_FAULT": fault} if fault else {}))
    block = [b"line 1", b"line 2", b"line 3"]
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer)
        deliver(peer, session, 1, *block)
        if fault:
            peer.send(encode(Data.of(4, 3, b"".join(line + b"\n" for line in block)), session))
            assert child.wait(PATIENCE) == -signal.SIGKILL
    kill(child)
    before = path.read_bytes()
    options = ("--state", tmp_path / "another") if state else ()
    with ended_receiver("--to", path, *options) as (peer, session):
        deliver(peer, session, 1, *block)  # the very bytes that the first was about to write
    assert look(receiver(), endpoint).startswith(b"zmqpull: kept the last ")

    assert path.read_bytes() == before + b"".join(line + b"\n" for line in block)
    assert look(receiver(), endpoint) == b""


def test_a_file_that_got_the_inode_of_a_deleted_one_is_not_cut(receiver, endpoint, path):
    leave_uncommitted(receiver, endpoint)
    inode = path.stat().st_ino
    path.unlink()
    new = COMMITTED.replace(b"1", b"x") + TAIL
    for name in range(1000):
        path.write_bytes(new)
        if path.stat().st_ino == inode:
            break
        path.rename(path.with_name(f"{name}"))
    else:
        pytest.skip("this file system does not use inodes again")

    assert look(receiver(), endpoint).decode() == MOVED.format(path, len(TAIL))
    assert path.read_bytes() == new


@pytest.mark.parametrize("journal", ["gone", "zeros", "torn"])
def test_after_a_power_cut_what_nothing_proves_is_kept(receiver, endpoint, path, tmp_path, journal):
    leave_uncommitted(receiver, endpoint)
    for name in ("journal.0", "journal.1"):
        file = tmp_path / "state" / name
        size = file.stat().st_size
        content = {"gone": b"", "zeros": bytes(size), "torn": file.read_bytes()[: size // 2]}
        file.write_bytes(content[journal])

    assert look(receiver(), endpoint).decode() == KEPT.format(len(TAIL), path)
    assert path.read_bytes() == COMMITTED + TAIL


def test_a_mark_of_an_earlier_version_proves_nothing(receiver, endpoint, path, tmp_path):
    leave_uncommitted(receiver, endpoint)
    mark = f"{path.stat().st_ino} {len(COMMITTED)}"
    change(tmp_path / "state", "UPDATE marks SET value = ?", (mark,))
    for name in ("journal.0", "journal.1"):
        (tmp_path / "state" / name).unlink()
    child = receiver()
    with bare(zmq.DEALER, endpoint) as peer:
        welcome, session = greet(peer)
        deliver(peer, session, 3, b"3")
    assert welcome["acked"] == 2
    assert end(child).decode() == KEPT.format(len(TAIL), path)
    assert path.read_bytes() == COMMITTED + TAIL + b"3\n"


@pytest.mark.parametrize("kind", ["swapped", "copied"])
def test_the_state_of_another_receiver_cuts_nothing(start, endpoint, tmp_path, kind):
    """Two states swapped by mistake; or one copied to where a file of the same name is."""
    for name in ("a", "b"):

        def receive(*args, name=name, **kwargs):
            options = ("-a", endpoint, "--state", tmp_path / name, "--to", tmp_path / f"to-{name}")
            return start(ZMQPULL, *options, *args, **kwargs)

        leave_uncommitted(receive, endpoint)
    a, b = tmp_path / "to-a", tmp_path / "to-b"
    if kind == "copied":
        content = a.read_bytes() + b"more\n"
        a.unlink()
        a.write_bytes(content)
    (tmp_path / "a").rename(tmp_path / "c")
    (tmp_path / "b").rename(tmp_path / "a")
    (tmp_path / "c").rename(tmp_path / "b")
    options = ("-a", endpoint, "--state", tmp_path / "b", "--to", tmp_path / "to-c")
    look(start(ZMQPULL, *options), endpoint)

    assert b.read_bytes() == COMMITTED + TAIL
    # It knows its file by its path, whatever it is to write now.
    assert a.read_bytes() == (content if kind == "copied" else COMMITTED)


# The file system keeps no attributes, or no locks.
NO_ATTRIBUTES = """
import errno
def refuse(*args):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
os.setxattr = os.getxattr = refuse
"""
NO_LOCKS = """
import errno, fcntl
flock = fcntl.flock
def refuse(fd, operation):
    if os.readlink(f"/proc/self/fd/{fd}").endswith("/all"):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    flock(fd, operation)
fcntl.flock = refuse
"""


@pytest.mark.parametrize("lacking", [NO_ATTRIBUTES, NO_LOCKS], ids=["attributes", "locks"])
def test_where_the_file_system_can_do_less_a_kill_repeats_nothing_either(
    start, endpoint, tmp_path, path, lacking
):
    def receive(**kwargs):
        options = ("-a", endpoint, "--state", tmp_path / "state", "--to", path)
        return start(*patched("zmqpull", lacking), *options, **kwargs)

    path.parent.mkdir()
    leave_uncommitted(receive, endpoint)
    told = look(receive(), endpoint).decode()

    notice = f"zmqpull: {path} cannot be locked where it is\n" if lacking == NO_LOCKS else ""
    assert told == CUT.format(len(TAIL), path) + notice
    assert path.read_bytes() == COMMITTED


def test_a_file_in_use_is_refused_by_its_name(receiver, start, endpoint, path, tmp_path):
    child = receiver()
    with bare(zmq.DEALER, endpoint) as peer:
        deliver(peer, greet(peer)[1], 1, b"1")
    for options in ((), ("--state", tmp_path / "another")):
        second = start(ZMQPULL, "-a", f"ipc://{tmp_path}/second", "--to", path, *options)
        told = f"zmqpull: {path} is in use by process {child.pid}: each receiver needs files "
        assert finish(second) == (73, b"", f"{told}of its own\n".encode())
    kill(child)
    with ended_receiver("--to", path):
        pass


def test_a_file_that_a_label_names_and_another_receiver_uses_is_waited_for(
    receiver, start, endpoint, path, tmp_path
):
    child = receiver()
    with bare(zmq.DEALER, endpoint) as peer:
        greet(peer)
        second = start(ZMQPULL, "-a", f"ipc://{tmp_path}/second", "--to", path.parent / "{type}")
        shipping = start(
            ZMQPUSH, "-q", "--ack", "-c", f"ipc://{tmp_path}/second", "--format", "raw", "all"
        )
        shipping.stdin.write(b"one\n")
        shipping.stdin.close()
        shipping.stdin = None
        assert b"is in use by process" in second.stderr.readline()
    kill(child)
    assert shipping.wait(PATIENCE) == 0
    assert path.read_bytes() == b'{"message":"one"}\n'


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

    assert look(receiver(), endpoint) == b""
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
    ages = {SECRET: 0, "1" * 32: 29 * day, "2" * 32: 31 * day}
    child = receiver()
    with bare(zmq.DEALER, endpoint) as peer:
        for secret in ages:
            deliver(peer, greet(peer, secret)[1], 1, b"1")
    kill(child)
    for secret, age in ages.items():
        seen = (int(time.time()) - age, public_name(secret))
        change(tmp_path / "state", "UPDATE streams SET seen = ? WHERE stream = ?", seen)
    receiver()
    with bare(zmq.DEALER, endpoint) as peer:
        acked = [greet(peer, secret)[0]["acked"] for secret in ages]

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
    child = start(ZMQPULL, "-a", endpoint, "--to", tmp_path / "all", "--state", directory)

    assert finish(child) == (code, b"", f"zmqpull: {line.format(directory)}\n".encode())


def given_away(directory):
    os.chown(directory, 12345, -1)
    return directory, "belongs to somebody else: chown it (uid 12345), or use another"


def writable_by_the_group(directory):
    directory.chmod(0o770)
    return directory, f"can be written by others: chmod go-w {directory}"


def writable_by_all_and_sticky(directory):
    directory.chmod(0o1777)
    return directory, f"can be written by others: chmod go-w {directory}"


def with_a_foreign_database(directory):
    os.chown(directory / "state.db", 12345, -1)
    path = directory / "state.db"
    return path, "belongs to somebody else: chown it (uid 12345), or use another"


def with_a_database_that_others_write(directory):
    path = directory / "state.db"
    path.chmod(0o622)
    return path, f"can be written by others: chmod go-w {path}"


def with_a_foreign_link(directory):
    path = directory / "dead-letters.ndjson"
    path.symlink_to("/etc/passwd")
    os.chown(path, 12345, -1, follow_symlinks=False)
    return path, "belongs to somebody else: chown it (uid 12345), or use another"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize(
    "trouble",
    [
        given_away,
        writable_by_the_group,
        writable_by_all_and_sticky,
        with_a_foreign_database,
        with_a_database_that_others_write,
        with_a_foreign_link,
    ],
)
@pytest.mark.parametrize("is_link", [False, True])
def test_a_state_that_others_could_have_written_is_refused(
    receiver, endpoint, tmp_path, path, trouble, is_link
):
    """A mark in it would say which file of a victim is cut, and where."""
    leave_uncommitted(receiver, endpoint)
    directory = tmp_path / "state"
    if is_link:
        directory.rename(tmp_path / "elsewhere")
        directory.symlink_to(tmp_path / "elsewhere")
        where, reason = trouble(tmp_path / "elsewhere")
        where = where if where == tmp_path / "elsewhere" else directory / where.name
        reason = reason.replace(f"{tmp_path}/elsewhere/", f"{directory}/")
    else:
        where, reason = trouble(directory)

    line = f"zmqpull: the state {directory} is not safe: {where} {reason}\n"
    assert finish(receiver()) == (78, b"", line.encode())
    assert path.read_bytes() == COMMITTED + TAIL


@pytest.mark.parametrize("name", ["lock", "state.db", "journal.0"])
def test_a_link_in_a_state_is_not_followed(receiver, tmp_path, name):
    directory = tmp_path / "state"
    directory.mkdir(0o700)
    (directory / name).symlink_to(tmp_path / "victim")
    code, _, err = finish(receiver())

    assert (code, err.count(b"\n")) == (74, 1)
    assert b"Too many levels of symbolic links" in err
    assert not (tmp_path / "victim").exists()


def test_a_state_in_use_is_told_in_one_line(receiver, start, endpoint, tmp_path):
    receiver()
    with bare(zmq.DEALER, endpoint) as peer:
        greet(peer)
    directory = tmp_path / "state"
    other = ("-a", f"ipc://{tmp_path}/second", "--to", tmp_path / "second.ndjson")
    second = start(ZMQPULL, *other, "--state", directory)

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

    assert look(receiver(), endpoint) == b""
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
