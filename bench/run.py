"""
Measure zmqpush against a C yardstick and its peers, interleaved on the same input.

Usage: python bench/run.py [--lines N] [--rounds N] [--only NAME,NAME] [--smoke]

Needs cc and libzmq's headers (Debian: libzmq3-dev); peers that are not installed are left
out. Everything stays on loopback. Prints the tables of docs/performance.md.
"""

import argparse
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import zmq

from zmqpush.security.keyfile import write_pair

HERE = Path(__file__).parent
BUILD = HERE.parent / "build" / "bench"
ZMQPUSH = str(Path(sysconfig.get_path("scripts")) / "zmqpush")
ZMQPULL = str(Path(sysconfig.get_path("scripts")) / "zmqpull")
TIMEOUT = 300.0
RSYSLOG = """\
global(workDirectory="{dir}")
module(load="imfile")
module(load="omczmq")
template(name="record" type="list" option.jsonf="off") {{
  constant(value="{{\\"message\\":\\"") property(name="msg" format="json")
  constant(value="\\",\\"type\\":\\"syslog\\",\\"@pid\\":1}}")
}}
input(type="imfile" file="{input}" tag="bench" ruleset="ship")
ruleset(name="ship" queue.type="LinkedList" queue.size="50000" queue.dequeueBatchSize="1024") {{
  action(type="omczmq" endpoints=">{endpoint}" socktype="PUSH" template="record")
}}
"""


@dataclass
class Run:
    """What one run of a shipper showed: seconds, and peak memory in bytes where known."""

    seconds: float
    memory: int = 0


@dataclass
class Bench:
    """Where a run finds its input and its tools."""

    dir: Path
    input: Path
    lines: int


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(*command: str, **kwargs: object) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, **kwargs) as child:  # type: ignore[call-overload]
        try:
            yield child
        finally:
            if child.poll() is None:
                child.terminate()


def received(bench: Bench, ship: Callable[[str], int], mark: str | None = None) -> Run:
    """Let ``ship`` send to the receiver; time from the first record to the last."""
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    command = [str(BUILD / "receiver"), endpoint, str(bench.lines), *([mark] if mark else [])]
    with running(*command, stdout=subprocess.PIPE) as receiver:
        assert receiver.stdout.readline() == b"ready\n"
        memory = ship(endpoint)
        records, seconds, *_ = receiver.communicate(timeout=TIMEOUT)[0].split()
        assert int(records) == bench.lines, records
        return Run(float(seconds), memory)


def through_pipe(bench: Bench, *command: str, stdout: object = subprocess.DEVNULL) -> int:
    """Run ``cat input | command``; return the peak memory of the command."""
    with subprocess.Popen(["cat", bench.input], stdout=subprocess.PIPE) as cat:
        child = subprocess.Popen(command, stdin=cat.stdout, stdout=stdout)
        cat.stdout.close()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, command
    return usage.ru_maxrss * 1024


def yardstick(bench: Bench) -> Run:
    return received(bench, lambda to: through_pipe(bench, str(BUILD / "yardstick"), to))


def zmqpush(framing: str, mark: str | None = None) -> Callable[[Bench], Run]:
    def run(bench: Bench) -> Run:
        command = [ZMQPUSH, "-q", "--framing", framing, "-c"]
        return received(bench, lambda to: through_pipe(bench, *command, to), mark)

    return run


def plain_with_keys(framing: str) -> Callable[[Bench], Run]:
    """Into zmqpull's file sink, encrypted; timed until the last record is in the file."""

    def run(bench: Bench) -> Run:
        with tempfile.TemporaryDirectory(dir=bench.dir) as name:
            key = f"{name}/key"
            write_pair(Path(key), {})  # one for both ends
            with pulling(bench, name, "--key", key, "--allow", "any") as (child, endpoint):
                keys = ["--key", key, "--server-key", key]
                started = time.perf_counter()
                memory = through_pipe(
                    bench, ZMQPUSH, "-q", "--framing", framing, *keys, "-c", endpoint
                )
                assert child.wait(TIMEOUT) == 0
                return Run(time.perf_counter() - started, memory)

    return run


