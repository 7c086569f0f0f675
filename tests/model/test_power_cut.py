"""
Power cuts at every moment, in every way that a file system may come back.

What the spool does to its files is recorded. Then, for each beginning of that record, the
disk is rebuilt as it may be after a power cut at this moment: what was synced is there, of
the rest anything may be; and a new run must make the right thing of it.
"""

import errno
import os
import random
import shutil
import struct
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from spools import HEADER_BYTES, Receiver, numbers_in, open_spool, payload, put, sync
from zmqpush.core.protocol.messages import Data
from zmqpush.settings import Sync, WhenFull
from zmqpush.spool.slots import survey, take_slot

LONG = os.environ.get("ZMQPUSH_CHAOS") == "long"
PATCHED = ("open", "write", "pwrite", "pwritev", "ftruncate", "fdatasync", "fsync")
PATCHED += ("rename", "unlink", "mkdir")


@dataclass(frozen=True)
class Op:
    """
    A change of a file's bytes (``write``, ``truncate``) or of a directory (the rest).

    ``place`` is the number of the file, or the path of the directory: what must be synced.
    """

    kind: str
    place: object
    args: tuple = ()


class Recorder:
    """Passes system calls on and keeps those that change the files below a directory."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.trace: list[Op] = []
        self.names: dict[str, int] = {}
        self.files: dict[int, object] = {}  # by descriptor: a number, or a directory's path
        self.broken: set[object] = set()
        self.fail_sync = False
        self.count = 0
        self._real = {name: getattr(os, name) for name in PATCHED}
        for name in PATCHED:
            monkeypatch.setattr(os, name, getattr(self, name))

    def mark(self, kind: str, *args: object) -> None:
        """Keep what happened beside."""
        self.trace.append(Op(kind, None, args))

    def _note(self, kind: str, fd: int, *args: object) -> None:
        if fd in self.files:
            self.trace.append(Op(kind, self.files[fd], args))

    def _note_name(self, kind: str, path: object, *args: object) -> None:
        self.trace.append(Op(kind, str(Path(path).parent), (str(path), *args)))

    def open(self, path: object, flags: int, mode: int = 0o777, **kwargs: object) -> int:
        """Open, and learn which file that is."""
        fd = self._real["open"](path, flags, mode, **kwargs)
        self.files.pop(fd, None)
        name = str(path)
        if not Path(name).is_relative_to(self.root):
            return fd
        if flags & os.O_DIRECTORY:
            self.files[fd] = name
            return fd
        if name not in self.names:
            self.count += 1
            self.names[name] = self.count
            self._note_name("create", path, self.count)
        self.files[fd] = self.names[name]
        if flags & os.O_TRUNC:
            self._note("truncate", fd, 0)
        return fd

    def write(self, fd: int, data: bytes) -> int:
        """Write at the beginning: nobody here writes so twice."""
        self._note("write", fd, 0, bytes(data))
        return self._real["write"](fd, data)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Write."""
        self._note("write", fd, offset, bytes(data))
        return self._real["pwrite"](fd, data, offset)

    def pwritev(self, fd: int, buffers: tuple[bytes, ...], offset: int) -> int:
        """Write."""
        self._note("write", fd, offset, b"".join(buffers))
        return self._real["pwritev"](fd, buffers, offset)

    def ftruncate(self, fd: int, length: int) -> None:
        """Truncate."""
        self._note("truncate", fd, length)
        self._real["ftruncate"](fd, length)

    def fdatasync(self, fd: int) -> None:
        """Sync, or fail, and then never sync this file any more."""
        if self.fail_sync:
            self.fail_sync = False
            self.broken.add(self.files[fd])
            raise OSError(errno.EIO, "broken")
        if self.files.get(fd) not in self.broken:
            self._note("sync", fd)

    fsync = fdatasync

    def rename(self, source: object, target: object) -> None:
        """Rename."""
        self.names[str(target)] = self.names.pop(str(source))
        self._note_name("rename", source, str(target))
        self._real["rename"](source, target)

    def unlink(self, path: object) -> None:
        """Remove."""
        self._real["unlink"](path)
        del self.names[str(path)]
        self._note_name("unlink", path)

    def mkdir(self, path: object, mode: int = 0o777) -> None:
        """Make a directory."""
        self._real["mkdir"](path, mode)
        if Path(path).is_relative_to(self.root):
            self._note_name("mkdir", path)


