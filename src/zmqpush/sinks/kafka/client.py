"""
What the Kafka sink needs of librdkafka beside producing: properties, clients, reading.

Everything here but the constructor blocks, for seconds maybe, and belongs into a thread. What
fails is a KafkaException.
"""

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from zmqpush.errors import SettingsError

# By partition: where it begins and where it ends.
Extents = Mapping[int, tuple[int, int]]

_DEFAULTS = {
    "client.id": "zmqpull",
    "compression.type": "lz4",  # every broker and client of the last ten years reads it
    "partitioner": "murmur2_random",  # as clients in Java do, and cheaper than the default
    "linger.ms": "2",  # a confirmation is waited for: a longer wait costs more than it saves
    "queue.buffering.max.kbytes": "65536",
    "reconnect.backoff.max.ms": "2000",
}
# What delivery relies on: what it may be set to, if anything. The first is how it is.
_FIXED: Mapping[str, tuple[str, ...]] = {
    "enable.idempotence": ("true",),
    "acks": ("all", "-1"),
    "request.required.acks": ("all", "-1"),
    "message.timeout.ms": ("0",),
    "delivery.timeout.ms": ("0",),
    "delivery.report.only.error": ("true",),
    "queuing.strategy": ("fifo",),
    "enable.gapless.guarantee": ("false",),
    "retries": ("2147483647",),
    "message.send.max.retries": ("2147483647",),
    "isolation.level": ("read_committed",),
    "bootstrap.servers": (),
    "metadata.broker.list": (),
    "default.topic.config": (),
    "logger": (),
    "on_delivery": (),
    "on_commit": (),
}
# What blocks takes so long at most, in seconds.
CALL_TIMEOUT = 10.0
# What has no end is read, and what is being made is waited for, so long, in seconds.
_BRIEFLY = 1.0
# The reading of a topic may find nothing for so long, in seconds.
_SILENCE = 5.0
_CONTEXT = re.compile(
    r"^\S+/(?:bootstrap|\d+): |Connect to \S+ failed: | \(after [^)]*\)$"
    r"|^(?:Unable to|Failed to) [^:]*: |\b(?:Broker|Local): "
)
_SEQUENCE = re.compile(rb"[0-9]{1,18}")
_UNREACHABLE = {
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._TRANSPORT,
    KafkaError._RESOLVE,
    KafkaError._TIMED_OUT,
}

_log = logging.getLogger(__name__)
_log.addHandler(logging.NullHandler())  # librdkafka does not write to standard error


def reason_of(error: KafkaError, cause: str = "") -> str:
    """Return what a user should know of an error; ``cause`` is a better one for silence."""
    text = _CONTEXT.sub("", error.str())
    if error.code() not in _UNREACHABLE:
        return text
    silent = error.code() in (KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT)
    return cause or ("no broker answers" if silent else f"no broker answers: {text}")


