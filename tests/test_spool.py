"""The spool's files, what damages them, and what a full or failing disk costs."""

import errno
import json
import os
import shutil
import stat
import struct
import threading
import zlib

import pytest

import test_pull
from spools import (
    FORMER_MARK,
    HEADER_BYTES,
    MARK,
    FaultyDisk,
    Receiver,
    Reports,
    account,
    entry_of,
    numbers_in,
    open_spool,
    payload,
    put,
    segment_header,
    sync,
)
from zmqpush.core.protocol.messages import DAMAGED, DROPPED, Data, Labels, Skip
from zmqpush.core.records.encode import Payload
from zmqpush.errors import EXIT_CONFIG, SpoolError, SpoolForeignError, SpoolFullError
from zmqpush.settings import Sync, WhenFull

FULL = 1024 + 4 * HEADER_BYTES  # room for 14 entries of 72 bytes, four in a segment
small_disk = test_pull.small_disk
POLICIES = pytest.mark.parametrize("policy", list(WhenFull))


@pytest.fixture
def slot(tmp_path):
    return tmp_path / "0"


@pytest.fixture
def disk(monkeypatch):
    disk = FaultyDisk(monkeypatch)
    yield disk
    disk.reboot()


def segments(slot):
    return sorted(slot.glob("*.seg2"))


def entries(data):
    """Return the entries of a segment as the specification says, independently of the code."""
    magic, length, _, mark = struct.unpack_from(">4sII8s", data)
    assert magic == b"ZS\x02\x01"
    header = 2 * (24 + length)
    assert data[:header] == segment_header(mark, data[48 : 48 + length])
    data = data[header:]
    found = []
    while data:
        one, length, two, first, count, crc = struct.unpack(">4sI4sQQI", data[:32])
        content = data[32 : 32 + length]
        assert (one + two, len(content)) == (mark, length)
        assert crc == zlib.crc32(data[12:28] + content)
        found.append((first, count, content))
        data = data[32 + length :]
    return found


def entry(first, *lines, mark=MARK):
    """Return the bytes of an entry."""
    return entry_of(first, len(lines), b"".join(line + b"\n" for line in lines), mark)


def state_of(slot):
    """Return the ack floor, as the specification says."""
    data = (slot / "state").read_bytes()
    valid = []
    for offset in (0, 4096):
        magic, generation, floor, crc = struct.unpack(">8sQQI", data[offset : offset + 28])
        if magic == b"SPOOLST1" and crc == zlib.crc32(data[offset : offset + 24]):
            valid.append((generation, floor))
    return max(valid, default=(0, 0))


def fill(slot, count=12, **options):
    """Leave so many records in a slot, each in a block of its own, three in a segment."""
    spool = open_spool(slot, **options)
    put(spool, *range(1, count + 1))
    sync(spool)
    spool.close()
    return spool


def refill(slot, taken=0):
    """Return what a new run finds, as a receiver gets it that holds so much already."""
    spool = open_spool(slot)
    before = spool.records
    receiver = Receiver(taken)
    spool.acknowledge(taken)
    receiver.take_all(spool)
    assert account(spool) == before
    spool.close()
    return receiver


# The files.


def test_the_files_are_as_specified(slot):
    spool = open_spool(slot)
    blocks = [payload(1), payload(2, 3), payload(4), payload(5), payload(6)]
    for block in blocks:
        spool.put(block)
    sync(spool)
    meta = json.loads((slot / "meta").read_bytes())
    paths = segments(slot)

    assert meta == {"format": 2, "secret": spool.secret, "inode": slot.stat().st_ino}
    assert len(bytes.fromhex(meta["secret"])) == 16
    assert [path.name for path in paths] == [f"{1:020d}.seg2", f"{5:020d}.seg2"]
    found = [e for path in paths for e in entries(path.read_bytes())]
    firsts = [1, 2, 4, 5, 6]
    assert found == [(n, b.records, b.data) for n, b in zip(firsts, blocks, strict=True)]
    assert (slot / "state").stat().st_size == 4096 + 28
    assert state_of(slot) == (0, 0)


def test_the_state_has_the_floor_in_two_slots_written_in_turn(slot):
    spool = open_spool(slot)
    put(spool, *range(1, 13))
    sync(spool)
    found = []
    for acked in (4, 8):  # each removes a segment
        spool.acknowledge(acked)
        found.append(state_of(slot))
    spool.acknowledge(9)
    spool.close()

    assert found == [(1, 4), (2, 8)]
    assert state_of(slot) == (3, 9)
    data = (slot / "state").read_bytes()
    assert [struct.unpack_from(">QQ", data, at + 8) for at in (0, 4096)] == [(2, 8), (3, 9)]


def test_what_another_implementation_wrote_is_read(slot):
    slot.mkdir()
    (slot / f"{7:020d}.seg2").write_bytes(segment_header() + entry(7, b"7") + entry(8, b"8", b"9"))
    mark = bytes(8)
    (slot / f"{10:020d}.seg2").write_bytes(segment_header(mark) + entry(10, b"10", mark=mark))
    (slot / "meta").write_text(
        json.dumps({"secret": "ab" * 16, "format": 2, "inode": slot.stat().st_ino, "more": [1]})
    )
    newer, older = (struct.pack(">8sQQ", b"SPOOLST1", *state) for state in [(5, 7), (4, 6)])
    state = newer + struct.pack(">I", zlib.crc32(newer)) + bytes(4096 - 28)
    (slot / "state").write_bytes(state + older + struct.pack(">I", zlib.crc32(older)))
    spool = open_spool(slot)

    assert (spool.secret, spool.first, spool.recovered) == ("ab" * 16, 8, 10)
    assert Receiver(7).take_all(spool) == [8, 9, 10]


def test_directories_and_files_are_private_whatever_the_umask(slot):
    before = os.umask(0)
    try:
        fill(slot)
        flip(segments(slot)[0], HEADER_BYTES + 40)
        refill(slot)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [slot, *slot.rglob("*")]}

    assert len(list((slot / "damaged").iterdir())) == 1
    assert modes == {path: 0o700 if path.is_dir() else 0o600 for path in modes}


def test_other_names_in_a_slot_are_left_alone(slot):
    fill(slot)
    names = ["note", "1.seg2", f"{0:020d}.seg2", f"{1:020d}.seg2.gz", "9" * 20 + ".seg2"]
    for name in names:
        (slot / name).write_bytes(b"mine")
    spool = open_spool(slot)
    put(spool, 13)
    sync(spool)

    assert Receiver().take_all(spool) == list(range(1, 14))
    assert all((slot / name).read_bytes() == b"mine" for name in names)


# Damage.


