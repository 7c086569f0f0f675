"""
Have a thousand senders ship to one zmqpull at once: is each of them served, and how evenly.

Usage: python bench/senders.py [--senders N] [--blocks N] [--nofile N] [--smoke]

Each sender is a DEALER socket and the state machine of zmqpush itself, with its blocks in
memory; several hundred share a process. First all connect, then all ship. All write into
one file, since with a file each (--to with {type}) it would be the opening of files that is
measured. Each record names its sender and has a number, so the file tells what was lost,
came twice or is out of order. Everything stays on loopback. Prints the table of
docs/performance.md, and exits with 1 if a record is lost or there twice.
"""

import argparse
import multiprocessing
import os
import re
import resource
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import zmq

from run import TIMEOUT, ZMQPULL, free_port, wait_for_port
from zmqpush.core.frames import Data, Labels
from zmqpush.core.sender import Redial, Sender

PER_PROCESS = 250
RECORDS = 100  # a block
HWM = 1024
POLL_MS = 20
FILLER = b"x" * 70


class Blocks:
    """A ``core.sender.Store`` of a known number of blocks."""

    recovered = 0
    spooled = True
    was = ""

    def __init__(self, name: int, count: int) -> None:
        self.rename_stream()
        self.labels = Labels(f"sender{name}")
        self.first = 1
        self.end = count * RECORDS
        self.closed = True  # for now
        self._name = name
        self._next = 1

    @property
    def next_labels(self) -> Labels | None:
        """What the records of the next block have in common."""
        return None if self.closed or self._next > self.end else self.labels

    def take(self) -> Data | None:
        """Make the next block: always the same bytes."""
        if self.next_labels is None:
            return None
        numbers = range(self._next, self._next + RECORDS)
        self._next += RECORDS
        line = b'{"sender":%d,"number":%d,"message":"%b"}\n'
        return Data.of(
            numbers[0], RECORDS, b"".join(line % (self._name, n, FILLER) for n in numbers)
        )

    def rewind(self) -> None:
        """Begin again at the first block that is not acknowledged."""
        self._next = self.first

    def acknowledge(self, acked: int) -> None:
        """Forget blocks."""
        self.first = max(self.first, acked + 1)
        self._next = max(self._next, self.first)

    def rename_stream(self) -> None:
        """Take a new secret."""
        self.secret = secrets.token_hex(16)


class Shipper:
    """One sender: its socket, its blocks and its protocol."""

    def __init__(self, context: zmq.Context, endpoint: str, name: int, blocks: int) -> None:
        self.store = Blocks(name, blocks)
        self.sender = Sender(self.store, secrets.token_hex(16))
        self.context, self.endpoint = context, endpoint
        self.dials = 0
        self.finished = 0.0
        self.dial_at = 0.0
        self.socket: zmq.Socket | None = None

    def dial(self, now: float, poller: zmq.Poller) -> None:
        """Connect."""
        self.socket = self.context.socket(zmq.DEALER)
        options = {zmq.LINGER: 0, zmq.IMMEDIATE: 1, zmq.SNDHWM: HWM, zmq.RCVHWM: HWM}
        for option, value in {**options, zmq.RECONNECT_IVL: 100}.items():
            self.socket.setsockopt(option, value)
        self.socket.connect(self.endpoint)
        poller.register(self.socket, zmq.POLLIN)
        self.sender.connect(now)
        self.dials += 1

    def turn(self, now: float, poller: zmq.Poller) -> None:
        """Receive and send what can be."""
        if self.socket is None:
            if now >= self.dial_at:
                self.dial(now, poller)
            return
        redial: Redial | None = None
        try:
            while True:
                redial = self.sender.receive(self.socket.recv(zmq.NOBLOCK), now) or redial
        except zmq.Again:
            pass
        if redial := redial or self.sender.tick(now):
            poller.unregister(self.socket)
            self.socket.close()
            self.socket = None
            self.dial_at = now + redial.delay
            self.sender.disconnected(now)
        elif self.store.first > self.store.end:
            self.finished = now
            self.socket.send(self.sender.goodbye() or b"")
        elif self.socket.getsockopt(zmq.EVENTS) & zmq.POLLOUT:
            while frame := self.sender.next_frame(now):
                self.socket.send(frame, zmq.NOBLOCK)
        else:
            self.sender.disconnected(now)


class Shippers:
    """Several senders of one process."""

    def __init__(self, endpoint: str, names: range, blocks: int) -> None:
        self.context = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, 2 * len(names) + 10)
        self.poller = zmq.Poller()
        self.all = [Shipper(self.context, endpoint, name, blocks) for name in names]

    def serve(self, done: Callable[[Shipper], object]) -> None:
        """Let all of them work until each is done."""
        look_at = 0.0
        deadline = time.monotonic() + TIMEOUT
        while not all(map(done, self.all)) and time.monotonic() < deadline:
            readable = dict(self.poller.poll(POLL_MS))
            now = time.monotonic()
            look = now >= look_at  # at all, for timers and connections
            if look:
                look_at = now + POLL_MS / 1000
            for shipper in self.all:
                if not shipper.finished and (look or shipper.socket in readable):
                    shipper.turn(now, self.poller)


def ship(pipe: Connection, endpoint: str, names: range, blocks: int) -> None:
    """Be several senders; tell when each had all acknowledged, and how often it connected."""
    shippers = Shippers(endpoint, names, blocks)
    pipe.send("ready")
    pipe.recv()
    shippers.serve(lambda shipper: shipper.sender.streaming)
    pipe.send("connected")
    pipe.recv()
    for shipper in shippers.all:
        shipper.store.closed = False
    shippers.serve(lambda shipper: shipper.finished)
    pipe.send([(shipper.finished, shipper.dials) for shipper in shippers.all])
    pipe.recv()  # until all are done: a socket that closes is one fewer to serve
    shippers.context.destroy(linger=0)


