"""
rsyslog's dialogue with a program behind ``omprog``, the program's end.

With ``confirmMessages="on"`` rsyslog hands over one message, which ends with a newline,
and waits for one line of answer before it goes on; whatever is not answered ``OK`` it
hands over again. With ``useTransactions="on"``, too, marks stand around a batch of
messages, and only the answer to the closing one counts. The contract is that of
rsyslog's ``plugins/external/INTERFACE.md``.

A message that looks like a mark should not be taken for one, or messages would be deferred
that rsyslog holds for committed: so the first line of all decides whether there are
transactions, and inside of one only the closing mark counts. What looks like that is lost,
but nothing else is; only a first message of all that looks like the opening mark, where
there are no transactions, does harm. A template that begins with a date rules out both.

When a program dies within a transaction, rsyslog goes on with the message at which it
noticed that, in a transaction of the next program, and does not hand over again what was
deferred before (rsyslog issue 2420). So a program's first transaction may be the rest of
one. It is refused: then rsyslog hands over all of it. (Refused as the answer to a message
that looks like the closing mark, such a rsyslog would lose those before it, too.)
"""

from typing import NamedTuple

OK = b"OK"
DEFER_COMMIT = b"DEFER_COMMIT"
KEEP_ALIVE = b"."
REFUSED = b"the first transaction may not be whole: once more, please"
_BEGIN = b"BEGIN TRANSACTION"
_COMMIT = b"COMMIT TRANSACTION"


class Turn(NamedTuple):
    """
    What to do about a message.

    Attributes:
        messages: These must be safe first.
        answer: Then this is to be answered.

    """

    messages: list[bytes]
    answer: bytes


class Dialogue:
    """
    Knows what each message asks for.

    Args:
        max_bytes: Of a transaction so much is held, at most (a message more); then what
            is there is to be made safe at once.

    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._has_transactions: bool | None = None
        self._open = False
        self._is_first = True
        self._held: list[bytes] = []
        self._held_bytes = 0

    def take(self, message: bytes) -> Turn:
        """Take the next message or mark, without its newline."""
        if self._has_transactions is None:
            self._has_transactions = message == _BEGIN
        if self._has_transactions and not self._open and message == _BEGIN:
            self._open = True
            return Turn([], OK)
        if self._has_transactions and message == _COMMIT:
            self._open = False
            if self._is_first:
                self._is_first = False
                return Turn([], REFUSED)
            return Turn(self._release(), OK)
        if self._open and self._is_first:
            return Turn([], DEFER_COMMIT)
        self._held.append(message)
        self._held_bytes += len(message) + 1
        if not self._open:
            return Turn(self._release(), OK)
        return Turn(self._release() if self._held_bytes >= self._max_bytes else [], DEFER_COMMIT)

    def _release(self) -> list[bytes]:
        messages, self._held = self._held, []
        self._held_bytes = 0
        return messages


class MarkFilter:
    """Takes the marks of transactions out of blocks, where rsyslog wants no answers."""

    def __init__(self) -> None:
        self._has_transactions: bool | None = None

    def strip(self, lines: bytes) -> bytes | None:
        """Return the lines that are none; ``None`` if no line is left."""
        if self._has_transactions is None:
            self._has_transactions = lines == _BEGIN or lines.startswith(_BEGIN + b"\n")
        if not self._has_transactions or b" TRANSACTION" not in lines:
            return lines
        rest = b"\n" + lines + b"\n"
        for mark in (_BEGIN, _COMMIT):
            # Of two in a row one pass finds the first: they share a newline.
            while (fewer := rest.replace(b"\n" + mark + b"\n", b"\n")) != rest:
                rest = fewer
        return rest[1:-1] if len(rest) > 1 else None
