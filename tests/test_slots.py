"""Who uses which slot of a spool, and what its status says."""

import errno
import fcntl
import os
import re
import stat
import sys

import pytest

from spools import open_spool, put, sync
from zmqpush.errors import (
    EXIT_BUSY,
    EXIT_CONFIG,
    SpoolBusyError,
    SpoolError,
    SpoolForeignError,
    SpoolFullError,
)
from zmqpush.spool import slots as slots_module
from zmqpush.spool.slots import status_of, take_slot

HOLD = "import sys; from pathlib import Path; from zmqpush.spool.slots import take_slot\n"
HOLD += "print(take_slot(Path(sys.argv[1]), int(sys.argv[2])).name, flush=True); sys.stdin.read()"


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "spool"


@pytest.fixture
def hold(start, directory):
    """Return a function that has another process take a slot, and returns both."""

    def taking(slots):
        child = start(sys.executable, "-c", HOLD, directory, slots)
        return child, child.stdout.readline().decode().strip()

    return taking


@pytest.fixture
def take(directory):
    """Return a function that takes a slot; what it locked is free again at the end."""
    before = set(os.listdir("/proc/self/fd"))
    yield lambda slots=1: take_slot(directory, slots).name
    for fd in set(os.listdir("/proc/self/fd")) - before:
        try:
            if os.readlink(f"/proc/self/fd/{fd}").endswith("/lock"):
                os.close(int(fd))
        except FileNotFoundError:
            pass


def leave(directory, number, records):
    """Leave so many records in a slot."""
    directory.mkdir(exist_ok=True)
    spool = open_spool(directory / str(number))
    put(spool, *range(1, records + 1))
    sync(spool)
    if not records:
        put(spool, 1)
        sync(spool)
        spool.acknowledge(1)
    spool.close()