# What is done while it is recorded.


class Scenario:
    """Works a spool, and marks in the record what was promised and handed out."""

    def __init__(self, recorder: Recorder, slot: Path, **options: object) -> None:
        self.recorder, self.slot, self.options = recorder, slot, options
        self.number = 0
        self.receiver = Receiver()
        self.open()

    def open(self) -> None:
        """Begin a run."""
        self.spool = open_spool(self.slot, **self.options)
        self.promise(self.spool.recovered)

    def promise(self, end: int) -> None:
        """Mark that all up to ``end`` survives a power cut."""
        if self.options["sync"] is not Sync.OFF:
            self.recorder.mark("safe", end)

    def put(self, *records: int) -> None:
        """Put blocks of so many records."""
        for count in records:
            numbers = range(self.number + 1, self.number + 1 + count)
            self.number += count
            self.spool.put(payload(*numbers, size=20))

    def sync(self, *, fails: bool = False, meanwhile: int = 0) -> None:
        """Sync, with blocks put before the disk is told, and so many again after it."""
        job = self.spool.begin_sync()
        self.put(*[1] * meanwhile)
        self.recorder.fail_sync = fails
        failure = None
        try:
            job.run()
        except OSError as exc:
            failure = exc
        self.put(*[1] * meanwhile)
        self.spool.end_sync(job, failure)
        if not failure:
            self.promise(job.end)

    def take(self, count: int = 1000) -> None:
        """Hand out blocks."""
        while count and (entry := self.spool.take()):
            count -= 1
            meaning = numbers_in(entry) if isinstance(entry, Data) else [0] * entry.records
            self.recorder.mark("taken", self.spool.secret, entry.first, meaning)
            self.receiver.end = max(self.receiver.end, entry.end)

    def acknowledge(self, acked: int = 0) -> None:
        """Acknowledge what was taken, or up to a number."""
        acked = acked or self.receiver.end
        self.recorder.mark("acked", self.spool.secret, acked)
        self.spool.acknowledge(acked)
        self.spool.unlink_removable()

    def kill(self) -> None:
        """Begin a new run; the old one is not closed."""
        self.open()

    def close(self) -> None:
        """Begin a new run after an orderly end."""
        self.spool.close()
        self.open()


def plain(run):
    run.put(1, 2, 1)
    run.sync()
    run.take(2)
    run.put(3, 1)
    run.sync(meanwhile=2)
    run.take()
    run.acknowledge(3)
    run.acknowledge()
    run.put(1, 1, 1, 1)
    run.sync()


def restarts(run):
    run.put(1, 1, 1, 1, 1)
    run.kill()
    run.take()
    run.put(2, 2)
    run.sync()
    run.take(3)
    run.acknowledge()
    run.close()
    run.put(1)
    run.kill()
    run.put(1, 1)
    run.sync()
    run.take()
    run.acknowledge()


def failures(run):
    run.put(1, 1)
    run.sync()
    run.take()
    run.put(1, 1, 1, 1, 1, 1)
    run.sync(fails=True, meanwhile=1)
    run.put(1)
    run.sync()
    run.take()
    run.acknowledge(5)
    run.put(1, 1)
    run.sync(fails=True)
    run.sync()
    run.kill()
    run.take()


def renamed(run):
    run.put(1, 1, 1)
    run.sync()
    run.take()
    run.acknowledge(2)
    run.recorder.mark("renaming")
    run.spool.rename_stream()
    run.spool.rewind()
    run.put(1)
    run.sync()
    run.take()
    run.acknowledge()
    run.put(1, 1)
    run.sync()


def overflowing(run):
    for _ in range(6):
        run.put(1, 1, 1)
        run.sync(meanwhile=1)
        run.take(1)
    run.acknowledge()
    run.take()
    run.put(1, 1, 1, 1, 1, 1, 1)
    run.sync()
    run.take()
    run.spool.rewind()
    run.put(1, 1, 1, 1, 1, 1, 1)
    run.sync()


SCENARIOS = [plain, restarts, failures, renamed, overflowing]


# What may be on the disk afterwards.


