"""
Plain delivery: payloads through a bounded queue to a PUSH socket.

While a receiver takes everything, what is put is sent at once, and nothing waits in the
queue; when none has room, the queue fills, and a task sends as soon as one has, until the
queue is empty.
"""

import asyncio
import contextlib

from zmqpush.core.records.encode import Payload
from zmqpush.runtime.reporting import Outage, Reporter, Tally
from zmqpush.runtime.shutdown import Ending
from zmqpush.security.admission import Guard
from zmqpush.sender.delivery import Outcome
from zmqpush.sender.queue import Queue
from zmqpush.settings import PushSettings
from zmqpush.transport.push import PushSocket

# After so many payloads signals and the reader get a turn.
_PAYLOADS_PER_TURN = 16
# So long reading waits for a receiver that may keep up, in seconds: what is read further
# ahead leaves the cache.
_KEEP_UP_TIMEOUT = 0.005


class PlainOutlet:
    """
    An :class:`zmqpush.sender.delivery.Outlet` without acknowledgements.

    Args:
        settings: What to do.
        reporter: Where to say what happens.
        guard: How to encrypt, and whom to admit.
        separator: What ends each record of a payload.

    Raises:
        EndpointError: If an endpoint cannot be used.

    """

    def __init__(
        self, settings: PushSettings, reporter: Reporter, guard: Guard, separator: bytes
    ) -> None:
        self._settings = settings
        self._queue = Queue(settings.queue_max, settings.when_full)
        self._link = PushSocket(settings.endpoints, guard, settings.framing, separator)
        self._outage, self._fullness = Outage(reporter, guard.why), Outage(reporter)
        self._accepted = 0
        self._drops = Tally(reporter, "the queue is full: {} records dropped")
        self._moved = asyncio.Event()  # a receiver took something
        if self._link.has_open_port:
            reporter.notice(f"listening at {self._link.address}")

    @property
    def progress(self) -> object:
        """What changes as long as records are delivered."""
        return self._link.accepted, self._link.unread

    @property
    def waiting(self) -> int:
        """How many records the kernel has not taken yet."""
        return self._queue.records + self._link.unsent

    @property
    def statistics(self) -> str:
        """How many records were sent, wait and were dropped."""
        return f"{self._link.accepted} sent, {self.waiting} queued, {self._queue.dropped} dropped"

    async def open(self, ending: Ending) -> None:
        """Do nothing: it is ready."""

    def put(self, payload: Payload) -> None:
        """Take the next payload, and send it if nothing waits."""
        self._queue.put(payload)
        self._drops.note(self._queue.dropped)
        self._pump()

    async def room(self) -> None:
        """Return once there is room to read on."""
        if self._queue and self._link.connected:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_KEEP_UP_TIMEOUT):
                    await self._wait_for_progress()
        while self._queue.full:
            self._fullness.begin("the queue is full: reading waits")
            await self._wait_for_progress()
        self._fullness.end("the queue has room again")

    async def _wait_for_progress(self) -> None:
        self._moved.clear()
        await self._moved.wait()

    def _pump(self) -> None:
        """Send from the queue until it is empty, nobody has room, or the turn is over."""
        queue, link = self._queue, self._link
        for _ in range(_PAYLOADS_PER_TURN):
            if not queue or not link.has_room:
                break
            link.send(queue.first)
            queue.get()  # only now: no memory may be left to send it
        if link.accepted != self._accepted:
            self._accepted = link.accepted
            self._moved.set()
            self._outage.end(
                f"a receiver takes messages again: {queue.records} queued, {queue.dropped} dropped"
            )
        if queue and link.has_room:
            link.wake()
        elif self.waiting:
            self._outage.begin(
                f"no receiver takes messages at {self._settings.endpoints}: "
                f"queueing, then --when-full {self._settings.when_full}"
            )

    async def run(self) -> None:
        """Send what waits, for ever."""
        while True:
            await self._link.changed()
            self._pump()
            await asyncio.sleep(0)

    async def drain(self) -> None:
        """Return once the kernel has taken everything."""
        while self.waiting:
            await self._wait_for_progress()

    async def close(self, ending: Ending) -> Outcome:
        """Wait until the receivers have taken all; return what became of all records."""
        link = self._link
        self._outage.begin("the receiver is slow to take the last records")
        closed = await ending.unless_given_up(link.close())
        untaken = 0 if closed else link.untaken
        doubtful = link.doubtful + (0 if closed else link.unconfirmed - untaken)
        lost = self.waiting + untaken
        if closed and not lost:
            self._outage.end("the last records were taken")
        return Outcome(link.accepted - untaken, self._queue.dropped, lost, doubtful=doubtful)
