"""
What the tests of faults share: how much of each, the pipeline, its feeder, and the oracle.

The oracle knows records by what is in them, never by the protocol's numbers: each holds
a number and text that follows from it. The spool is read here as ``docs/spool.md``
describes it, not with the program's own code.
"""

import contextlib
import errno
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zmqpush
from helpers import PATIENCE, ZMQPULL, ZMQPUSH, wait_until, wait_until_ready


@dataclass(frozen=True)
class Dose:
    """How much of each fault; times in seconds."""

    kills: int  # of each program, in one test
    receiver_stopped: float  # more than three pings is 15
    sender_stopped: float  # a session ends after 30 of silence
    away: float  # how long there is no receiver
    backlog_lines: int
    passages: tuple[int, ...]  # at which passage of a fault point to die
    recoveries: int  # how often to die again, in recovery
    syncs: int  # up to which sync one fails
    stride: int  # every how manyth byte is damaged
    switches: int  # from one receiver to another


SHORT = Dose(3, 1, 1, 1.5, 100_000, (4,), 1, 3, 53, 2)
LONG = Dose(20, 20, 60, 600, 2_000_000, (1, 2, 3, 5, 8, 13, 21), 3, 40, 1, 10)
DOSE = LONG if os.environ.get("ZMQPUSH_CHAOS") == "long" else SHORT

# The oracle.

_TEXTS = (
    b'sshd[612]: Accepted publickey for root from 10.0.0.7 port 4711 "ssh2"',
    b'nginx: 10.1.2.3 - - "GET /index.html?q=%C3%A4 HTTP/1.1" 200 5316',
    b"kernel: [12345.678901] eth0: link up, 1000 Mbit/s",
    b"app: \xc3\xa4\xc3\xb6\xc3\xbc \\ \t {}",
    b"cron[9]: (root) CMD (test -x /usr/sbin/anacron || run-parts /etc/cron.daily)",
    b"",
)
_NUMBER = re.compile(rb"(\d{9})#")


def line(number: int) -> bytes:
    """Return the line of a number, as it looks in a log, with its newline."""
    return b"<34> %09d# %s\n" % (number, _TEXTS[number % len(_TEXTS)])


def lines(numbers: Iterable[int]) -> bytes:
    """Return the lines of some numbers."""
    return b"".join(map(line, numbers))


def number_of(record: bytes) -> int:
    """Return the number of a record, in JSON or raw; fail if it is not whole and right."""
    match = _NUMBER.search(record)
    assert match, record
    number = int(match[1])
    if record.startswith(b"{"):
        assert json.loads(record)["message"] == line(number)[:-1].decode(), record
    else:
        assert record + b"\n" == line(number), record
    return number


def _numbers(records: list[bytes], cut: bool) -> Iterator[int]:
    # Raw, as they are in a spool, or as zmqpull writes them.
    whole = (b"<34> ", b'{"message":"<34> ')
    return map(number_of, (r for r in records if not cut or r.startswith(whole)))


def written(*paths: Path, cut: bool = False) -> list[int]:
    """
    Return the numbers in files; what is being written at the end of one does not count.

    Args:
        paths: The files.
        cut: Leave out raw records of which a kill has cut off the beginning.

    """
    numbers = []
    for path in paths:
        if path.exists():
            whole = path.read_bytes().rpartition(b"\n")[0]
            numbers += _numbers(whole.splitlines(), cut)
    return numbers


def spooled(spool: Path, *, cut: bool = False) -> list[int]:
    """Return the numbers of the records in the segments, also of acknowledged ones; see above."""
    numbers: list[int] = []
    for slot in sorted(spool.glob("*")):
        segments = sorted(path for path in slot.glob("*.seg2") if path.is_file())
        ends = [int(segment.stem) for segment in segments[1:]] + [1 << 63]
        for segment, end in zip(segments, ends, strict=False):
            for first, payload in entries(segment.read_bytes()):
                if first < end:
                    numbers += _numbers(payload.splitlines(), cut)
    return numbers


def fill_disk(ballast: Path) -> None:
    """Write a file until its disk is full."""
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as exc:
            assert exc.errno == errno.ENOSPC  # noqa: PT017


