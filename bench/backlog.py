"""
Drain backlogs of growing size from the spool: speed, memory and start-up must stay the same.

Usage: python bench/backlog.py [--sizes MIB,MIB] [--smoke]

Everything stays on loopback. Prints the table of docs/performance.md.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run import HERE, TIMEOUT, ZMQPULL, ZMQPUSH, free_port, running, wait_for_port

STATUS = re.compile(r"(\d+) records to be acknowledged, \d+ segments, (\d+) bytes")


def fill(directory: Path, mib: int) -> tuple[int, int]:
    """Fill a spool while there is no receiver; return its records and bytes."""
    spool = directory / "spool"
    text = directory / "text"
    with text.open("wb") as file:
        subprocess.run([sys.executable, HERE / "generate.py", "60000"], stdout=file, check=True)
    command = [ZMQPUSH, "-q", "--spool", spool, "--spool-max", "64GiB", "--sync", "off"]
    command += ["--timeout", "0", "-c", "tcp://127.0.0.1:9"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        data = text.read_bytes()
        for _ in range(max(1, (mib << 20) // (len(data) * 4 // 3))):
            child.stdin.write(data)
        child.stdin.close()
        child.wait(TIMEOUT)
    status = subprocess.run(
        [ZMQPUSH, "--spool", spool, "--spool-status"], capture_output=True, text=True, check=True
    )
    records, size = STATUS.search(status.stdout).groups()
    return int(records), int(size)


def drain(directory: Path) -> tuple[float, float, int]:
    """Drain it; return the seconds to the first record, to the last ack, and peak memory."""
    port = free_port()
    endpoint = f"tcp://127.0.0.1:{port}"
    out = directory / "out"
    fifo = directory / "fifo"
    os.mkfifo(fifo)
    # The output goes through a pipe to nowhere: the disk shall not hold the backlog twice.
    with running("sh", "-c", f"head -c 1 <{fifo} >{out}; exec cat <{fifo} >/dev/null"):
        sink = os.open(fifo, os.O_RDWR)
        with running(ZMQPULL, "-q", "-a", endpoint, stdout=sink):
            wait_for_port(port)
            began = time.perf_counter()
            child = subprocess.Popen(
                [ZMQPUSH, "-q", "--spool", directory / "spool", "-c", endpoint],
                stdin=subprocess.DEVNULL,
            )
            while not (out.exists() and out.stat().st_size):
                time.sleep(0.002)
            first = time.perf_counter() - began
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            assert child.returncode == 0
            last = time.perf_counter() - began
        os.close(sink)
    return first, last, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--sizes", default="10,100,1024,10240", help="in MiB, with commas")
    parser.add_argument("--smoke", action="store_true", help="see only that everything runs")
    args = parser.parse_args()
    sizes = [4, 8] if args.smoke else list(map(int, args.sizes.split(",")))
    print("| backlog | records | first record after | records/s | memory |")
    print("|---|---|---|---|---|")
    for mib in sizes:
        with tempfile.TemporaryDirectory() as name:
            records, size = fill(Path(name), mib)
            first, last, memory = drain(Path(name))
        print(
            f"| {size / 2**20:.0f} MiB | {records} | {first:.2f} s "
            f"| {records / (last - first) / 1e6:.2f} M | {memory / 2**20:.0f} MiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