def flip(path, at, bit=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_a_tail_torn_at_any_byte_costs_only_the_entries_it_tore(slot, tmp_path):
    fill(slot, 6)
    size = segments(slot)[-1].stat().st_size
    for length in range(size):
        copy = tmp_path / "copy"
        shutil.copytree(slot, copy)
        os.truncate(segments(copy)[-1], length)
        whole = 4 + max(0, length - HEADER_BYTES) // 72
        spool = open_spool(copy)
        put(spool, 100)
        sync(spool)

        assert Receiver().take_all(spool) == [*range(1, whole + 1), 100]
        assert (spool.recovered, spool.damaged) == (whole, 0)
        spool.close()
        shutil.rmtree(copy)


def test_a_bit_flipped_anywhere_in_a_sealed_segment_costs_one_entry(slot, tmp_path):
    fill(slot)
    size = segments(slot)[1].stat().st_size
    assert size == HEADER_BYTES + 288  # four entries
    for at in range(HEADER_BYTES, size):
        copy = tmp_path / "copy"
        shutil.copytree(slot, copy)
        flip(segments(copy)[1], at, at % 8)
        lost = 5 + (at - HEADER_BYTES) // 72
        reports = Reports()
        spool = open_spool(copy, reporter=reports)
        receiver = Receiver()
        receiver.take_all(spool)

        assert receiver.numbers == [n for n in range(1, 13) if n != lost]
        assert receiver.skipped == {DAMAGED: 1, DROPPED: 0}
        assert (spool.damaged, account(spool)) == (1, 12)
        assert sum("missing" in line for line in reports) == 1
        begin = HEADER_BYTES + (lost - 5) * 72
        kept = copy / "damaged" / f"{lost:020d}.{begin}"
        bad = bytearray(segments(slot)[1].read_bytes()[begin : begin + 72])
        bad[at - begin] ^= 1 << at % 8
        assert [kept] == list((copy / "damaged").iterdir())
        assert kept.read_bytes() == bad
        spool.close()
        shutil.rmtree(copy)


@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_bit_flipped_anywhere_in_the_header_of_a_segment_costs_nothing(slot, tmp_path, which):
    """The first, one in the middle and the last, which is read to know where to go on."""
    fill(slot, labels=Labels("nginx", "web1"))
    size = len(segment_header(labels=b'{"type":"nginx","host":"web1","raw":false}'))
    for at in range(size):
        copy = tmp_path / "copy"
        shutil.copytree(slot, copy)
        flip(segments(copy)[which], at, at % 8)
        spool = open_spool(copy)
        labels, numbers = set(), []
        while entry := spool.take():
            labels.add(spool.next_labels)
            numbers += numbers_in(entry)

        assert numbers == list(range(1, 13))
        assert labels == {Labels("nginx", "web1"), None}
        assert not (copy / "damaged").exists()
        spool.close()
        shutil.rmtree(copy)


def test_a_sealed_segment_with_both_copies_of_its_header_damaged_is_kept_and_counted(slot):
    fill(slot)
    for at in (9, 33):
        flip(segments(slot)[1], at)
    damaged = segments(slot)[1].read_bytes()
    receiver = refill(slot)

    assert receiver.numbers == [*range(1, 5), *range(9, 13)]
    assert receiver.skipped == {DAMAGED: 4, DROPPED: 0}
    assert [path.read_bytes() for path in (slot / "damaged").iterdir()] == [damaged]


def test_what_cannot_be_read_at_the_end_is_kept_and_told_when_its_numbers_are_given_again(slot):
    """The first sector of the last segment is gone, and with it what tells its entries."""
    fill(slot, 7)
    data = bytearray(segments(slot)[-1].read_bytes())
    data[:48] = bytes(48)
    segments(slot)[-1].write_bytes(data)
    reports = Reports()
    spool = open_spool(slot, reporter=reports)
    assert (spool.recovered, reports) == (4, [])
    put(spool, 100, 101)
    sync(spool)

    assert Receiver().take_all(spool) == [1, 2, 3, 4, 100, 101]
    (line,) = reports
    assert line.startswith(f"{len(data)} bytes at the end of the spool {slot} cannot be read")
    assert [path.read_bytes() for path in (slot / "damaged").iterdir()] == [data]


@pytest.mark.parametrize("length", [0, 1, 23, 24, 47, 48, HEADER_BYTES - 1, HEADER_BYTES])
def test_a_segment_with_a_torn_header_is_no_obstacle(slot, length):
    fill(slot, 4)
    (slot / f"{5:020d}.seg2").write_bytes(segment_header()[:length])
    spool = open_spool(slot)
    put(spool, 100, 101)
    sync(spool)
    spool.close()
    spool = open_spool(slot)

    assert Receiver().take_all(spool) == [1, 2, 3, 4, 100, 101]
    assert (spool.recovered, spool.damaged) == (6, 0)


def test_damage_is_counted_once_however_often_it_is_read(slot):
    fill(slot)
    flip(segments(slot)[0], HEADER_BYTES + 80)
    reports = Reports()
    spool = open_spool(slot, reporter=reports)
    for _ in range(3):
        receiver = Receiver()
        assert receiver.take_all(spool, acknowledge=False) == [1, *range(3, 13)]
        spool.rewind()

    assert (spool.damaged, spool.records, len(reports)) == (1, 11, 1)


def test_no_more_than_so_many_damaged_bytes_are_kept(slot, monkeypatch):
    monkeypatch.setattr("zmqpush.spool.reader._DAMAGED_BYTES", 100)
    fill(slot)
    for path in segments(slot):
        flip(path, HEADER_BYTES + 40)
    receiver = refill(slot)

    assert receiver.skipped[DAMAGED] == 3
    assert [path.stat().st_size for path in (slot / "damaged").iterdir()] == [72]


def _corrupt_both_slots(slot):
    flip(slot / "state", 20)
    flip(slot / "state", 4096 + 20)


def _delete_state(slot):
    (slot / "state").unlink()


@pytest.mark.parametrize("trouble", [_corrupt_both_slots, _delete_state, 0, 1, 27, 28, 4100, 4123])
def test_a_state_that_is_gone_makes_it_offer_again_what_it_still_has(slot, trouble):
    spool = open_spool(slot)
    put(spool, *range(1, 13))
    sync(spool)
    spool.acknowledge(4)
    spool.acknowledge(6)
    spool.close()
    if callable(trouble):
        trouble(slot)
    else:
        os.truncate(slot / "state", trouble)
    spool = open_spool(slot)

    assert 5 <= spool.first <= 7
    assert Receiver(spool.first - 1).take_all(spool, acknowledge=False)[-6:] == [*range(7, 13)]
    spool.acknowledge(6)  # as the receiver's WELCOME says
    spool.rewind()
    assert Receiver(6).take_all(spool) == [*range(7, 13)]
    spool.close()
    assert state_of(slot)[1] == 12


@pytest.mark.parametrize(("at", "generation"), [(0, 3), (4096, 2)])
def test_one_bad_slot_of_the_state_leaves_the_other(slot, at, generation):
    spool = open_spool(slot)
    put(spool, *range(1, 13))
    sync(spool)
    spool.acknowledge(4)
    spool.acknowledge(8)
    spool.close()
    assert state_of(slot) == (3, 8)
    flip(slot / "state", at + 20)
    assert state_of(slot) == (generation, 8)

    assert open_spool(slot).first == 9


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"\xff\xfe",
        b"{",
        b"[]",
        b"null",
        b'{"format": 1}',
        b'{"format": "2", "secret": "%s"}' % (b"ab" * 16),
        b'{"format": 2, "secret": "%s"}' % (b"AB" * 16),
        b'{"format": 2, "secret": 17}',
        b"[" * 100_000,
        b'{"format": ' + b"9" * 5000 + b"}",
    ],
)
def test_without_a_readable_meta_the_records_are_sent_under_a_new_name(slot, content):
    before = fill(slot).secret
    if content is None:
        (slot / "meta").unlink()
    else:
        (slot / "meta").write_bytes(content)
    spool = open_spool(slot)

    assert spool.secret != before
    assert json.loads((slot / "meta").read_bytes())["secret"] == spool.secret
    assert Receiver().take_all(spool) == list(range(1, 13))