def judge(path: Path, senders: int, records: int) -> tuple[int, int, int]:
    """Return how many records are lost, there twice or foreign, and out of order."""
    pattern = re.compile(rb'\{"sender":(\d+),"number":(\d+),"message":"x{70}"\}\n')
    last = [0] * senders
    seen = [bytearray(records + 1) for _ in range(senders)]
    twice = disordered = 0
    with path.open("rb") as file:
        for line in file:
            match = pattern.fullmatch(line)
            if not match:
                twice += 1
                continue
            name, number = int(match[1]), int(match[2])
            twice += seen[name][number]
            seen[name][number] = 1
            disordered += number != last[name] + 1
            last[name] = number
    return sum(records - numbers.count(1) for numbers in seen), twice, disordered


def memory(pid: int, what: str) -> int:
    """Return what the kernel says of a process's memory, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) * 1024


def limit_descriptors(limit: int | None) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit or soft, hard))


def watch(receiver: subprocess.Popen[bytes], pipes: list[Connection]) -> int:
    """Wait for all of them; return the most descriptors that the receiver had."""
    descriptors = 0
    while not descriptors or not all(pipe.poll() for pipe in pipes):
        descriptors = max(descriptors, len(os.listdir(f"/proc/{receiver.pid}/fd")))
        time.sleep(0.02)
        assert receiver.poll() is None, receiver.stderr.read()
    return descriptors


def measure(args: argparse.Namespace, directory: Path) -> int:
    endpoint = f"tcp://127.0.0.1:{(port := free_port())}"
    out = directory / "out"
    command = [ZMQPULL, "-a", endpoint, "--state", directory / "state", "--to", out]
    receiver = subprocess.Popen(
        [*map(str, command), "--memory", args.memory],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: limit_descriptors(args.nofile),
    )
    processes = []
    try:
        wait_for_port(port)
        idle = memory(receiver.pid, "VmRSS")
        limit_descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        pipes = []
        spawn = multiprocessing.get_context("spawn")
        for first in range(0, args.senders, PER_PROCESS):
            pipe, end = spawn.Pipe()
            names = range(first, min(first + PER_PROCESS, args.senders))
            arguments = (end, endpoint, names, args.blocks)
            processes.append(spawn.Process(target=ship, args=arguments, daemon=True))
            processes[-1].start()
            pipes.append(pipe)
        assert all(pipe.recv() == "ready" for pipe in pipes)
        began = time.monotonic()
        for pipe in pipes:
            pipe.send("connect")
        descriptors = watch(receiver, pipes)
        assert all(pipe.recv() == "connected" for pipe in pipes)
        connected = time.monotonic() - began
        began = time.monotonic()
        for pipe in pipes:
            pipe.send("ship")
        descriptors = max(descriptors, watch(receiver, pipes))
        results = [result for pipe in pipes for result in pipe.recv()]
        peak = memory(receiver.pid, "VmHWM")
        for pipe in pipes:
            pipe.send("end")
        receiver.terminate()
        told = receiver.communicate(timeout=TIMEOUT)[1].decode().strip()
    finally:
        for process in processes:
            process.terminate()
        if receiver.poll() is None:
            receiver.kill()
            receiver.wait()
    records = args.blocks * RECORDS
    lost, twice, disordered = judge(out, args.senders, records)
    times = sorted(finished - began for finished, _ in results if finished)
    report(
        {
            "senders": args.senders,
            "records of each, in blocks of 100": records,
            "served: all records acknowledged": len(times),
            "lost": lost,
            "twice or foreign": twice,
            "out of order": disordered,
            **fairness(times, records),
            "all were connected after": f"{connected:.2f} s",
            "connections": sum(dials for _, dials in results),
            "--memory": args.memory,
            "memory of zmqpull, idle and at its peak": f"{idle >> 20} and {peak >> 20} MiB",
            "descriptors of zmqpull at their peak": descriptors,
        }
    )
    print(told, file=sys.stderr)
    return int(bool(lost or twice or disordered or len(times) < args.senders))


def fairness(times: list[float], records: int) -> dict[str, object]:
    if not times:
        return {}
    rates = [records / seconds for seconds in times]
    jain = sum(rates) ** 2 / (len(rates) * sum(rate * rate for rate in rates))
    return {
        "records a second, all together": f"{len(times) * records / times[-1]:.0f}",
        "the first and the last one done after": f"{times[0]:.2f} and {times[-1]:.2f} s",
        "the last one's time by the first one's": f"{times[-1] / times[0]:.2f}",
        "Jain's index of their speeds (1 is even)": f"{jain:.3f}",
    }


def report(rows: dict[str, object]) -> None:
    print("| what | how much |\n|---|---|")
    for what, how_much in rows.items():
        print(f"| {what} | {how_much} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--senders", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=50, help="of each, of 100 records")
    parser.add_argument("--memory", default="64MiB", help="the budget of zmqpull")
    parser.add_argument("--nofile", type=int, help="the soft limit that zmqpull starts with")
    parser.add_argument("--smoke", action="store_true", help="see only that everything runs")
    args = parser.parse_args()
    if args.smoke:
        args.senders, args.blocks = 50, 5
    with tempfile.TemporaryDirectory(prefix="zmqpush-senders-") as name:
        return measure(args, Path(name))


if __name__ == "__main__":
    sys.exit(main())