@contextmanager
def pulling(
    bench: Bench, directory: str, *options: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run zmqpull until it has written all records to a file."""
    port = free_port()
    endpoint = f"tcp://127.0.0.1:{port}"
    command = [ZMQPULL, "-qn", str(bench.lines), "-b", endpoint, "--to", f"{directory}/out"]
    with running(*command, *options) as child:
        wait_for_port(port)
        yield child, endpoint


def receiving(size: int) -> Callable[[Bench], Run]:
    """
    Let zmqpull write to a file what comes as fast as it reads.

    Args:
        size: How many records a message has, one a line.

    """

    def run(bench: Bench) -> Run:
        path = bench.dir / f"frames{size}"
        if not path.exists():
            path.write_bytes(b"".join(frames(bench.input, size)))
        with tempfile.TemporaryDirectory(dir=bench.dir) as name:
            with pulling(bench, name) as (child, endpoint), path.open("rb") as file:
                with socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2]))) as s:
                    s.sendall(GREETING)
                    answer = b""
                    while b"READY" not in answer:
                        answer += s.recv(4096)
                    started = time.perf_counter()
                    s.sendfile(file)
                    _, status, usage = os.wait4(child.pid, 0)
                    child.returncode = os.waitstatus_to_exitcode(status)
                seconds = time.perf_counter() - started
            assert child.returncode == 0
        return Run(seconds, usage.ru_maxrss * 1024)

    return run


# As a PUSH socket without keys connects: RFC 37.
GREETING = (
    b"\xff"
    + bytes(8)
    + b"\x7f\x03\x00NULL"
    + bytes(48)
    + b"\x04\x1a\x05READY\x0bSocket-Type\0\0\0\x04PUSH"
)


def frames(path: Path, size: int) -> Iterator[bytes]:
    """Yield the lines of a file as records in messages of so many."""
    with path.open() as file:
        while lines := list(islice(file, size)):
            text = "".join(
                json.dumps({"message": line[:-1], "type": "syslog", "@pid": 1}) + "\n"
                for line in lines
            )
            body = text.encode()[: -1 if size == 1 else None]
            short = len(body) < 256
            yield (bytes((0, len(body))) if short else b"\2" + len(body).to_bytes(8)) + body


def acked(*options: str) -> Callable[[Bench], Run]:
    """Into zmqpull's file sink, synced and remembered; timed until the last ack."""

    def run(bench: Bench) -> Run:
        port = free_port()
        endpoint = f"tcp://127.0.0.1:{port}"
        with tempfile.TemporaryDirectory(dir=bench.dir) as name:
            at = Path(name)
            receiver = [
                ZMQPULL,
                "-q",
                "-a",
                endpoint,
                "--state",
                f"{at}/state",
                "--to",
                f"{at}/out",
            ]
            more = ["--spool", f"{at}/spool"] if "spool" in options else []
            if "key" in options:
                write_pair(at / "key", {})  # one for both ends
                receiver += ["--key", f"{at}/key", "--allow", "any"]
                more += ["--key", f"{at}/key", "--server-key", f"{at}/key"]
            with running(*receiver) as child:
                wait_for_port(port)
                with (at / "summary").open("wb") as summary:
                    command = [ZMQPUSH, "--ack", *more, "-c", endpoint]
                    memory = through_pipe(bench, *command, stdout=summary)
                child.terminate()
                child.wait(TIMEOUT)
            match = re.match(
                r"Processed (\d+) messages in ([\d.]+)ms", (at / "summary").read_text()
            )
            written = subprocess.run(
                ["wc", "-l", at / "out"], capture_output=True, check=True
            ).stdout
            assert int(match[1]) == int(written.split()[0]) == bench.lines
            return Run(float(match[2]) / 1000, memory)

    return run


def omczmq(bench: Bench) -> Run:
    config = bench.dir / "rsyslog.conf"

    def ship(endpoint: str) -> int:
        config.write_text(RSYSLOG.format(dir=bench.dir, input=bench.input, endpoint=endpoint))
        for state in bench.dir.glob("imfile-state*"):
            state.unlink()
        stack.enter_context(
            running("rsyslogd", "-n", "-f", str(config), "-i", str(bench.dir / "rsyslog.pid"))
        )
        return 0

    with ExitStack() as stack:
        return received(bench, ship)


def kcat(bench: Bench) -> Run:
    started = time.perf_counter()
    memory = through_pipe(
        bench,
        "kcat",
        "-P",
        "-q",
        "-X",
        "log_level=3",
        "-X",
        "test.mock.num.brokers=1",
        "-b",
        "mock",
        "-t",
        "logs",
    )
    return Run(time.perf_counter() - started, memory)


def mosquitto(bench: Bench) -> Run:
    port = free_port()
    config = bench.dir / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nlog_type none\n")
    with running("mosquitto", "-c", str(config), stderr=subprocess.DEVNULL):
        wait_for_port(port)
        started = time.perf_counter()
        memory = through_pipe(bench, "mosquitto_pub", "-p", str(port), "-t", "logs", "-l")
        return Run(time.perf_counter() - started, memory)


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)
    raise TimeoutError(f"nothing listens on port {port}")