def entries(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the first number and the payload of the whole entries that a segment begins with."""
    if len(data) < 48:
        return
    magic, size, _, mark = struct.unpack_from(">4sII8s", data)
    assert magic == b"ZS\x02\x01"
    data = data[2 * (24 + size) :]
    while len(data) >= 32:
        one, length, two, first, _, crc = struct.unpack(">4sI4sQQI", data[:32])
        payload = data[32 : 32 + length]
        if (one + two, len(payload)) != (mark, length):
            return
        if zlib.crc32(data[12:28] + payload) != crc:
            return
        yield first, payload
        data = data[32 + length :]


def compare(got: Iterable[int], expected: Iterable[int]) -> tuple[list[int], list[int]]:
    """Return which numbers are lost, and which are there too often."""
    counts = Counter(got)
    lost = [number for number in expected if number not in counts]
    too_often = sorted((counts - Counter(set(expected))).elements())
    return lost, too_often


def account(
    returncode: int, out: bytes, err: bytes, *, read: int, before: int = 0
) -> tuple[int, int, int, int]:
    """
    Return how many records were acknowledged, dropped, lost and left, as a sender says.

    They must add up to what it read and what was in the spool before, and the exit code
    must say the worst of it.
    """
    summary = re.fullmatch(rb"Processed (\d+) messages in .*\n", out)
    assert summary, out
    rest = re.search(rb"zmqpush: (\d+) dropped, (\d+) lost(?:, (\d+) left in the spool)?\n", err)
    acked = int(summary[1])
    dropped, lost, left = (int(number or 0) for number in rest.groups()) if rest else (0, 0, 0)
    assert acked + dropped + lost + left == read + before, (out, err, read, before)
    assert returncode == (1 if dropped or lost else 75 if left else 0), (out, err)
    return acked, dropped, lost, left


# The programs.

_ROOT = Path(zmqpush.__file__).parent


def _who_dies_in(path: Path) -> str:
    package, name = path.relative_to(_ROOT).parts[:2]
    if package == "sinks" and name in ("kafka", "nats"):
        return name
    return "zmqpull" if package in ("receiver", "sinks") else "zmqpush"


def fault_points(program: str) -> list[str]:
    """Return the names of all points where a program may die; those of a sink by its scheme."""
    names = set()
    for path in _ROOT.glob("*/**/*.py"):
        for argument in re.findall(r"^\s+fault_point\((.*)\)", path.read_text(), re.MULTILINE):
            assert re.fullmatch(r'"[a-z-]+"', argument), f"{path}: {argument}"
            if _who_dies_in(path) == program:
                names.add(argument.strip('"'))
    return sorted(names)


def patched(program: str, code: str) -> list[str]:
    """Return a command that runs a program after some code that changes the system under it."""
    entry = program.removeprefix("zmq")
    run = f"import os, sys, time\n{code}\nfrom zmqpush.__main__ import {entry}; {entry}()"
    return [sys.executable, "-c", run]


# The sync with that number fails, counted from 1; with `onwards` all later ones fail, too.
FAILING_SYNC = """
import errno, itertools
count, sync = itertools.count(1), os.fdatasync
def fdatasync(fd):
    n = next(count)
    if n == {n} or ({onwards} and n > {n}):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    sync(fd)
os.fdatasync = fdatasync
"""

# The spool's disk takes its time for each block.
SLOW_DISK = """
write = os.pwritev
def pwritev(*args):
    time.sleep(0.05)
    return write(*args)
os.pwritev = pwritev
"""

# The wall clock leaps a day to and fro each time it is looked at.
LEAPING_CLOCK = """
import itertools
count, now = itertools.count(), time.time
time.time = lambda: now() + 86400 * (next(count) % 3 - 1)
"""


class Feeder:
    """
    Writes numbered lines to a sender, in blocks of all sizes, until told to stop.

    It ends by itself when the sender dies. The input stays open unless `close` is called.
    """

    def __init__(self, child: subprocess.Popen[bytes], first: int, seed: int) -> None:
        self._child = child
        self.next = first
        self._random = random.Random(seed)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        assert self._child.stdin
        with contextlib.suppress(BrokenPipeError, ValueError):  # it died, or was closed
            while not self._stopped.wait(0.003):
                end = self.next + int(10 ** self._random.uniform(0, 3.3))
                # Also when only a part of it was taken.
                data, self.next = lines(range(self.next, end)), end
                self._child.stdin.write(data)
                self._child.stdin.flush()

    def stop(self) -> int:
        """Stop, and return how many lines were written at most."""
        self._stopped.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        return self.next - 1


class Pipeline:
    """One spool, and one receiver with a state and a file; the feeder repeats what is not safe."""

    def __init__(self, start: Callable[..., subprocess.Popen[bytes]], directory: Path) -> None:
        self._start = start
        self.endpoint = f"ipc://{directory}/socket"
        self.spool = directory / "spool"
        self.state = directory / "state"
        self.path = directory / "all"
        self.fed = 0  # up to here

    def receive(
        self, *options: object, fault: str = "", command: Iterable[str] = (ZMQPULL,)
    ) -> subprocess.Popen[bytes]:
        """Start the receiver."""
        args = ("-a", self.endpoint, "--state", self.state, "--to", self.path, *options)
        return self._start(*command, *args, env=_environment(fault))

    def send(
        self,
        *options: object,
        fault: str = "",
        command: Iterable[str] = (ZMQPUSH,),
        **kwargs: object,
    ) -> subprocess.Popen[bytes]:
        """Start a sender."""
        args = ("--spool", self.spool, "-c", self.endpoint, "--format", "raw", *options)
        return self._start(*command, *args, env=_environment(fault), **kwargs)

    def feed(self, child: subprocess.Popen[bytes]) -> Feeder:
        """Feed a sender with what follows what is safe."""
        return Feeder(child, self.fed + 1, seed=self.fed)

    def put(self, child: subprocess.Popen[bytes], count: int) -> None:
        """Feed a sender with so many lines more."""
        assert child.stdin
        first = self.fed + 1
        self.fed += count
        child.stdin.write(lines(range(first, self.fed + 1)))
        child.stdin.flush()

    def leave(self, count: int, *options: object) -> None:
        """Leave so many lines more in the spool, without any receiver."""
        child = self.send("--timeout", 0, *options)
        before = len(set(spooled(self.spool)) - set(written(self.path)))
        self.put(child, count)
        assert end(child, read=count, before=before)[3] == before + count

    def look_what_is_safe(self) -> None:
        """Note, after a sender has died, from where to feed: no line before may be missing."""
        safe = {*spooled(self.spool), *written(self.path)}
        self.fed = max(safe, default=0)
        assert len(safe) == self.fed, f"{self.fed - len(safe)} lines are missing before {self.fed}"

    def finish(self, receiver: subprocess.Popen[bytes] | None = None, count: int = 10) -> None:
        """Feed a last sender to its end, end the receiver, and look at the file."""
        receiver = receiver or self.receive()
        sender = self.send()
        self.put(sender, count)
        _, err = sender.communicate(timeout=PATIENCE)
        assert sender.returncode == 0, err
        stop(receiver)
        self.verify()

    def verify(self) -> None:
        """Look that each line is in the file once."""
        lost, too_often = compare(written(self.path), range(1, self.fed + 1))
        assert not lost, f"of {self.fed} {len(lost)} are lost: {lost[:10]}"
        assert not too_often, f"of {self.fed} {len(too_often)} are repeated: {too_often[:10]}"
        assert self.path.read_bytes()[-1:] in (b"", b"\n")


def _environment(fault: str) -> dict[str, str]:
    return os.environ | ({"ZMQPUSH_FAULT": fault} if fault else {})


def kill(child: subprocess.Popen[bytes]) -> None:
    """Kill a child that must still live."""
    assert child.poll() is None, child.stderr and child.stderr.read()
    child.kill()
    child.wait(PATIENCE)


def killed(child: subprocess.Popen[bytes]) -> bool:
    """Return whether a child ends by being killed."""
    return child.wait(PATIENCE) == -signal.SIGKILL


def stop(receiver: subprocess.Popen[bytes]) -> bytes:
    """End a receiver in order; return what it said."""
    wait_until_ready(receiver)
    receiver.terminate()
    _, err = receiver.communicate(timeout=PATIENCE)
    assert receiver.returncode == 0, err
    return err


def end(
    sender: subprocess.Popen[bytes], *, read: int, before: int = 0
) -> tuple[int, int, int, int]:
    """Have a sender end at the end of its input; return what it says, which must add up."""
    out, err = sender.communicate(timeout=PATIENCE)
    return account(sender.returncode, out, err, read=read, before=before)


def wait_for_growth(path: Path, size: int = 1, *children: subprocess.Popen[bytes]) -> None:
    """Return once a file is so many bytes longer, or a child has died."""

    def length() -> int:
        return path.stat().st_size if path.exists() else 0

    before = length()
    wait_until(lambda: length() >= before + size or any(c.poll() is not None for c in children))


def resident_bytes(child: subprocess.Popen[bytes]) -> int:
    """Return how much memory a process has."""
    status = Path(f"/proc/{child.pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert match
    return int(match[1]) << 10
