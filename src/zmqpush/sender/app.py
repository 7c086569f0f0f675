"""
The ``zmqpush`` program: wires the stages and owns the order of shutdown.

::

    Source ─ LineSplitter ─ Envelope ─┬ PlainOutlet: Queue ─ PushSocket
     bytes      blocks      payloads  └ AckedOutlet: UnackedQueue or Spool ─ Sender ─ DealerSocket

With ``--omprog`` a :class:`zmqpush.sender.omprog.Conversation` stands between the source and the
splitter, and has the messages that it reads confirmed.
"""

import asyncio
import mmap
import os
import socket
import time
from collections.abc import Awaitable, Callable

from zmqpush.core.omprog import MarkFilter, Marks
from zmqpush.core.records.encode import Envelope, Format
from zmqpush.core.records.framing import Framing
from zmqpush.core.records.lines import Block, LineSplitter
from zmqpush.errors import (
    EXIT_IO,
    EXIT_LATER,
    EXIT_LOSS,
    EXIT_NO_RECEIVER,
    EXIT_RESOURCES,
    ResourceError,
    SourceError,
    SpoolError,
    ZmqpushError,
)
from zmqpush.runtime.reporting import Reporter, Tally
from zmqpush.runtime.shutdown import Ending, Reason
from zmqpush.security.admission import Guard
from zmqpush.sender.delivery import Outcome, Outlet
from zmqpush.sender.omprog import Conversation, wants_answers
from zmqpush.sender.source import Source
from zmqpush.settings import PushSettings

# How much is read at once, in bytes. Large blocks are fast, but the records of one that
# is cut into messages should stay in the cache.
_READ_BYTES = 1 << 17
_READ_BYTES_SINGLE = 1 << 16
# Less is read at once if that could make a payload of more bytes than this: a block of
# empty lines is mostly envelope.
_PAYLOAD_BYTES = 16 << 20
_PAYLOAD_BYTES_ACK = 8 << 20
# What the end needs when a limit on memory is reached: threads, and what they allocate.
_RESERVE_BYTES = 48 << 20


