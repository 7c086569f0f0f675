"""
Have a thousand senders ship to one zmqpull at once: is each of them served, and how evenly.

Usage: python bench/senders.py [--senders N] [--blocks N] [--key] [--nofile N] [--smoke]
       python bench/senders.py --one-line [--senders 200] [--seconds N]

Each sender is a DEALER socket and the state machine of zmqpush itself, with its blocks in
memory; several hundred share a process. First all connect, then all ship. All write into
one file, since with a file each (--to with {type}) it would be the opening of files that is
measured. Each record names its sender and has a number, so the file tells what was lost,
came twice or is out of order. Everything stays on loopback. Prints the table of
docs/performance.md, and exits with 1 if a record is lost or there twice.

``--one-line`` asks what a block costs zmqpull beside its bytes: raw connections of one process
send blocks of one line as fast as credit allows. They share their frames but for the session, so
that the sending costs little. First one of them sends a block at a time, for the latency of its
acknowledgement.
"""

import argparse
import multiprocessing
import os
import re
import resource
import secrets
import selectors
import socket
import struct
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ClassVar

import zmq

from run import TIMEOUT, ZMQPULL, free_port, wait_for_port
from zmqpush.core.protocol.messages import (
    MAX_CREDIT_BLOCKS,
    VERSION,
    Ack,
    Data,
    Hello,
    Labels,
    Message,
    Welcome,
    decode,
    encode,
)
from zmqpush.core.protocol.sender import Redial, Sender
from zmqpush.security.keyfile import KeyPair, write_pair

PER_PROCESS = 250
RECORDS = 100  # a block
HWM = 1024
POLL_MS = 20
FILLER = b"x" * 70
# So many blocks go alone, each so long after the last one's acknowledgement, in seconds.
LONE_BLOCKS = 300
LONE_INTERVAL = 0.002
ZMTP_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
ZMTP_READY = b"\x04\x1c\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
ZMTP_LONG, ZMTP_COMMAND = 2, 4
# Before what is the same in all sessions.
FRAME_HEADER_BYTES = 16


class Blocks:
    """A ``core.protocol.sender.Store`` of a known number of blocks."""

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

    def __init__(
        self, context: zmq.Context, endpoint: str, name: int, blocks: int, key: KeyPair | None
    ) -> None:
        self.key = key
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
        if self.key:  # one for both ends
            self.socket.curve_serverkey = self.socket.curve_publickey = self.key.public.encode()
            self.socket.curve_secretkey = self.key.secret.encode()
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

    def __init__(self, endpoint: str, names: range, blocks: int, key: KeyPair | None) -> None:
        self.context = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, 2 * len(names) + 10)
        self.poller = zmq.Poller()
        self.all = [Shipper(self.context, endpoint, name, blocks, key) for name in names]

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


def ship(pipe: Connection, endpoint: str, names: range, blocks: int, key: KeyPair | None) -> None:
    """Be several senders; tell when each had all acknowledged, and how often it connected."""
    shippers = Shippers(endpoint, names, blocks, key)
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