def test_a_copy_goes_on_under_a_new_name_and_what_was_only_moved_does_not(slot, tmp_path):
    secret = fill(slot).secret
    shutil.copytree(slot, tmp_path / "copy")
    slot.rename(tmp_path / "moved")
    moved, copy = open_spool(tmp_path / "moved"), open_spool(tmp_path / "copy")

    assert (moved.secret, moved.records) == (secret, 12)
    assert (copy.secret != secret, copy.records) == (True, 12)


def test_a_half_written_meta_is_written_anew(slot):
    before = fill(slot).secret
    (slot / "meta.new").write_bytes(b"{" * 1000)
    spool = open_spool(slot)
    assert spool.secret == before
    spool.rename_stream()

    assert json.loads((slot / "meta").read_bytes())["secret"] == spool.secret != before
    assert not (slot / "meta.new").exists()


@pytest.mark.parametrize("version", ["3", "2.5", "1e999"])
def test_a_spool_of_a_later_version_is_refused_and_not_touched(slot, version):
    fill(slot)
    (slot / "meta").write_text(f'{{"format": {version}, "more": 1}}')
    before = {path: path.read_bytes() for path in slot.iterdir()}
    with pytest.raises(SpoolForeignError) as told:
        open_spool(slot)

    assert told.value.exit_code == EXIT_CONFIG
    assert {path: path.read_bytes() for path in slot.iterdir()} == before


def test_missing_segments_at_the_front_count_as_acknowledged(slot):
    fill(slot)
    segments(slot)[0].unlink()
    (slot / "state").unlink()

    receiver = refill(slot, 4)
    assert receiver.numbers == [*range(5, 13)]
    assert not any(receiver.skipped.values())


def test_segments_below_the_floor_that_were_left_are_removed(slot):
    fill(slot)
    kept = segments(slot)[0].read_bytes()
    assert refill(slot, 0).end == 12
    assert len(segments(slot)) == 1
    (slot / f"{1:020d}.seg2").write_bytes(kept)
    spool = open_spool(slot)

    assert len(segments(slot)) == 1
    assert (spool.first, spool.records, spool.take()) == (13, 0, None)


@pytest.mark.parametrize("running", [False, True])
def test_a_missing_segment_in_the_middle_is_a_hole(slot, running):
    fill(slot)
    if not running:
        segments(slot)[1].unlink()
    spool = open_spool(slot)
    if running:
        segments(slot)[1].unlink()
    receiver = Receiver()
    receiver.take_all(spool)

    assert receiver.numbers == [*range(1, 5), *range(9, 13)]
    assert receiver.skipped == {DAMAGED: 4, DROPPED: 0}
    assert account(spool) == 12


def test_segments_that_are_all_gone_leave_the_numbers_of_the_state(slot):
    fill(slot)
    refill(slot, 12)
    for path in segments(slot):
        path.unlink()
    spool = open_spool(slot)
    put(spool, 100)
    sync(spool)

    assert (spool.recovered, spool.take().first) == (12, 13)


def test_an_entry_within_a_payload_is_no_entry(slot):
    inner = entry(3, b"not a record")[:-1]
    spool = open_spool(slot)
    spool.put(payload(1)._replace(data=inner + b"\n"))
    put(spool, 2, 3)
    sync(spool)
    spool.close()

    spool = open_spool(slot)
    assert [spool.take().first for _ in range(3)] == [1, 2, 3]


# Content that looks like entries.


def tear(slot, lost):
    """Take the last bytes of what was written last, as a power cut may."""
    path = max([*slot.glob("*.seg"), *segments(slot)])
    os.truncate(path, path.stat().st_size - lost)


def forged(number, mark):
    """Return a line of raw content that is a whole entry, as far as a sender can know."""
    line = entry(number, b"forged", mark=mark)[:-1]
    assert b"\n" not in line
    return line


@pytest.mark.parametrize("number", [4, 5, 9, 1 << 32, (1 << 63) - 2, (1 << 63) - 1])
@pytest.mark.parametrize(
    "mark", [FORMER_MARK, MARK.replace(b"\n", b"N"), bytes(8)], ids=["1", "2", "zero"]
)
@pytest.mark.parametrize("former", [False, True])
def test_content_behind_a_torn_write_is_no_entry(slot, former, mark, number):
    lines = [b"4", forged(number, mark), b"end"]
    if former:
        make_former(slot, [1, 2, 3], torn=entry(4, *lines, mark=FORMER_MARK)[:-2])
    else:
        spool = open_spool(slot)
        put(spool, 1, 2, 3)
        spool.put(Payload(b"".join(line + b"\n" for line in lines), 3))
        sync(spool)
        spool.close()
        tear(slot, 2)
    for new in (100, 101):
        spool = open_spool(slot)
        put(spool, new)
        sync(spool)
        assert (spool.recovered, spool.damaged) == (3 + (new - 100), 0)
        spool.close()

    assert refill(slot).numbers == [1, 2, 3, 100, 101]


@pytest.mark.parametrize("number", [3, 4, 60, 61, 1 << 32, (1 << 63) - 1])
@pytest.mark.parametrize("last", [True, False])
def test_a_jump_of_numbers_is_bounded_by_the_bytes_between(slot, number, last):
    """Even where somebody knows the mark, or it is one of format 1."""
    slot.mkdir()
    bad = entry(2, b"x" * 20)
    data = segment_header() + entry(1, b"1") + flipped(bad) + entry(number, b"9")
    (slot / f"{1:020d}.seg2").write_bytes(data)
    if not last:
        follows = min(number + 1, (1 << 63) - 1)
        (slot / f"{follows:020d}.seg2").write_bytes(segment_header() + entry(follows, b"10"))
    spool = open_spool(slot)
    first, *skips, second = [spool.take() for _ in range(2 if last and number > 60 else 3)]

    assert first.first == 1
    if number < 2 + len(bad):
        assert (second.first, numbers_in(second)) == (number, [9])
        assert skips == [Skip(2, number - 2, DAMAGED)]
    elif last:
        assert (second, spool.recovered) == (None, 1)
    else:
        assert skips == [Skip(2, follows - 2, DAMAGED)]
        assert second.first == follows


