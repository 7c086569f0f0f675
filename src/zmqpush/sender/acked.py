"""
Acknowledged delivery: blocks, in a queue or a spool, to one receiver at a time.

The protocol is the business of :class:`zmqpush.core.protocol.sender.Sender`; here are its
sockets, its timers, and the thread that syncs the spool.
"""

import asyncio
import contextlib
import hashlib
import os
import random
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from zmqpush.core.protocol.messages import MAX_LABEL, Labels, public_name
from zmqpush.core.protocol.sender import Redial, Sender
from zmqpush.core.records.encode import Format, Payload
from zmqpush.errors import SpoolError, SpoolFullError
from zmqpush.runtime.background import end_with
from zmqpush.runtime.faults import fault_point
from zmqpush.runtime.reporting import Outage, Reporter, Tally
from zmqpush.runtime.shutdown import Ending
from zmqpush.security.admission import Guard
from zmqpush.sender.delivery import Outcome
from zmqpush.sender.unacked_queue import UnackedQueue
from zmqpush.settings import Confirm, PushSettings, Sync
from zmqpush.spool.slots import take_slot
from zmqpush.spool.spool import Spool, SyncJob
from zmqpush.transport.dealer import DealerSocket

# With ``--sync interval``, how often the spool is synced at most, in seconds.
_SYNC_INTERVAL = 0.05
# Sooner, when so many bytes wait for it.
_SYNC_BYTES = 4 << 20
# So long reading waits for a receiver that may keep up, in seconds: what is read further
# ahead leaves the cache, or must be read again from the spool.
_KEEP_UP_TIMEOUT = 0.005
# How often a full spool is tried again, in seconds.
_FULL_INTERVAL = 1.0
# How long to wait for a receiver's answer before the next one is tried, in seconds. A
# round trip of two seconds, which takes eight, should do where there is no other one.
_PATIENCE = 8.0
_PATIENCE_OF_SEVERAL = 2.0
# How long the last frame to a receiver may take, in seconds.
_GOODBYE_TIMEOUT = 0.2


