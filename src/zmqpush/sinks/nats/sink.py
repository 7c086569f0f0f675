"""
NATS JetStream: a message for each record, or for each block.

Every message is named by its first record (``Nats-Msg-Id: STREAM:FIRST``), and counts as written
when its PubAck has come. The server forgets names after a while; so after each interruption the
end of the stream is read for them, too, before anything is sent again.

One task has the connection, and makes it anew whenever something is unclear; :meth:`write` and
:meth:`sync` only wait for what it does.
"""

import asyncio
import contextlib
import json
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import count, islice
from typing import Any

from nats.aio.msg import Msg
from nats.errors import Error, NoRespondersError, NoServersError

from zmqpush.errors import SettingsError, SinkSetupError, SinkStalledError, ZmqpushError
from zmqpush.runtime.background import begin
from zmqpush.runtime.faults import fault_point
from zmqpush.sinks.base import Batch, Context, Held, Marks, Rejection, Sink, Synced
from zmqpush.sinks.nats.client import NatsClient, connect_options, read_options, reason_of
from zmqpush.sinks.template import Template

_URL = re.compile(r"nats://(?:([^@/]*)@)?([^@/]+)/(.+)", re.DOTALL)
_HOST = re.compile(r"([\w.-]+|\[[0-9a-fA-F:.]+\])(:(?P<port>\d{1,5}))?")
_WHAT = "subjects", "logs.{type}.{host}"
_BAD_SUBJECT = re.compile(r"^\$|^\.|\.\.|\.$|[\x00-\x20\x7f*>\ud800-\udfff]")
_UNSAFE = re.compile(r"^\$|[\s\x00-\x1f\x7f.*>\ud800-\udfff]")
_MAX_LABEL_BYTES = 200
_ID = re.compile(r"(.+):(\d{1,19})(?:-(\d{1,19}))?")
# What of a message's size is left to its headers.
_HEADER_BYTES = 256
# What may be on its way; a server takes 10,000 messages at once for a stream, of all its clients.
_MAX_MESSAGES = 4000
_MAX_BYTES = 8 << 20
# Without an answer for so long, a connection is made anew; and a stall is told, in seconds.
_ANSWER_TIMEOUT = 10.0
_STALL_TIMEOUT = 1.0
_FIRST_DELAY, _MAX_DELAY = 0.1, 2.0
# Streams can be changed so that they keep nothing, and go on confirming: they are looked at again
# after so many seconds.
_LOOK_INTERVAL = 10.0
# A server that hung may store what came before an interruption after the end of the stream was
# read: then only the name keeps it from being there twice. In seconds.
_MIN_WINDOW = 10.0
_TAIL_BATCH = 500
# What JetStream's errors mean.
_TOO_LARGE = 10054


class _InterruptedError(Exception):
    """Why it cannot go on as it is, in one line."""


@dataclass(slots=True)
class _Message:
    subject: str
    payload: bytes
    stream: str
    first: int
    records: int
    position: int
    sent_at: float = 0.0  # 0: it is not sent
    done: bool = False

    @property
    def id(self) -> str:
        """The name; of many records it says how many, since they may be cut in another way."""
        last = f"-{self.first + self.records - 1}" if self.records > 1 else ""
        return f"{self.stream}:{self.first}{last}"


class NatsUnit(StrEnum):
    """What a message of NATS carries."""

    RECORD = "record"
    BLOCK = "block"