def flipped(data):
    return bytes([data[0] ^ 1]) + data[1:]


def test_a_flood_of_entries_in_content_behind_damage_is_no_entry(slot):
    """The damage is in the middle of a sealed segment, where the next entry is looked for."""
    spool = open_spool(slot)
    lines = [forged(n, FORMER_MARK) for n in range(2, 9)]
    spool.put(Payload(b"".join(line + b"\n" for line in lines), 7))
    put(spool, *range(8, 20))
    sync(spool)
    spool.close()
    flip(segments(slot)[0], HEADER_BYTES)
    receiver = refill(slot)

    assert receiver.numbers == list(range(8, 20))
    assert receiver.skipped[DAMAGED] == 7


# Labels.


def labels_and_numbers(spool):
    """Return what a sender takes: numbers under the labels that were told before each."""
    found = []
    while (labels := spool.next_labels) is not None:
        entry = spool.take()
        found.append((labels.type, numbers_in(entry) if isinstance(entry, Data) else entry))
    assert spool.take() is None
    return found


def test_the_labels_of_a_run_stay_with_its_records(slot):
    types = ["a", "b", "b", "a", "c"]
    expected = []
    for run, kind in enumerate(types):
        spool = open_spool(slot, labels=Labels(kind, "h", run % 2 == 0))
        put(spool, *range(6 * run, 6 * run + 6))  # two segments
        sync(spool)
        expected += [(kind, [n]) for n in range(6 * run, 6 * run + 6)]
        assert labels_and_numbers(spool) == expected
        spool.rewind()
        assert spool.next_labels == Labels("a", "h", True)
        spool.close()
    spool = open_spool(slot, labels=Labels("z"))
    spool.acknowledge(6)

    assert spool.next_labels == Labels("b", "h", False)
    assert labels_and_numbers(spool) == expected[6:]


def test_the_labels_of_what_is_damaged_or_dropped_are_nobodys_business(slot):
    for kind in "abc":
        spool = open_spool(slot, labels=Labels(kind))
        put(spool, *range(1, 6))
        sync(spool)
        spool.close()
    paths = segments(slot)
    assert [int(path.stem) for path in paths] == [1, 5, 6, 10, 11, 15]
    flip(paths[1], HEADER_BYTES + 40)  # number 5, the last of a
    paths[2].unlink()  # 6 to 9, of b
    spool = open_spool(slot, labels=Labels("d"))
    found = labels_and_numbers(spool)

    assert [(kind, n) for kind, n in found if not isinstance(n, Skip)] == [
        *(("a", [n]) for n in (1, 2, 3, 4)),
        ("b", [5]),
        *(("c", [n]) for n in (1, 2, 3, 4, 5)),
    ]
    assert [n for _, n in found if isinstance(n, Skip)] == [Skip(5, 5, DAMAGED)]


def test_dropping_the_oldest_goes_on_with_the_labels_of_what_follows(slot):
    for kind in "ab":
        spool = open_spool(slot, labels=Labels(kind), max_bytes=FULL)
        put(spool, *range(1, 5))
        sync(spool)
        spool.close()
    spool = open_spool(slot, labels=Labels("c"), max_bytes=FULL, when_full=WhenFull.DROP_OLDEST)
    assert spool.next_labels == Labels("a")
    put(spool, *range(1, 10))
    sync(spool)

    assert spool.dropped == 4
    found = labels_and_numbers(spool)
    assert [(kind, n) for kind, n in found if not isinstance(n, Skip)] == [
        *(("b", [n]) for n in (1, 2, 3, 4)),
        *(("c", [n]) for n in range(1, 10)),
    ]


def test_the_longest_labels_fit(slot):
    labels = Labels("\U0001f600" * 256, "\udc80" * 256, raw=True)
    spool = open_spool(slot, labels=labels)
    put(spool, 1)
    sync(spool)
    spool.close()
    spool = open_spool(slot)

    assert (spool.next_labels, spool.records) == (labels, 1)
    assert Receiver().take_all(spool) == [1]


@pytest.mark.parametrize(
    "labels",
    [
        *(b"", b"null", b"[]", b"{}", b'"x"', b"\xff", b"[" * 5000, b'{"type":1}'),
        b'{"type":"a","host":"","raw":1}',
        b'{"type":"a","host":"%s","raw":true}' % (b"h" * 257),
        b'{"type":"a","host":"","more":1}',
    ],
)
def test_labels_that_make_no_sense_are_those_of_the_run(slot, labels):
    slot.mkdir()
    data = segment_header(labels=labels) + entry(1, b"1")
    (slot / f"{1:020d}.seg2").write_bytes(data)
    spool = open_spool(slot, labels=Labels("now"))

    assert labels_and_numbers(spool) in ([("now", [1])], [("", [1])])


@pytest.mark.parametrize("written", [0, 1, 30, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 40])
@pytest.mark.parametrize("killed", [False, True])
def test_no_space_in_the_header_of_a_segment_is_rolled_back(slot, disk, written, killed):
    spool = open_spool(slot)
    put(spool, 1, 2, 3, 4)
    sync(spool)
    disk.written = written
    disk.fail("pwritev", errno.ENOSPC)
    put(spool, 5, 6)
    assert segments(slot)[-1].stat().st_size == 0
    assert (spool.unsafe, account(spool)) == (2, 6)
    disk.reboot()
    if not killed:
        spool.retry()
        sync(spool)
        spool.close()
    spool = open_spool(slot)

    assert Receiver().take_all(spool) == [1, 2, 3, 4, *([] if killed else [5, 6])]


# Format 1.


def make_former(slot, *runs, torn=b"", stream="ab" * 16, floor=0):
    """Make a spool as earlier versions wrote it; each block holds one number."""
    slot.mkdir()
    meta = {"format": 1, "stream": stream, "inode": slot.stat().st_ino}
    (slot / "meta").write_text(json.dumps(meta) + "\n")
    number = 1
    for run in runs:
        blocks = [entry_of(number + i, 1, payload(n).data, FORMER_MARK) for i, n in enumerate(run)]
        (slot / f"{number:020d}.seg").write_bytes(b"".join(blocks) + torn)
        number += len(run)
    state = struct.pack(">8sQQ", b"SPOOLST1", 2, floor)
    (slot / "state").write_bytes(bytes(4096) + state + struct.pack(">I", zlib.crc32(state)))


