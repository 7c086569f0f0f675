"""
What every sink needs around it: a memory, patience, a place for dead letters, statistics.

What is acknowledged and the sink's marks are remembered in one transaction, when the sink has
made safe what they are about.
"""

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from zmqpush.core.held import HeldRecords
from zmqpush.core.protocol.receiver import ANONYMOUS, Floor, Key, Progress
from zmqpush.errors import SinkError, SinkStalledError, SinkUndoneError
from zmqpush.receiver.state import State
from zmqpush.runtime.faults import fault_point
from zmqpush.runtime.reporting import Reporter
from zmqpush.settings import PullSettings
from zmqpush.sinks.base import Batch, Context, Deferral, Marks, Rejection, Synced
from zmqpush.sinks.files.output import open_shared
from zmqpush.sinks.registry import make_sink

# A sink that stalls is tried again after so long, then after twice as long and so on, in
# seconds.
_FIRST_DELAY, _MAX_DELAY = 0.1, 2.0
# Of one stall so many reasons are told.
_MAX_REASONS = 5
# Files that are idle are closed by a sync, so there is one now and then, in seconds.
_IDLE_SYNC = 60.0
# What an engine holds of a stream that does not come back is forgotten, in seconds.
_HELD_EXPIRY = 30 * 86400

_T = TypeVar("_T")


