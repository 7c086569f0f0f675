"""
Plain delivery: payloads through a bounded queue to a PUSH socket.

While the link takes everything, what is put is sent at once, and nothing waits in the
queue; when libzmq says EAGAIN, the queue fills and a task sends as soon as a peer has
room, until the queue is empty.
"""

import asyncio

from zmqpush.core.envelope import Payload
from zmqpush.endings import Ending
from zmqpush.guard import Guard
from zmqpush.links import PushLink
from zmqpush.outlet import Outcome
from zmqpush.queue import Queue
from zmqpush.settings import PushSettings
from zmqpush.telemetry import Outage, Reporter, Tally

# After so many payloads signals and the reader get a turn.
_PAYLOADS_PER_TURN = 16


class PlainOutlet:
    """
    An :class:`zmqpush.outlet.Outlet` without acknowledgements.

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
        self._link = PushLink(settings.endpoints, guard, settings.framing, separator)
        self._outage, self._fullness = Outage(reporter, guard.why), Outage(reporter)
        self._drops = Tally(reporter, "the queue is full: {} records dropped")
        self._behind = asyncio.Event()  # something waits: the sending task takes over
        self._moved = asyncio.Event()  # the link took something
        if self._link.has_open_port:
            reporter.notice(f"listening at {self._link.address}")

    @property
    def progress(self) -> object:
        """What changes as long as records are delivered."""
        return self._link.accepted, self._link.unread

    @property
    def waiting(self) -> int:
        """How many records libzmq has not taken yet."""
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
        if not self._behind.is_set():
            self._pump()

    async def room(self) -> None:
        """Return once there is room to read on."""
        while self._queue.full:
            self._fullness.begin("the queue is full: reading waits")
            self._moved.clear()
            await self._moved.wait()
        self._fullness.end("the queue has room again")

    def _pump(self) -> None:
        """Send from the queue until it is empty, libzmq says EAGAIN, or the turn is over."""
        queue, link = self._queue, self._link
        accepted = link.accepted
        for _ in range(_PAYLOADS_PER_TURN):
            if not (taken := link.flush()) or not queue:
                break
            link.load(queue.first)
            queue.get()  # only now: no memory may be left to load it
        if link.accepted != accepted:
            self._moved.set()
            self._outage.end(
                f"a receiver takes messages again: {queue.records} queued, {queue.dropped} dropped"
            )
        if link.unsent:
            self._behind.set()
        if not taken:
            self._outage.begin(
                f"no receiver takes messages at {self._settings.endpoints}: "
                f"queueing, then --when-full {self._settings.when_full}"
            )

    async def run(self) -> None:
        """Send what waits, for ever."""
        while True:
            await self._behind.wait()
            await self._link.writable()
            self._behind.clear()
            self._pump()
            await asyncio.sleep(0)

    async def drain(self) -> None:
        """Return once libzmq has taken everything."""
        while self.waiting:
            self._moved.clear()
            await self._moved.wait()

    async def close(self, ending: Ending) -> Outcome:
        """Hand over what libzmq has taken; return what became of all records."""
        link = self._link
        lost = self.waiting
        delivered = link.accepted
        self._outage.begin("the receiver is slow to take the last records")
        closed = await ending.unless_given_up(link.close())
        if closed and not lost:
            self._outage.end("the last records were taken")
        elif not closed:
            lost += link.in_doubt
            delivered -= link.in_doubt
        return Outcome(delivered, self._queue.dropped, lost)
