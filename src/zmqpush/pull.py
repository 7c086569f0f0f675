"""
The ``zmqpull`` program: receives, writes records, and acknowledges those that are safe.

::

    PullLink ─ RecordDecoder ───────────┬─ Sink ─ (sync) ─ State
    RouterLink ─ Receiver ─ (arrivals) ─┘                    │
         ▲                                                   │
         └───────────────── acknowledgements ────────────────┘

Plain records are written as they come. Arrivals wait in memory, bounded by the credit of
their senders; whatever has come while the last ones were made safe is written, synced and
remembered as one.
"""

import asyncio
import json
import secrets
import time
from collections.abc import Iterator, Mapping

from zmqpush.core.delivery import Arrival, Progress, Receiver
from zmqpush.core.envelope import Payload
from zmqpush.core.records import RecordDecoder
from zmqpush.endings import Ending
from zmqpush.errors import EXIT_IO, EXIT_LOSS, SinkClosedError, SinkError, StateError
from zmqpush.faults import fault_point
from zmqpush.links import PullLink, RouterLink
from zmqpush.settings import PullSettings
from zmqpush.sink import Sink, Written
from zmqpush.state import State
from zmqpush.telemetry import Reporter

# How often silent sessions are looked for, in seconds.
_EXPIRY_INTERVAL = 5.0
_NO_LABELS: Mapping[str, str] = {}


