"""
A Kafka cluster: a record is a message, its key the stream.

librdkafka keeps what is produced until the brokers confirm it, and sends it again by itself. So
what is left to do here is to know when all is confirmed, what to do with what it gives up,
and what is in the topics after a death. Marks are the ends of the partitions that are written to;
what is beyond them is read then, and each record tells its stream and number.

All producing and polling is done in the event loop: neither blocks, and a second thread would
fight with it for each confirmation. Whatever blocks has a thread.
"""

import asyncio
import contextlib
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from confluent_kafka import KafkaError, KafkaException, Producer

from zmqpush.errors import SettingsError, SinkError, SinkStalledError
from zmqpush.runtime.background import begin, end_with
from zmqpush.runtime.faults import fault_point
from zmqpush.sinks.base import Batch, Context, Held, Marks, Rejection, Sink, Synced
from zmqpush.sinks.kafka.client import CALL_TIMEOUT, KafkaClient, reason_of
from zmqpush.sinks.template import Template

_GOOD = "kafka://broker1:9092,broker2:9092/logs-{type}"
_URL = re.compile(r"kafka://((?:[\w.-]+|\[[0-9A-Fa-f:.%\w]+\])(?::\d{1,5})?(?:,(?!/)|(?=/)))+/(.+)")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_CODE = re.compile(r"\{\w*\}|%.")
_MAX_TOPIC = 249
# So many records are produced before others get their turn.
_PIECE = 1000
# So many records may be unconfirmed; each costs librdkafka 700 bytes beside its own.
_WINDOW = 100_000
# When nothing has moved for so long it is a stall, in seconds.
_PATIENCE = 1.0
# Marks are renewed so often, and an error explains a stall so long, in seconds.
_REFRESH, _RECENT = 2.0, 15.0
_POLL_INTERVAL = 1.0
# Errors of a record that will be refused whenever it comes, if it comes alone.
_REFUSED = {
    KafkaError.MSG_SIZE_TOO_LARGE,
    KafkaError.RECORD_LIST_TOO_LARGE,
    KafkaError.INVALID_MSG,
    KafkaError.INVALID_MSG_SIZE,
    KafkaError.INVALID_RECORD,
    KafkaError._BAD_MSG,
}
# Errors of a record that was sent with one that is refused, or is in its transaction.
_INNOCENT = {
    KafkaError._INVALID_DIFFERENT_RECORD,
    KafkaError._PURGE_QUEUE,
    KafkaError._PURGE_INFLIGHT,
}
_FENCED = {
    KafkaError._FENCED,
    KafkaError.PRODUCER_FENCED,
    KafkaError.INVALID_PRODUCER_EPOCH,
}
_Headers = list[tuple[str, str | bytes | None]]
_T = TypeVar("_T")


@dataclass(slots=True)
class _Item:
    """A batch on its way to a topic: how many of its records are produced, and confirmed."""

    topic: str
    batch: Batch
    records: Sequence[bytes]
    produced: int = 0
    confirmed: int = 0

    @property
    def left(self) -> int:
        return len(self.records) - self.produced

    @property
    def seq(self) -> int:
        return self.batch.first + self.produced

    def unconfirmed(self) -> Iterator[tuple[int, bytes]]:
        """Yield what is produced and not confirmed: the place in the batch, and the record."""
        yield from enumerate(self.records[self.confirmed : self.produced], self.confirmed)

    def headers(self) -> tuple[bytes | None, _Headers | None]:
        """Return the key, and the headers; the first, of a stream, is for each record."""
        batch = self.batch
        labels: _Headers = [
            (name, batch.labels[name].encode("utf-8", "replace"))
            for name in ("type", "host")
            if batch.labels.get(name)
        ]
        if not batch.stream:
            return None, labels or None
        stream = batch.stream.encode()
        return stream, [("first", b""), ("stream", stream), *labels]


