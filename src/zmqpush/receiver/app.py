"""
The ``zmqpull`` program: receives, writes records, and acknowledges those that are safe.

::

    PullSocket ─ RecordDecoder ───────────┬─ Writer ─ Sink
    RouterSocket ─ Receiver ─ (arrivals) ─┘    │  └── State
         ▲                                   │
         └───────── acknowledgements ────────┘

Plain records are written as they come. Arrivals wait in memory, bounded by the credit of
their senders; whatever has come while the last ones were made safe is written, synced and
remembered as one.
"""

import asyncio
import contextlib
import gc
import secrets
import time
from collections.abc import Iterator, Mapping
from itertools import chain

from zmqpush.core.protocol.receiver import Arrival, Receiver
from zmqpush.core.records.decode import RecordDecoder, labels_of
from zmqpush.core.records.encode import Payload
from zmqpush.errors import (
    EXIT_IO,
    EXIT_LOSS,
    EXIT_RESOURCES,
    ResourceError,
    SinkClosedError,
    SinkError,
    StateError,
)
from zmqpush.receiver.writer import Writer, stream_name
from zmqpush.runtime.faults import fault_point
from zmqpush.runtime.fds import allow_many_descriptors
from zmqpush.runtime.reporting import Reporter, Tally
from zmqpush.runtime.shutdown import Ending
from zmqpush.security.admission import Guard
from zmqpush.settings import PullSettings
from zmqpush.sinks.base import Batch
from zmqpush.transport.pull import PullSocket
from zmqpush.transport.router import RouterSocket

# What a byte that is not yet acknowledged costs: the allocator and the connections want
# their share, too.
_MEMORY_PER_BYTE = 2
# How often silent sessions are looked for, in seconds.
_EXPIRY_INTERVAL = 5.0
# How long senders may take for their goodbyes, in seconds.
_GOODBYE_TIMEOUT = 1.0
# What nobody wants acknowledged is synced so often, in seconds.
_PLAIN_INTERVAL = 0.05
# What waits for a place that cannot be written now is tried again so often, in seconds.
_WAITING_INTERVAL = 1.0
# The garbage collector looks at new objects when they are so many; it begins with 700.
_GC_THRESHOLD = 50_000
_NO_LABELS: Mapping[str, str] = {}