class Puller:
    """
    One run of ``zmqpull``.

    Args:
        settings: What to do.
        reporter: Where to say what happens.

    Raises:
        SinkError: If the output cannot be opened.
        StateError: If the state cannot be used.
        EndpointError: If an endpoint cannot be used.

    """

    def __init__(self, settings: PullSettings, reporter: Reporter) -> None:
        self._settings = settings
        self._reporter = reporter
        self._state: State | None = None
        if settings.state:
            self._state = State(settings.state, reporter)
            self._state.cut_back()
        self._sink = Sink(settings.to, reporter)
        self._plain = PullLink(settings.endpoints) if settings.endpoints else None
        self._acked = RouterLink(settings.ack_endpoints) if settings.ack_endpoints else None
        self._decoder = RecordDecoder()
        self._receiver = Receiver(
            self._state.floors() if self._state else {},
            settings.memory,
            "sink" if settings.to == "-" else "disk",
            lambda: secrets.randbits(64) or 1,
        )
        self._arrivals: list[Arrival] = []
        self._work = asyncio.Event()  # there is something to write, sync or reopen
        self._writing = asyncio.Lock()
        self._committing = asyncio.Lock()
        self._reopen_due = False
        self._written = 0
        self._until: float | None = None
        self._ending = Ending(settings.grace, self._stop)

    async def run(self) -> int:
        """
        Receive until told to stop.

        Returns:
            The exit code.

        """
        self._ending.handle_signals(at_once=True, hangup=self._hang_up)
        for link, what in ((self._plain, "plain"), (self._acked, "acknowledged")):
            if link and link.has_open_port:
                both = f" for {what} delivery" if self._plain and self._acked else ""
                self._reporter.notice(f"listening at {link.address}{both}")
        beside = asyncio.gather(self._sink.closed(), self._commit_all())
        done = False
        try:
            done = await self._ending.unless_given_up(self._receive_all(), beside=beside)
        except SinkClosedError:
            return 0  # the reader has what it wanted, as in `zmqpull | head`
        except (SinkError, StateError) as exc:
            self._reporter.warn(str(exc))
        finally:
            beside.cancel()
            self._written -= self._sink.unwritten
            self._tell_statistics()
        lost = 0
        if self._until is not None or not done:
            lost = self._sink.unwritten + self._count_the_rest()
        if lost:
            self._reporter.warn(f"{lost} lost: they could not be written")
        if not done:
            return EXIT_IO
        return EXIT_LOSS if lost else 0

    async def _receive_all(self) -> None:
        await asyncio.gather(self._receive_plain(), self._receive_acked())
        await self._commit()
        if self._acked:
            for peer, frame in self._receiver.goodbyes():
                self._acked.send(peer, frame)
            await self._acked.close()

    @property
    def _enough(self) -> bool:
        wanted = self._settings.count
        return wanted is not None and self._written >= wanted

    # What comes from PUSH sockets.

    async def _receive_plain(self) -> None:
        wanted = self._settings.count
        while self._plain and not self._enough:
            left = None if wanted is None else wanted - self._written
            if frames := self._plain.receive(left):
                await self._write_plain(self._decoder.decode(frames, left))
            elif self._until is None:
                await self._plain.readable()
            else:
                return
            if self._until is not None and time.monotonic() > self._until:
                return
        self._wake()

    async def _write_plain(self, payload: Payload) -> None:
        async with self._writing:
            self._written += payload.records
            for part, labels in (
                _by_labels(payload) if self._sink.labelled else [(payload.data, _NO_LABELS)]
            ):
                self._open([labels])
                await self._sink.write(part, labels)
        if self._state:
            self._work.set()
        await asyncio.sleep(0)  # signals get a turn, however fast the senders are

    def _count_the_rest(self) -> int:
        decoder = RecordDecoder()
        rest = self._plain.drain() if self._plain else ()
        return sum(decoder.decode(frames).records for frames in rest)

    # What comes from senders that want acknowledgements.

    async def _receive_acked(self) -> None:
        expire_at = time.monotonic() + _EXPIRY_INTERVAL
        while self._acked and self._until is None and not self._enough:
            messages = self._acked.receive()
            now = time.monotonic()
            for peer, frame in messages:
                if arrival := self._receiver.receive(peer, frame, now):
                    self._arrivals.append(arrival)
            if messages:
                fault_point("received")
                self._work.set()
                self._reply()
                await asyncio.sleep(0)
            else:
                await self._acked.readable()
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
        self._acked.wake_if_readable()

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
            async with self._writing:
                arrivals, self._arrivals = self._arrivals, []
                moved = self._receiver.take_accepted()
                self._open([arrival.labels for arrival in arrivals])
                for arrival in arrivals:
                    self._written += arrival.block.records
                    await self._sink.write(arrival.block.payload, arrival.labels)
                fault_point("written")
                dirty = self._sink.take_dirty() if self._acked or self._state else []
            if dirty or (moved and self._state):
                await asyncio.get_running_loop().run_in_executor(
                    None, self._make_safe, moved, dirty
                )
            self._receiver.committed(moved)
            if self._acked:
                self._reply()
                fault_point("acknowledged")
            self._tidy()

    def _make_safe(self, moved: list[Progress], dirty: list[Written]) -> None:
        for file in dirty:
            file.sync()
        fault_point("files-synced")
        if self._state:
            self._state.commit(moved, dirty)

    def _open(self, labels: list[Mapping[str, str]]) -> None:
        opened = self._sink.open(labels)
        if opened and self._state:
            # Before anything is written to it, so that it can be cut off again.
            self._state.commit((), opened)

    def _tidy(self) -> None:
        closed = self._sink.close_idle()
        if self._reopen_due and not self._writing.locked():
            self._reopen_due = False
            closed += self._sink.reopen()
        if closed and self._state:
            self._state.commit((), (), closed)

    def _wake(self) -> None:
        for link in (self._plain, self._acked):
            if link:
                link.wake()

    def _stop(self) -> None:
        self._until = time.monotonic() + self._settings.grace / 2
        self._wake()

    def _hang_up(self) -> None:
        self._reopen_due = True
        self._work.set()
        self._tell_statistics()

    def _tell_statistics(self) -> None:
        counters = self._receiver.counters
        numbers = {
            "of them were no JSON object": self._decoder.foreign,
            "came twice": counters.duplicates,
            "were skipped by their senders": counters.skipped,
            "were acknowledged by another receiver or an older state": counters.missing,
            "frames were refused": counters.malformed + counters.resets,
        }
        told = [f", {number} {what}" for what, number in numbers.items() if number]
        self._reporter.notice(f"{self._written} records written" + "".join(told))


def _by_labels(payload: Payload) -> Iterator[tuple[bytes, Mapping[str, str]]]:
    """Cut a payload into parts of the same type and host."""
    parts: dict[tuple[str, str], list[bytes]] = {}
    for record in payload.data.splitlines(keepends=True):
        values = json.loads(record)
        key = (_label(values, "type"), _label(values, "host"))
        parts.setdefault(key, []).append(record)
    for (kind, host), records in parts.items():
        yield b"".join(records), {"type": kind, "host": host}


def _label(values: Mapping[str, object], key: str) -> str:
    value = values.get(key, "")
    return value if isinstance(value, str) else ""