class KafkaClient:
    """
    Makes producers, and reads.

    Args:
        brokers: As ``bootstrap.servers`` lists them.
        options: Properties that a user has set.
        on_error: Is told what goes wrong meanwhile, in any thread.

    Attributes:
        transactional: Whether there is a ``transactional.id``.

    Raises:
        SettingsError: If a property is unknown, has a bad value, or is not for users.

    """

    def __init__(
        self, brokers: str, options: Mapping[str, str], on_error: Callable[[KafkaError], None]
    ) -> None:
        for name, value in options.items():
            allowed = _FIXED.get(name)
            if name.endswith("_cb") or (allowed is not None and value.lower() not in allowed):
                rest = f": it is {allowed[0]}" if allowed else ""
                raise SettingsError(f"-X {name} cannot be set: delivery relies on it{rest}")
        self.transactional = "transactional.id" in options
        common: dict[str, Any] = {**_DEFAULTS, **options, "logger": _log, "error_cb": on_error}
        common.pop("delivery.report.only.error", None)  # that is no text
        ours = ("enable.idempotence", "acks", "message.timeout.ms")
        self._producing = common | {name: _FIXED[name][0] for name in ours}
        self._producing["delivery.report.only.error"] = True
        self._reading = common | {
            "group.id": "zmqpull",  # none is joined, but a consumer must have one
            "enable.auto.commit": "false",
            "enable.partition.eof": "true",
            "auto.offset.reset": "earliest",
            "fetch.wait.max.ms": "50",
            "isolation.level": "read_committed",
        }
        self._reading.pop("transactional.id", None)
        try:
            Producer(self._producing)  # it has no brokers yet, and so connects to nothing
        except KafkaException as exc:
            raise SettingsError(f"-X: {exc.args[0].str()}") from exc
        except (TypeError, ValueError) as exc:
            raise SettingsError(f"-X: {exc}") from exc
        self._brokers = {"bootstrap.servers": brokers}
        self._watcher: Consumer | None = None
        self._connecting: Producer | None = None

    def connect(self, on_failure: Callable[[KafkaError, Any], None]) -> Producer:
        """Return a producer that knows a broker; ``on_failure`` gets what is not delivered."""
        if self._connecting is None:
            config = self._producing | self._brokers | {"on_delivery": on_failure}
            self._connecting = Producer(config)
        producer = self._connecting
        give_up_at = time.monotonic() + CALL_TIMEOUT
        while True:
            try:
                producer.poll(0)  # why none answers, if none does
                producer.cluster_id(timeout=0.3)
                break
            except KafkaException:
                if time.monotonic() > give_up_at:
                    raise
        if self.transactional:
            try:
                # Ends what another producer of this name has begun, and fences it off.
                producer.init_transactions(CALL_TIMEOUT)
            except KafkaException as exc:
                if not exc.args[0].retriable():
                    self._connecting = None
                raise
        self._connecting = None
        return producer

    def check(self, topic: str) -> list[int]:
        """Return the partitions of a topic; brokers may make it now."""
        give_up_at = time.monotonic() + _BRIEFLY
        while True:
            found = self._watch().list_topics(topic, timeout=CALL_TIMEOUT).topics[topic]
            errors = [found.error, *(place.error for place in found.partitions.values())]
            if not any(errors):
                return sorted(found.partitions)
            error = next(filter(None, errors))
            if error.code() != KafkaError.LEADER_NOT_AVAILABLE or time.monotonic() > give_up_at:
                text = f"topic {topic}: {reason_of(error)}"
                raise KafkaException(KafkaError(error.code(), text))
            time.sleep(0.1)  # it is being made

    def extents(self, topic: str) -> Extents:
        """Return where the partitions of a topic begin and end."""
        found = {}
        for partition in self.check(topic):
            place = TopicPartition(topic, partition)
            found[partition] = self._watch().get_watermark_offsets(place, timeout=CALL_TIMEOUT)
        return found

    def poll(self) -> None:
        """Take what a client has to say, so that it does not pile up."""
        if self._watcher:
            with contextlib.suppress(KafkaException):
                self._watcher.poll(0)

    def _watch(self) -> Consumer:
        if self._watcher is None:
            # Ends are those of all records, also of transactions that still run.
            config = self._reading | {"isolation.level": "read_uncommitted"}
            config["allow.auto.create.topics"] = "true"
            self._watcher = Consumer(config | self._brokers)
        return self._watcher

    def read_tail(self, marks: Mapping[str, Mapping[int, int]]) -> dict[str, list[range]]:
        """
        Return which records of which streams are in topics beyond the marks.

        Args:
            marks: Offsets by topic and partition; other partitions are read as a whole.

        """
        starts: dict[tuple[str, int], int] = {}
        ends: dict[tuple[str, int], int] = {}
        for topic, offsets in marks.items():
            for partition, (low, high) in self._extents_if_any(topic).items():
                start = offsets.get(partition, low)
                start = start if low <= start <= high else low
                if start < high:
                    starts[topic, partition], ends[topic, partition] = start, high
        held: dict[str, list[range]] = {}
        for stream, seq in self._read(starts, ends) if starts else ():
            runs = held.setdefault(stream, [])
            if runs and runs[-1].stop == seq:
                runs[-1] = range(runs[-1].start, seq + 1)
            else:
                runs.append(range(seq, seq + 1))
        return {stream: _merged(runs) for stream, runs in held.items()}

    def _extents_if_any(self, topic: str) -> Extents:
        try:
            return self.extents(topic)
        except KafkaException as exc:
            if exc.args[0].code() in (
                KafkaError.UNKNOWN_TOPIC_OR_PART,
                KafkaError._UNKNOWN_TOPIC,
                KafkaError._UNKNOWN_PARTITION,
            ):
                return {}  # somebody has removed it, and what was in it
            raise

    def _read(
        self, starts: Mapping[tuple[str, int], int], ends: Mapping[tuple[str, int], int]
    ) -> Iterator[tuple[str, int]]:
        """Yield the stream and the number of each record between two offsets."""
        reader = Consumer(self._reading | self._brokers)
        left, ended = dict(ends), set(ends)
        try:
            reader.assign([TopicPartition(*place, start) for place, start in starts.items()])
            moved_at = time.monotonic()
            # Until its end, too, which may be later; but others may write without a pause.
            while left or (ended and time.monotonic() < moved_at + _BRIEFLY):
                messages: list[Any] = reader.consume(1000, timeout=0.1)
                if left and messages:
                    moved_at = time.monotonic()
                elif left and time.monotonic() > moved_at + _SILENCE:
                    text = f"topic {next(iter(left))[0]} cannot be read to its end; "
                    text += "another producer may have an open transaction there"
                    raise KafkaException(KafkaError(KafkaError._TIMED_OUT_QUEUE, text))
                for message in messages:
                    place, position = (message.topic(), message.partition()), message.offset()
                    if error := message.error():
                        if error.code() != KafkaError._PARTITION_EOF:
                            raise KafkaException(error)
                        if position >= ends[place]:
                            ended.discard(place)
                    else:
                        position += 1
                        headers = dict(message.headers() or ())
                        stream, first = headers.get("stream"), headers.get("first")
                        if stream and first and _SEQUENCE.fullmatch(first):
                            yield stream.decode(errors="replace"), int(first)
                    if position >= ends[place]:
                        left.pop(place, None)
        finally:
            reader.close()


def _merged(runs: list[range]) -> list[range]:
    merged: list[range] = []
    for run in sorted(runs, key=lambda run: run.start):
        if merged and run.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, run.stop))
        else:
            merged.append(run)
    return merged