def test_a_spool_of_format_1_goes_over_by_itself(slot):
    make_former(slot, [1, 2, 3], [4, 5], floor=2)
    spool = open_spool(slot, labels=Labels("now"))
    secret = spool.secret

    assert (spool.was, spool.first, spool.recovered, spool.records) == ("ab" * 16, 3, 5, 3)
    meta = {"format": 2, "secret": secret, "was": "ab" * 16, "inode": slot.stat().st_ino}
    assert json.loads((slot / "meta").read_bytes()) == meta
    assert not spool._reporter
    put(spool, 6)
    sync(spool)
    assert labels_and_numbers(spool) == [("now", [n]) for n in (3, 4, 5, 6)]
    spool.close()
    spool = open_spool(slot, labels=Labels("later"))
    assert (spool.secret, spool.was) == (secret, "ab" * 16)
    assert labels_and_numbers(spool) == [*(("later", [n]) for n in (3, 4, 5)), ("now", [6])]
    spool.acknowledge(6)
    spool.unlink_removable()
    assert not list(slot.glob("*.seg"))
    spool.rename_stream()
    assert (spool.secret != secret, spool.was) == (True, "")
    assert "was" not in json.loads((slot / "meta").read_bytes())


def test_a_copy_of_a_spool_of_format_1_is_a_new_stream(slot, tmp_path):
    make_former(slot, [1, 2, 3])
    shutil.copytree(slot, tmp_path / "copy")
    spool = open_spool(tmp_path / "copy")

    assert (spool.was, spool.records) == ("", 3)