class Writer:
    """
    Writes batches to a sink, and makes them safe.

    Args:
        settings: Which sink, and where to remember what it holds.
        reporter: Where to say what happens.

    Attributes:
        sink: The sink.
        given: How many records it was given.
        rejected: How many of them it refused for good.

    Raises:
        SettingsError: If there is no such sink.

    """

    def __init__(self, settings: PullSettings, reporter: Reporter) -> None:
        self._reporter = reporter
        self._dead_letters = settings.dead_letters
        self._buries = settings.dead_letters is not None
        if settings.state and not self._dead_letters:
            self._dead_letters = settings.state / "dead-letters.ndjson"
        own = [self._dead_letters] if self._dead_letters else []
        if settings.state:
            own += [settings.state, settings.state / "state.db", settings.state / "lock"]
        context = Context(
            reporter=reporter,
            remember=lambda marks: self._remember(marks=marks),
            safe=bool(settings.state or settings.ack_endpoints),
            remembers=settings.state is not None,
            directory=settings.state,
            buries=self._buries,
            own=own,
            options=settings.options,
        )
        self.sink = make_sink(settings.to, context)
        self._state_directory = settings.state
        self._state: State | None = None
        self._background = ThreadPoolExecutor(1)  # changes the state, in order
        self._writing = asyncio.Lock()
        self._held = HeldRecords()
        self._held_marks: dict[str, list[str]] = {}  # their names, by stream
        self._no_longer_held: list[str] = []  # names of marks, since the last commit
        self._unsynced = False  # something was written since the last sync
        self._undone = False  # a sync has failed, and what was written is gone
        self._synced_at = time.monotonic()
        self._rotation_due = False
        self._stalled_since: float | None = None
        self._plain_waiting = 0  # records for their turn, or for a place for dead letters
        self._recent: deque[tuple[int, bool]] = deque()  # records, and whether they are plain
        self._going = 0  # records of the write that goes on
        self.given = 0
        self.rejected = 0

    @property
    def floors(self) -> Mapping[Key, Floor]:
        """What is remembered of each stream."""
        return self._state.floors() if self._state else {}

    @property
    def taken(self) -> int:
        """How many records the sink has taken, for itself or as dead letters."""
        return self.given - self._going - self.sink.waiting - self.sink.deferred

    @property
    def written(self) -> int:
        """How many records are in the sink."""
        sink = self.sink
        return self.given - sink.unwritten - sink.waiting - sink.lost - self.rejected

    @property
    def plain_unwritten(self) -> int:
        """How many records that nobody else has are not in the sink."""
        left, plain = self.sink.unwritten, self._plain_waiting + self.sink.waiting
        for records, is_plain in reversed(self._recent):
            plain += min(left, records) if is_plain else 0
            left -= min(left, records)
        return plain

    async def open(self) -> None:
        """
        Open the state and the sink.

        Raises:
            StateError: If the state cannot be used.
            SinkError: If the sink cannot be opened.

        """
        if self._state_directory:
            opening = partial(State, self._state_directory, self._reporter)
            self._state = await self._in_background(opening)
        marks = self._state.marks() if self._state else {}
        found = await self._when_possible(partial(self.sink.open, marks))
        if self._dead_letters and (self.sink.durability == "engine" or self._buries):
            # Whether it can be written is known now.
            await self._when_possible(partial(self._write_dead_letters, b""))
        changed = self._take_held(marks)
        by_place: dict[str, HeldRecords] = {}
        for stream, first, records, place in found:
            self._held.add(stream, first, records)
            by_place.setdefault(place, HeldRecords()).add(stream, first, records)
        for place, held in by_place.items():
            for stream in held:
                name = _held_name(self.sink.name, place, stream)
                self._held_marks.setdefault(stream, []).append(name)
                changed[name] = f"{time.time():.0f} {held.to_text(stream)}"
        if changed:
            # Before the sink's marks move on: its tail is not read again.
            await self._remember(marks=changed)

    def _take_held(self, marks: Marks) -> dict[str, str | None]:
        """Note what earlier openings have found; return the marks to forget."""
        forgotten: dict[str, str | None] = {}
        for name, value in marks.items():
            if not value or not name.startswith(_held_name()):
                continue
            sink, place, stream = name.removeprefix(_held_name()).split("\n")
            since, text = value.split()
            is_old = float(since) < time.time() - _HELD_EXPIRY
            if is_old or sink != self.sink.name or not self.sink.has(place):
                forgotten[name] = None
            else:
                self._held.add_text(stream, text)
                self._held_marks.setdefault(stream, []).append(name)
        return forgotten

    async def write(self, batches: Sequence[Batch]) -> None:
        """
        Write records, but for those that are in the sink, when that is possible.

        Raises:
            SinkError: If they cannot be written.

        """
        if self._held:
            batches = [part for batch in batches for part in self._not_held(batch)]
        if not batches:
            return
        records = sum(batch.records for batch in batches)
        plain = 0 if batches[0].stream else records
        self._plain_waiting += plain
        async with self._writing:
            self._plain_waiting -= plain
            self._recent.append((records, bool(plain)))
            self.given += records
            self._unsynced = True
            self._going = records
            await self._when_possible(partial(self.sink.write, batches))
            self._going = 0
            left = self.sink.unwritten
            total = sum(records for records, _ in self._recent)
            while self._recent and total - self._recent[0][0] >= left:
                total -= self._recent.popleft()[0]

    def _not_held(self, batch: Batch) -> Iterator[Batch]:
        stream = batch.stream
        if stream not in self._held:
            yield batch
            return
        missing = self._held.missing(stream, batch.first, batch.records)
        if self._held.ends_by(stream, batch.first + batch.records - 1):
            self._forget_held(stream)
        lines = bytes(batch.payload).split(b"\n") if missing else []
        for first, records in missing:
            payload = b"\n".join([*lines[first - batch.first :][:records], b""])
            yield batch._replace(payload=payload, records=records, first=first)

    def _forget_held(self, stream: str) -> None:
        self._held.forget(stream)
        self._no_longer_held += self._held_marks.pop(stream)

    async def commit(
        self, moved: Sequence[Progress], forgotten: Sequence[Key]
    ) -> tuple[Sequence[Progress], Mapping[Key, Deferral]]:
        """
        Make safe what was written before, and remember it.

        Args:
            moved: How far streams have moved.
            forgotten: Streams that have ended.

        Returns:
            How far they have moved in the sink, and what it leaves to the senders.

        Raises:
            SinkError: If it cannot be made safe.
            StateError: If it cannot be remembered.

        """
        for key in forgotten:
            if (stream := stream_name(key)) in self._held:
                self._forget_held(stream)
        marks: dict[str, str | None] = dict.fromkeys(self._no_longer_held)
        self._no_longer_held.clear()
        deferred: dict[Key, Deferral] = {}
        if self.sink.waiting:
            async with self._writing:
                self._unsynced = True
                await self._when_possible(partial(self.sink.write, ()))
        if self._unsynced or time.monotonic() > self._synced_at + _IDLE_SYNC:
            self._unsynced = False
            synced = await self._when_possible(self._sync)
            self._synced_at = time.monotonic()
            marks |= synced.marks
            if synced.deferred:
                moved, deferred = self._defer(moved, synced.deferred)
            if synced.rejected:
                async with self._writing:  # nothing more is refused meanwhile
                    await self._bury(synced.rejected)
        if moved or forgotten or marks:
            await self._remember(moved=moved, marks=marks, forgotten=forgotten)
        if self._rotation_due and not self._writing.locked():
            self._rotation_due = False
            self.sink.rotate()
        return moved, deferred

    def _defer(
        self, moved: Sequence[Progress], deferrals: Sequence[Deferral]
    ) -> tuple[list[Progress], dict[Key, Deferral]]:
        self.given -= sum(deferral.records for deferral in deferrals)
        by_stream = {deferral.stream: deferral for deferral in deferrals}
        kept, deferred = [], {}
        for key, floor in moved:
            if deferral := by_stream.get(stream_name(key)):
                deferred[key] = deferral
                floor = floor._replace(acked=deferral.first - 1)
            kept.append(Progress(key, floor))
        return kept, deferred

    async def _sync(self) -> Synced:
        async with self._writing:
            if self._undone:
                await self.sink.write(())
                self._undone = False
            syncing = asyncio.create_task(self.sink.sync())
            await asyncio.sleep(0)  # it has looked what was written
        try:
            return await syncing
        except SinkUndoneError:
            self._undone = True
            raise

    async def _bury(self, rejected: Sequence[Rejection]) -> None:
        """Write down what the sink refuses; without a place for it, wait for the end."""
        self.rejected += len(rejected)
        plain = sum(not rejection.stream for rejection in rejected)
        self._plain_waiting += plain
        first = rejected[0]
        what = f"{self.sink.name} refuses {len(rejected)} records ({first.reason})"
        if self._dead_letters is None:
            self._reporter.warn(f"{what}: waiting; --dead-letters FILE lets the others pass")
            await asyncio.Event().wait()
        self._reporter.warn(f"{what}: they are in {self._dead_letters}")
        lines = b"".join(_dead_letter(rejection, self.sink.name) for rejection in rejected)
        await self._when_possible(partial(self._write_dead_letters, lines))
        self._plain_waiting -= plain
        fault_point("engine-buried")

    async def _write_dead_letters(self, lines: bytes) -> None:
        path = str(self._dead_letters)
        try:
            output = await open_shared(path, self._reporter)
        except SinkError as exc:
            if not lines or isinstance(exc, SinkStalledError):
                raise
            raise SinkStalledError(f"{path} ({exc})") from exc  # somebody has to mend that
        length = os.fstat(output.fd).st_size
        try:
            await output.write(lines)
            if output.is_regular:
                await asyncio.get_running_loop().run_in_executor(None, output.sync)
        except SinkStalledError:
            if output.is_regular:
                os.ftruncate(output.fd, length)
            raise
        finally:
            output.close()

    def rotate(self) -> None:
        """Open files anew at the next commit."""
        self._rotation_due = True

    async def close(self) -> None:
        """
        End, when all is safe.

        Raises:
            SinkError: If the sink cannot be closed.
            StateError: If the state cannot be written.

        """
        marks = await self._when_possible(self.sink.close)
        await self._remember(marks=marks)
        if self._state:
            await self._in_background(self._state.close)

    async def _remember(
        self,
        *,
        moved: Iterable[Progress] = (),
        marks: Marks | None = None,
        forgotten: Iterable[Key] = (),
    ) -> None:
        if self._state:
            commit = partial(
                self._state.commit, moved=moved, marks=dict(marks or {}), forgotten=forgotten
            )
            await self._in_background(commit)

    async def _in_background(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._background, work)

    async def _when_possible(self, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """Do something again and again until the sink does not stall."""
        delay = _FIRST_DELAY
        told: set[str] = set()
        while True:
            try:
                result = await attempt()
            except SinkStalledError as exc:
                if self._stalled_since is None:
                    self._stalled_since = time.monotonic()
                if str(exc) not in told and len(told) < _MAX_REASONS:
                    told.add(str(exc))
                    self._reporter.warn(f"cannot write to {exc}: waiting")
                await asyncio.sleep(delay)
                delay = min(2 * delay, _MAX_DELAY)
            else:
                if told and self._stalled_since is not None:
                    seconds = time.monotonic() - self._stalled_since
                    self._stalled_since = None
                    self._reporter.notice(
                        f"writing to {self.sink.name} again (after {seconds:.1f} s)"
                    )
                return result


def stream_name(key: Key) -> str:
    """Return what a stream is called in a sink: with the key of its sender, if there is one."""
    principal, stream = key
    return stream if principal == ANONYMOUS else f"{principal}/{stream}"


def _held_name(*parts: str) -> str:
    """Return the name of the mark for what a sink holds, at a place, of a stream."""
    return "held\n" + "\n".join(parts)


def _dead_letter(rejection: Rejection, sink: str) -> bytes:
    values = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sink": sink,
        "reason": rejection.reason,
        "stream": rejection.stream,
        "seq": rejection.seq,
        "record": rejection.record.decode("utf-8", "surrogateescape"),
    }
    return json.dumps(values).encode() + b"\n"