class Pusher:
    """
    One run of ``zmqpush``.

    Args:
        settings: What to do.
        reporter: Where to say what happens.
        fd: The descriptor to read.
        answers: With ``--omprog``, where rsyslog may read answers.

    Raises:
        SourceError: If the input cannot be read.
        KeyFileError: If a key or the list of keys cannot be used.
        EndpointError: If an endpoint cannot be used.
        SettingsError: If a field is part of the format already.

    """

    def __init__(
        self,
        settings: PushSettings,
        reporter: Reporter,
        fd: int = 0,
        answers: int | None = None,
    ) -> None:
        self._settings = settings
        self._reporter = reporter
        self._started = time.monotonic()
        if answers is not None and not wants_answers(answers):
            answers = None
        self._delimiter = settings.delimiter
        if answers is not None and settings.format is not Format.RAW:
            self._delimiter = b"\0"  # rsyslog's messages may hold newlines, but no NUL
        self._splitter = LineSplitter(self._delimiter, settings.max_line)
        self._envelope = Envelope(
            format=settings.format,
            logtype=settings.logtype,
            pid=os.getpid(),
            host=socket.gethostname(),
            fields=settings.fields,
            delimiter=self._delimiter,
        )
        single = settings.framing is Framing.SINGLE and not settings.ack
        payload_bytes = _PAYLOAD_BYTES_ACK if settings.ack else _PAYLOAD_BYTES
        max_bytes = min(
            _READ_BYTES_SINGLE if single else _READ_BYTES,
            payload_bytes // self._envelope.overhead_bytes,
        )
        self._max_bytes = max(1, max_bytes)
        guard = self._guard = Guard(settings.security, settings.endpoints.connect, reporter)
        self._lost_datagrams = Tally(
            reporter,
            "standard input: {} datagrams are lost: the socket had no room (SO_RCVBUF)",
        )
        self._source = Source(
            fd,
            self._max_bytes,
            delimiter=self._delimiter,
            in_turns=answers is not None,
            warn=guard.complaints.warn,
            count_lost=self._lost_datagrams.note,
        )
        self._conversation: Conversation | None = None
        if answers is not None:
            self._conversation = Conversation(
                self._source, answers, settings.marks, self._delimiter
            )
        self._marks: MarkFilter | None = None
        if settings.marks and answers is None:
            self._marks = MarkFilter(settings.marks)
        self._outlet: Outlet
        self._confirm: Callable[[], Awaitable[None]]
        if settings.ack:
            from zmqpush.sender.acked import AckedOutlet  # each starts faster without the other

            self._outlet = outlet = AckedOutlet(settings, reporter, guard)
            self._confirm = outlet.confirm
        else:
            from zmqpush.sender.plain import PlainOutlet

            self._outlet = PlainOutlet(settings, reporter, guard, self._envelope.separator)
        self._reading = True
        self._was_read = True  # as far as it can be
        self._read = self._confirmed = 0
        # Addresses, no memory: with a limit on them there is room for an orderly end.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._reserve = mmap.mmap(-1, _RESERVE_BYTES, flags, prot=0)
        self._forgone = 0  # lines that were read, and no memory was left to make records of
        self._ending = Ending(
            settings.grace,
            self._source.stop,
            # rsyslog may get the same signal and has more to say, until it closes its end.
            is_quiet=lambda: self._source.waiting and not self._conversation,
            progress=lambda: self._source.reads,
        )

    async def run(self) -> int:
        """
        Read to the end of the input, deliver, and print the summary.

        Returns:
            The exit code.

        Raises:
            SpoolError: If the spool cannot be used.

        """
        try:
            return await self._run()
        except ZmqpushError:
            raise
        except BaseException:  # a bug: what became of the records is said all the same
            self._tell_statistics()
            raise

    async def _run(self) -> int:
        ending, outlet = self._ending, self._outlet
        ending.handle_signals(at_once=not self._source.can_wait, hangup=self._hang_up)
        if not await ending.unless_given_up(outlet.open(ending)):
            raise SpoolError("the spool was not ready in time: nothing was read")
        delivering = asyncio.create_task(outlet.run())
        failure, disk_failed = 0, False
        try:
            failure = await self._ship(delivering)
            delivering.cancel()
            await asyncio.wait({delivering})
            if not delivering.cancelled():
                delivering.result()
        except SpoolError as exc:  # what became of the records is to be known all the same
            self._reporter.warn(str(exc))
            disk_failed = True
            self._forgone += len(self._splitter.finish(cut=True))
        except MemoryError as exc:
            failure = self._note_want(exc)
        delivering.cancel()
        self._source.note_overflow()
        self._lost_datagrams.close()
        outcome = await outlet.close(ending)
        self._reporter.summary(outcome.delivered, time.monotonic() - self._started)
        gave_up = ending.reason is Reason.TIMEOUT and bool(
            not self._was_read or outcome.lost or outcome.spooled
        )
        unread = 0
        if (ending.signalled or gave_up or disk_failed) and not self._conversation:
            unread = self._source.unread_bytes  # else rsyslog has the rest
        if gave_up:
            rest = f": {unread} bytes of the input were not read" if unread else ""
            limit = f"{self._settings.timeout:g} s"
            self._reporter.warn(f"gave up after {limit} without delivery{rest}")
        elif unread and not ending.signalled:
            self._reporter.warn(f"{unread} bytes of the input were not read")
        elif unread:
            self._reporter.warn(f"a signal came before {unread} bytes of the input were read")
        code = self._settle(outcome, unread, gave_up)
        if not code or failure == EXIT_RESOURCES:
            code = failure
        return EXIT_IO if disk_failed or outcome.failed else code

    async def _ship(self, delivering: "asyncio.Task[None]") -> int:
        """Read and deliver until the end; return the exit code that the input is a reason for."""
        ending, outlet = self._ending, self._outlet
        failure = 0
        try:
            if self._conversation:
                reading = self._conversation.run(self._make_safe)
            else:
                reading = self._read_all()
            self._was_read = await ending.unless_given_up(reading, beside=delivering)
            if self._settings.omprog:
                ending.begin_grace()  # rsyslog waits for our end, and not for long
        except SourceError as exc:  # what was read before is still delivered or counted
            self._reporter.warn(str(exc))
            failure = exc.exit_code
        except MemoryError as exc:
            failure = self._note_want(exc)
        if not self._conversation:  # what rsyslog has not ended is not answered, and comes again
            # What is left of a line that goes on is a line of its own for whoever reads it.
            cut = bool(failure) or not self._source.has_ended
            self._take(self._splitter.finish(cut=cut))
        self._reading = False
        self._watch()
        if not self._unconfirmed:
            await ending.unless_given_up(outlet.drain(), beside=delivering)
        return failure

    def _note_want(self, error: MemoryError) -> int:
        self._reserve.close()
        self._reporter.warn(f"{ResourceError.of(error)}; nothing more is read")
        return EXIT_RESOURCES

    @property
    def _unconfirmed(self) -> int:
        """How many records rsyslog hands over again, since they were not confirmed."""
        return self._read - self._confirmed if self._conversation else 0

    def _settle(self, outcome: Outcome, unread: int, gave_up: bool) -> int:
        if unconfirmed := min(self._unconfirmed, outcome.lost):
            outcome = outcome._replace(lost=outcome.lost - unconfirmed)
            self._reporter.warn(f"{unconfirmed} not confirmed: rsyslog has them")
        if self._envelope.invalid_bytes:
            self._reporter.warn(f"{self._envelope.invalid_bytes} bytes were not UTF-8")
        if not self._conversation:  # else rsyslog hands it over again
            outcome = outcome._replace(lost=outcome.lost + self._forgone)
        if any(outcome[1:4]) or outcome.doubtful:
            more = f", {outcome.spooled} left in the spool" if outcome.spooled else ""
            if outcome.doubtful:
                more += f", up to {outcome.doubtful} more may be: no receiver has confirmed them"
            self._reporter.warn(f"{outcome.dropped} dropped, {outcome.lost} lost{more}")
        if gave_up and (outcome.lost or not (outcome.spooled or self._conversation)):
            return EXIT_NO_RECEIVER
        if outcome.dropped or outcome.lost or outcome.doubtful or unread or self._source.gaps:
            return EXIT_LOSS
        return EXIT_LATER if outcome.spooled or unconfirmed else 0

    async def _read_all(self) -> None:
        while chunk := await self._source.read():
            self._feed(chunk)
            if self._source.has_messages:
                self._take(self._splitter.finish(cut=self._source.message_cut))
            await self._outlet.room()

    def _feed(self, data: bytes) -> None:
        # Not more at once than a read of a pipe returns: a message may be longer.
        before = self._read
        try:
            for start in range(0, len(data), self._max_bytes):
                self._take(self._splitter.feed(data[start : start + self._max_bytes]))
        except (MemoryError, SpoolError):
            self._forgone += max(0, data.count(self._delimiter) - (self._read - before))
            raise

    async def _make_safe(self, lines: bytes) -> None:
        self._feed(lines)
        await self._confirm()
        self._confirmed = self._read

    def _take(self, blocks: list[Block]) -> None:
        now = time.time()
        if self._marks:
            blocks = [stripped for block in blocks for stripped in self._marks.strip(block)]
        for block in blocks:
            if self._settings.omprog and not self._read:
                self._look_for_marks(block.data)
            payload = self._envelope.format(block, now)
            self._read += payload.records
            self._outlet.put(payload)
        self._watch()

    def _watch(self) -> None:
        """Have the end of patience watched for while something waits."""
        if self._settings.timeout is not None:
            self._ending.limit_stall(self._settings.timeout, self._progress)

    def _progress(self) -> object:
        """Return what changes as long as records are delivered; None while none need be."""
        if self._reading and (self._settings.spool or not self._outlet.waiting):
            return None
        return self._outlet.progress

    def _look_for_marks(self, first: bytes) -> None:
        """Warn if what comes first shows that rsyslog was set up otherwise than we were."""
        marks = self._marks or (self._conversation and self._conversation.dialogue)
        if not self._settings.marks:
            if first.split(b"\n", 1)[0] == Marks().begin:
                self._reporter.warn(
                    'the first message looks like a mark: if rsyslog has useTransactions="on", '
                    "give --transactions; as it is, marks become records"
                )
        elif marks and not marks.spoken:
            self._reporter.warn(
                "rsyslog does not begin with the mark of a transaction: without "
                'useTransactions="on" leave out --transactions; other marks are for --begin-mark '
                "and --commit-mark"
            )

    def _hang_up(self) -> None:
        self._guard.reload()
        self._tell_statistics()

    def _tell_statistics(self) -> None:
        self._reporter.warn(
            f"{self._read} read, {self._outlet.statistics}, "
            f"{self._envelope.invalid_bytes} bytes not UTF-8"
        )