# The name, what must be installed, how to run it. The yardstick comes first.
CONTESTANTS: tuple[tuple[str, str, Callable[[Bench], Run]], ...] = (
    ("yardstick", "cc", yardstick),
    ("single", ZMQPUSH, zmqpush("single")),
    ("frames", ZMQPUSH, zmqpush("frames")),
    ("array", ZMQPUSH, zmqpush("array", '{"message"')),
    ("lines", ZMQPUSH, zmqpush("lines", "\n")),
    ("--ack", ZMQPUSH, acked()),
    ("--ack --spool", ZMQPUSH, acked("spool")),
    ("--ack --key", ZMQPUSH, acked("key")),
    ("single --key", ZMQPUSH, plain_with_keys("single")),
    ("frames --key", ZMQPUSH, plain_with_keys("frames")),
    ("lines --key", ZMQPUSH, plain_with_keys("lines")),
    ("zmqpull single", ZMQPULL, receiving(1)),
    ("zmqpull lines", ZMQPULL, receiving(500)),
    ("omczmq", "/usr/lib/x86_64-linux-gnu/rsyslog/omczmq.so", omczmq),
    ("mosquitto_pub", "mosquitto_pub", mosquitto),
    ("kcat", "kcat", kcat),
)


def build() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    for name in ("yardstick", "receiver"):
        source = HERE / f"{name}.c"
        subprocess.run(["cc", "-O2", "-o", BUILD / name, source, "-lzmq"], check=True)


def throughput(bench: Bench, rounds: int, only: set[str]) -> None:
    chosen = [
        (name, run)
        for name, needs, run in CONTESTANTS
        if shutil.which(needs) or (os.path.isabs(needs) and os.path.exists(needs))
        if not only or name in only
    ]
    runs: dict[str, list[Run]] = {name: [] for name, _ in chosen}
    for number in range(rounds):
        for name, run in chosen:
            print(f"round {number + 1} of {rounds}: {name:<20}", end="\r", file=sys.stderr)
            runs[name].append(run(bench))
    first = runs[chosen[0][0]]
    print("| shipper | lines/s | spread | ratio | memory |")
    print("|---|---|---|---|---|")
    for name, done in runs.items():
        rates = sorted(bench.lines / run.seconds / 1e6 for run in done)
        # The ratio within each round, so that a slow moment of the machine counts for both.
        ratio = statistics.median(a.seconds / b.seconds for a, b in zip(first, done, strict=True))
        memory = max(run.memory for run in done) / 2**20
        print(
            f"| {name} | {statistics.median(rates):.2f} M | {rates[0]:.2f}-{rates[-1]:.2f} "
            f"| {ratio:.2f} | {f'{memory:.0f} MiB' if memory else ''} |",
            flush=True,
        )


def tell(title: str, unit: str, rates: dict[str, list[float]]) -> None:
    """Print the rates of each, and their ratio to those of the first in the same rounds."""
    first = next(iter(rates.values()))
    print(f"\n| {title} | {unit} | spread | ratio |\n|---|---|---|---|")
    for name, measured in rates.items():
        ratio = statistics.median(b / a for a, b in zip(first, measured, strict=True))
        low, middle, high = min(measured), statistics.median(measured), max(measured)
        print(f"| {name} | {middle:,.0f} | {low:,.0f}-{high:,.0f} | {ratio:.2f} |", flush=True)


def milliseconds(times: list[float]) -> str:
    return f"{statistics.median(times) * 1e3:.2f} ms"


def latency(rounds: int) -> None:
    """Time a lone line from its write, and one from the start of the process, to arrival."""
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        port = pull.bind_to_random_port("tcp://127.0.0.1")
        endpoint = f"tcp://127.0.0.1:{port}"
        lone, start, bare = [], [], []
        with running(ZMQPUSH, "-qc", endpoint, stdin=subprocess.PIPE) as child:
            for number in range(20 * rounds):
                time.sleep(0.01)
                began = time.perf_counter()
                os.write(child.stdin.fileno(), b"a line\n")
                pull.recv()
                if number:  # the first one waits for the start of the process
                    lone.append(time.perf_counter() - began)
            child.stdin.close()
            child.wait(TIMEOUT)
        for _ in range(rounds):
            began = time.perf_counter()
            subprocess.run([ZMQPUSH, "-qc", endpoint], input=b"x\n", check=True)
            start.append(time.perf_counter() - began)
            pull.recv()
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", "pass"], check=True)
            bare.append(time.perf_counter() - began)
    over = [a - b for a, b in zip(start, bare, strict=True)]
    print(f"lone line, written to received: {milliseconds(lone)}")
    print(f"echo x | zmqpush over python -c pass: {milliseconds(over)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--lines", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="names, with commas; the first is ratio 1")
    parser.add_argument("--smoke", action="store_true", help="see only that everything runs")
    args = parser.parse_args()
    if args.smoke:
        args.lines, args.rounds = 20_000, 1
    build()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), Path(name) / "input", args.lines)
        with bench.input.open("wb") as file:
            command = [sys.executable, HERE / "generate.py", str(args.lines)]
            subprocess.run(command, stdout=file, check=True)
        throughput(bench, args.rounds, set(filter(None, args.only.split(","))))
    if not args.only:
        latency(max(args.rounds, 3) * 3)


if __name__ == "__main__":
    main()
