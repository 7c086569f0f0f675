"""Where zmqpull writes: files by label and time, many of them, rotated, on full disks."""

import asyncio
import errno
import json
import os
import re
import resource
import select
import shutil
import signal
import time
from collections import Counter, defaultdict

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

import test_pull
from chaos import patched
from helpers import PATIENCE, ZMQPULL, ZMQPUSH, push, sent, wait_until
from peers import bare, deliver, greet
from test_pull import FULL, finish
from zmqpush.core.protocol.messages import Data, encode
from zmqpush.errors import SinkError, SinkStalledError, SinkUndoneError
from zmqpush.runtime.reporting import Reporter
from zmqpush.sinks.base import Batch, Context
from zmqpush.sinks.files.journal import Mark
from zmqpush.sinks.files.sink import FileSink

endpoint, sender, small_disk = test_pull.endpoint, test_pull.sender, test_pull.small_disk

LABELS = {
    "nginx": "nginx",
    "": "unknown",
    ".": "_",
    "..": "_.",
    "../../etc/cron.d/x": "_._.._etc_cron.d_x",
    "/etc/passwd": "_etc_passwd",
    ".hidden": "_hidden",
    "a\0b\nc\x7fd\x1b[2J": "a_b_c_d_[2J",
    "\ud800": "_",
    "%Y{host}": "%Y{host}",
    "Müller 日本": "Müller 日本",
    "ü" * 256: "ü" * 100,
}


def record(**values):
    return json.dumps(values).encode()


