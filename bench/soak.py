"""
Kill both ends of acknowledged delivery at random while lines flow; count what arrived.

Usage: python bench/soak.py [--seconds N] [--lines-min N] [--rate N] [--seed N] [--calm]

Both ends die by kill -9 every 1 to 3 seconds, each by a clock of its own, shortly after a
burst of lines. What a killed sender had read and not spooled is gone with it, so the
feeder goes on after the last line that the spool or the file holds. Every line has a
number, and the file must hold each of them once and in order. Everything stays on loopback;
prints the report of docs/reliability.md, and exits with 1 if a line is lost or there twice.
"""

import argparse
import contextlib
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from run import TIMEOUT, ZMQPULL, ZMQPUSH, free_port
from zmqpush.spool.segment import HEADER, list_segments, read_block, read_header

RECORD = re.compile(rb'^\{"message":"(\d+) [^"\n]*","type":"[^\n]*\}\n', re.MULTILINE)
FILLER = b"a line of a log as there are many, more or less"
CUT_OFF = re.compile(r"cut off (\d+) bytes")
# How often both ends are looked at, in seconds, once they have been up for so long.
SAMPLE_INTERVAL = 0.5
BATCH = 1000  # lines
# Lines come in bursts, at the latest after so many seconds. One comes before each kill, which
# waits until its victim has begun to write, but not for long, and then so many seconds at most.
BURST_INTERVAL = 3.0
WORK_TIMEOUT = 0.5
KILL_DELAY = 0.02
READ_BYTES = 4 << 20


@dataclass
class End:
    """One of both programs, started again and again."""

    command: list[str]
    log: Path
    stdin: int
    writes: Path
    kills: int = 0
    kill_at: float = 0.0
    doomed: bool = False  # it dies then
    before: int | None = None  # how much it had written, if it dies when that changes
    # Each a pair: when, in seconds; memory in bytes, or descriptors.
    memory: list[tuple[float, int]] = field(default_factory=list)
    descriptors: list[tuple[float, int]] = field(default_factory=list)

    def start(self) -> None:
        """Start it."""
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                self.command, stdin=self.stdin, stdout=subprocess.DEVNULL, stderr=log
            )
        if self.child.stdin:
            os.set_blocking(self.child.stdin.fileno(), False)
        self.since = time.monotonic()

    def kill(self) -> None:
        """Kill it, and see that it lived until then."""
        self.child.kill()
        if self.child.stdin:
            self.child.stdin.close()
        if (code := self.child.wait(TIMEOUT)) != -9:
            raise RuntimeError(f"{self.command[0]} ended by itself with {code}")
        self.kills += 1
        self.doomed, self.before = False, None

    def sample(self, now: float, began: float) -> None:
        """Note its memory and descriptors."""
        if now - self.since < SAMPLE_INTERVAL:
            return  # it is starting
        with contextlib.suppress(FileNotFoundError):
            proc = Path(f"/proc/{self.child.pid}")
            pages = int((proc / "statm").read_text().split()[1])
            self.memory.append((now - began, pages * os.sysconf("SC_PAGE_SIZE")))
            self.descriptors.append((now - began, len(os.listdir(proc / "fd"))))


@dataclass
class Verdict:
    """What the file holds."""

    lost: int = 0
    duplicated: int = 0
    disordered: int = 0
    foreign: int = 0  # lines that were never fed, or not whole


def last_number(data: bytes) -> int:
    """Return the number of the last record; 0 if there is none."""
    numbers = RECORD.findall(data)
    return int(numbers[-1]) if numbers else 0


def last_held(slot: Path, out: Path) -> int:
    """Return the last line's number that is in the spool of a dead sender, or in the file."""
    for segment in reversed(list_segments(slot) if slot.exists() else []):
        payload = b""
        with segment.path.open("rb") as file:
            mark, offset, _ = read_header(segment, file.fileno())
            while block := read_block(file.fileno(), offset, segment.size, mark):
                payload = bytes(block.payload)
                offset += HEADER.size + len(payload)
        if payload:
            return last_number(payload)
    # All that was sent is acknowledged, so it is safe in the file.
    if not out.exists():
        return 0
    with out.open("rb") as file:
        file.seek(max(0, out.stat().st_size - (64 << 10)))
        file.readline()
        return last_number(b"\n" + file.read())


