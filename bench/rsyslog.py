"""
Measure what a real rsyslogd moves through zmqpush, next to its own outputs.

Usage: python bench/rsyslog.py [--lines N] [--confirmed N] [--rounds N] [--smoke]

rsyslogd reads a file of syslog lines and hands over each message in the same template.
Times run from the first record's arrival to the last. It allocates a message in one thread
and frees it in another, and waits mostly for glibc's malloc; so it is measured with
jemalloc, too. Last, programs log to its socket, and it writes a local file beside zmqpush.

Needs Debian's packages rsyslog, rsyslog-czmq, rsyslog-relp and libjemalloc2, and what
run.py needs.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from run import (
    BUILD,
    HERE,
    TIMEOUT,
    ZMQPULL,
    ZMQPUSH,
    build,
    free_port,
    running,
    tell,
    wait_for_port,
)

TEMPLATE = 'template="RSYSLOG_SyslogProtocol23Format"'
CONFIG = """\
global(workDirectory="{dir}")
module(load="imfile")
module(load="omczmq")
module(load="omprog")
module(load="omrelp")
input(type="imfile" file="{dir}/input" tag="bench" ruleset="ship")
ruleset(name="ship" queue.type="LinkedList" queue.size="50000" queue.dequeueBatchSize="1024") {{
  action({action} action.resumeRetryCount="-1" action.resumeInterval="1")
}}
"""
RELP = """\
global(workDirectory="{dir}")
module(load="{action}")
template(name="line" type="string" string="%rawmsg%\\n")
input(type="{action}" port="{port}" ruleset="write")
ruleset(name="write") {{ action(type="omfile" file="{dir}/out" template="line") }}
"""

LOCAL = """\
global(workDirectory="{dir}")
module(load="imuxsock" sysSock.use="off")
module(load="omprog")
input(type="imuxsock" socket="{dir}/log" rateLimit.interval="0" ruleset="both")
ruleset(name="both" queue.type="FixedArray" queue.size="50000") {{
  action(type="omfile" file="{dir}/out" template="RSYSLOG_FileFormat")
  {action}
}}
"""
# A program that logs each line of a file.
LOGGER = """\
import socket, sys
log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
log.connect(sys.argv[1])
for line in open(sys.argv[2], "rb"):
    log.send(b"<13>Nov 23 00:00:00 bench: " + line[:-1])
"""
JEMALLOC = "libjemalloc.so.2"


class Place:
    """A directory with the input and everything else of one run."""

    def __init__(self, directory: Path, lines: int) -> None:
        self.dir = directory
        self.lines = lines
        self.out = directory / "out"
        self.port = free_port()
        self.endpoint = f"tcp://127.0.0.1:{self.port}"
        with (directory / "input").open("wb") as file:
            subprocess.run([sys.executable, HERE / "generate.py", str(lines)], stdout=file)

    def program(self, *options: str) -> str:
        """Return the path of a script that runs zmqpush, as omprog's old form needs it."""
        script = self.dir / "ship"
        script.write_text(f"#!/bin/sh\nexec {ZMQPUSH} -c {self.endpoint} {' '.join(options)}\n")
        script.chmod(0o755)
        return str(script)

    @contextlib.contextmanager
    def rsyslogd(
        self, action: str, name: str = "rsyslog", config: str = CONFIG, preload: str = ""
    ) -> Iterator[None]:
        """Run rsyslogd with an action."""
        file = self.dir / f"{name}.conf"
        file.write_text(config.format(dir=self.dir, action=action, port=self.port))
        command = ["rsyslogd", "-n", "-f", str(file), "-i", str(self.dir / f"{name}.pid")]
        env = os.environ | ({"LD_PRELOAD": preload} if preload else {})
        with running(*command, stderr=subprocess.DEVNULL, env=env) as child:
            yield
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)  # omczmq may hang at the end
            child.kill()


Action = Callable[[Place], str]


def czmq(place: Place) -> str:
    return f'type="omczmq" endpoints=">{place.endpoint}" socktype="PUSH" {TEMPLATE}'


def classic(*options: str) -> Action:
    return lambda place: (
        f'type="omprog" binary="{place.program("-q --queue-max 1MiB", *options)}" {TEMPLATE}'
    )


def confirmed(parameters: str, *options: str) -> Action:
    def action(place: Place) -> str:
        flags = ("--omprog", *(["--transactions"] if TRANSACTIONS in parameters else []))
        words = [option.format(dir=place.dir) for option in (*flags, *options)]
        program = place.program("-q", *words)
        return f'type="omprog" binary="{program}" confirmMessages="on" {parameters} {TEMPLATE}'

    return action


def forwarding(kind: str, more: str = "") -> Action:
    return lambda place: f'type="{kind}" target="127.0.0.1" port="{place.port}" {more} {TEMPLATE}'


def counted(place: Place, action: Action, mark: str | None, preload: str) -> float:
    """Return the seconds that a bare PULL socket saw from the first record to the last."""
    command = [str(BUILD / "receiver"), place.endpoint, str(place.lines), *([mark] if mark else [])]
    with running(*command, stdout=subprocess.PIPE) as receiver:
        assert receiver.stdout.readline() == b"ready\n"
        with place.rsyslogd(action(place), preload=preload):
            records, seconds, *_ = receiver.communicate(timeout=TIMEOUT)[0].split()
        assert int(records) == place.lines
        return float(seconds)