class NatsSink(Sink):
    """
    Writes records to the JetStream streams that take a subject.

    Args:
        to: ``nats://[USER:PASSWORD@]HOST[:PORT][,HOST…]/SUBJECT``, the subject a template.
        context: What comes from outside.

    Raises:
        SettingsError: If ``to`` or an option cannot be understood.

    """

    def __init__(self, to: str, context: Context) -> None:
        match = _URL.fullmatch(to)
        if not match or "@" in match[3] or not all(map(_is_host, match[2].split(","))):
            raise SettingsError(
                "--to nats:// needs a host and a subject: nats://HOST[:PORT]/SUBJECT"
            )
        self._template = Template(match[3], _WHAT, _token)
        if _BAD_SUBJECT.search(match[3]):
            raise SettingsError(f"{match[3]!r} is no subject to publish to")
        if re.search(r"[^.]\{|\}[^.]", match[3]):
            raise SettingsError("a label is a whole token of a subject, as in logs.{type}.{host}")
        self._servers = [f"nats://{host}" for host in match[2].split(",")]
        self._context = context
        self._options = read_options(context.options, match[1])
        connect_options(self._options)  # so that what is wrong with it is told now
        unit = context.options.get("unit", NatsUnit.RECORD)
        if unit not in {*NatsUnit}:
            raise SettingsError(f"-X unit={unit} is none of {', '.join(NatsUnit)}")
        self._unit = NatsUnit(unit)
        domain = self._options.get("js-domain")
        self._api = f"$JS.{domain}.API" if domain else "$JS.API"
        self.name = f"nats://{match[2]}/{match[3]}"
        self.labelled = self._template.labelled
        self.unwritten = 0
        self._plain = (secrets.token_hex(16), count(1))  # names for what has none
        self._todo: Iterator[_Message] | None = None  # of the write that goes on
        self._pending: deque[_Message] = deque()  # not confirmed, in order
        self._unsent: deque[_Message] = deque()
        self._waiting: dict[str, _Message] = {}  # for a PubAck, by the end of its subject
        self._bytes = 0  # in `_pending`
        self._positions = count(1)
        self._last = 0  # position
        self._rejected: list[Rejection] = []
        self._limit = 0  # of a payload, in bytes
        # The last sequence number known of each JetStream stream: now, when everything before
        # a position was confirmed, and when it will be.
        self._seqs: dict[str, int] = {}
        self._base: dict[str, int] = {}
        self._next_base: tuple[int, dict[str, int]] = (0, {})
        self._made: dict[str, str] = {}  # when each stream was
        self._told: set[tuple[str, str]] = set()  # streams, and what was warned of
        self._held: list[Held] = []
        self._client: NatsClient | None = None
        self._tokens = count()
        self._inbox = ""
        self._refusal = ""
        self._reason = "no answer"
        self._error: ZmqpushError | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_open = False
        self._moved = 0  # counts what happens
        self._changed = asyncio.Event()  # something has become true that is waited for
        self._wake = asyncio.Event()  # the task has something to do

    # What zmqpull calls.

    async def open(self, marks: Marks) -> Sequence[Held]:
        """
        Connect, find the streams, and read what they hold beyond the marks.

        Raises:
            SinkStalledError: If there is no server, or it does not let us.
            SinkError: If no stream takes the subject, or none that can be relied on.

        """
        if not self._task:
            for name, mark in marks.items():
                if name.startswith("nats:") and mark:
                    seq, _, made = mark.partition(" ")
                    stream = name.removeprefix("nats:")
                    self._seqs[stream], self._made[stream] = int(seq), made
            self._task = begin(self._run())
        await self._until(lambda: self._is_open)
        return self._held

    def has(self, place: str) -> bool:
        """Whether a stream is the one that it was, and not one that was made anew."""
        stream, _, made = place.partition(" ")
        return self._made.get(stream) == made

    async def write(self, batches: Sequence[Batch]) -> None:
        """
        Queue records, as soon as there is room.

        Raises:
            SinkStalledError: If nothing moves.

        """
        if not self._todo:
            self._todo = self._messages(batches)
            self.unwritten += sum(batch.records for batch in batches)
        while True:
            await self._until(self._has_room)
            message = next(self._todo, None)
            if not message:
                break
            self._bytes += len(message.payload)
            self._pending.append(message)
            self._unsent.append(message)
            self._wake.set()
        self._todo = None

    async def sync(self) -> Synced:
        """
        Wait until all that was written before is confirmed.

        Raises:
            SinkStalledError: If nothing moves.

        """
        # What is written from now on comes behind this in the streams.
        last, marks = self._last, self._marks()
        await self._until(lambda: not self._pending or self._pending[0].position > last)
        fault_point("engine-synced")
        rejected, self._rejected = self._rejected, []
        self.unwritten -= len(rejected)
        return Synced(marks, rejected)

    async def close(self) -> Marks:
        """End the connection."""
        if self._task:
            self._task.cancel()
        await self._disconnect(at_once=False)
        # All is safe: the next opening need not read what others have written meanwhile.
        return dict.fromkeys(self._marks())

    # Between the two.

    def _marks(self) -> dict[str, str | None]:
        return {
            f"nats:{stream}": f"{seq} {self._made[stream]}" for stream, seq in self._seqs.items()
        }

    def _has_room(self) -> bool:
        return len(self._pending) < _MAX_MESSAGES and self._bytes < _MAX_BYTES

    async def _until(self, condition: Callable[[], bool]) -> None:
        moved = self._moved
        while not condition():
            if self._error:
                raise self._error
            self._changed.clear()
            try:
                async with asyncio.timeout(_STALL_TIMEOUT):
                    await self._changed.wait()
            except TimeoutError:
                if self._moved == moved:
                    raise SinkStalledError(f"{self.name}: {self._reason}") from None
                moved = self._moved

    def _move(self) -> None:
        self._moved += 1
        self._changed.set()

    def _messages(self, batches: Iterable[Batch]) -> Iterator[_Message]:
        for batch in batches:
            subject = self._template.fill(batch.labels)
            stream, first = batch.stream, batch.first
            if not stream:
                stream, numbers = self._plain
                first = next(islice(numbers, batch.records - 1, None)) - batch.records + 1
            self._last = next(self._positions)
            whole = _Message(
                subject, bytes(batch.payload), stream, first, batch.records, self._last
            )
            yield from self._cut(whole)

    def _cut(self, whole: _Message) -> Iterator[_Message]:
        """Cut a message into those that the server takes; reject the records it never takes."""
        number = whole.first
        for payload, records in self._pieces(whole.payload):
            if len(payload) > self._limit:
                self._reject(payload, whole.stream, number)
            else:
                yield _Message(
                    whole.subject, payload, whole.stream, number, records, whole.position
                )
            number += records

    def _pieces(self, payload: bytes) -> Iterable[tuple[bytes, int]]:
        if self._unit is NatsUnit.RECORD:
            yield from ((record, 1) for record in payload.removesuffix(b"\n").split(b"\n"))
            return
        start = 0
        while start < len(payload):
            end = len(payload)
            if end - start > self._limit:
                end = payload.rfind(b"\n", start, start + self._limit) + 1
                end = end or payload.find(b"\n", start) + 1
            piece = payload[start:end]
            yield piece, piece.count(b"\n")
            start = end

    def _reject(self, record: bytes, stream: str, seq: int) -> None:
        record = record.removesuffix(b"\n")
        reason = f"more than the {self._limit} bytes that the server takes"
        if stream == self._plain[0]:
            stream, seq = "", 0
        self._rejected.append(Rejection(record, reason, stream, seq))

    def _confirm(self, message: _Message) -> None:
        if message.done:
            return
        message.done = True
        self.unwritten -= message.records
        self._bytes -= len(message.payload)
        while self._pending and self._pending[0].done:
            self._pending.popleft()
        position, seqs = self._next_base
        if not self._pending or self._pending[0].position > position:
            # All that is not confirmed was sent after these numbers had been given out.
            self._base, self._next_base = seqs, (self._last, dict(self._seqs))
        self._move()

    # The task that has the connection.

    async def _run(self) -> None:
        delay = _FIRST_DELAY
        while True:
            moved = self._moved
            try:
                await self._work()
            except NoServersError:
                pass  # `_on_error` has been told why
            except (_InterruptedError, Error, OSError, ValueError, TimeoutError) as exc:
                self._reason = reason_of(exc)  # also what has become wrong with an option's file
            except ZmqpushError as exc:
                self._error = exc
                self._changed.set()
                return
            except Exception as exc:  # nats-py raises what it meets
                self._reason = f"{type(exc).__name__}: {reason_of(exc)}"
            delay = _FIRST_DELAY if self._moved > moved else min(2 * delay, _MAX_DELAY)
            await asyncio.sleep(delay)

    async def _work(self) -> None:
        self._refusal = ""
        client = await self._connected()
        streams = await self._look(client)
        if not self._is_open or any(message.sent_at for message in self._pending):
            for stream, info in streams.items():
                await self._read_tail(client, stream, info)
        self._line_up()
        self._reason = "no answer"
        if not self._is_open:
            self._is_open = True
            self._move()
        looked_at = time.monotonic()
        while not client.is_closed:
            if time.monotonic() > looked_at + _LOOK_INTERVAL:
                await self._look(client)
                looked_at = time.monotonic()
            self._wake.clear()
            await self._send(client)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STALL_TIMEOUT):
                    await self._wake.wait()
            if self._refusal:
                await self._let_all_arrive()
                raise _InterruptedError(self._refusal)
            oldest = next(iter(self._waiting.values()), None)  # sent first
            if oldest and time.monotonic() > oldest.sent_at + _ANSWER_TIMEOUT:
                await self._disconnect()
        raise _InterruptedError("no answer")

    def _line_up(self) -> None:
        """Have all that is not confirmed sent again, as the server takes it now."""
        pending, self._pending = self._pending, deque()
        for message in pending:
            if message.done:
                continue
            message.sent_at = 0.0
            self._bytes -= len(message.payload)
            small = len(message.payload) <= self._limit
            for piece in (message,) if small else self._cut(message):
                self._bytes += len(piece.payload)
                self._pending.append(piece)
        self._unsent = self._pending.copy()
        self._waiting.clear()
        self._base = dict(self._seqs)
        self._next_base = (self._last, self._base)
        self._changed.set()

    async def _send(self, client: NatsClient) -> None:
        sent = 0
        while self._unsent and not self._refusal and not client.is_closed:
            message = self._unsent.popleft()
            headers = {"Nats-Msg-Id": message.id}
            if self._unit is NatsUnit.BLOCK:
                headers["Records"] = str(message.records)
            token = str(next(self._tokens))
            self._waiting[token] = message
            message.sent_at = time.monotonic()
            reply = f"{self._inbox}.{token}"
            await client.publish(message.subject, message.payload, reply, headers)
            sent += 1
            if sent % 64 == 0 or not self._unsent:
                await asyncio.sleep(0)
                fault_point("engine-written")

    async def _let_all_arrive(self) -> None:
        """After a refusal, wait for what becomes of the rest, so that nothing is unclear."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STALL_TIMEOUT):
                while self._waiting:
                    self._wake.clear()
                    await self._wake.wait()

    async def _on_answer(self, answer: Msg) -> None:
        message = self._waiting.pop(answer.subject.rpartition(".")[2], None)
        if not message:
            return
        values = _decode(answer)
        error, stream, seq = (values.get(key) for key in ("error", "stream", "seq"))
        if error or not isinstance(stream, str) or not isinstance(seq, int):
            message.sent_at = 0.0
            code, why = _explain(error)
            if code == _TOO_LARGE and message.records == 1:
                self._reject(message.payload, message.stream, message.first)
                self.unwritten += 1
                self._confirm(message)
            else:
                self._refuse(f"{message.subject}: {why}")
        else:
            if stream not in self._seqs:
                self._refuse(f"{message.subject}: now the stream {stream} takes it")
            elif not values.get("duplicate"):
                self._seqs[stream] = seq
            self._confirm(message)
        if not self._waiting:
            self._wake.set()

    def _refuse(self, why: str) -> None:
        self._refusal = self._refusal or why
        self._wake.set()

    # The connection.

    async def _connected(self) -> NatsClient:
        if self._client and self._client.is_connected:
            return self._client
        await self._disconnect()
        client = self._client = NatsClient()
        options = connect_options(self._options)
        client.wants_tls = bool(options["tls"]) and not options["tls_handshake_first"]
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                await client.connect(
                    self._servers, error_cb=self._on_error, closed_cb=self._on_closed, **options
                )
                self._inbox = client.new_inbox()
                await client.subscribe(f"{self._inbox}.*", cb=self._on_answer)
        except BaseException:
            client.abort()
            self._client = None
            raise
        return client

    async def _disconnect(self, *, at_once: bool = True) -> None:
        client, self._client = self._client, None
        if client:
            if at_once:
                client.abort()
            with contextlib.suppress(Exception):  # nats-py raises what it meets
                async with asyncio.timeout(_STALL_TIMEOUT):
                    await client.close()

    async def _on_error(self, exc: Exception) -> None:
        self._reason = reason_of(exc)
        if "permissions violation" in self._reason:
            self._refuse(self._reason)
        self._wake.set()

    async def _on_closed(self) -> None:
        self._wake.set()

    # Streams.

    async def _request(self, client: NatsClient, what: str, **values: object) -> dict[str, Any]:
        try:
            answer = await client.request(
                f"{self._api}.{what}", json.dumps(values).encode(), timeout=_ANSWER_TIMEOUT / 2
            )
        except NoRespondersError:
            raise _InterruptedError("there is no JetStream, or it has no leader") from None
        except TimeoutError:
            raise _InterruptedError(self._refusal or "no answer") from None
        found = _decode(answer)
        if "error" in found:
            raise _InterruptedError(_explain(found["error"])[1])
        return found

    async def _look(self, client: NatsClient) -> dict[str, dict[str, Any]]:
        """Find the streams, and what they take; return what the server says of each."""
        tokens = self._template.text.split(".")
        self._pattern = ".".join("*" if {*token} & {*"{%"} else token for token in tokens)
        streams: list[str] = []
        while True:
            found = await self._request(
                client, "STREAM.NAMES", subject=self._pattern, offset=len(streams)
            )
            streams += found.get("streams") or ()
            if not found.get("streams") or len(streams) >= found.get("total", 0):
                break
        infos: dict[str, dict[str, Any]] = {}
        limit = client.max_payload
        if limit <= _HEADER_BYTES:
            self._give_up(f"the server takes no messages of more than {limit} bytes")
        for stream in streams:
            info = infos[stream] = await self._request(client, f"STREAM.INFO.{stream}")
            self._check(stream, info["config"])
            if info["config"]["max_msg_size"] > 0:
                limit = min(limit, info["config"]["max_msg_size"])
            end, made = info["state"]["last_seq"], info["created"]
            if stream not in self._seqs:
                await self._context.remember({f"nats:{stream}": f"{end} {made}"})
                self._seqs[stream] = self._base[stream] = end
            elif self._made[stream] != made:
                self._seqs[stream] = self._base[stream] = 0
            self._made[stream] = made
            self._base.setdefault(stream, self._seqs[stream])
        if not infos:
            command = f"nats stream add logs --subjects '{self._pattern}'"
            self._give_up(f"no stream takes {self._pattern}; make one: {command}")
        self._limit = limit - _HEADER_BYTES
        return infos

    def _give_up(self, why: str) -> None:
        """Say what must be set up first; when it was once, wait for it."""
        if self._is_open:
            raise _InterruptedError(why)
        raise SinkSetupError(f"{self.name}: {why}")

    def _check(self, stream: str, config: Mapping[str, Any]) -> None:
        retention = config.get("retention", "limits")
        for what, is_so in {
            "is sealed": config.get("sealed"),
            "does not acknowledge": config.get("no_ack"),
            "holds counters, not records": config.get("allow_msg_counter"),
            f"confirms messages and does not keep them (retention: {retention}); make one with "
            "--retention limits": retention != "limits",
            "takes no messages of this size": -1 < config["max_msg_size"] <= _HEADER_BYTES,
        }.items():
            if is_so:
                self._give_up(f"the stream {stream} {what}")
        window = config.get("duplicate_window", 0) / 1e9
        for what, is_so in {
            "is in memory: what it holds ends with its server": config["storage"] == "memory",
            "acknowledges records before they are on its disk (persist_mode: async): what it had "
            "not written is lost when its server dies": config.get("persist_mode") == "async",
            f"knows the names of messages for {window:g} s (duplicate_window): after a hang of its "
            f"server some may be there twice; set {_MIN_WINDOW:g} s or more": window < _MIN_WINDOW,
        }.items():
            if is_so and (stream, what) not in self._told:
                self._told.add((stream, what))
                self._context.reporter.warn(f"{self.name}: the stream {stream} {what}")

    async def _read_tail(self, client: NatsClient, stream: str, info: Mapping[str, Any]) -> None:
        """Take note of what the stream holds after what is known of it."""
        begin, end = self._base[stream] + 1, info["state"]["last_seq"]
        self._seqs[stream] = end
        if begin > end:
            return
        ours = {message.id: message for message in self._pending if message.sent_at}
        held: dict[str, Held] = {}
        consumer = f"zmqpull-{secrets.token_hex(8)}"
        limits = info["config"].get("consumer_limits", {})
        await self._make_consumer(client, stream, consumer, begin, limits)
        answers: asyncio.Queue[Msg] = asyncio.Queue()
        inbox = client.new_inbox()
        subscription = await client.subscribe(inbox, cb=answers.put)
        seq = 0
        left = 0
        while seq < end:
            if not left:
                left = _TAIL_BATCH
                self._move()  # it takes long, maybe, and it is no stall
                wanted = json.dumps({"batch": left, "no_wait": True}).encode()
                await client.publish(
                    f"{self._api}.CONSUMER.MSG.NEXT.{stream}.{consumer}", wanted, inbox
                )
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                answer = await answers.get()
            headers = answer.headers or {}
            if status := headers.get("Status") if not answer.reply else None:
                if status in ("404", "408"):
                    break  # what followed is gone
                raise _InterruptedError(headers.get("Description", status))
            left -= 1
            seq = answer.metadata.sequence.stream
            name = headers.get("Nats-Msg-Id", "")
            if name in ours:
                self._confirm(ours[name])
            elif not self._is_open and (match := _ID.fullmatch(name)):
                place = f"{stream} {self._made[stream]}"
                first = int(match[2])
                self._hold(held, match[1], first, int(match[3] or first) - first + 1, place)
        self._held += held.values()
        await subscription.unsubscribe()
        with contextlib.suppress(_InterruptedError):
            await self._request(client, f"CONSUMER.DELETE.{stream}.{consumer}")

    def _hold(
        self, held: dict[str, Held], stream: str, first: int, records: int, place: str
    ) -> None:
        before = held.get(stream)
        if before and before.first + before.records == first:
            held[stream] = Held(stream, before.first, before.records + records, place)
        elif records > 0:
            if before:
                self._held.append(before)
            held[stream] = Held(stream, first, records, place)

    async def _make_consumer(
        self, client: NatsClient, stream: str, consumer: str, begin: int, limits: Mapping[str, int]
    ) -> None:
        idle = int(3 * _ANSWER_TIMEOUT * 1e9)
        config: dict[str, object] = {
            "name": consumer,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": begin,
            "ack_policy": "none",
            "replay_policy": "instant",
            "headers_only": True,
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": min(idle, limits.get("inactive_threshold") or idle),
        }
        await self._request(
            client, f"CONSUMER.CREATE.{stream}.{consumer}", stream_name=stream, config=config
        )


def _is_host(text: str) -> bool:
    match = _HOST.fullmatch(text)
    return match is not None and 0 < int(match["port"] or 4222) < 65536


def _token(label: str) -> str:
    """Make a label one token of a subject."""
    token = _UNSAFE.sub("_", label) or "unknown"
    return token.encode()[:_MAX_LABEL_BYTES].decode("utf-8", "ignore")


def _decode(answer: Msg) -> dict[str, Any]:
    """Read an answer of JetStream; an error is in it under that name."""
    if (answer.headers or {}).get("Status") == "503":
        return {"error": {"description": "no stream takes it"}}
    with contextlib.suppress(ValueError):
        values = json.loads(answer.data)
        if isinstance(values, dict):
            return values
    return {"error": None}


def _explain(error: object) -> tuple[object, str]:
    """Return the code and the words of an error of JetStream, or of something else."""
    values = error if isinstance(error, dict) else {}
    return values.get("err_code"), str(values.get("description", "the answer is not of JetStream"))