def judge(out: Path, total: int) -> Verdict:
    """Read the file once."""
    verdict = Verdict()
    seen = bytearray(total + 1)
    last = 0
    rest = b""
    with out.open("rb") as file:
        while data := file.read(READ_BYTES):
            whole, newline, tail = data.rpartition(b"\n")
            lines, rest = (rest + whole + newline, tail) if newline else (b"", rest + tail)
            numbers = RECORD.findall(lines)
            verdict.foreign += lines.count(b"\n") - len(numbers)
            for number in map(int, numbers):
                if not 0 < number <= total:
                    verdict.foreign += 1
                    continue
                verdict.duplicated += seen[number]
                verdict.disordered += number <= last
                seen[number] = 1
                last = number
    verdict.foreign += bool(rest)
    verdict.lost = total - seen.count(1)
    return verdict


def bytes_in(path: Path) -> int:
    total = path.stat().st_size if path.is_file() else 0
    for place, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


class Soak:
    """One run."""

    def __init__(self, directory: Path, args: argparse.Namespace) -> None:
        self.args = args
        self.chance = random.Random(args.seed)
        self.out = directory / "out"
        self.spool = directory / "spool"
        self.state = directory / "state"
        self.peaks = {self.spool: 0, self.state: 0}
        endpoint = f"tcp://127.0.0.1:{free_port()}"
        sender = [ZMQPUSH, "--spool", str(self.spool), "-c", endpoint]
        receiver = [ZMQPULL, "-a", endpoint, "--state", str(self.state), "--to", str(self.out)]
        self.sender = End(sender, directory / "sender.log", subprocess.PIPE, self.spool)
        self.receiver = End(receiver, directory / "receiver.log", subprocess.DEVNULL, self.out)
        self.due = 0  # lines that have been written by now
        self.fed = 0  # of them, into the sender
        self.repeated = 0
        self.pending = memoryview(b"")

    def run(self) -> None:
        """Feed and kill, then let all of it drain."""
        self.began = now = time.monotonic()
        ends = (self.sender, self.receiver)
        for end in ends:
            end.start()
            end.kill_at = now + self.chance.uniform(1, 3)
        sample_at = burst_at = now
        while now - self.began < self.args.seconds or self.fed < self.args.lines_min:
            for end in ends if not self.args.calm else ():
                if end.before is not None and bytes_in(end.writes) != end.before:
                    end.before = None
                    end.kill_at = now + self.chance.uniform(0, KILL_DELAY)
                if now < end.kill_at:
                    continue
                if not end.doomed:
                    burst_at = now
                    end.kill_at = now + WORK_TIMEOUT
                    end.doomed = True
                    end.before = bytes_in(end.writes)
                    continue
                end.kill()
                if end is self.sender:
                    self.go_back()
                end.start()
                end.kill_at = time.monotonic() + self.chance.uniform(1, 3)
            if now >= burst_at:
                burst_at = now + self.chance.uniform(0, BURST_INTERVAL)
                self.due = int((now - self.began) * self.args.rate)
            if now >= sample_at:
                sample_at = now + SAMPLE_INTERVAL
                self.sample(now)
            if not self.feed():
                time.sleep(0.001)
            now = time.monotonic()
        self.drain()

    def go_back(self) -> None:
        """Feed again what the sender took with it."""
        held = last_held(self.spool / "0", self.out)
        self.repeated += self.fed - held
        self.fed = held
        self.pending = memoryview(b"")

    def feed(self) -> bool:
        """Write some lines, if they are due and there is room; whether there was."""
        if not self.pending:
            if self.due - self.fed < BATCH:
                return False
            numbers = range(self.fed + 1, self.fed + BATCH + 1)
            self.pending = memoryview(b"".join(b"%d %b\n" % (n, FILLER) for n in numbers))
            self.fed += BATCH
        try:
            self.pending = self.pending[os.write(self.sender.child.stdin.fileno(), self.pending) :]
        except BlockingIOError:
            return False
        return True

    def sample(self, now: float) -> None:
        """Look at both ends and their files."""
        for end in (self.sender, self.receiver):
            end.sample(now, self.began)
        for directory in self.peaks:
            self.peaks[directory] = max(self.peaks[directory], bytes_in(directory))

    def drain(self) -> None:
        """Kill no more: wait until everything is in the file."""
        stdin = self.sender.child.stdin
        os.set_blocking(stdin.fileno(), True)
        stdin.write(self.pending)
        stdin.close()
        for end in (self.sender, self.receiver):
            if end is self.receiver:
                end.child.terminate()
            if code := end.child.wait(TIMEOUT):
                raise RuntimeError(f"{end.command[0]} ended with {code}")
        self.seconds = time.monotonic() - self.began

    def close(self) -> None:
        """End both, whatever has happened."""
        for end in (self.sender, self.receiver):
            if end.child.poll() is None:
                end.child.kill()
                end.child.wait()
            if end.child.stdin:
                with contextlib.suppress(BrokenPipeError):
                    end.child.stdin.close()