def files(directory):
    """Return the content of each file below a directory, by its name there."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def test_plain_records_name_their_files_themselves_and_cannot_leave_the_directory(
    start, endpoint, sender, tmp_path
):
    expected = defaultdict(list)
    for label, name in LABELS.items():
        expected[f"{name}/x-{name}%"].append(record(type=label, host=label))
    expected["unknown/x-unknown%"] += [record(type=7, host=None), record()]
    records = [each for group in expected.values() for each in group]
    to = tmp_path / "to"
    options = ("-n", 2 * len(records), "--to", to / "{host}/x-{type}%%")
    child = start(ZMQPULL, "-qb", endpoint, *options)
    push = sender()
    push.send_multipart(records)  # as one block
    for each in records:
        push.send(each)

    assert finish(child) == (0, b"", b"")
    written = {name: sorted(data.splitlines()) for name, data in files(to).items()}
    assert written == {name: sorted(group * 2) for name, group in expected.items()}
    assert {path.name for path in tmp_path.iterdir()} <= {"to", "socket"}
    assert (to / "nginx").stat().st_mode & 0o007 == 0


def file_sink(to):
    """Return a sink, and what it has remembered at once."""
    remembered = {}

    async def remember(marks):
        remembered.update(marks)

    return FileSink(to, Context(reporter=Reporter("test"), remember=remember)), remembered


@given(st.text(), st.text())
def test_no_label_leads_out_of_its_directory(tmp_path_factory, kind, host):
    directory = tmp_path_factory.mktemp("to")
    sink, _ = file_sink(f"{directory}/{{host}}/{{type}}")
    asyncio.run(sink.write([Batch(b"1\n", 1, {"type": kind, "host": host})]))
    ((name, content),) = files(directory).items()

    assert (name.count("/"), content) == (1, b"1\n")
    assert not any(c < " " for c in name)


@pytest.mark.parametrize("label", LABELS)
def test_an_acknowledged_sender_names_the_file_of_all_its_records(start, endpoint, tmp_path, label):
    to = tmp_path / "to"
    start(ZMQPULL, "-qa", endpoint, "--to", to / "%Y/{type}-{host}")
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer, type=label, host="a/b")
        deliver(peer, session, 1, b"not even JSON", record(type="another", host="c"))

    name = f"{time.strftime('%Y')}/{LABELS[label]}-a_b"
    assert files(to) == {name: b'not even JSON\n{"type": "another", "host": "c"}\n'}


def test_zmqpush_names_its_type_and_host(start, endpoint, tmp_path):
    start(ZMQPULL, "-qa", endpoint, "--to", tmp_path / "{host}/{type}")
    done = push("--ack", "-c", endpoint, "--format", "raw", "web/1", data=b'{"n":1}\n{"n":2}')

    assert (done.returncode, sent(done), done.stderr) == (0, 2, b"")
    assert (tmp_path / os.uname().nodename / "web_1").read_bytes() == b'{"n":1}\n{"n":2}\n'


def few_descriptors():
    resource.setrlimit(resource.RLIMIT_NOFILE, (340, 340))


def send_acknowledged(peer, names):
    for first in (1, 2):
        for number, name in enumerate(names):
            _, session = greet(peer, f"{number:032x}", type=name, host="", first=first)
            deliver(peer, session, first, record(type=name))


def send_plain(peer, names):
    for name in names * 2:
        peer.send(record(type=name))
        time.sleep(0.001)  # so that they are no single block


def send_two_blocks(peer, names):
    peer.send(b"\n".join(record(type=name) for name in names * 2))


@pytest.mark.parametrize(
    ("kind", "bind", "send"),
    [
        (zmq.DEALER, "-a", send_acknowledged),
        (zmq.PUSH, "-b", send_plain),
        (zmq.PUSH, "-b", send_two_blocks),
    ],
)
def test_files_beyond_256_are_closed_and_opened_again(start, endpoint, tmp_path, kind, bind, send):
    names = [f"t{number}" for number in range(400)]
    args = ("-n", 800, bind, endpoint, "--to", tmp_path / "to/{type}")
    child = start(ZMQPULL, *args, preexec_fn=few_descriptors)
    with bare(kind, endpoint) as peer:
        send(peer, names)
        assert finish(child) == (0, b"", b"zmqpull: 800 records written\n")

    assert files(tmp_path / "to") == {name: (record(type=name) + b"\n") * 2 for name in names}


def lengths(marks):
    """Return the inodes and the lengths that marks name."""
    parsed = {path: mark and Mark.parse(mark) for path, mark in marks.items()}
    return {path: mark and (mark.inode, mark.length) for path, mark in parsed.items()}


def test_a_file_that_is_idle_is_closed_when_it_is_safe_and_opened_again(tmp_path, monkeypatch):
    monkeypatch.setattr("zmqpush.sinks.files.sink._IDLE_INTERVAL", 0.0)
    sink, remembered = file_sink(f"{tmp_path}/{{type}}")
    path = tmp_path / "a"

    async def write():
        await sink.write([Batch(b"1\n", 1, {"type": "a"})])
        return [(await sink.sync()).marks for _ in range(3)]

    for length in (0, 2):
        marks = asyncio.run(write())
        inode = path.stat().st_ino
        assert lengths(remembered) == {str(path): (inode, length)}
        assert [lengths(each) for each in marks] == [
            {str(path): (inode, length + 2)},
            {str(path): None},
            {},
        ]


def test_a_file_that_is_closed_to_make_room_is_remembered_until_all_of_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("zmqpush.sinks.files.sink._MAX_OPEN", 1)
    sink, remembered = file_sink(f"{tmp_path}/{{type}}")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")

    async def write(*names):
        await sink.write([Batch(b"1\n", 1, {"type": name}) for name in names])
        before = dict(remembered)
        remembered.clear()
        return [mark and mark.split()[1] for mark in before.values()], (await sink.sync()).marks

    def lengths(marks):
        return {path: mark and int(mark.split()[1]) for path, mark in marks.items()}

    # Opened again before what it holds is acknowledged: the older mark must stay.
    opened, marks = asyncio.run(write("a", "b", "a"))
    assert (opened, lengths(marks)) == (["0", "0"], {a: 4, b: 2})
    # The same when it is closed and opened by the same call as the first of another file.
    opened, marks = asyncio.run(write("b"))
    assert (opened, lengths(marks)) == ([], {a: None, b: 4})
    opened, marks = asyncio.run(write("a"))
    assert (opened, lengths(marks)) == (["4"], {a: 6, b: None})


def test_a_file_opened_again_while_it_is_being_forgotten_is_not_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr("zmqpush.sinks.files.sink._MAX_OPEN", 1)
    sink, remembered = file_sink(f"{tmp_path}/{{type}}")

    async def write():
        await sink.write([Batch(b"1\n", 1, {"type": "a"})])
        await sink.sync()
        await sink.write([Batch(b"1\n", 1, {"type": "b"})])  # closes a, which is clean
        syncing = asyncio.create_task(sink.sync())
        await asyncio.sleep(0)
        remembered.clear()
        await sink.write([Batch(b"1\n", 1, {"type": "a"})])
        return await syncing

    synced = asyncio.run(write())

    assert [*remembered] == [str(tmp_path / "a")]
    assert [*synced.marks] == [str(tmp_path / "b")]


def failing(monkeypatch, name, error, at):
    """Let one call of a system call fail, counted from now."""
    real, left = getattr(os, name), iter(range(1, 1000))

    def call(fd, *args):
        if next(left) == at:
            raise OSError(error, os.strerror(error))
        return real(fd, *args)

    monkeypatch.setattr(os, name, call)


def acked(text, seq=1):
    return Batch(text + b"\n", 1, {"type": text[:1].decode()}, "stream", seq)


def test_a_sync_without_room_writes_nothing_twice_that_another_sync_had_made_safe(
    tmp_path, monkeypatch
):
    """The file was closed to make room for others, and synced for that."""
    monkeypatch.setattr("zmqpush.sinks.files.sink._MAX_OPEN", 2)
    sink, _ = file_sink(f"{tmp_path}/{{type}}")

    async def write():
        await sink.write([acked(b"a1", 1), acked(b"b1", 2), acked(b"c1", 3)])
        failing(monkeypatch, "fdatasync", errno.ENOSPC, 1)
        with pytest.raises(SinkUndoneError):
            await sink.sync()
        await sink.write(())
        await sink.sync()

    asyncio.run(write())

    assert [(tmp_path / name).read_bytes() for name in "abc"] == [b"a1\n", b"b1\n", b"c1\n"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_file_that_cannot_be_synced_is_not_closed_as_if_it_were_safe(
    tmp_path, monkeypatch, error
):
    monkeypatch.setattr("zmqpush.sinks.files.sink._MAX_OPEN", 2)
    sink, _ = file_sink(f"{tmp_path}/{{type}}")

    async def write():
        await sink.write([acked(b"a1", 1), acked(b"b1", 2)])
        failing(monkeypatch, "fdatasync", error, 1)
        more = [acked(b"c1", 3)]
        with pytest.raises(SinkError) as failed:
            await sink.write(more)
        assert isinstance(failed.value, SinkStalledError) == (error == errno.ENOSPC)
        if error == errno.ENOSPC:
            await sink.write(more)
            await sink.sync()

    asyncio.run(write())

    assert (tmp_path / "a").read_bytes() == b"a1\n"
    assert error == errno.EIO or (tmp_path / "c").read_bytes() == b"c1\n"


def test_a_write_that_stalls_while_a_sync_fails_is_repeated_from_its_beginning(
    tmp_path, monkeypatch
):
    """Neither is the acknowledged record lost, nor the plain one torn."""
    sink, _ = file_sink(str(tmp_path / "all"))
    real = os.write
    short = iter([5])

    def write_a_part(fd, data):
        if (most := next(short, None)) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, bytes(data)[:most])

    plain = [Batch(b"plain\n" * 3, 3, {})]

    async def write():
        await sink.write([acked(b"a1")])
        with monkeypatch.context() as full:
            full.setattr(os, "write", write_a_part)
            with pytest.raises(SinkStalledError):
                await sink.write(plain)
        failing(monkeypatch, "fdatasync", errno.ENOSPC, 1)
        with pytest.raises(SinkUndoneError):
            await sink.sync()
        await sink.write(plain)
        await sink.sync()

    asyncio.run(write())

    assert sorted((tmp_path / "all").read_bytes().split()) == [b"a1", *[b"plain"] * 3]


def of_streams(*texts):
    """Return a batch of each text, by the stream that its second letter names."""
    numbers = Counter()
    batches = []
    for text in texts:
        stream = text[1:2].decode()
        numbers[stream] += 1
        labels = {"type": text[:1].decode()}
        batches.append(Batch(text + b"\n", 1, labels, stream, numbers[stream]))
    return batches


@pytest.mark.parametrize(("most", "writes"), [(1 << 16, 2), (10, 4), (1, 7)])
def test_what_many_senders_have_for_a_file_is_written_at_once(tmp_path, monkeypatch, most, writes):
    monkeypatch.setattr("zmqpush.sinks.files.sink._PIECE_BYTES", most)
    sink, _ = file_sink(f"{tmp_path}/{{type}}")
    real, written = os.write, []

    def write(fd, data):
        written.append(bytes(data))
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    asyncio.run(sink.write(of_streams(b"ax1", b"ay1", b"bz1", b"ax2", b"ay2", b"bz2", b"ax3")))

    assert len(written) == writes
    assert (tmp_path / "a").read_bytes() == b"ax1\nay1\nax2\nay2\nax3\n"
    assert (tmp_path / "b").read_bytes() == b"bz1\nbz2\n"


def test_what_is_written_at_once_goes_on_where_the_disk_was_full(tmp_path, monkeypatch):
    sink, _ = file_sink(str(tmp_path / "all"))
    batches = of_streams(b"ax1", b"ay1", b"az1", b"ax2")
    real, left = os.write, iter([6])

    def write_a_part(fd, data):
        if (most := next(left, None)) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, bytes(data)[:most])

    async def write():
        with monkeypatch.context() as full:
            full.setattr(os, "write", write_a_part)
            with pytest.raises(SinkStalledError):
                await sink.write(batches)
        assert sink.unwritten == 3  # one of them in part
        await sink.write(batches)
        assert sink.unwritten == 0
        assert (await sink.sync()).deferred == []

    asyncio.run(write())

    assert (tmp_path / "all").read_bytes() == b"ax1\nay1\naz1\nax2\n"


def test_what_one_sender_has_to_keep_does_not_keep_others_for_the_same_file(tmp_path):
    """Nothing that follows on it is written before it, though its file could take it."""
    (tmp_path / "a").mkdir()
    sink, _ = file_sink(f"{tmp_path}/{{type}}")
    first, *others = of_streams(b"ax1", b"by1", b"bx2", b"bz1", b"bx3", b"by2")

    async def write():
        await sink.write([first])
        await sink.write(others)
        (deferral,) = (await sink.sync()).deferred
        assert deferral[:3] == ("x", 1, 3)

    asyncio.run(write())

    assert (tmp_path / "b").read_bytes() == b"by1\nbz1\nby2\n"


@pytest.mark.parametrize("acked", [False, True])
def test_what_is_not_written_does_not_count_for_the_end(start, endpoint, tmp_path, acked):
    """With --count: records whose file cannot be opened are still to come."""
    (tmp_path / "to" / "bad").mkdir(parents=True)
    kind, mode = ("-a", "--ack") if acked else ("-b", "--quiet")
    child = start(ZMQPULL, kind, endpoint, "--count", "3", "--to", tmp_path / "to" / "{type}")
    bad = push(mode, "-c", endpoint, "--timeout", "1", "bad", data=b"1\n2\n3\n")
    assert bad.returncode == (69 if acked else 0)
    assert b"/bad: " in child.stderr.readline()
    assert push(mode, "-c", endpoint, "good", data=b"1\n2\n3\n").returncode == 0

    child.wait(PATIENCE)
    assert (tmp_path / "to" / "good").read_bytes().count(b"\n") == 3


def test_a_state_that_is_removed_ends_the_receiver(start, endpoint, tmp_path):
    state = tmp_path / "state"
    child = start(ZMQPULL, "-qa", endpoint, "--state", state, "--to", tmp_path / "all")
    assert push("--ack", "-c", endpoint, data=b"1\n").returncode == 0
    shutil.rmtree(state)
    refused = push("--ack", "-c", endpoint, "--timeout", "1", data=b"2\n")

    code, _, err = finish(child)
    assert (code, refused.returncode) == (74, 69)
    assert b"was removed while it was in use" in err


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("name", ["{type}-%Y", "all"])
def test_a_rotation_loses_nothing(start, endpoint, tmp_path, name, state):
    path = tmp_path / name.replace("{type}-%Y", f"web-{time.strftime('%Y')}")
    old = tmp_path / "old"
    options = ("--state", tmp_path / "state") if state else ()
    child = start(ZMQPULL, "-a", endpoint, "--to", tmp_path / name, *options)
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer, type="web", host="")
        deliver(peer, session, 1, b"1")
        path.rename(old)
        deliver(peer, session, 2, b"2")
        child.send_signal(signal.SIGHUP)
        if name == "all":
            wait_until(path.exists)
        else:
            assert b"records written" in child.stderr.readline()
            assert not path.exists()  # until there is something for it
        deliver(peer, session, 3, b"3")

    assert (old.read_bytes(), path.read_bytes()) == (b"1\n2\n", b"3\n")


def test_a_rotation_that_fails_goes_on_with_the_old_file(start, endpoint, tmp_path):
    path = tmp_path / "logs" / "all"
    path.parent.mkdir()
    child = start(ZMQPULL, "-qa", endpoint, "--to", path)
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer)
        deliver(peer, session, 1, b"1")
        path.parent.rename(tmp_path / "moved")
        child.send_signal(signal.SIGHUP)
        wait_until(lambda: b"still writing to the old file" in child.stderr.readline())
        peer.send(encode(Data.of(2, 1, b"2\n"), session))
        wait_until(lambda: peer.poll(10) or child.poll() is not None)

    assert child.poll() is None
    assert (tmp_path / "moved" / "all").read_bytes() == b"1\n2\n"


@pytest.mark.parametrize(
    "template", ["{pid}", "{", "}", "{type", "{}", "%", "a%!", "%D", "{type}/%\n"]
)
def test_an_unreadable_template_is_told(start, template):
    code, out, err = finish(start(ZMQPULL, "--to", template))

    assert (code, out) == (2, b"")
    assert b"is not a template for file names: " in err
    assert b"; a good one is /var/log/all/" in err


@pytest.mark.parametrize("template", ["x/{type}", "x/%Y/all"])
def test_a_directory_that_cannot_be_made_is_told_at_the_start(start, tmp_path, template):
    (tmp_path / "file").touch()
    code, out, err = finish(start(ZMQPULL, "-q", "--to", tmp_path / "file" / template))

    line = f"zmqpull: cannot make the directory {tmp_path}/file/x: Not a directory\n"
    assert (code, out, err.decode()) == (74, b"", line)


def test_unacknowledged_records_that_were_not_written_are_not_lost(start, endpoint):
    child = start(ZMQPULL, "-a", endpoint, "--to", "/dev/full", "--grace", "0.2")
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer)
        peer.send(encode(Data.of(1, 1, b"1\n"), session))
        assert child.stderr.readline() == FULL % b"/dev/full"
        child.terminate()
        code, _, err = finish(child)

    assert (code, err) == (74, b"zmqpull: 0 records written\n")


def test_a_full_disk_is_waited_for_while_the_sender_waits_for_its_ack(
    small_disk, start, endpoint, tmp_path_factory
):
    path, ballast = small_disk / "to" / "web", small_disk / "ballast"
    ballast.write_bytes(bytes(960 << 10))
    child = start(ZMQPULL, "-a", endpoint, "--to", small_disk / "to/{type}")
    lines = b"".join(b'{"n":"%099d"}\n' % number for number in range(3000))
    shipping = start(ZMQPUSH, "--ack", "--format", "raw", "-c", endpoint, "web")
    shipping.stdin.write(lines)
    shipping.stdin.close()
    assert child.stderr.readline() == FULL % bytes(path)
    ballast.unlink()

    assert (shipping.wait(PATIENCE), path.read_bytes()) == (0, lines)
    assert re.fullmatch(rb"zmqpull: writing to .*/\{type\} again \(.*\)\n", child.stderr.readline())


HOSTILE = {
    "a carriage return between values": b'{"type":"a",\r"n":1}',
    "names that are too long together": record(type="a" * 250, host="b" * 250),
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=list(HOSTILE))
def test_no_record_of_a_sender_ends_the_receiver(start, endpoint, sender, tmp_path, hostile):
    child = start(ZMQPULL, "-qb", endpoint, "-n", "2", "--to", tmp_path / "to/{host}-{type}")
    push = sender()
    push.send(hostile)
    push.send(record(type="last"))

    assert finish(child) == (0, b"", b"")
    assert record(type="last") + b"\n" in files(tmp_path / "to").values()


TORN = (
    b"%s ends within a line: 6 bytes of it are kept, and what follows begins on a line of its own"
)


@pytest.mark.parametrize("kind", ["plain", "acked", "with a state"])
@pytest.mark.parametrize("name", ["all", "{type}"])
def test_what_is_appended_begins_on_a_line_of_its_own(start, endpoint, tmp_path, kind, name):
    path = tmp_path / "to" / "all"
    path.parent.mkdir()
    path.write_bytes(b'1\n{"half')
    options = ("-b" if kind == "plain" else "-a", endpoint, "--to", path.parent / name)
    if kind == "with a state":
        options += ("--state", tmp_path / "state")
    child = start(ZMQPULL, *options)
    mode = () if kind == "plain" else ("--ack",)
    done = push(*mode, "-c", endpoint, "--format", "raw", "all", data=b'{"type":"all"}\n')
    assert sent(done) == 1
    wait_until(lambda: path.read_bytes().endswith(b"}\n"))

    assert path.read_bytes() == b'1\n{"half\n{"type":"all"}\n'
    assert child.stderr.readline() == b"zmqpull: %s\n" % (TORN % bytes(path))


def test_a_torn_line_in_what_sighup_opens_is_ended_too(start, endpoint, tmp_path):
    path = tmp_path / "all"
    child = start(ZMQPULL, "-qa", endpoint, "--to", path)
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer)
        deliver(peer, session, 1, b"1")
        path.rename(tmp_path / "old")
        path.write_bytes(b'{"half')
        child.send_signal(signal.SIGHUP)
        assert child.stderr.readline() == b"zmqpull: %s\n" % (TORN % bytes(path))
        deliver(peer, session, 2, b"2")

    assert path.read_bytes() == b'{"half\n2\n'


@pytest.mark.parametrize("state", [False, True])
def test_a_line_that_a_full_disk_has_torn_swallows_no_other(small_disk, start, endpoint, state):
    path, ballast = small_disk / "all", small_disk / "ballast"
    options = ("-a", endpoint, "--to", path)
    if state:
        options += ("--state", small_disk / "state")
    child = start(ZMQPULL, "-q", *options)
    lines = [b'{"n":"%091d"}' % number for number in range(3000)]
    shipping = start(ZMQPUSH, "-q", "--ack", "--format", "raw", "-c", endpoint)
    shipping.stdin.write(lines[0] + b"\n")
    shipping.stdin.flush()
    wait_until(lambda: path.exists() and path.stat().st_size)
    ballast.write_bytes(bytes(800 << 10))
    shipping.stdin.write(b"\n".join([*lines[1:], b""]))
    shipping.stdin.close()
    shipping.stdin = None
    assert b"No space left on device" in child.stderr.readline()
    child.kill()
    child.wait(PATIENCE)
    assert not path.read_bytes().endswith(b"\n")
    ballast.unlink()
    start(ZMQPULL, *options)
    assert shipping.wait(PATIENCE) == 0

    written = path.read_bytes().splitlines()
    whole = [line for line in written if len(line) == 99]
    assert set(whole) == set(lines)
    assert len(written) - len(whole) == (0 if state else 1)
    assert not state or written == lines


@pytest.mark.parametrize("hang_up", [False, True])
@pytest.mark.parametrize("name", ["all", "{type}"])
def test_nothing_is_acknowledged_that_is_in_a_deleted_file(
    start, endpoint, tmp_path, name, hang_up
):
    """The directory is removed: made anew where it was made, else waited for."""
    path = tmp_path / "logs" / "all"
    path.parent.mkdir()
    state = ("--state", tmp_path / "state")
    child = start(ZMQPULL, "-qa", endpoint, "--to", path.parent / name, *state)
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer, type="all")
        deliver(peer, session, 1, b"1")
        shutil.rmtree(path.parent)
        if hang_up:
            child.send_signal(signal.SIGHUP)
        peer.send(encode(Data.of(2, 1, b"2\n"), session))
        told = child.stderr.readline()
        assert told == b"zmqpull: %s was deleted: making it anew\n" % bytes(path)
        if name == "all":
            told = child.stderr.readline()
            line = b"zmqpull: cannot open %s: No such file or directory: its records wait"
            assert told.startswith(line % bytes(path))
            path.parent.mkdir()
        shipped = push("--ack", "-c", endpoint, "--format", "raw", "all", data=b"3\n")
        assert sent(shipped) == 1
        wait_until(lambda: path.read_bytes().count(b"\n") > (name == "{type}"))

    assert child.poll() is None
    records = sorted(path.read_bytes().splitlines())
    assert records == ([b"2"] if name == "{type}" else []) + [b'{"message":"3"}']


def test_a_file_that_an_administrator_deletes_is_made_anew(start, endpoint, tmp_path):
    path = tmp_path / "all"
    start(ZMQPULL, "-qa", endpoint, "--to", path)
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer)
        deliver(peer, session, 1, b"1")
        path.unlink()
        deliver(peer, session, 2, b"2")
        assert path.read_bytes() == b"2\n"
        path.rename(tmp_path / "renamed")
        deliver(peer, session, 3, b"3")

    assert (tmp_path / "renamed").read_bytes() == b"2\n3\n"
    assert not path.exists()


# The file is deleted, once, when the second record has just been written to it.
DELETING = """
write, left = os.write, [{path!r}]
def deleting(fd, data):
    done = write(fd, data)
    if bytes(data) == b"2\\n" and left:
        os.unlink(left.pop())
    return done