class KafkaSink(Sink):
    """
    Writes records to the topics of a Kafka cluster.

    Args:
        to: ``kafka://BROKER[,BROKER]/TOPIC``; the topic is a template.
        context: What comes from outside.

    Raises:
        SettingsError: If ``to`` is no such URL, or a property is wrong.

    """

    def __init__(self, to: str, context: Context) -> None:
        brokers, topic = _parse(to)
        self.name = f"kafka://{brokers}/{topic}"
        self._template = Template(topic, ("topics", _GOOD), _clean)
        self.labelled = self._template.labelled
        self._client = KafkaClient(brokers, context.options, self._note_error)
        if self._client.transactional and not context.remembers:
            raise SettingsError(
                "-X transactional.id needs --state: without it repeats are not known"
            )
        self._context = context
        self._producer: Producer | None = None
        self._broken: KafkaError | None = None  # the producer is, for good
        self._old: list[Producer | None] = []  # that a new one takes the place of
        self._thread = ThreadPoolExecutor(1)
        self._call: tuple[Any, Any, asyncio.Future[Any]] | None = None  # that goes on there
        self._lock = asyncio.Lock()
        self._todo: deque[_Item] = deque()
        self._taken = False  # they hold, or held, the batches of the write that goes on
        self._waiting = 0  # records of a write whose batches are not there
        self._produced: list[_Item] = []  # whole, and not all confirmed
        self._unconfirmed = 0
        self._window = _WINDOW
        self._failed: list[tuple[KafkaError, Any]] = []
        self._in_transaction = self._aborting = False
        self._syncing = self._synced = False
        self._rejected: list[Rejection] = []
        self._refused = 0  # so many of them will not come again
        self._error: tuple[float, str] = (0.0, "")  # the last, and when
        self._held: dict[str, list[range]] = {}  # what is in topics already, and to do
        self._offsets: dict[str, dict[int, int]] = {}  # that are remembered, by topic
        self._used: dict[str, None] = {}  # topics that are written to
        self._ends: dict[str, dict[int, int]] = {}  # of topics, since the last sync
        self._asking: asyncio.Task[None] | None = None
        self._ask_at = 0.0
        self._marks: dict[str, str | None] = {}

    @property
    def unwritten(self) -> int:  # type: ignore[override]  # it is computed
        """How many records are not produced, or not confirmed."""
        unconfirmed = self._unconfirmed
        if self._producer is not None and not self._client.transactional and not self._broken:
            unconfirmed = min(unconfirmed, len(self._producer) + len(self._failed))
        return self._waiting + sum(item.left for item in self._todo) + unconfirmed

    async def open(self, marks: Marks) -> Sequence[Held]:
        """
        Connect; read what topics hold beyond the marks.

        Raises:
            SinkStalledError: If no broker answers, or they refuse that.
            SinkError: If another process uses the ``transactional.id``.

        """
        for name, mark in marks.items():
            whose, _, place = name.partition("\n")
            if whose == self.name and mark:
                topic, _, partition = place.rpartition("/")
                self._offsets.setdefault(topic, {})[int(partition)] = int(mark)
        await self._connect()
        if not self._template.varies:
            await self._run(self._client.check, self._template.text)
        self._poll_now_and_then()
        held, self._held = self._held, {}
        return [Held(stream, run.start, len(run)) for stream, runs in held.items() for run in runs]

    async def _connect(self) -> None:
        if self._producer is None:
            self._producer = await self._run(self._client.connect, self._note_failure)
        known = self._offsets if self._context.remembers else {}
        self._held = await self._run(self._client.read_tail, known)

    async def write(self, batches: Sequence[Batch]) -> None:
        """
        Hand records to librdkafka.

        Raises:
            SinkStalledError: If the brokers take nothing.
            SinkError: If another process uses the ``transactional.id``.

        """
        async with self._lock:
            if not self._taken:
                self._waiting = sum(batch.records for batch in batches)
                if self._syncing and not self._synced:
                    await self._settle()  # what comes now is not to be waited for
                    self._synced = True
                self._todo.extend(map(self._item, batches))
                self._waiting, self._taken = 0, True
            await self._produce()
            self._taken = False

    def _item(self, batch: Batch) -> _Item:
        topic = _clean(self._template.fill(batch.labels))
        return _Item(topic, batch, bytes(batch.payload)[:-1].split(b"\n"))

    async def sync(self) -> Synced:
        """
        Wait until all that was written before is confirmed.

        Raises:
            SinkStalledError: If the brokers confirm nothing.
            SinkError: If another process uses the ``transactional.id``.

        """
        self._syncing = True
        async with self._lock:
            if not self._synced:
                await self._settle()
            self._syncing = self._synced = False
            marks, self._marks = self._marks, {}
            rejected, self._rejected = (
                self._rejected[: self._refused],
                self._rejected[self._refused :],
            )
            self._refused = 0
        fault_point("engine-synced")
        return Synced(marks, rejected)

    async def close(self) -> Marks:
        """Forget the marks: all is safe."""
        return dict.fromkeys(name for topic in self._offsets for name in self._marks_of(topic))

    # Producing.

    async def _produce(self) -> None:
        """Produce what there is to do; that is confirmed whenever the window is full."""
        while self._todo:
            if self._unconfirmed >= self._window or self._aborting or self._broken:
                await self._confirm()
                continue
            item = self._todo[0]
            if not item.left:
                self._produced.append(self._todo.popleft())
                continue
            await self._know(item.topic)
            if self._client.transactional and not self._in_transaction:
                assert self._producer
                await self._run(self._producer.begin_transaction)
                self._in_transaction = True
            if not self._produce_some(item):
                await self._wait(room=True)
            self._poll()
            await asyncio.sleep(0)

    def _produce_some(self, item: _Item) -> bool:
        """Produce some of a batch, without what topics hold already; whether there was room."""
        room = min(self._window - self._unconfirmed, _PIECE)
        for run in self._held.get(item.batch.stream, ()):
            if item.seq in run:
                item.produced += min(item.left, run.stop - item.seq)
                return True
            if item.seq < run.start:
                room = min(room, run.start - item.seq)
            elif item.seq >= self._held[item.batch.stream][-1].stop:
                del self._held[item.batch.stream]
                break
        assert self._producer
        produce, topic, seq = self._producer.produce, item.topic, item.seq
        records = item.records[item.produced : item.produced + room]
        key, headers = item.headers()
        done = 0
        try:
            for record in records:
                if key and headers:
                    headers[0] = ("first", b"%d" % (seq + done))
                # By position: names would take twice as long.
                produce(topic, record, key, -1, None, None, 0, headers)
                done += 1
        except BufferError:
            return False
        except KafkaException as exc:
            error = exc.args[0]
            if error.code() in _REFUSED:
                self._reject(item, seq + done, records[done], error)
                item.produced += 1
            elif error.code() == KafkaError._FATAL:
                self._broken = error
            elif error.code() == KafkaError._STATE:
                self._aborting = True  # it is known why, or will be
            else:
                raise self._stall(f"topic {topic}: {reason_of(error)}") from exc
        finally:
            # Those before what was refused, too.
            item.produced += done
            self._unconfirmed += done
        return True

    def _reject(self, item: _Item, seq: int, record: bytes, error: KafkaError) -> None:
        seq = seq if item.batch.stream else 0
        self._rejected.append(Rejection(record, reason_of(error), item.batch.stream, seq))

    # Confirming.

    async def _settle(self) -> None:
        """Have all confirmed; then marks may move."""
        ends, self._ends = self._ends, {}
        await self._produce()
        while self._unconfirmed:
            await self._confirm()
            await self._produce()
        self._settled()
        self._held.clear()
        # All that was there when these were asked for is confirmed now.
        for topic, found in ends.items():
            self._offsets[topic] = found
            self._marks |= self._marks_of(topic)
        if self._context.remembers and not self._asking and time.monotonic() > self._ask_at:
            self._asking = begin(self._ask_for_ends())

    async def _confirm(self) -> None:
        """Wait until what is produced is confirmed, or is to do again."""
        if not self._broken:
            await self._wait()
        if self._broken:
            await self._begin_anew()
            return
        fault_point("engine-written")
        if not self._failed and not self._aborting and self._in_transaction:
            await self._commit()
        if self._broken:
            return
        if self._failed or self._aborting:
            await self._put_back()
        else:
            self._settled()
            self._window = min(2 * self._window, _WINDOW)

    def _settled(self) -> None:
        self._produced.clear()
        self._unconfirmed = 0
        self._refused = len(self._rejected)
        for item in self._todo:
            item.confirmed = item.produced

    async def _put_back(self) -> None:
        """Do again what has failed; in a transaction, all of it."""
        if self._in_transaction:
            self._aborting = True
            assert self._producer
            await self._run(self._producer.abort_transaction, CALL_TIMEOUT)
            self._in_transaction = self._aborting = False
        failed, self._failed = self._failed, []
        refused = [each for each in failed if each[0].code() in _REFUSED]
        others = [error for error, _ in failed if error.code() not in _REFUSED | _INNOCENT]
        if refused and self._unconfirmed == 1:
            for item in self._matching(refused) or ():
                self._reject(item, item.seq, item.records[0], refused[0][0])
            self._settled()
        elif self._client.transactional:
            if refused:
                self._window = max(1, self._unconfirmed // 2)
            self._rewind()
        else:
            if refused:
                # Some of them, of which none may be to blame: in smaller numbers.
                self._window = max(1, len(failed) // 2)
            again = self._matching(failed)
            if again is None:
                self._broken = failed[0][0]  # the topics tell what is there
                return
            self._settled()
            self._todo.extendleft(reversed(again))
        if others:
            raise self._stall(reason_of(others[0]))

    def _rewind(self) -> None:
        self._todo.extendleft(reversed(self._produced))
        for item in self._todo:
            item.produced = item.confirmed
        self._produced.clear()
        self._unconfirmed = 0
        del self._rejected[self._refused :]

    def _all_unconfirmed(self) -> Iterator[tuple[_Item, int, bytes]]:
        for item in [*self._produced, *self._todo]:
            for place, record in item.unconfirmed():
                yield item, place, record

    def _matching(self, failed: Sequence[tuple[KafkaError, Any]]) -> list[_Item] | None:
        """
        Return what has failed as batches of one: a report tells neither headers nor number.

        None, if some are like others that have not failed.
        """
        wanted = Counter((m.topic(), m.key() or b"", m.value() or b"") for _, m in failed)
        found: Counter[tuple[str, bytes, bytes]] = Counter()
        items = []
        for item, place, record in self._all_unconfirmed():
            batch = item.batch
            what = (item.topic, batch.stream.encode(), record)
            if what in wanted:
                found[what] += 1
                one = Batch(record + b"\n", 1, batch.labels, batch.stream, batch.first + place)
                items.append(_Item(item.topic, one, [record]))
        return items if found == wanted else None

    async def _commit(self) -> None:
        assert self._producer
        try:
            await self._in_thread(self._producer.commit_transaction, CALL_TIMEOUT)
            self._in_transaction = False
        except KafkaException as exc:
            error = exc.args[0]
            if error.fatal():
                self._broken = error
            elif error.txn_requires_abort():
                self._aborting = True
            else:
                raise self._stall(reason_of(error, self._cause)) from exc

    async def _begin_anew(self) -> None:
        """Make a new producer, and produce what is not in the topics."""
        assert self._broken
        if self._broken.code() in _FENCED and self._client.transactional:
            raise SinkError(f"{self.name}: another process uses this transactional.id")
        if not self._old:
            self._old, self._producer = [self._producer], None
        self._in_transaction = self._aborting = False
        # Each step goes on where it was, if this is called again.
        if self._old[0] is not None:
            await self._in_thread(self._end_old)  # it takes a while to end
        await self._connect()
        self._old = []
        self._broken = None
        self._failed.clear()
        self._rewind()

    def _end_old(self) -> None:
        self._old[0] = None

    # Waiting.

    async def _wait(self, *, room: bool = False) -> None:
        """
        Wait until all is confirmed or has failed, or until there is room.

        Raises:
            SinkStalledError: If nothing moves.

        """
        assert self._producer
        left, delay = len(self._producer), 0.0005
        give_up_at = time.monotonic() + _PATIENCE
        while left and not self._broken:
            self._poll()
            before, left = left, len(self._producer)
            if left < before:
                give_up_at, delay = time.monotonic() + _PATIENCE, 0.0005
                if room:
                    return
            elif time.monotonic() > give_up_at:
                raise self._stall(await self._reason())
            if left:
                await asyncio.sleep(delay)
                delay = min(1.5 * delay, 0.02)

    def _poll(self) -> None:
        if self._producer is not None and not self._broken:
            try:
                self._producer.poll(0)
            except KafkaException as exc:
                self._broken = exc.args[0]
            except SystemError as exc:  # a callback came after the exception above
                cause = exc.__cause__
                error = cause.args[0] if isinstance(cause, KafkaException) else None
                self._broken = error or KafkaError(KafkaError._FATAL)

    def _poll_now_and_then(self) -> None:
        self._poll()
        loop = asyncio.get_running_loop()
        end_with(loop.run_in_executor(self._thread, self._client.poll))
        loop.call_later(_POLL_INTERVAL, self._poll_now_and_then)

    def _note_failure(self, error: KafkaError, message: Any) -> None:
        self._failed.append((error, message))

    def _note_error(self, error: KafkaError) -> None:
        if error.code() != KafkaError._ALL_BROKERS_DOWN:
            self._error = time.monotonic(), reason_of(error)

    @property
    def _cause(self) -> str:
        at, reason = self._error
        return reason if time.monotonic() - at < _RECENT else ""

    def _stall(self, reason: str) -> SinkStalledError:
        return SinkStalledError(f"{self.name}: {reason}")

    async def _reason(self) -> str:
        """Find out why nothing moves."""
        if not self._cause:
            topics = {item.topic for item in [*self._produced, *self._todo]}
            for topic in sorted(topics)[:3]:
                try:
                    await self._in_thread(self._client.check, topic)
                except KafkaException as exc:
                    return reason_of(exc.args[0], self._cause)
        return self._cause or "nothing is confirmed"

    async def _in_thread(self, work: Callable[..., _T], *args: object) -> _T:
        """Wait for what blocks, but not for long: the same call later goes on waiting for it."""
        if self._call is None or self._call[:2] != (work, args):
            loop = asyncio.get_running_loop()
            doing = loop.run_in_executor(self._thread, work, *args)
            doing.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._call = (work, args, doing)
        doing = self._call[2]
        await asyncio.wait({doing}, timeout=_PATIENCE)
        if not doing.done():
            raise self._stall(self._cause or "no answer")
        self._call = None
        result: _T = doing.result()
        return result

    async def _run(self, work: Callable[..., _T], *args: object) -> _T:
        try:
            return await self._in_thread(work, *args)
        except KafkaException as exc:
            error = exc.args[0]
            if error.fatal() and self._producer is not None:
                self._broken = error
            raise self._stall(reason_of(error, self._cause)) from exc

    # Marks.

    async def _know(self, topic: str) -> None:
        """Remember where a topic ends before anything is written to it."""
        self._used[topic] = None
        if topic in self._offsets:
            return
        if not self._context.remembers:
            await self._run(self._client.check, topic)
            self._offsets[topic] = {}
            return
        extents = await self._run(self._client.extents, topic)
        self._offsets[topic] = {place: end for place, (_, end) in extents.items()}
        await self._context.remember(self._marks_of(topic))

    def _marks_of(self, topic: str) -> dict[str, str]:
        ends = self._offsets[topic]
        return {f"{self.name}\n{topic}/{place}": str(end) for place, end in ends.items()}

    async def _ask_for_ends(self) -> None:
        """Ask where the topics end that were written to since this was asked last."""
        topics, self._used = [*self._used], {}
        ends: dict[str, dict[int, int]] = {}
        loop = asyncio.get_running_loop()
        for topic in topics:
            with contextlib.suppress(KafkaException):  # the older marks are good, too
                extents = await loop.run_in_executor(None, self._client.extents, topic)
                ends[topic] = {place: end for place, (_, end) in extents.items()}
        self._ends = ends
        self._ask_at = time.monotonic() + _REFRESH
        self._asking = None


def _parse(to: str) -> tuple[str, str]:
    """Return the brokers and the template; what is wrong is not told, it may be secret."""
    match = _URL.fullmatch(to)
    brokers, _, topic = to.removeprefix("kafka://").partition("/")
    ports = [int(port) for port in re.findall(r":(\d+)(?=,|$)", brokers)]
    if (
        not all(0 < port < 65536 for port in ports)
        or not match
        or not re.fullmatch(r"[A-Za-z0-9._-]*", _CODE.sub("", topic))
    ):
        raise SettingsError(f"--to kafka:// needs brokers and a topic; a good one is {_GOOD}")
    return brokers, topic


def _clean(label: str) -> str:
    name = _UNSAFE.sub("_", label)[:_MAX_TOPIC] or "unknown"
    return name if name.strip(".") else name.replace(".", "_")
