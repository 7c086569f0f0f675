"""
The program's end of rsyslog's ``omprog``: what is read is answered once it is safe.

What a message asks for is the business of :class:`zmqpush.core.omprog.Dialogue`; here
are its descriptors and its timer. rsyslog writes nothing until it has its answer. So all
that is there to be read is one message, even if it has several lines. Only of a message
that does not fit into the pipe (1 MiB, as a rule) may a part be taken for the whole: if it
ends with a newline, and rsyslog does not go on writing within 0.1 s. A long message is passed
on in parts, as it comes, and answered when all of it is safe.
"""

import asyncio
import fcntl
import os
import stat
from collections.abc import Callable, Coroutine
from typing import Any

from zmqpush.core.omprog import KEEP_ALIVE, OK, Dialogue, Marks
from zmqpush.runtime.faults import fault_point
from zmqpush.sender.source import Source

# A message waits for its answer; that rsyslog shall wait on is said so often, in seconds
# (it gives up after ``confirmTimeout``, 10 s), and not more often than fits into the line
# of 4095 bytes that it reads. Then rsyslog had better begin anew.
_KEEP_ALIVE_INTERVAL = 1.0
_MAX_KEEP_ALIVES = 4000
# Of a message that is longer, so much is passed on at a time, in bytes.
_PART_BYTES = 1 << 17
# Of a transaction so much is held, in bytes: a thousand messages of 8 KiB, which is as much as
# rsyslog makes of either without being told to.
_TRANSACTION_BYTES = 8 << 20


def claim_stdout() -> int:
    """
    Return a descriptor for the answers; what else is printed goes to standard error now.

    Call it first: one line too many on standard output would confirm a message.
    """
    answers = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)
    os.dup2(2, 1)
    return answers


def wants_answers(answers: int) -> bool:
    """
    Whether rsyslog waits for answers (``confirmMessages="on"``).

    It reads them from a pipe. Without, standard output and error are the same file, or
    the same pipe.
    """
    mine, error = os.fstat(answers), os.fstat(2)
    return stat.S_ISFIFO(mine.st_mode) and not os.path.samestat(mine, error)


class Conversation:
    """
    Reads messages and answers them.

    Args:
        source: Where rsyslog writes.
        answers: The descriptor that it reads from.
        marks: As of :class:`zmqpush.core.omprog.Dialogue`.
        delimiter: As of :class:`zmqpush.core.omprog.Dialogue`.

    Attributes:
        dialogue: What knows each message's answer.

    """

    def __init__(self, source: Source, answers: int, marks: Marks | None, delimiter: bytes) -> None:
        self._source = source
        self._answers = answers
        self.dialogue = Dialogue(marks, delimiter, _TRANSACTION_BYTES)
        self._text = b""  # of a message, what was not passed on
        self._message_bytes = 0  # of the same message, what was read
        self._keep_alives = 0  # since the last answer

    async def run(self, make_safe: Callable[[bytes], Coroutine[Any, Any, None]]) -> None:
        """
        Say that we are ready, and answer until rsyslog has closed either end.

        Args:
            make_safe: Takes lines and returns once they are safe, but for the last one if it
                has no end.

        Raises:
            SourceError: If the input cannot be read.

        """
        if not self._say(OK + b"\n"):
            return
        while part := await self._read():
            text, ends = part
            turn = self.dialogue.take(text, ends=ends)
            if turn.lines:
                fault_point("message-read")
                if not await self._keep_alive_while(make_safe(turn.lines)):
                    return
                fault_point("message-safe")
            if turn.answer is None:
                continue
            if not self._say(turn.answer + b"\n"):
                return
            self._keep_alives = 0
            fault_point("message-answered")

    async def _read(self) -> tuple[bytes, bool] | None:
        """Return the next message, or a part of it, and whether that is its end."""
        while chunk := await self._source.read():
            self._text += chunk
            self._message_bytes += len(chunk)
            ends = self._text.endswith(b"\n") and await self._source.turn_is_over(
                self._message_bytes
            )
            if ends:
                text, self._text = self._text[:-1], b""
                self._message_bytes = 0
                return text, True
            if len(self._text) > _PART_BYTES:
                # The end of the line stays in one piece.
                text, self._text = self._text[:-2], self._text[-2:]
                return text, False
        return None  # what is unfinished is not answered, and comes again

    async def _keep_alive_while(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do the work while rsyslog waits; whether it was done."""
        working = asyncio.ensure_future(work)
        try:
            while self._keep_alives < _MAX_KEEP_ALIVES:
                done, _pending = await asyncio.wait({working}, timeout=_KEEP_ALIVE_INTERVAL)
                if done:
                    working.result()
                    return True
                if not self._say(KEEP_ALIVE):
                    break
                self._keep_alives += 1
            return False
        finally:
            working.cancel()

    def _say(self, text: bytes) -> bool:
        """Write an answer, in one piece; whether rsyslog is still there."""
        try:
            return os.write(self._answers, text) == len(text)
        except OSError:
            return False