os.write = deleting
"""


@pytest.mark.parametrize("state", [False, True])
def test_what_is_deleted_between_its_write_and_its_sync_is_written_again(
    start, endpoint, tmp_path, state
):
    path = tmp_path / "all"
    options = ("--state", tmp_path / "state") if state else ()
    command = patched("zmqpull", DELETING.format(path=str(path)))
    child = start(*command, "-qa", endpoint, "--to", path, *options)
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer)
        deliver(peer, session, 1, b"1")
        deliver(peer, session, 2, b"2")
        deliver(peer, session, 3, b"3")

    assert child.poll() is None
    assert path.read_bytes() == b"2\n3\n"


def test_plain_records_do_not_go_on_into_a_deleted_file(start, endpoint, tmp_path):
    path = tmp_path / "logs" / "all"
    path.parent.mkdir()
    child = start(ZMQPULL, "-qb", endpoint, "--to", path)
    with bare(zmq.PUSH, endpoint) as peer:
        peer.send(record(n=0))
        wait_until(lambda: path.exists() and path.stat().st_size)
        shutil.rmtree(path.parent)

        def told():
            peer.send(record(n=1))
            return bool(select.select([child.stderr], [], [], 0.05)[0])

        wait_until(told)
        assert child.stderr.readline().endswith(b"was deleted: making it anew\n")
        assert b"its records wait" in child.stderr.readline()
        path.parent.mkdir()
        peer.send(record(n=2))
        wait_until(lambda: path.exists() and path.read_bytes().endswith(record(n=2) + b"\n"))
