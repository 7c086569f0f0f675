"""
The ``zmqpush`` program: wires the stages and owns the order of shutdown.

::

    Source ─ LineSplitter ─ Envelope ─ Queue ─ PushLink
     bytes      blocks      payloads            frames

One task reads. While the link takes everything, it also sends, and nothing waits in
the queue; when libzmq says EAGAIN, reading goes on into the queue and a second task
sends as soon as a peer has room, until the queue is empty.
"""

import asyncio
import os
import socket
import time

from zmqpush.core.envelope import Envelope
from zmqpush.core.framing import Framing
from zmqpush.core.lines import Block, LineSplitter
from zmqpush.endings import Ending, Reason
from zmqpush.errors import EXIT_LOSS, EXIT_NO_RECEIVER, SourceError
from zmqpush.links import PushLink
from zmqpush.queue import Queue
from zmqpush.settings import PushSettings
from zmqpush.source import Source
from zmqpush.telemetry import Outage, Reporter

# How much is read at once, in bytes. Large blocks are fast, but the records of one that
# is cut into messages should stay in the cache.
_READ_BYTES = 1 << 17
_READ_BYTES_SINGLE = 1 << 16
# Less is read at once if that could make a payload of more bytes than this: a block of
# empty lines is mostly envelope.
_PAYLOAD_BYTES = 16 << 20
# After so many payloads signals and the reader get a turn.
_PAYLOADS_PER_TURN = 16


class Pusher:
    """
    One run of ``zmqpush``.

    Args:
        settings: What to do.
        reporter: Where to say what happens.
        fd: The descriptor to read.

    Raises:
        SourceError: If the input cannot be read.
        EndpointError: If an endpoint cannot be used.
        ValueError: If a field is part of the format already.

    """

    def __init__(self, settings: PushSettings, reporter: Reporter, fd: int = 0) -> None:
        self._settings = settings
        self._reporter = reporter
        self._started = time.monotonic()
        self._splitter = LineSplitter(settings.delimiter, settings.max_line)
        self._envelope = Envelope(
            format=settings.format,
            logtype=settings.logtype,
            pid=os.getpid(),
            host=socket.gethostname(),
            fields=settings.fields,
            delimiter=settings.delimiter,
        )
        max_bytes = _READ_BYTES_SINGLE if settings.framing is Framing.SINGLE else _READ_BYTES
        max_bytes = min(max_bytes, _PAYLOAD_BYTES // self._envelope.overhead_bytes)
        self._source = Source(fd, max(1, max_bytes))
        self._queue = Queue(settings.queue_max, settings.when_full)
        self._link = PushLink(settings.endpoints, settings.framing, self._envelope.separator)
        self._outage = Outage(reporter)
        self._read = 0
        self._behind = asyncio.Event()  # something waits: the sending task takes over
        self._moved = asyncio.Event()  # the link took something
        self._ending = Ending(
            settings.grace,
            self._source.stop,
            is_quiet=lambda: self._source.waiting,
            progress=lambda: self._source.reads,
        )

    async def run(self) -> int:
        """
        Read to the end of the input, deliver, and print the summary.

        Returns:
            The exit code.

        """
        ending, link = self._ending, self._link
        ending.handle_signals(at_once=not self._source.can_wait, hangup=self._tell_statistics)
        sending = asyncio.create_task(self._send())
        if self._settings.endpoints.has_open_port:
            self._reporter.notice(f"listening at {link.address}")
        failure = 0
        try:
            await ending.unless_given_up(self._read_all(), beside=sending)
        except SourceError as exc:  # what was read before is still delivered or counted
            self._reporter.warn(str(exc))
            failure = exc.exit_code
        self._take(self._splitter.finish())
        ending.limit_stall(self._settings.timeout, lambda: (link.accepted, link.unread))
        await ending.unless_given_up(self._drain(), beside=sending)
        sending.cancel()
        lost = self._queue.records + link.unsent
        accepted = link.accepted
        self._outage.begin("the receiver is slow to take the last records")
        closed = await ending.unless_given_up(link.close())
        if closed and not lost:
            self._outage.end("the last records were taken")
        elif not closed:
            lost += link.in_doubt
            accepted -= link.in_doubt
        self._reporter.summary(accepted, time.monotonic() - self._started)
        unread = self._source.unread_bytes if ending.signalled else 0
        if unread:
            self._reporter.warn(f"a signal came before {unread} bytes of the input were read")
        return self._settle(lost) or failure or (EXIT_LOSS if unread else 0)

    def _settle(self, lost: int) -> int:
        dropped = self._queue.dropped
        if dropped or lost:
            self._reporter.warn(f"{dropped} dropped, {lost} lost")
        if self._envelope.invalid_bytes:
            self._reporter.notice(f"{self._envelope.invalid_bytes} bytes were not UTF-8")
        if lost and self._ending.reason is Reason.TIMEOUT:
            return EXIT_NO_RECEIVER
        return EXIT_LOSS if dropped or lost else 0

    async def _read_all(self) -> None:
        while chunk := await self._source.read():
            self._take(self._splitter.feed(chunk))
            while self._queue.full:
                self._moved.clear()
                await self._moved.wait()

    def _take(self, blocks: list[Block]) -> None:
        now = time.time()
        for block in blocks:
            payload = self._envelope.format(block, now)
            self._read += payload.records
            self._queue.put(payload)
            if not self._behind.is_set():
                self._pump()

    def _pump(self) -> None:
        """Send from the queue until it is empty, libzmq says EAGAIN, or the turn is over."""
        queue, link = self._queue, self._link
        accepted = link.accepted
        for _ in range(_PAYLOADS_PER_TURN):
            if not (taken := link.flush()) or not queue:
                break
            link.load(queue.get())
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

    async def _send(self) -> None:
        while True:
            await self._behind.wait()
            await self._link.writable()
            self._behind.clear()
            self._pump()
            await asyncio.sleep(0)

    async def _drain(self) -> None:
        while self._queue or self._link.unsent:
            self._moved.clear()
            await self._moved.wait()

    def _tell_statistics(self) -> None:
        waiting = self._queue.records + self._link.unsent
        self._reporter.warn(
            f"{self._read} read, {self._link.accepted} sent, {waiting} queued, "
            f"{self._queue.dropped} dropped, {self._envelope.invalid_bytes} bytes not UTF-8"
        )