class Puller:
    """
    One run of ``zmqpull``.

    Args:
        settings: What to do.
        reporter: Where to say what happens.

    Raises:
        SettingsError: If there is no such sink.
        KeyFileError: If a key or the list of keys cannot be used.
        EndpointError: If an endpoint cannot be used.

    """

    def __init__(self, settings: PullSettings, reporter: Reporter) -> None:
        allow_many_descriptors()
        self._settings = settings
        self._reporter = reporter
        self._writer = Writer(settings, reporter)
        plain, acked = settings.endpoints, settings.ack_endpoints
        self._guard = Guard(settings.security, plain.connect if plain else (), reporter)
        self._plain = PullSocket(plain, self._guard, settings.memory) if plain else None
        self._acked = RouterSocket(acked, self._guard, settings.memory) if acked else None
        self._decoder = RecordDecoder()
        self._receiver = self._make_receiver()  # which knows nobody until the state is open
        self._refused = Tally(reporter, "{} frames were refused: they break the protocol")
        self._skipped = Tally(reporter, "senders have dropped {} records, or cannot read them")
        self._payloads: Iterator[Payload] = iter(())  # what is left of the frames that came last
        self._arrivals: list[Arrival] = []
        self._work = asyncio.Event()  # there is something to write, sync or reopen
        self._committing = asyncio.Lock()
        self._commit_timer: asyncio.TimerHandle | None = None
        self._opening: asyncio.Task[None] | None = None
        self._ended = False  # all is written and remembered
        self._until: float | None = None
        self._ending = Ending(settings.grace, self._stop)

    def _make_receiver(self) -> Receiver:
        return Receiver(
            self._writer.floors,
            self._settings.memory // _MEMORY_PER_BYTE,
            self._writer.sink.durability,
            lambda: secrets.randbits(64) or 1,
            self._guard.admits_host,
        )

    async def run(self) -> int:
        """
        Receive until told to stop.

        Returns:
            The exit code.

        Raises:
            StateError: If the state cannot be used.
            SinkError: If the sink cannot be opened.

        """
        self._ending.handle_signals(at_once=True, hangup=self._hang_up)
        if not await self._open():
            return self._tell_losses()
        self._receiver = self._make_receiver()
        # Blocks that wait for their commit are many objects, and in no cycles: to look at all of
        # them again and again, and at the program's own, took a fifth of the time.
        gc.freeze()
        gc.set_threshold(_GC_THRESHOLD)
        for link, what in ((self._plain, "plain"), (self._acked, "acknowledged")):
            if link and link.has_open_port:
                both = f" for {what} delivery" if self._plain and self._acked else ""
                self._reporter.notice(f"listening at {link.address}{both}")
        beside = asyncio.gather(self._watch_sink(), self._commit_all())
        done, failure = False, EXIT_IO
        try:
            done = await self._ending.unless_given_up(self._receive_all(), beside=beside)
        except SinkClosedError:
            return 0  # the reader has what it wanted, as in `zmqpull | head`
        except (SinkError, StateError) as exc:
            self._reporter.warn(str(exc))
        except MemoryError as exc:
            self._reporter.warn(f"{ResourceError.of(exc)}; the message that came last may be lost")
            failure = EXIT_RESOURCES
        finally:
            beside.cancel()
            self._tell_statistics()
        code = self._tell_losses(rest=self._until is not None or not done)
        return code if done else failure

    def _tell_losses(self, *, rest: bool = True) -> int:
        lost = self._writer.plain_unwritten + self._writer.sink.lost
        if rest:
            lost += self._count_the_rest()
        if lost:
            self._reporter.warn(f"{lost} lost: they could not be written")
        return EXIT_LOSS if lost else 0

    async def _open(self) -> bool:
        """Open the state and the sink; whether that was possible before a signal came."""
        self._opening = asyncio.create_task(self._writer.open())
        await asyncio.wait({self._opening})
        opening, self._opening = self._opening, None
        if opening.cancelled():
            return False
        opening.result()
        return True

    async def _watch_sink(self) -> None:
        await self._writer.sink.gone()
        await asyncio.Event().wait()

    async def _receive_all(self) -> None:
        await asyncio.gather(self._receive_plain(), self._receive_acked())
        await self._commit()
        async with self._committing:
            self._ended = True
            await self._writer.close()
        if self._acked:
            fault_point("all-acknowledged")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GOODBYE_TIMEOUT):
                    await self._take_leave(self._acked)

    async def _take_leave(self, link: RouterSocket) -> None:
        # Until they answer, since the last acknowledgements must not be lost: a connection that
        # is reset takes along what the sender has not read.
        for peer, frame in self._receiver.goodbyes():
            if not link.send(peer, frame):
                self._receiver.forget(peer)
        while self._receiver.sessions:
            await link.readable()
            for peer, answer, principal in link.receive():
                self._receiver.receive(peer, answer, time.monotonic(), principal)
            self._forget_gone(link)
            await asyncio.sleep(0)  # the time limit gets a turn, however much they send
        await link.close()

    @property
    def _enough(self) -> bool:
        wanted = self._settings.count
        return wanted is not None and self._writer.taken >= wanted

    # What comes from PUSH sockets.

    async def _receive_plain(self) -> None:
        wanted = self._settings.count
        while self._plain and not self._enough:
            left = None if wanted is None else wanted - self._writer.taken
            if frames := self._plain.receive(left):
                self._payloads = self._decoder.decode(frames, left)
                for payload in self._payloads:
                    await self._write_plain(payload)
                    if self._until is not None and time.monotonic() > self._until:
                        return
            elif self._until is None:
                await self._plain.readable()
            elif self._plain.read_all() and time.monotonic() < self._until:
                await asyncio.sleep(0)  # what comes may be no frames, and never end
            else:
                return
        self._wake()

    async def _write_plain(self, payload: Payload) -> None:
        sink = self._writer.sink
        if sink.labelled:
            batches = _by_labels(payload)
        else:
            batches = [Batch(*payload, _NO_LABELS)] if payload.records else []
        await self._writer.write(batches)
        if sink.buffers or sink.waiting:
            self._commit_later(_PLAIN_INTERVAL)
        await asyncio.sleep(0)  # signals get a turn, however fast the senders are

    def _commit_later(self, delay: float) -> None:
        if not self._commit_timer:
            loop = asyncio.get_running_loop()
            self._commit_timer = loop.call_later(delay, self._commit_plain)

    def _commit_plain(self) -> None:
        self._commit_timer = None
        self._work.set()

    def _count_the_rest(self) -> int:
        decoder = RecordDecoder()
        rest = self._plain.drain() if self._plain else ()
        rests = chain([self._payloads], map(decoder.decode, rest))
        return sum(payload.records for payload in chain.from_iterable(rests))

    # What comes from senders that want acknowledgements.

    async def _receive_acked(self) -> None:
        expire_at = time.monotonic() + _EXPIRY_INTERVAL
        # While a commit goes on, what it leaves to the senders may count as taken.
        while (
            self._acked and self._until is None and (self._committing.locked() or not self._enough)
        ):
            messages = self._acked.receive()
            now = time.monotonic()
            for peer, frame, principal in messages:
                if arrival := self._receiver.receive(peer, frame, now, principal):
                    self._arrivals.append(arrival)
            self._forget_gone(self._acked)
            if messages:
                fault_point("received")
                self._work.set()
                self._reply()
            else:
                await self._acked.readable()
            self._refused.note(self._receiver.counters.malformed + self._acked.malformed)
            self._skipped.note(self._receiver.counters.skipped)
            await asyncio.sleep(0)  # also when all that comes is refused
            if now >= expire_at:
                expire_at = now + _EXPIRY_INTERVAL
                self._receiver.tick(now)
        self._receiver.stop()
        self._wake()

    def _reply(self) -> None:
        assert self._acked
        for peer, frame in self._receiver.take_replies():
            if not self._acked.send(peer, frame):
                self._receiver.forget(peer)

    def _forget_gone(self, link: RouterSocket) -> None:
        for peer in link.take_gone():
            self._receiver.forget(peer)

    # Both.

    async def _commit_all(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            await self._commit()
            if self._enough:
                self._wake()

    async def _commit(self) -> None:
        """Write what has arrived, make it safe with all that was written, and acknowledge it."""
        async with self._committing:
            if self._ended:
                return
            arrivals, self._arrivals = self._arrivals, []
            forgotten = self._receiver.take_forgotten()
            accepted = self._receiver.take_accepted()
            batches: list[Batch] = []
            for key, labels, block, raw in arrivals:
                payload = block.payload
                if raw:
                    # One at a time: they may become many times as long.
                    await self._writer.write(batches)
                    batches = []
                    payload = await self._wrap(payload)
                batches.append(Batch(payload, block.records, labels, stream_name(key), block.first))
            await self._writer.write(batches)
            fault_point("written")
            moved, deferred = await self._writer.commit(accepted, forgotten)
            self._receiver.committed(moved)
            for key, deferral in deferred.items():
                self._receiver.give_back(key, deferral.first, deferral.reason)
                self._arrivals = [arrival for arrival in self._arrivals if arrival.key != key]
            if self._writer.sink.waiting:
                self._commit_later(_WAITING_INTERVAL)
            if self._acked:
                self._reply()
                fault_point("acknowledged")

    async def _wrap(self, lines: bytes | memoryview) -> bytes:
        parts = []
        for payload in self._decoder.wrap(bytes(lines)):
            parts.append(payload.data)
            await asyncio.sleep(0)
        return b"".join(parts)

    def _wake(self) -> None:
        for link in (self._plain, self._acked):
            if link:
                link.wake()

    def _stop(self) -> None:
        if self._opening:
            self._opening.cancel()
        self._until = time.monotonic() + self._settings.grace / 2
        self._wake()

    def _hang_up(self) -> None:
        self._writer.rotate()
        self._guard.reload()
        self._receiver.review()
        self._work.set()
        self._tell_statistics()

    def _tell_statistics(self) -> None:
        counters = self._receiver.counters
        refused = counters.malformed + counters.resets
        numbers = {
            "of them were no JSON object": self._decoder.foreign,
            "bytes were not UTF-8": self._decoder.invalid_bytes,
            "were refused by the sink": self._writer.rejected,
            "came twice": counters.duplicates,
            "were skipped by their senders": counters.skipped,
            "were acknowledged by another receiver or an older state": counters.missing,
            "frames were refused": refused + (self._acked.malformed if self._acked else 0),
        }
        told = [f", {number} {what}" for what, number in numbers.items() if number]
        self._reporter.notice(f"{self._writer.written} records written" + "".join(told))


def _by_labels(payload: Payload) -> list[Batch]:
    """Cut a payload into batches of the same type and host."""
    by_labels: dict[tuple[str, str], list[bytes]] = {}
    for record in payload.data.split(b"\n")[:-1]:
        by_labels.setdefault(labels_of(record), []).append(record)
    if len(by_labels) == 1:
        ((kind, host),) = by_labels
        return [Batch(*payload, {"type": kind, "host": host})]
    return [
        Batch(b"\n".join([*records, b""]), len(records), {"type": kind, "host": host})
        for (kind, host), records in by_labels.items()
    ]