def written(place: Place) -> float:
    """Return the seconds from the first line in the collector's file to the last."""
    deadline = time.monotonic() + TIMEOUT
    while not place.out.exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    lines, began = 0, 0.0
    with place.out.open("rb") as file:
        while lines < place.lines:
            chunk = file.read(1 << 20)
            if chunk and not began:
                began = time.monotonic()
            lines += chunk.count(b"\n")
            if not chunk:
                assert time.monotonic() < deadline
                time.sleep(0.001)
    assert lines == place.lines
    return time.monotonic() - began


def to_zmqpull(place: Place, action: Action) -> float:
    command = [ZMQPULL, "-q", "-a", place.endpoint, "--state", f"{place.dir}/state"]
    with running(*command, "--to", str(place.out)) as receiver:
        wait_for_port(place.port)
        with place.rsyslogd(action(place)):
            seconds = written(place)
        receiver.send_signal(signal.SIGTERM)
        receiver.wait(TIMEOUT)
        return seconds


def to_rsyslogd(module: str) -> Callable[..., float]:
    def run(place: Place, action: Action) -> float:
        with place.rsyslogd(module, "receiver", RELP):
            wait_for_port(place.port)
            with place.rsyslogd(action(place)):
                return written(place)

    return run


def beside(place: Place, action: Action | None, *, up: bool) -> float:
    """Return the seconds that the local file takes, with the collector up or down."""
    shipping = f"action({action(place)})" if action else ""
    with contextlib.ExitStack() as stack:
        if up:
            command = [ZMQPULL, "-q", "-a", place.endpoint, "--to", str(place.dir / "collected")]
            stack.enter_context(running(*command))
            wait_for_port(place.port)
        stack.enter_context(place.rsyslogd(shipping, config=LOCAL))
        log = place.dir / "log"
        while not log.exists():
            time.sleep(0.01)
        stack.enter_context(
            running(sys.executable, "-c", LOGGER, str(log), str(place.dir / "input"))
        )
        return written(place)


TRANSACTIONS = 'useTransactions="on"'
PLAIN = (
    ("omczmq", czmq, None),
    ("omprog, zmqpush", classic(), None),
    ("omprog, zmqpush --framing frames", classic("--framing", "frames"), None),
    ("omprog, zmqpush --framing lines", classic("--framing", "lines"), "\n"),
)
CONFIRMED = (
    ("omfwd to imptcp", forwarding("omfwd", 'protocol="tcp"'), to_rsyslogd("imptcp"), 1),
    ("omrelp to imrelp", forwarding("omrelp"), to_rsyslogd("imrelp"), 40),
    (
        'omrelp windowSize="5000"',
        forwarding("omrelp", 'windowSize="5000"'),
        to_rsyslogd("imrelp"),
        1,
    ),
    ("transactions, remote", confirmed(TRANSACTIONS), to_zmqpull, 1),
    ("transactions, fsync", confirmed(TRANSACTIONS, "--spool {dir}/spool"), to_zmqpull, 1),
    ("single messages, remote", confirmed(""), to_zmqpull, 40),
    ("single messages, fsync", confirmed("", "--spool {dir}/spool"), to_zmqpull, 40),
)
# As in contrib/rsyslog/transactions.conf.
QUEUED = f"""{TRANSACTIONS} queue.type="LinkedList" queue.size="50000" queue.filename="queue"
  queue.highWatermark="5000" queue.lowWatermark="2000" queue.maxDiskSpace="{{}}"
  queue.timeoutEnqueue="0" action.resumeRetryCount="-1" action.resumeInterval="1\""""
BESIDE = (
    ("no zmqpush", None, False),
    ("zmqpush, the collector up", confirmed(QUEUED.format("1g")), True),
    ("the collector down", confirmed(QUEUED.format("1g")), False),
    ("the collector down, the queue full", confirmed(QUEUED.format("1m")), False),
)


def compare(
    runs: dict[str, tuple[int, Callable[[Place], float]]], rounds: int
) -> dict[str, list[float]]:
    """Run each with its number of lines in turn, and again; return the messages per second."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (lines, run) in runs.items():
            with tempfile.TemporaryDirectory() as directory:
                rates[name].append(lines / run(Place(Path(directory), lines)))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--confirmed", type=int, default=200_000, help="of these so many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="see only that everything runs")
    args = parser.parse_args()
    if args.smoke:
        args.lines, args.confirmed, args.rounds = 5_000, 4_000, 1
    if not shutil.which("rsyslogd"):
        sys.exit("rsyslogd is not installed (Debian: rsyslog rsyslog-czmq rsyslog-relp)")
    os.environ.pop("GLIBC_TUNABLES", None)
    build()
    for title, preload in (("not confirmed", ""), ("with jemalloc", JEMALLOC)):
        runs = {
            name: (args.lines, partial(counted, action=action, mark=mark, preload=preload))
            for name, action, mark in PLAIN
        }
        tell(title, "messages/s", compare(runs, args.rounds))
    runs = {
        name: (args.confirmed // share, partial(run, action=action))
        for name, action, run, share in CONFIRMED
    }
    tell("confirmed, to a file", "messages/s", compare(runs, args.rounds))
    runs = {
        name: (args.confirmed, partial(beside, action=action, up=up)) for name, action, up in BESIDE
    }
    tell("to the local file", "messages/s", compare(runs, args.rounds))


if __name__ == "__main__":
    main()
