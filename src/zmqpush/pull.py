"""The ``zmqpull`` program: receives, makes JSON lines of what comes, and writes them."""

import asyncio
import time

from zmqpush.core.envelope import Payload
from zmqpush.core.records import RecordDecoder
from zmqpush.endings import Ending
from zmqpush.errors import EXIT_IO, EXIT_LOSS, SinkClosedError, SinkError
from zmqpush.links import PullLink
from zmqpush.settings import PullSettings
from zmqpush.sink import Sink
from zmqpush.telemetry import Reporter


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
        self._settings = settings
        self._reporter = reporter
        self._sink = Sink(settings.to, reporter)
        self._link = PullLink(settings.endpoints)
        self._decoder = RecordDecoder()
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
        watching = asyncio.create_task(self._sink.closed())
        if self._settings.endpoints.has_open_port:
            self._reporter.notice(f"listening at {self._link.address}")
        done = False
        try:
            done = await self._ending.unless_given_up(self._receive_all(), beside=watching)
        except SinkClosedError:
            return 0  # the reader has what it wanted, as in `zmqpull | head`
        except SinkError as exc:
            self._reporter.warn(str(exc))
        finally:
            watching.cancel()
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
        wanted = self._settings.count
        while wanted is None or self._written < wanted:
            left = None if wanted is None else wanted - self._written
            if frames := self._link.receive(left):
                await self._write(self._decoder.decode(frames, left))
            elif self._until is None:
                await self._link.readable()
            else:
                return
            if self._until is not None and time.monotonic() > self._until:
                return

    def _count_the_rest(self) -> int:
        decoder = RecordDecoder()
        return sum(decoder.decode(frames).records for frames in self._link.drain())

    async def _write(self, payload: Payload) -> None:
        self._written += payload.records
        await self._sink.write(payload.data)
        await asyncio.sleep(0)  # signals get a turn, however fast the senders are

    def _stop(self) -> None:
        self._until = time.monotonic() + self._settings.grace / 2
        self._link.wake()

    def _hang_up(self) -> None:
        self._sink.reopen()
        self._tell_statistics()

    def _tell_statistics(self) -> None:
        foreign = self._decoder.foreign
        self._reporter.notice(
            f"{self._written} records written, {foreign} of them were no JSON object"
            if foreign
            else f"{self._written} records written"
        )
