"""The ``zmqpull`` program: receives, makes JSON lines of what comes, and writes them."""

import asyncio

from zmqpush.core.records import RecordDecoder
from zmqpush.endings import Ending
from zmqpush.errors import SinkClosedError, SinkError
from zmqpush.links import PullLink
from zmqpush.settings import PullSettings
from zmqpush.sink import Sink
from zmqpush.telemetry import Reporter

EXIT_SINK = 74

# What is taken from libzmq after the first signal, in frames: what its queue may hold.
_LAST_FRAMES = 1000


class Puller:
    """
    One run of ``zmqpull``.

    Args:
        settings: What to do.
        reporter: Where to say what happens.

    Raises:
        SinkError: If the output cannot be opened.
        EndpointError: If an endpoint cannot be used.

    """

    def __init__(self, settings: PullSettings, reporter: Reporter) -> None:
        self._reporter = reporter
        self._sink = Sink(settings.to, reporter)
        self._link = PullLink(settings.endpoints)
        self._decoder = RecordDecoder()
        self._written = 0
        self._in_hand = 0
        self._wanted = settings.count
        self._frames_left: int | None = None
        self._ending = Ending(settings.grace, self._stop, lambda: self._written)

    async def run(self) -> int:
        """
        Receive until told to stop.

        Returns:
            The exit code.

        Raises:
            SinkError: If the output cannot be written.

        """
        self._ending.handle_signals(at_once=True, hangup=self._hang_up)
        watching = asyncio.create_task(self._sink.closed())
        try:
            done = await self._ending.unless_given_up(self._receive_all(), beside=watching)
        except SinkClosedError:
            return 0  # the reader has what it wanted, as in `zmqpull | head`
        finally:
            watching.cancel()
            self._tell_statistics()
        if not done and self._in_hand:
            self._reporter.warn(f"{self._in_hand} lost: they could not be written in time")
            return EXIT_SINK
        return 0

    async def _receive_all(self) -> None:
        while self._wanted is None or self._written < self._wanted:
            limits = [self._frames_left]
            if self._wanted is not None:
                limits.append(self._wanted - self._written)
            frames = self._link.receive(min((n for n in limits if n is not None), default=None))
            if frames:
                await self._write(frames)
            elif self._frames_left is not None:
                return
            else:
                await self._link.readable()

    async def _write(self, frames: list[bytes]) -> None:
        payload = self._decoder.decode(frames)
        if self._wanted is not None and payload.records > self._wanted - self._written:
            payload = payload.first(self._wanted - self._written)
        if self._frames_left is not None:
            self._frames_left -= len(frames)
        self._in_hand = payload.records
        await self._sink.write(payload.data)
        self._in_hand = 0
        self._written += payload.records
        await asyncio.sleep(0)  # signals get a turn, however fast the senders are

    def _stop(self) -> None:
        self._frames_left = _LAST_FRAMES
        self._link.wake()

    def _hang_up(self) -> None:
        try:
            self._sink.reopen()
        except SinkError as exc:
            self._reporter.warn(f"{exc}: still writing to the old file")
        self._tell_statistics()

    def _tell_statistics(self) -> None:
        foreign = self._decoder.foreign
        self._reporter.notice(
            f"{self._written} records written, {foreign} of them were no JSON object"
            if foreign
            else f"{self._written} records written"
        )