class AckedOutlet:
    """
    An :class:`zmqpush.sender.delivery.Outlet` with acknowledgements.

    Args:
        settings: What to do.
        reporter: Where to say what happens.
        guard: How to encrypt.

    """

    _sender: Sender  # from open() on

    def __init__(self, settings: PushSettings, reporter: Reporter, guard: Guard) -> None:
        self._settings = settings
        self._reporter = reporter
        self._guard = guard
        self._slot: Path | None = None
        self._spool: Spool | None = None
        host, raw = socket.gethostname(), settings.format is Format.RAW
        self._labels = Labels(settings.logtype[:MAX_LABEL], host[:MAX_LABEL], raw)
        self._store: Spool | UnackedQueue = UnackedQueue(
            settings.queue_max, settings.when_full, self._labels
        )
        self._endpoints = list(settings.endpoints.connect)
        self._link: DealerSocket | None = None
        self._not_before: dict[str, float] = {}  # endpoints that have refused us
        self._outage, self._fullness = Outage(reporter, guard.why), Outage(reporter)
        self._name = "spool" if settings.spool else "queue"
        self._drops = Tally(reporter, f"the {self._name} is full: {{}} records dropped")
        self._moved = asyncio.Event()  # something was acknowledged
        self._unsynced = asyncio.Event()
        self._pressing = asyncio.Event()  # much is unsynced
        self._wake_at = self._dial_at = 0.0

    async def open(self, ending: Ending) -> None:
        """
        Open the spool, once there is room for its files, and connect.

        Raises:
            SpoolError: If the spool cannot be used, or a signal comes while it waits.

        """
        settings = self._settings
        if settings.spool:
            self._store = self._spool = await self._open_spool(settings.spool, ending)
        patience = _PATIENCE if len(self._endpoints) == 1 else _PATIENCE_OF_SEVERAL
        run = os.urandom(16).hex()
        self._sender = Sender(self._store, run, patience, random.random)
        if settings.spread:
            name = self._store.was or public_name(self._store.secret)
            self._endpoints = _spread(self._endpoints, name)
        self._endpoint = self._last_endpoint = self._endpoints[0]
        self._dial()

    async def _open_spool(self, directory: Path, ending: Ending) -> Spool:
        loop = asyncio.get_running_loop()
        told = False
        while True:
            try:
                spool = await loop.run_in_executor(None, self._take_spool, directory)
            except SpoolFullError as exc:
                if ending.signalled:
                    raise SpoolError(f"{exc}: nothing was read") from exc
                if not told:
                    self._reporter.warn(f"{exc}: waiting")
                told = True
                await asyncio.sleep(_FULL_INTERVAL)
            else:
                if told:
                    self._reporter.notice(f"the spool {directory} has room again")
                return spool

    def _take_spool(self, directory: Path) -> Spool:
        settings = self._settings
        self._slot = self._slot or take_slot(directory, settings.spool_slots)
        return Spool(
            self._slot,
            max_bytes=settings.spool_max,
            when_full=settings.when_full,
            sync=settings.sync,
            labels=self._labels,
            reporter=self._reporter,
        )

    @property
    def progress(self) -> object:
        """What changes as long as records are delivered."""
        return self._store.acked

    @property
    def waiting(self) -> int:
        """How many records are not acknowledged."""
        return self._store.records

    @property
    def statistics(self) -> str:
        """How many records were acknowledged, wait and were dropped."""
        store = self._store
        return f"{store.acked} acknowledged, {store.records} queued, {store.dropped} dropped"

    def put(self, payload: Payload) -> None:
        """
        Take the next payload, and send it if it may be.

        Raises:
            SpoolError: If the spool fails.

        """
        self._store.put(payload)
        self._drops.note(self._store.dropped)
        if self._spool and self._spool.unsynced_bytes:
            self._unsynced.set()
            if self._spool.unsynced_bytes >= _SYNC_BYTES:
                self._pressing.set()
        self._turn()

    async def room(self) -> None:
        """
        Return once there is room to read on.

        Raises:
            SpoolError: If the spool fails.

        """
        if self._store.ahead and self._sender.streaming:
            await self._wait_for_ack(_KEEP_UP_TIMEOUT)
        while self._store.full:
            self._fullness.begin(f"the {self._name} is full: reading waits")
            await self._wait_for_ack(_FULL_INTERVAL)
            self._retry()
        self._fullness.end(f"the {self._name} has room again")

    async def _wait_for_ack(self, timeout: float) -> None:  # noqa: ASYNC109 - the common case
        self._moved.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._moved.wait()

    def _retry(self) -> None:
        if self._spool:
            self._spool.retry()
            if self._spool.unsynced_bytes:
                self._unsynced.set()

    def _turn(self) -> None:
        """Receive and send what can be at once."""
        link, sender = self._link, self._sender
        if link is None:
            return
        now = time.monotonic()
        acked = self._store.acked
        redial = None
        # Looked at before what has come, so that a broken connection's last words count.
        was_connected = link.connected
        for frame in link.receive():
            redial = sender.receive(frame, now) or redial
        if self._store.acked != acked:
            fault_point("acked")
            self._moved.set()
            if self._spool and self._spool.has_removable:
                loop = asyncio.get_running_loop()
                end_with(loop.run_in_executor(None, self._spool.unlink_removable))
        if not was_connected:
            sender.disconnected(now)
        if redial := redial or sender.tick(now):
            self._hang_up(redial)
            return
        if link.connected:
            while sending := sender.next_frame(now):
                if not link.send(sending):
                    link.wake()
                    break
                fault_point("sent")
        elif was_connected:
            link.wake()
        self._tell()
        if self._wake_at > sender.deadline(now):
            link.wake()

    def _tell(self) -> None:
        if not self._sender.streaming:
            self._outage.begin(
                f"no receiver acknowledges at {self._settings.endpoints}: "
                f"into the {self._name}, then --when-full {self._settings.when_full}"
            )
            return
        self._outage.end(f"{self._endpoint} acknowledges")
        if self._endpoint != self._last_endpoint:
            self._last_endpoint = self._endpoint
            self._reporter.notice(f"sending to {self._endpoint} now")

    def _dial(self) -> None:
        self._link = DealerSocket(self._endpoint, self._guard)
        self._sender.connect(time.monotonic())

    def _hang_up(self, redial: Redial) -> None:
        assert self._link
        if redial.refused:
            self._reporter.warn(f"{self._endpoint}: {redial.reason}")
        if goodbye := self._sender.goodbye():
            self._link.send(goodbye)
        self._link.discard(_GOODBYE_TIMEOUT)
        self._link.wake()
        self._link = None
        now = time.monotonic()
        self._not_before[self._endpoint] = now + redial.delay
        at = self._endpoints.index(self._endpoint) + 1
        # The next one that may be tried now, or else first.
        following = self._endpoints[at:] + self._endpoints[:at]
        self._endpoint = min(following, key=lambda e: max(now, self._not_before.get(e, 0)))
        self._dial_at = max(now, self._not_before.get(self._endpoint, 0))
        self._sender.disconnected(now)

    async def run(self) -> None:
        """
        Deliver, for ever.

        Raises:
            SpoolError: If the spool fails.

        """
        work = [self._serve()]
        if self._spool and self._settings.sync is not Sync.OFF:
            work.append(self._sync(self._spool))
        tasks = [asyncio.create_task(each) for each in work]
        try:
            await asyncio.gather(*tasks)
        finally:  # when one fails the other must not go on with its files
            for task in tasks:
                task.cancel()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._turn()
            if self._link is None:
                await asyncio.sleep(self._dial_at - loop.time())
                self._dial()
                continue
            self._wake_at = self._sender.deadline(loop.time())
            timer = loop.call_at(self._wake_at, self._link.wake)
            await self._link.readable()
            timer.cancel()
            self._wake_at = 0.0
            await asyncio.sleep(0)

    async def _sync(self, spool: Spool) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout(_FULL_INTERVAL if spool.unsafe else None):
                    await self._unsynced.wait()
            except TimeoutError:  # while the input is idle nobody else tries again
                self._retry()
                continue
            self._unsynced.clear()
            due = loop.time() + _SYNC_INTERVAL
            job = spool.begin_sync()
            spool.end_sync(job, await loop.run_in_executor(None, _run, job))
            self._turn()
            self._moved.set()
            if spool.unsynced_bytes:
                self._unsynced.set()
            if self._settings.sync is Sync.INTERVAL:
                self._pressing.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._pressing.wait(), due - loop.time())

    async def drain(self) -> None:
        """Return once everything is acknowledged."""
        await self._settle(Confirm.REMOTE)

    async def confirm(self) -> None:
        """Return once everything is as safe as ``--confirm`` says."""
        await self._settle(self._settings.confirm)

    async def _settle(self, level: Confirm) -> None:
        while not self._is_safe(level):
            if self._store.full:
                await self.room()
            else:
                self._moved.clear()
                await self._moved.wait()

    def _is_safe(self, level: Confirm) -> bool:
        if self._spool and level is Confirm.WRITE:
            return not self._spool.unsafe
        if self._spool and level is Confirm.FSYNC:
            return self._spool.synced
        return not self._store.records

    async def close(self, ending: Ending) -> Outcome:
        """
        Sync the spool and take leave of the receiver; return what became of all records.

        A slow disk is waited for, but a second signal ends that.
        """
        store = self._store
        if self._link and not store.records and (goodbye := self._sender.goodbye()):
            self._link.send(goodbye)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._link.close(), _GOODBYE_TIMEOUT)
        if (spool := self._spool) is None:
            return Outcome(store.acked, store.dropped, store.records)
        if not spool.failed:
            try:
                await ending.unless_told_twice(asyncio.to_thread(spool.close))
            except SpoolError as exc:
                self._reporter.warn(str(exc))
        at_risk = spool.at_risk
        return Outcome(
            spool.acked,
            spool.dropped,
            at_risk + spool.damaged,
            spool.records - at_risk,
            failed=spool.failed,
        )


def _run(job: SyncJob) -> OSError | None:
    try:
        job.run()
    except OSError as exc:
        return exc
    return None


def _spread(endpoints: Sequence[str], stream: str) -> list[str]:
    """Order endpoints so that streams spread evenly over them, each always alike."""
    return sorted(endpoints, key=lambda e: hashlib.sha256(f"{stream} {e}".encode()).digest())