class Wire:
    """A raw connection that sends blocks of one line, each as long as the others."""

    tails: ClassVar[list[bytes]] = []  # of all frames, by number, what no session changes

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent = self.acked = self._blocks = self._bytes = 0
        self._got = self._head = b""
        self.socket.sendall(ZMTP_GREETING + ZMTP_READY)
        while len(self._got) < len(ZMTP_GREETING):
            self._got += self.socket.recv(len(ZMTP_GREETING) - len(self._got))
        self._got = b""
        while not self._head:
            self.receive()

    def receive(self) -> None:
        """Take in what is there, acknowledgements mostly."""
        self._got += self.socket.recv(1 << 16)
        at = 0
        while len(self._got) >= at + 9:
            flags, size = self._got[at], self._got[at + 1]
            begin = at + 2
            if flags & ZMTP_LONG:
                (size,) = struct.unpack_from(">Q", self._got, at + 1)
                begin = at + 9
            if len(self._got) < begin + size:
                break
            at = begin + size
            if flags & ZMTP_COMMAND:  # READY
                self._greet()
            else:
                self._take(*decode(self._got[begin:at]))
        self._got = self._got[at:]

    def _greet(self) -> None:
        values = {"versions": [VERSION, VERSION], "secret": secrets.token_hex(16), "first": 1}
        hello = encode(Hello({**values, "run": secrets.token_hex(16)}), 0)
        self.socket.sendall(bytes((0, len(hello))) + hello)

    def _take(self, message: Message | None, session: int) -> None:
        match message:
            case Ack(acked, blocks, size):
                self.acked, self._blocks, self._bytes = acked, blocks, size
            case Welcome(values):
                self._blocks, self._bytes = values["blocks"], values["bytes"]
                frame = encode(line_block(1), session)
                self._head = bytes((0, len(frame))) + frame[:FRAME_HEADER_BYTES]
            case _:
                raise AssertionError(message)

    def send(self, most: int = MAX_CREDIT_BLOCKS) -> None:
        """Send so many blocks, or as many as credit allows."""
        # Whoever has a byte of credit left may send a block.
        room = min(self._blocks, -(-self._bytes // len(line_block(1).payload)))
        end = min(self.acked + room, self.sent + most)
        for number in range(len(self.tails) + 1, end + 1):
            self.tails.append(encode(line_block(number), 0)[FRAME_HEADER_BYTES:])
        if end > self.sent:
            self.socket.sendall(self._head.join([b"", *self.tails[self.sent : end]]))
            self.sent = end


def line_block(number: int) -> Data:
    return Data.of(number, 1, b'{"number":%012d,"message":"%b"}\n' % (number, FILLER))


def drive(wires: list[Wire], until: float) -> None:
    """Send until that time, and wait until all is acknowledged."""
    with selectors.DefaultSelector() as selector:
        for wire in wires:
            selector.register(wire.socket, selectors.EVENT_READ, wire)
            wire.send()
        deadline = until + TIMEOUT
        while (now := time.monotonic()) < until or any(w.acked < w.sent for w in wires):
            assert now < deadline, "some blocks are not acknowledged"
            for key, _ in selector.select(POLL_MS / 1000):
                key.data.receive()
                if now < until:
                    key.data.send()


def latencies(wire: Wire) -> list[float]:
    """Return how long lone blocks take until they are acknowledged, in seconds, in order."""
    took = []
    for _ in range(LONE_BLOCKS):
        time.sleep(LONE_INTERVAL)
        began = time.monotonic()
        wire.send(1)
        while wire.acked < wire.sent:
            wire.receive()
        took.append(time.monotonic() - began)
    return sorted(took)


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
    key = write_pair(directory / "key", {}) if args.key else None
    command += ["--key", directory / "key", "--allow", "any"] if key else []
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
            arguments = (end, endpoint, names, args.blocks, key)
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


def judge_lines(path: Path, wires: list[Wire]) -> tuple[int, int]:
    """Return how many lines are lost, and there twice or foreign."""
    with path.open("rb") as file:
        seen = Counter(file)
    sent = sorted(wire.sent for wire in wires)
    lost = twice = 0
    for number in range(1, sent[-1] + 1):
        wanted = len(sent) - bisect_left(sent, number)
        there = seen.pop(line_block(number).payload, 0)
        lost += max(0, wanted - there)
        twice += max(0, there - wanted)
    return lost, twice + seen.total()


def processor_time(pid: int) -> float:
    """Return how much a process has taken, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_lines(args: argparse.Namespace, directory: Path) -> int:
    port = free_port()
    out = directory / "out"
    command = [ZMQPULL, "-a", f"tcp://127.0.0.1:{port}", "--state", directory / "state"]
    receiver = subprocess.Popen([*map(str, command), "--to", out, "--memory", args.memory])
    try:
        wait_for_port(port)
        wires = [Wire(port) for _ in range(args.senders)]
        lone = latencies(wires[0])
        before = sum(wire.acked for wire in wires)
        began, cpu = time.monotonic(), processor_time(receiver.pid)
        drive(wires, began + args.seconds)
        took, cpu = time.monotonic() - began, processor_time(receiver.pid) - cpu
        peak = memory(receiver.pid, "VmHWM")
    finally:
        receiver.terminate()
        receiver.wait(TIMEOUT)
    lost, twice = judge_lines(out, wires)
    blocks = sum(wire.acked for wire in wires) - before
    report(
        {
            "senders": args.senders,
            "blocks of one line": blocks,
            "lost": lost,
            "twice or foreign": twice,
            "blocks a second, all together": f"{blocks / took:.0f}",
            "processor time of zmqpull for a block": f"{1e6 * cpu / blocks:.2f} us",
            "Jain's index of their speeds (1 is even)": f"{jain([w.acked for w in wires]):.3f}",
            "a lone block is acknowledged after (median, 99 %)": " and ".join(
                f"{1000 * lone[int(share * LONE_BLOCKS)]:.2f} ms" for share in (0.5, 0.99)
            ),
            "memory of zmqpull at its peak": f"{peak >> 20} MiB",
        }
    )
    return int(bool(lost or twice))


def fairness(times: list[float], records: int) -> dict[str, object]:
    if not times:
        return {}
    rates = [records / seconds for seconds in times]
    return {
        "records a second, all together": f"{len(times) * records / times[-1]:.0f}",
        "the first and the last one done after": f"{times[0]:.2f} and {times[-1]:.2f} s",
        "the last one's time by the first one's": f"{times[-1] / times[0]:.2f}",
        "Jain's index of their speeds (1 is even)": f"{jain(rates):.3f}",
    }


def jain(rates: list[float]) -> float:
    return sum(rates) ** 2 / (len(rates) * sum(rate * rate for rate in rates))


def report(rows: dict[str, object]) -> None:
    print("| what | how much |\n|---|---|")
    for what, how_much in rows.items():
        print(f"| {what} | {how_much} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--senders", type=int, help="1000; with --one-line 200")
    parser.add_argument("--blocks", type=int, default=50, help="of each, of 100 records")
    parser.add_argument("--one-line", action="store_true", help="blocks of one line each")
    parser.add_argument("--seconds", type=float, default=10, help="of --one-line")
    parser.add_argument("--memory", default="64MiB", help="the budget of zmqpull")
    parser.add_argument("--key", action="store_true", help="encrypt; not with --one-line")
    parser.add_argument("--nofile", type=int, help="the soft limit that zmqpull starts with")
    parser.add_argument("--smoke", action="store_true", help="see only that everything runs")
    args = parser.parse_args()
    if args.smoke:
        args.senders, args.blocks, args.seconds = 50, 5, 0.5
    args.senders = args.senders or (200 if args.one_line else 1000)
    failed = 0
    for run in (
        (measure, measure_lines)
        if args.smoke
        else ((measure_lines,) if args.one_line else (measure,))
    ):
        with tempfile.TemporaryDirectory(prefix="zmqpush-senders-") as name:
            failed |= run(args, Path(name))
    return failed


if __name__ == "__main__":
    sys.exit(main())