def test_a_new_spool_is_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        slot = take_slot(tmp_path / "var" / "spool", 1)
    finally:
        os.umask(before)

    assert slot == tmp_path / "var" / "spool" / "0"
    for path in (slot, slot.parent, slot.parent.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((slot / "lock").stat().st_mode) == 0o600


def test_new_directories_are_synced_in_those_above(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    take_slot(tmp_path / "var" / "spool", 1)

    assert synced == [str(path) for path in (tmp_path, tmp_path / "var", tmp_path / "var/spool")]


def test_a_directory_that_could_not_be_synced_is_made_and_synced_again(tmp_path, monkeypatch):
    def fail(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SpoolFullError):
        take_slot(tmp_path / "var" / "spool", 1)

    test_new_directories_are_synced_in_those_above(tmp_path, monkeypatch)


def test_two_processes_share_a_spool_only_if_it_has_two_slots(hold, directory):
    first, name = hold(1)
    assert name == "0"
    with pytest.raises(SpoolBusyError, match=f"in use by process {first.pid}: give") as told:
        take_slot(directory, 1)
    assert told.value.exit_code == EXIT_BUSY
    assert str(told.value).endswith(" a --spool of its own, or --spool-slots 2 to each")

    second, name = hold(2)
    assert name == "1"
    with pytest.raises(SpoolBusyError, match=f"by process {first.pid}, {second.pid}: .* 3 to"):
        take_slot(directory, 2)


def test_a_killed_process_leaves_its_slot_to_the_next(hold):
    first, _ = hold(1)
    first.kill()
    first.wait(60)

    assert hold(1)[1] == "0"


def test_slots_that_hold_records_come_first_also_beyond_the_limit(directory, take, hold):
    for number, records in [(0, 0), (1, 0), (2, 3), (10, 1)]:
        leave(directory, number, records)

    assert take(4) == "2"
    assert take(4) == "10"
    assert take(4) == "0"
    assert hold(4)[1] == "1"
    with pytest.raises(SpoolBusyError):
        take(4)


def test_a_free_slot_beyond_the_limit_is_not_used_if_it_is_empty(directory, take):
    leave(directory, 3, 0)

    assert take(1) == "0"
    with pytest.raises(SpoolBusyError):
        take(1)


def test_somebody_who_only_looks_does_not_make_a_slot_busy(directory, take, monkeypatch):
    leave(directory, 0, 1)
    looking = os.open(directory / "0" / "lock", os.O_RDONLY | os.O_CREAT)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(slots_module.time, "sleep", lambda seconds: os.close(looking))

    assert take(1) == "0"


def test_the_status_tells_what_is_there_also_while_it_is_used(directory, hold):
    leave(directory, 0, 12)
    leave(directory, 1, 0)
    child, name = hold(1)
    used, free = status_of(directory)

    assert name == "0"
    assert (used.records, used.acked, used.end, used.segments) == (12, 0, 12, 3)
    assert used.bytes == sum(path.stat().st_size for path in (directory / "0").glob("*.seg2"))
    assert (used.pid, free.pid) == (child.pid, None)
    assert (free.records, free.acked) == (0, 1)
    assert re.fullmatch(r"[0-9a-f]{32}", used.stream)
    assert used.stream != free.stream


def test_the_status_of_segments_that_are_removed_meanwhile(directory, monkeypatch):
    leave(directory, 0, 12)
    listed = os.listdir
    gone = sorted((directory / "0").glob("*.seg2"))

    def list_and_remove(path):
        names = listed(path)
        if str(path).endswith("/0"):
            gone[0].unlink(missing_ok=True)
        return names

    monkeypatch.setattr(os, "listdir", list_and_remove)
    (status,) = status_of(directory)
    assert (status.records, status.segments) == (8, 2)

    opened = os.open

    def remove_and_open(path, *args, **kwargs):
        if path == gone[-1]:
            path.unlink(missing_ok=True)
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", remove_and_open)
    (status,) = status_of(directory)
    assert status.segments == 2
    (status,) = status_of(directory)
    assert (status.records, status.segments) == (4, 1)


def test_looking_changes_nothing(directory):
    leave(directory, 0, 12)
    (directory / "1").mkdir()
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert [status.records for status in status_of(directory)] == [12, 0]

    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


@pytest.mark.parametrize("name", ["note", "00", "01", "-1", "1 ", "\u0661", ".hidden", "0\n"])
@pytest.mark.parametrize("taking", [True, False])
def test_a_directory_with_other_names_is_no_spool(directory, name, taking):
    (directory / name).mkdir(parents=True)

    assert_foreign(directory, taking, re.escape(f"{directory} is no spool: it holds {name!r}"))


def test_a_spool_may_be_a_file_system_of_its_own(directory):
    (directory / "lost+found").mkdir(parents=True)

    assert take_slot(directory, 1).name == "0"


def assert_foreign(directory, taking, match):
    before = sorted(directory.rglob("*"))
    with pytest.raises(SpoolForeignError, match=match) as told:
        take_slot(directory, 1) if taking else list(status_of(directory))
    assert told.value.exit_code == EXIT_CONFIG
    assert sorted(directory.rglob("*")) == before


def _link(slot):
    slot.parent.parent.joinpath("elsewhere").mkdir()
    slot.symlink_to("../elsewhere")


def _dangling_link(slot):
    slot.symlink_to("nowhere")


@pytest.mark.parametrize("make", [_link, _dangling_link, os.mkfifo, lambda slot: slot.touch()])
def test_a_slot_that_is_no_directory_is_refused(directory, make):
    directory.mkdir()
    make(directory / "0")

    assert_foreign(directory, True, "is no spool: it holds '0'")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("number", [0, 7])
def test_a_slot_that_belongs_to_somebody_else_is_refused(directory, number):
    leave(directory, number, 1)
    os.chown(directory / str(number), 12345, -1)

    assert_foreign(directory, True, f"/{number} belongs to somebody else")


def test_a_path_that_cannot_be_a_directory_is_told(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SpoolError, match=f"cannot use the spool {path}: "):
            take_slot(path, 1)


def test_a_link_to_a_spool_is_followed(directory, tmp_path):
    directory.mkdir()
    (tmp_path / "link").symlink_to("spool")

    assert take_slot(tmp_path / "link", 1) == tmp_path / "link" / "0"
    assert (directory / "0" / "lock").read_bytes() == b"%d\n" % os.getpid()