@dataclass
class Disk:
    """The state of the disk after a power cut: what was synced, and the rest that was kept."""

    directories: set[str] = field(default_factory=set)
    names: dict[str, int] = field(default_factory=dict)
    files: dict[int, bytearray] = field(default_factory=dict)

    def apply(self, op: Op, torn: int | None = None) -> None:
        """Do an operation; of a write only the first bytes if it is torn."""
        if op.kind == "mkdir":
            self.directories.add(op.args[0])
        elif op.kind == "create":
            self.names[op.args[0]] = op.args[1]
        elif op.kind == "unlink":
            self.names.pop(op.args[0], None)
        elif op.kind == "rename" and op.args[0] in self.names:
            self.names[op.args[1]] = self.names.pop(op.args[0])
        elif op.kind == "write":
            offset, data = op.args[0], op.args[1][:torn]
            content = self.files.setdefault(op.place, bytearray())
            content.extend(bytes(max(0, offset - len(content))))
            content[offset : offset + len(data)] = data
        elif op.kind == "truncate":
            content = self.files.setdefault(op.place, bytearray())
            content.extend(bytes(max(0, op.args[0] - len(content))))
            del content[op.args[0] :]

    def build(self, root: Path, target: Path) -> None:
        """Make the files, with ``target`` in place of ``root``."""
        target.mkdir()
        for directory in sorted(self.directories):
            (target / Path(directory).relative_to(root)).mkdir()
        for name, number in self.names.items():
            path = target / Path(name).relative_to(root)
            if path.parent.is_dir():
                path.write_bytes(self.files.get(number, b""))


def ways(trace, chance):
    """Return what may be left of the operations: for each the bytes that are kept, or none."""
    changes = [i for i, op in enumerate(trace) if op.place is not None and op.kind != "sync"]
    last_sync = {op.place: i for i, op in enumerate(trace) if op.kind == "sync"}
    unsynced = [i for i in changes if last_sync.get(trace[i].place, -1) < i]
    names = {i for i in unsynced if isinstance(trace[i].place, str)}
    everything = dict.fromkeys(changes)
    synced = {i: None for i in changes if i not in unsynced}
    found = [everything, synced]
    found.append({i: None for i in changes if i in synced or i in names})
    found.append({i: None for i in changes if i in synced or i not in names})
    found += [{i: None for i in changes if i != lost} for lost in unsynced]
    found += [
        {i: None for i in changes if i in synced or chance.random() < 0.5}
        for _ in range(40 if LONG else 3)
    ]
    if unsynced and trace[unsynced[-1]].kind == "write":
        length = len(trace[unsynced[-1]].args[1])
        points = range(length) if LONG and length < 400 else (1, 20, 32, 60, length - 1)
        found += [everything | {unsynced[-1]: at} for at in points]
    unique = {tuple(sorted(way.items(), key=str)): way for way in found}
    return unique.values()


class Knowledge:
    """What is known to have happened, from the record up to the power cut."""

    def __init__(self, trace):
        self.put = {}  # sequence number: all that was ever written there
        self.safe = {}  # sequence number: the record
        self.taken = {}  # stream, sequence number: the record, or 0 for a skip
        self.floors = {}  # by stream: acknowledged, handed out
        self.stream = None  # under which something was handed out, if it was not renamed
        names, segments = set(), set()
        written = {}
        dropped = set()
        for op in trace:
            if op.kind == "write" and op.place in segments:
                data = op.args[1]
                if not op.args[0]:
                    data = data[HEADER_BYTES:]
                first, count = struct.unpack_from(">QQ", data, 12)
                lines = data[32:].split(b"\n")
                for number, line in enumerate(lines[:count], first):
                    written[number] = int(line)
                    dropped.discard(number)
                    self.put.setdefault(number, set()).add(int(line))
            elif op.kind == "create" and op.args[0].endswith(".seg2"):
                names.add(int(Path(op.args[0]).stem))
                segments.add(op.args[1])
            elif op.kind == "unlink":
                first = int(Path(op.args[0]).stem)
                names.discard(first)
                end = min((n for n in names if n > first), default=1 << 63)
                dropped |= {n for n in written if first <= n < end}
                self.safe |= {n: 0 for n in self.safe if first <= n < end}
            elif op.kind == "safe":
                last = max(self.safe, default=0)
                new = {n: r for n, r in written.items() if last < n <= op.args[0]}
                self.safe |= {n: 0 if n in dropped else r for n, r in new.items()}
            elif op.kind == "taken":
                self.stream, first, meaning = op.args
                stream = self.stream
                self.taken |= {(stream, n): r for n, r in enumerate(meaning, first)}
                acked, end = self.floors.get(stream, (0, 0))
                self.floors[stream] = (acked, max(end, first + len(meaning) - 1))
            elif op.kind == "renaming":
                self.stream = None
            elif op.kind == "acked":
                stream, acked = op.args
                self.floors[stream] = (acked, max(acked, self.floors.get(stream, (0, 0))[1]))
                for number in [n for n in self.safe if n <= acked]:
                    self.safe[number] = 0  # it is nobody's business any more