def test_a_tail_of_format_1_torn_at_any_byte_costs_only_the_entries_it_tore(slot, tmp_path):
    make_former(slot, [1, 2, 3])
    size = (slot / f"{1:020d}.seg").stat().st_size
    for length in range(size):
        copy = tmp_path / "copy"
        shutil.copytree(slot, copy)
        os.truncate(copy / f"{1:020d}.seg", length)
        for new in (100, 101):
            spool = open_spool(copy)
            put(spool, new)
            sync(spool)
            spool.close()

        assert refill(copy).numbers == [*range(1, 1 + length // 72), 100, 101]
        shutil.rmtree(copy)


def test_a_bit_flipped_in_a_sealed_segment_of_format_1_costs_one_entry(slot, tmp_path):
    make_former(slot, [1, 2, 3], [4])
    for at in range(3 * 72):
        copy = tmp_path / "copy"
        shutil.copytree(slot, copy)
        flip(copy / f"{1:020d}.seg", at, at % 8)
        receiver = refill(copy)
        lost = 1 + at // 72

        assert receiver.numbers == [n for n in range(1, 5) if n != lost]
        assert receiver.skipped[DAMAGED] == 1
        shutil.rmtree(copy)


# When it is full.


@POLICIES
def test_when_it_is_full_every_record_is_accounted_for(slot, policy):
    spool = open_spool(slot, max_bytes=FULL, when_full=policy)
    receiver = Receiver()
    total = 0
    for _ in range(40):
        if spool.full:
            assert policy is WhenFull.BLOCK
            break
        total += 1
        put(spool, total)
        assert account(spool) == total
        assert sum(path.stat().st_size for path in segments(slot)) <= FULL
        sync(spool)
    receiver.take_all(spool)
    spool.retry()
    sync(spool)
    receiver.take_all(spool)

    expected = list(range(1, total + 1))
    assert account(spool) == total
    assert spool.acked == len(receiver.numbers)
    assert receiver.skipped[DAMAGED] == 0
    if policy is WhenFull.BLOCK:
        assert (receiver.numbers, spool.dropped) == (expected, 0)
    elif policy is WhenFull.DROP_NEWEST:
        assert receiver.numbers == expected[: len(receiver.numbers)]
        assert receiver.skipped[DROPPED] == 0
        assert len(receiver.numbers) == 14
    else:
        assert receiver.numbers == expected[-len(receiver.numbers) :]
        assert receiver.skipped[DROPPED] == spool.dropped == total - len(receiver.numbers)
        assert spool.dropped % 4 == 0  # whole segments
    assert spool.records == 0


def test_what_is_in_flight_is_not_dropped(slot):
    spool = open_spool(slot, max_bytes=FULL, when_full=WhenFull.DROP_OLDEST)
    put(spool, *range(1, 13))
    sync(spool)
    receiver = Receiver()
    for _ in range(5):  # all of the first segment, and the first of the second
        receiver.accept(spool.take())
    put(spool, *range(13, 18))
    sync(spool)

    assert spool.dropped == 4
    receiver.take_all(spool)
    assert receiver.numbers == [*range(1, 9), *range(13, 18)]
    assert receiver.skipped == {DROPPED: 4, DAMAGED: 0}
    assert account(spool) == 17


def test_dropping_and_damage_in_a_row_count_every_record_once(slot):
    spool = open_spool(slot, max_bytes=FULL, when_full=WhenFull.DROP_OLDEST)
    put(spool, *range(1, 13))
    sync(spool)
    for _ in range(2):
        spool.take()
    put(spool, *range(13, 18))  # drops the second segment
    flip(segments(slot)[0], HEADER_BYTES + 3 * 72 + 40)  # the last of the first one
    sync(spool)
    for _ in range(2):
        spool.take()
    spool.rewind()
    receiver = Receiver()
    receiver.take_all(spool, acknowledge=False)

    assert receiver.numbers == [1, 2, 3, *range(9, 18)]
    assert receiver.skipped == {DAMAGED: 1, DROPPED: 4}
    assert (spool.dropped, spool.damaged, account(spool)) == (4, 1, 17)


def test_the_holes_of_a_receiver_that_is_away_for_long_are_one(slot):
    spool = open_spool(slot, max_bytes=FULL, when_full=WhenFull.DROP_OLDEST)
    for number in range(1, 200):
        put(spool, number)
        sync(spool)
    skip = spool.take()

    assert (skip.first, skip.records, skip.reason) == (1, spool.dropped, DROPPED)


def test_a_block_that_is_larger_than_the_spool_is_taken_if_it_is_alone(slot):
    spool = open_spool(slot, max_bytes=FULL)
    put(spool, 1, size=4000)
    put(spool, 2)
    assert (spool.records, spool.unsafe) == (2, 1)
    sync(spool)
    receiver = Receiver()
    receiver.take_all(spool)
    spool.retry()
    sync(spool)

    assert receiver.take_all(spool) == [1, 2]


@POLICIES
def test_no_space_part_way_through_a_write_and_then_room_again(slot, disk, policy):
    spool = open_spool(slot, when_full=policy)
    put(spool, 1, 2)
    size = segments(slot)[0].stat().st_size
    disk.fail("pwritev", errno.ENOSPC)
    disk.written = 50
    put(spool, 3, 4)
    assert segments(slot)[0].stat().st_size == size  # what was written in part is cut off
    assert spool.full == (policy is WhenFull.BLOCK)
    assert account(spool) == 4
    spool.retry()
    disk.reboot()
    spool.retry()
    put(spool, 5)
    sync(spool)
    kept = [1, 2, 5] if policy is not WhenFull.BLOCK else [1, 2, 3, 4, 5]

    assert Receiver().take_all(spool) == kept
    assert spool.dropped == 5 - len(kept)
    assert account(spool) == 5


@POLICIES
@pytest.mark.parametrize("call", ["pwritev", "open"])
def test_no_space_for_an_empty_spool_is_no_endless_loop(slot, disk, policy, call):
    spool = open_spool(slot, when_full=policy)
    disk.fail(call, errno.EDQUOT)
    put(spool, 1)
    assert disk.calls[call] == 1
    assert account(spool) == 1
    disk.reboot()
    spool.retry()
    put(spool, 2)
    sync(spool)

    assert Receiver().take_all(spool) == ([1, 2] if policy is WhenFull.BLOCK else [2])


def test_no_space_frees_what_is_acknowledged(slot, disk):
    spool = open_spool(slot)
    put(spool, 1, 2)
    sync(spool)
    Receiver().take_all(spool)
    disk.fail("pwritev", errno.ENOSPC, 1)
    put(spool, 3)
    sync(spool)

    assert (spool.unsafe, spool.take().first) == (0, 3)
    assert [path.name for path in segments(slot)] == [f"{3:020d}.seg2"]


@POLICIES
def test_a_full_disk_and_then_room_again(small_disk, policy):
    slot, ballast = small_disk / "0", small_disk / "ballast"
    slot.mkdir()
    spool = open_spool(slot, when_full=policy, max_bytes=4 << 20, segment_bytes=16 << 10)
    ballast.write_bytes(bytes(512 << 10))
    total = 0
    while total < 300 and not spool.full:
        total += 1
        put(spool, total, size=4000)
        sync(spool)
        assert account(spool) == total
    assert spool.full == (policy is WhenFull.BLOCK)
    assert 40 < spool.records - spool.unsafe < 150
    receiver = Receiver()
    receiver.take_all(spool)
    ballast.unlink()
    spool.retry()
    put(spool, total + 1)
    sync(spool)
    receiver.take_all(spool)

    assert receiver.numbers == sorted(set(receiver.numbers))
    assert receiver.numbers[-1] == total + 1
    assert len(receiver.numbers) == spool.acked == total + 1 - spool.dropped
    assert receiver.skipped == {
        DAMAGED: 0,
        DROPPED: spool.dropped if policy is WhenFull.DROP_OLDEST else 0,
    }


# A failing disk.


def run_on(slot):
    """Put, sync, take and acknowledge in turn; return the receiver and the spool."""
    receiver = Receiver()
    spool = open_spool(slot)
    for number in range(1, 25):
        put(spool, number)
        if number % 3 == 0:
            job = spool.begin_sync()
            put(spool, -number)
            try:
                job.run()
            except OSError as exc:
                spool.end_sync(job, exc)
            else:
                spool.end_sync(job)
        if number % 5 == 0:
            receiver.take_all(spool, acknowledge=number % 2)
            spool.rewind()
    spool.close()
    return receiver


def expected_of_run():
    numbers = []
    for number in range(1, 25):
        numbers += [number] + ([-number] if number % 3 == 0 else [])
    return numbers


@pytest.mark.parametrize("call", ["fdatasync", "pwritev", "open"])
def test_any_one_failure_of_the_disk_costs_nothing(tmp_path, disk, call):
    run_on(tmp_path / "counted")
    count = disk.calls[call]
    assert count >= 8
    for nth in range(1, count + 1):
        disk.fail(call, errno.EIO, nth)
        slot = tmp_path / str(nth)
        receiver = run_on(slot)
        disk.reboot()
        spool = open_spool(slot)
        receiver.take_all(spool)

        assert receiver.numbers == expected_of_run()
        assert not any(receiver.skipped.values())
        spool.close()


@pytest.mark.parametrize(("call", "at_risk"), [("pwritev", 4), ("open", 6), ("fdatasync", 8)])
def test_a_disk_that_fails_on_ends_it_and_the_records_at_risk_are_told(slot, disk, call, at_risk):
    spool = open_spool(slot)
    put(spool, 1, 2, 3)
    sync(spool)
    put(spool, 4, 5, 6)
    disk.fail(call, errno.EIO)

    def go_on():
        put(spool, *range(7, 12))
        sync(spool)
        sync(spool)

    with pytest.raises(SpoolError, match=f"error: {at_risk} records may not be safe") as told:
        go_on()
    assert told.value.exit_code == 74

    disk.reboot()
    assert refill(slot).numbers[:3] == [1, 2, 3]


def test_a_disk_that_fails_while_it_rewrites_tells_all_records_at_risk(slot, disk):
    spool = open_spool(slot)
    put(spool, 1)
    sync(spool)
    put(spool, *range(2, 9))
    disk.fail("pwritev", errno.EIO, 1, 4)  # with three of eight written anew

    with pytest.raises(SpoolError, match=r"error: 8 records may not be safe"):
        put(spool, 9)


def test_a_segment_that_was_given_up_is_not_read_beyond_what_was_synced(slot, disk):
    spool = open_spool(slot)
    put(spool, 1, 2)
    sync(spool)
    put(spool, 3)
    disk.fail("fdatasync", errno.EIO, 1)
    sync(spool)
    put(spool, 4)
    first, second = segments(slot)

    assert [number for number, _, _ in entries(first.read_bytes())] == [1, 2, 3]
    assert second.name == f"{3:020d}.seg2"
    assert [number for number, _, _ in entries(second.read_bytes())] == [3, 4]
    spool.close()
    disk.reboot()
    assert refill(slot).numbers == [1, 2, 3, 4]


def test_without_room_to_write_anew_the_records_wait_for_it(slot, disk):
    spool = open_spool(slot)
    put(spool, 1, 2, 3)
    disk.fail("pwritev", errno.ENOSPC)
    job = spool.begin_sync()
    spool.end_sync(job, OSError(errno.EIO, "broken"))
    assert (spool.unsafe, spool.full, spool.records, spool.take()) == (3, True, 3, None)
    disk.reboot()
    spool.retry()
    sync(spool)

    assert Receiver().take_all(spool) == [1, 2, 3]


@POLICIES
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_room_that_only_a_sync_finds_missing_is_waited_for_or_the_policy_drops(
    slot, disk, policy, error
):
    """As on NFS: writes succeed, syncs do not, however often it is tried."""
    spool = open_spool(slot, when_full=policy)
    put(spool, 1, 2, 3)
    sync(spool)
    disk.fail("fdatasync", error)
    put(spool, 4)
    for _ in range(4):
        sync(spool)
        spool.retry()
    left = [1, 2, 3, 4] if policy is WhenFull.BLOCK else [1, 2, 3]  # in the only segment
    assert not spool.failed
    assert spool.records == len(left)
    assert account(spool) == 4
    disk.reboot()
    spool.retry()
    sync(spool)

    assert Receiver().take_all(spool) == left


def test_room_that_only_a_sync_finds_missing_may_be_made_by_dropping_the_oldest(slot, disk):
    spool = open_spool(slot, when_full=WhenFull.DROP_OLDEST)
    put(spool, *range(1, 13))
    sync(spool)
    oldest = len(entries(segments(slot)[0].read_bytes()))
    disk.fail("fdatasync", errno.ENOSPC, 1)
    put(spool, 13)
    sync(spool)
    sync(spool)

    assert (spool.dropped, account(spool)) == (oldest, 13)
    assert Receiver().take_all(spool) == list(range(oldest + 1, 14))


def test_a_new_name_for_which_there_is_no_room_is_not_used(slot, monkeypatch):
    spool = open_spool(slot)
    secret = spool.secret
    real = os.write

    def write(fd, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", write)
    spool.rename_stream()
    assert spool.secret == secret == json.loads((slot / "meta").read_bytes())["secret"]
    monkeypatch.setattr(os, "write", real)
    spool.rename_stream()

    assert spool.secret != secret
    assert spool.secret == json.loads((slot / "meta").read_bytes())["secret"]


@pytest.mark.parametrize("call", ["write", "pwrite", "rename", "fsync", "fdatasync"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_opening_that_fails_leaves_nothing_open_and_is_repeated(slot, monkeypatch, call, error):
    fill(slot, 3)
    for name in ("meta", "state"):
        (slot / name).unlink()
    before = os.listdir("/proc/self/fd")

    def failing(*args):
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as context:
        context.setattr(os, call, failing)
        with pytest.raises(SpoolError) as raised:
            open_spool(slot)
    assert os.listdir("/proc/self/fd") == before
    assert isinstance(raised.value, SpoolFullError) == (error != errno.EIO)

    assert Receiver().take_all(open_spool(slot)) == [1, 2, 3]


def test_a_skip_never_reaches_beyond_what_is_synced(slot, disk):
    """Else numbers that it passed over would be given to the blocks that are written anew."""
    spool = open_spool(slot, max_bytes=FULL, when_full=WhenFull.DROP_OLDEST)
    put(spool, 1, 2)
    sync(spool)
    put(spool, *range(3, 16))  # drops the segment of 1 to 4
    assert spool.dropped == 4
    receiver = Receiver()
    receiver.take_all(spool, acknowledge=False)
    disk.fail("fdatasync", errno.EIO, 1)
    sync(spool)
    sync(spool)
    receiver.take_all(spool)

    assert receiver.numbers == [*range(5, 16)]
    assert receiver.skipped[DAMAGED] == 0
    assert account(spool) == 15


# Syncing.


@pytest.mark.parametrize("policy", list(Sync))
def test_nothing_may_be_sent_before_it_is_as_durable_as_the_policy_says(slot, policy):
    spool = open_spool(slot, sync=policy)
    put(spool, 1, 2)
    job = spool.begin_sync()
    put(spool, 3)
    if policy is not Sync.OFF:
        assert spool.take() is None
        job.run()
        assert spool.take() is None
        spool.end_sync(job)
        assert [spool.take().first for _ in range(2)] == [1, 2]
        assert spool.take() is None
        sync(spool)
        assert spool.take().first == 3
    else:
        assert Receiver().take_all(spool) == [1, 2, 3]
        assert spool.unsynced_bytes == 0


def test_syncing_off_never_syncs_a_segment(slot, disk):
    disk.fail("fdatasync", errno.EIO)
    for _ in range(2):
        spool = open_spool(slot, sync=Sync.OFF)
        put(spool, *range(1, 13))
        spool.close()

    assert "fdatasync" not in disk.calls


def test_a_sync_covers_the_segments_that_were_filled_meanwhile(slot, disk):
    synced = []

    def note(fd):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))

    spool = open_spool(slot)
    put(spool, 1)
    job = spool.begin_sync()
    put(spool, *range(2, 7))  # fills the first segment, and begins the second
    disk.fdatasync = os.fdatasync = note
    job.run()
    spool.end_sync(job)
    assert spool.take().first == 1
    assert spool.take() is None
    sync(spool)

    names = [f"{1:020d}.seg2", f"{5:020d}.seg2", "0"]
    assert synced == [names[0], "0", *names]
    assert Receiver(1).take_all(spool) == [*range(2, 7)]


def test_a_segment_given_up_while_it_is_synced_stays_open_until_then(slot, disk):
    spool = open_spool(slot)
    put(spool, 1, 2)
    job = spool.begin_sync()
    disk.fail("pwritev", errno.EIO, 1)
    put(spool, 3)
    fd = job.fds[0]
    assert os.fstat(fd)
    job.run()
    spool.end_sync(job)
    assert spool.take() is None  # that sync does not count: all is written anew
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    sync(spool)

    assert Receiver().take_all(spool) == [1, 2, 3]


def test_a_sync_of_nothing_keeps_its_segment_open(slot):
    spool = open_spool(slot)
    put(spool, *range(1, 5))  # fills it
    sync(spool)
    job = spool.begin_sync()
    put(spool, 5)
    assert os.path.samestat(os.fstat(job.fds[0]), segments(slot)[0].stat())
    job.run()
    spool.end_sync(job)
    sync(spool)

    assert Receiver().take_all(spool) == [*range(1, 6)]


@pytest.mark.parametrize("fails", [False, True])
def test_closing_waits_for_a_sync_that_runs_and_learns_how_it_ends(slot, disk, fails):
    spool = open_spool(slot)
    put(spool, *range(1, 7))
    job = spool.begin_sync()  # its task is cancelled: nobody will end it
    running, go_on = threading.Event(), threading.Event()
    real = disk.fdatasync

    def wait(fd):
        running.set()
        assert go_on.wait(60)
        real(fd)

    if fails:
        disk.fail("fdatasync", errno.EIO, 1)
    os.fdatasync = wait

    def run():
        try:
            job.run()
        except OSError:
            assert fails

    thread = threading.Thread(target=run)
    thread.start()
    assert running.wait(60)
    closing = threading.Thread(target=spool.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    go_on.set()
    for ending in (thread, closing):
        ending.join(60)
        assert not ending.is_alive()

    assert spool.unsynced_bytes == 0
    assert refill(slot).numbers == [*range(1, 7)]


def test_closing_writes_anew_what_could_not_be_synced(slot, disk):
    spool = open_spool(slot)
    put(spool, 1, 2)
    disk.fail("fdatasync", errno.EIO, 1)
    spool.close()

    assert refill(slot).numbers == [1, 2]


def test_what_a_killed_process_left_is_synced_before_it_may_be_sent(slot, disk):
    spool = open_spool(slot)
    put(spool, *range(1, 7))  # and then it is killed
    for sync_policy, count in [(Sync.OFF, 0), (Sync.INTERVAL, 2), (Sync.BLOCK, 2)]:
        disk.fail("fdatasync", errno.EIO, 0)
        again = open_spool(slot, sync=sync_policy)
        assert disk.calls.get("fdatasync", 0) == count
        assert Receiver().take_all(again, acknowledge=False) == [*range(1, 7)]
        again.close()
    disk.fail("fdatasync", errno.EIO)
    with pytest.raises(SpoolError, match="Input/output error"):
        open_spool(slot)


# Taking, acknowledging, beginning again.


def test_acknowledging_taking_and_beginning_again(slot):
    spool = open_spool(slot)
    put(spool, *range(1, 13))
    sync(spool)
    assert [spool.take().first for _ in range(6)] == [*range(1, 7)]
    spool.acknowledge(4)
    assert (spool.first, spool.acked, spool.records) == (5, 4, 8)
    assert spool.take().first == 7
    spool.rewind()
    assert spool.take().first == 5
    spool.acknowledge(9)  # as a WELCOME may, beyond what was taken
    assert spool.take().first == 10
    spool.acknowledge(3)  # an old one
    assert (spool.first, spool.acked) == (10, 9)
    spool.acknowledge(1000)  # more than there is
    assert (spool.first, spool.acked, spool.records, spool.take()) == (13, 12, 0, None)
    put(spool, 13)
    sync(spool)
    assert spool.take().first == 13


def test_what_is_not_synced_cannot_be_acknowledged(slot, disk):
    spool = open_spool(slot)
    put(spool, 1)
    sync(spool)
    put(spool, 2, 3)
    spool.acknowledge(3)  # by a receiver that is out of its mind
    disk.fail("fdatasync", errno.EIO, 1)
    sync(spool)
    sync(spool)

    assert (spool.first, account(spool)) == (2, 3)
    assert Receiver(1).take_all(spool) == [2, 3]


def test_an_acknowledgement_within_a_block_leaves_the_rest_of_it(slot):
    spool = open_spool(slot)
    spool.put(payload(1, 2, 3))
    sync(spool)
    spool.acknowledge(2)

    assert (spool.first, spool.acked, spool.records) == (3, 2, 1)
    assert numbers_in(spool.take()) == [3]


def test_a_block_that_is_taken_again_is_the_same_to_the_byte(slot):
    spool = open_spool(slot)
    put(spool, *range(1, 13))
    sync(spool)
    first = [spool.take() for _ in range(12)]
    spool.rewind()
    assert [spool.take() for _ in range(12)] == first
    spool.close()
    spool = open_spool(slot)

    assert [spool.take() for _ in range(12)] == first


def test_beginning_again_in_the_middle_of_a_segment(slot):
    fill(slot, 3)
    spool = open_spool(slot)
    for _ in range(3):
        assert spool.take().first == 1
        assert spool.take().first == 2
        spool.rewind()


def test_an_entry_with_an_older_number_does_not_count(slot):
    slot.mkdir()
    (slot / f"{5:020d}.seg2").write_bytes(
        segment_header() + entry(5, b"5") + entry(6, b"6") + entry(5, b"again")
    )
    spool = open_spool(slot)

    assert (spool.recovered, Receiver(4).take_all(spool)) == (6, [5, 6])


def test_a_new_name_of_the_stream_keeps_the_records(slot):
    fill(slot)
    spool = open_spool(slot)
    spool.take()
    before = spool.secret
    spool.rename_stream()
    spool.rewind()
    assert spool.secret != before
    spool.close()
    again = open_spool(slot)

    assert again.secret == spool.secret
    assert Receiver().take_all(again) == [*range(1, 13)]


# What it costs.


def test_no_descriptor_is_left_open(slot, disk):
    before = len(os.listdir("/proc/self/fd"))
    spool = open_spool(slot, max_bytes=2048, when_full=WhenFull.DROP_OLDEST)
    for number in range(1, 400):
        put(spool, number)
        job = spool.begin_sync()
        put(spool, number)
        if number % 7 == 0:
            disk.fail("pwritev", errno.EIO, 1)
            put(spool, number)
        spool.end_sync(job, OSError(errno.EIO, "broken") if number % 11 == 0 else None)
        sync(spool)
        if number % 5 == 0:
            spool.rewind()
        while taken := spool.take():
            if number % 3 == 0:
                spool.acknowledge(taken.end)
        # The directory, the state, the last segment, and one that is read.
        assert len(os.listdir("/proc/self/fd")) <= before + 4
    spool.close()

    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_is_bounded_while_the_receiver_is_away(slot, monkeypatch):
    monkeypatch.setattr("zmqpush.spool.spool._RECENT_BYTES", 3000)
    monkeypatch.setattr("zmqpush.spool.spool._UNSYNCED_BYTES", 6000)
    spool = open_spool(slot)
    number = 0
    for _ in range(5):
        while not spool.full:
            number += 1
            put(spool, number, size=2)
            assert len(spool._recent) <= 24
        sync(spool)
        assert len(spool._recent) <= 12
        assert not spool.full

    receiver = Receiver()
    while taken := spool.take():
        assert isinstance(taken, Data)
        receiver.end = taken.end
    assert (receiver.end, len(spool._recent)) == (number, 0)


def test_a_backlog_opens_quickly_since_only_its_end_is_read(slot, monkeypatch):
    size = 16 << 20
    slot.mkdir()
    for number in range(640):  # 10 GiB, sparse
        path = slot / f"{1 + 1000 * number:020d}.seg2"
        path.touch()
        os.truncate(path, size)
    last = slot / f"{1 + 1000 * 640:020d}.seg2"
    last.write_bytes(segment_header() + entry(640001, b"1", b"2"))
    opened = []
    real = os.open

    def noting(path, *args, **kwargs):
        opened.append(str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", noting)
    spool = open_spool(slot, max_bytes=20 << 30)

    assert (spool.recovered, spool.records) == (640002, 640002)
    assert len({name for name in opened if name.endswith(".seg2")}) <= 7
    assert sum(name == str(last) for name in opened) <= 2


def test_a_sealed_segment_of_16_mib_is_skipped_in_one_go(slot):
    slot.mkdir()
    data = b"".join(entry(n, b"x" * 4000) for n in range(1, 4000))
    (slot / f"{1:020d}.seg2").write_bytes(bytes(len(data)))
    (slot / f"{4000:020d}.seg2").write_bytes(segment_header() + entry(4000, b"4000"))
    spool = open_spool(slot)

    assert spool.take() == Skip(1, 3999, DAMAGED)
    assert spool.take().first == 4000


def test_removing_files_in_another_thread_while_it_works(slot):
    spool = open_spool(slot)
    stop = threading.Event()

    def remove():
        while not stop.wait(0.0001):
            spool.unlink_removable()

    thread = threading.Thread(target=remove)
    thread.start()
    receiver = Receiver()
    try:
        for number in range(1, 300):
            put(spool, number)
            sync(spool)
            receiver.take_all(spool)
    finally:
        stop.set()
        thread.join(60)

    assert receiver.numbers == [*range(1, 300)]
    spool.unlink_removable()  # what that thread had no time for
    assert len(segments(slot)) == 1