def trend(samples: list[tuple[float, int]], unit: float) -> str:
    """Return the median of the first and of the last third, the peak, and the slope an hour."""
    if len(samples) < 6:
        return "too few samples | | | "
    third = len(samples) // 3
    values = [value / unit for _, value in samples]
    slope, _ = statistics.linear_regression([when / 3600 for when, _ in samples], values)
    first, last = statistics.median(values[:third]), statistics.median(values[-third:])
    return f"{first:.1f} | {last:.1f} | {max(values):.1f} | {slope:+.1f}"


def report(soak: Soak, verdict: Verdict) -> None:
    cuts = list(map(int, CUT_OFF.findall(soak.receiver.log.read_text())))
    rows = {
        "seed": soak.args.seed,
        "seconds": f"{soak.seconds:.0f}",
        "lines": soak.fed,
        "lines a second": f"{soak.fed / soak.seconds:.0f}",
        "kills of the sender": soak.sender.kills,
        "kills of the receiver": soak.receiver.kills,
        "lines fed again: a killed sender had not spooled them": soak.repeated,
        "times the file was cut back after a kill": f"{len(cuts)}, {sum(cuts)} bytes",
        "largest spool": f"{soak.peaks[soak.spool] / 2**20:.1f} MiB",
        "largest state": f"{soak.peaks[soak.state] / 2**20:.1f} MiB",
        "**lost**": verdict.lost,
        "**duplicated**": verdict.duplicated,
        "out of order": verdict.disordered,
        "foreign or torn": verdict.foreign,
    }
    print("| what | how much |\n|---|---|")
    for what, how_much in rows.items():
        print(f"| {what} | {how_much} |")
    print("\n| | first third | last third | peak | slope an hour |\n|---|---|---|---|---|")
    for name, end in (("sender", soak.sender), ("receiver", soak.receiver)):
        print(f"| memory of the {name}, MiB | {trend(end.memory, 2**20)} |")
        print(f"| descriptors of the {name} | {trend(end.descriptors, 1)} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--lines-min", type=int, default=0, help="go on until so many are fed")
    parser.add_argument("--rate", type=float, default=25_000.0, help="lines a second, on average")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--calm", action="store_true", help="kill nobody: for memory over time")
    args = parser.parse_args()
    print(f"seed {args.seed}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="zmqpush-soak-") as name:
        soak = Soak(Path(name), args)
        try:
            soak.run()
        except (RuntimeError, BrokenPipeError, subprocess.TimeoutExpired) as exc:
            logs = [end.log.read_text()[-4000:] for end in (soak.sender, soak.receiver)]
            print(f"seed {args.seed}: {exc!r}", *logs, sep="\n", file=sys.stderr)
            return 1
        finally:
            soak.close()
        verdict = judge(soak.out, soak.fed)
        report(soak, verdict)
    return int(any(vars(verdict).values()))


if __name__ == "__main__":
    sys.exit(main())
