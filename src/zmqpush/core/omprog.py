"""
rsyslog's dialogue with a program behind ``omprog``, the program's end.

With ``confirmMessages="on"`` rsyslog hands over one message, which ends with a newline,
and waits for one line of answer before it goes on; whatever is not answered ``OK`` it
hands over again. With ``useTransactions="on"``, too, marks stand around a batch of
messages, and only the answer to the closing one counts. The contract is that of
rsyslog's ``plugins/external/INTERFACE.md``.

Whether there are marks, and which, is said beforehand and never taken from what is read:
anybody may log a line that looks like one. Where there are marks, one stands only where
rsyslog may write it, the opening one outside of a transaction and the closing one inside;
anywhere else the same text is a message. So only a message like the closing mark cannot be
told from it: it makes no record. It is answered as the mark is, and rsyslog takes that as it
is meant: all before it is safe, and what follows it needs a new transaction.

When a program dies within a transaction, rsyslog goes on with the message at which it
noticed that, in a transaction of the next program, and does not hand over again what was
deferred before (rsyslog issue 2420). So a program's first transaction may be the rest of
one. It is refused: then rsyslog hands over all of it. If it was a message that was refused,
one like the closing mark, such a rsyslog goes on with that message, too; then what was
deferred before it is taken after all.
"""

from typing import NamedTuple

from zmqpush.core.records.lines import Block

OK = b"OK"
DEFER_COMMIT = b"DEFER_COMMIT"
KEEP_ALIVE = b"."
REFUSED = b"the first transaction may not be whole: once more, please"


class Marks(NamedTuple):
    """What rsyslog writes around a transaction (``beginTransactionMark`` and its fellow)."""

    begin: bytes = b"BEGIN TRANSACTION"
    commit: bytes = b"COMMIT TRANSACTION"


class Turn(NamedTuple):
    """
    What to do about a message, or a part of one.

    Attributes:
        lines: These must be safe first.
        answer: Then this is to be answered; nothing to a part that is not the last one.

    """

    lines: bytes
    answer: bytes | None


class Dialogue:
    r"""
    Knows what each message asks for.

    Args:
        marks: The marks of transactions, if rsyslog uses them.
        delimiter: What ends a message in what is to be made safe. A carriage return before
            it is taken off, unless that is a newline: then whoever cuts lines does so.
        max_bytes: Of a transaction so much is held, at most (a message, or a part of one,
            more); then what is there is to be made safe at once.

    Attributes:
        spoken: Whether there was a mark.

    """

    def __init__(self, marks: Marks | None, delimiter: bytes, max_bytes: int) -> None:
        self._marks = marks
        self._delimiter = delimiter
        self._max_bytes = max_bytes
        self.spoken = self._open = False
        self._goes_on = False  # the last part was not the end of its message
        self._is_first = True
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._refused: list[bytes] = []  # the first transaction

    def take(self, text: bytes, *, ends: bool = True) -> Turn:
        """Take the next message or mark, without its newline, or a part of a message."""
        mark = text if ends and not self._goes_on else None
        self._goes_on = not ends
        if self._marks:
            if mark == self._marks.begin and not self._open:
                self.spoken = self._open = True
                return Turn(b"", OK)
            refused, self._refused = self._refused, []
            if refused and (not self._open or mark == self._marks.commit):
                self._hold(*refused)  # and this is the message that was refused
            elif self._open and mark == self._marks.commit:
                return self._commit()
        if ends:
            if self._delimiter != b"\n":
                text = text.removesuffix(b"\r")
            text += self._delimiter
        self._hold(text)
        is_due = not self._open or self._held_bytes >= self._max_bytes
        answer = DEFER_COMMIT if self._open else OK
        return Turn(self._release() if is_due else b"", answer if ends else None)

    def _commit(self) -> Turn:
        self._open = False
        if self._is_first:
            self._is_first = False
            self._refused, self._held = self._held, []
            self._held_bytes = 0
            return Turn(b"", REFUSED)
        return Turn(self._release(), OK)

    def _hold(self, *texts: bytes) -> None:
        self._held += texts
        self._held_bytes += sum(map(len, texts))

    def _release(self) -> bytes:
        lines = b"".join(self._held)
        self._held.clear()
        self._held_bytes = 0
        return lines


class MarkFilter:
    """
    Takes the marks of transactions out of blocks, where rsyslog wants no answers.

    Behind the closing mark rsyslog begins another transaction: if something else follows, it
    was a message. Two messages in a row that are like these marks cannot be told from them.

    Args:
        marks: The marks.

    Attributes:
        spoken: Whether there was a mark.

    """

    def __init__(self, marks: Marks) -> None:
        self._begin, self._commit = (b"\n%b\n" % mark for mark in marks)
        self.spoken = self._open = False
        self._ended = False  # by the last line of the last block
        self._goes_on = False  # the last block was a part of a line

    def strip(self, block: Block) -> list[Block]:
        """Return the lines that are none."""
        lines = b"\n" + block.data + b"\n"
        goes_on, self._goes_on = self._goes_on, block.partial
        before = []
        if self._ended and (block.partial or not lines.startswith(self._begin)):
            self._open = True
            before = [Block(self._commit[1:-1])]
        self._ended = False
        if block.partial:
            return [*before, block]
        # What a line that goes on ends with is no mark.
        start = lines.index(b"\n", 1) if goes_on else 0
        kept = [lines[:start]]
        while (end := lines.find(self._commit if self._open else self._begin, start)) >= 0:
            self.spoken = True
            after = lines.index(b"\n", end + 1)  # two in a row share it
            self._ended = self._open and after == len(lines) - 1
            if self._open and not self._ended and not lines.startswith(self._begin, after):
                end = after  # it was a message
            else:
                self._open = not self._open
            kept.append(lines[start:end])
            start = after
        rest = b"".join((*kept, lines[start:]))
        return [*before, Block(rest[1:-1])] if len(rest) > 1 else before