def check(slot, known, options, *, accepted):
    """Have a new run make what it can of a slot; the receiver accepted all that it was sent."""
    if not slot.is_dir():
        assert not any(known.safe.values())
        assert not known.taken
        return
    survey(slot)
    spool = open_spool(slot, **options)
    assert known.stream in (None, spool.secret)
    floor = known.floors.get(spool.secret, (0, 0))[accepted]
    renamed = floor > spool.recovered
    if renamed:  # as core/sender.py does
        spool.rename_stream()
        floor = 0
    else:
        spool.acknowledge(floor)
        spool.rewind()
    floor = max(floor, spool.first - 1)
    recovered = spool.recovered
    receiver = Receiver(floor)
    while entry := spool.take():
        receiver.accept(entry)
        if isinstance(entry, Data):
            for number, record in enumerate(numbers_in(entry), entry.first):
                assert record in known.put[number]
                if not renamed:
                    assert known.taken.get((spool.secret, number), record) in (record, 0)
    kept = list(receiver.numbers)
    assert kept == sorted(set(kept))
    assert receiver.end == max(recovered, floor)
    assert {r for n, r in known.safe.items() if r and n > floor} <= set(kept)

    new = [10_000, 10_001, 10_002]
    spool.acknowledge(receiver.end)
    put(spool, *new)
    sync(spool)
    assert receiver.take_all(spool) == [*kept, *new]
    may_be_reused = renamed or options["sync"] is Sync.OFF
    handed_out = {number for stream, number in known.taken if stream == spool.secret}
    reused = handed_out & set(range(recovered + 1, recovered + 4))
    assert not reused if not may_be_reused else not {n for n in reused if n <= floor}
    assert spool.records == 0
    spool.close()


@pytest.fixture
def memory(tmp_path):
    """Return a directory where thousands of disks are quickly built."""
    shared = Path("/dev/shm")
    place = tempfile.mkdtemp(dir=shared if os.access(shared, os.W_OK) else tmp_path)
    yield Path(place)
    shutil.rmtree(place)


@pytest.mark.parametrize(
    ("scenario", "sync_policy"),
    [
        *((scenario, Sync.BLOCK) for scenario in SCENARIOS),
        *((scenario, Sync.OFF) for scenario in SCENARIOS if scenario is not failures),
    ],
)
def test_a_power_cut_at_any_moment(tmp_path, memory, monkeypatch, scenario, sync_policy):
    policy = WhenFull.DROP_OLDEST if scenario is overflowing else WhenFull.BLOCK
    options = {"sync": sync_policy, "when_full": policy}
    options |= {
        "max_bytes": 600 + 4 * HEADER_BYTES if scenario is overflowing else 1 << 20,
        "segment_bytes": 150,
    }
    root = tmp_path / "disk"
    root.mkdir()
    for module in ("segment", "spool"):  # what is left is built in another place
        monkeypatch.setattr(f"zmqpush.spool.{module}.inode_of", lambda slot: 1)
    with monkeypatch.context() as patching:
        recorder = Recorder(root, patching)
        slot = take_slot(root / "spool", 1)
        scenario(Scenario(recorder, slot, **options))
    trace = recorder.trace
    assert 30 < len(trace) < 200
    for call in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, call, lambda fd: None)
    chance = random.Random(17)
    target = memory / "after"
    cuts = 0
    for end in range(len(trace) + 1):
        if end < len(trace) and trace[end].place is None:
            continue  # what is known makes no difference before the next change
        known = Knowledge(trace[:end])
        for way in ways(trace[:end], chance):
            disk = Disk()
            for i, torn in sorted(way.items()):
                disk.apply(trace[i], torn)
            cuts += 1
            for accepted in (0, 1) if LONG else (cuts % 2,):
                disk.build(root, target)
                try:
                    check(target / slot.relative_to(root), known, options, accepted=accepted)
                except Exception:
                    print(f"after {end} operations, {trace[max(0, end - 5) : end]}, left: {way}")
                    raise
                shutil.rmtree(target)
    assert cuts > 300
