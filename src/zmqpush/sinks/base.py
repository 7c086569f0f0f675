"""
The contract of every sink.

A sink only knows its engine. What all of them need is done for them in ``receiver/writer.py``:
waiting and trying again, dead letters, statistics, and what is remembered across a death.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from zmqpush.runtime.reporting import Reporter

# What a sink wants to be told again when it is opened after a death: values by name. None
# forgets a name. They change together with what is remembered as acknowledged, or not at all.
Marks = Mapping[str, str | None]


class Batch(NamedTuple):
    """
    Records of one sender, in order.

    Attributes:
        payload: The records, each followed by a newline.
        records: How many they are.
        labels: The ``type`` and ``host`` of the sender, as far as they are known.
        stream: Whose records they are, the same for ever; empty if the sender wants no
            acknowledgements.
        first: The sequence number of the first; the others follow it without a gap.

    """

    payload: bytes | memoryview
    records: int
    labels: Mapping[str, str]
    stream: str = ""
    first: int = 0


class Rejection(NamedTuple):
    """A record that will never be taken, without its newline, and why."""

    record: bytes
    reason: str
    stream: str = ""
    seq: int = 0


class Deferral(NamedTuple):
    """
    What cannot be taken as things are, and is left to its sender: it brings it again later.

    Attributes:
        stream: Whose batches they are.
        first: The sequence number of the first; all that followed it are deferred, too.
        records: How many they are.
        reason: Why, in words that a sender may read.

    """

    stream: str
    first: int
    records: int
    reason: str


class Synced(NamedTuple):
    """What has become of the batches that were written: they are safe, but for some."""

    marks: Marks
    rejected: Sequence[Rejection] = ()
    deferred: Sequence[Deferral] = ()


class Held(NamedTuple):
    """Records of a stream that are in the sink, at some place in it."""

    stream: str
    first: int
    records: int
    place: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """
    What a sink gets from ``zmqpull``.

    Attributes:
        reporter: Where to say what a user should know; never for each record.
        remember: Makes marks durable at once, before anything else is written.
        safe: Whether somebody relies on what is synced: otherwise only order counts.
        remembers: Whether marks outlive this process at all.
        directory: The state, where a sink may keep files of its own; None without one.
        buries: Whether ``--dead-letters`` asks to reject what could also be deferred.
        own: Files of ``zmqpull`` itself, and directories of such.
        options: What ``-X`` says.

    """

    reporter: Reporter
    remember: Callable[[Marks], Awaitable[None]]
    safe: bool = True
    remembers: bool = True
    directory: Path | None = None
    buries: bool = False
    own: Sequence[Path] = ()
    options: Mapping[str, str] = field(default_factory=dict)


class Sink(Protocol):
    """
    A place for records.

    Every method may raise:

    - ``SinkStalledError``: not now. The same call is made again, with the same arguments,
      after a while; it must go on where it was. A :meth:`sync` may say that what was written
      is gone again (``SinkUndoneError``): then a :meth:`write` of nothing comes first.
    - ``SinkError``: never again. The program ends, and senders keep what is not acknowledged.

    Attributes:
        name: What to call it in a message; no secrets.
        durability: What an acknowledgement means, as in ``docs/protocol.md``.
        labelled: Whether the labels of a batch matter. If not, records of many senders that
            want no acknowledgements are one batch.
        buffers: Whether records may be unwritten, rejected or forgotten after
            :meth:`write`, also those that nobody wants acknowledged.
        unwritten: How many records of those given to :meth:`write` are not in the sink; they
            are the last ones.
        waiting: How many records that no sender keeps are held back, since what they are for
            cannot be written now. A :meth:`write` of nothing tries again.
        lost: How many of these found no room to wait.
        deferred: How many records are left to their senders, and were not yet deferred by a
            :meth:`sync`.

    """

    name: str
    durability: str = "engine"
    labelled: bool = False
    buffers: bool = True
    unwritten: int = 0
    waiting: int = 0
    lost: int = 0
    deferred: int = 0

    async def open(self, marks: Marks) -> Sequence[Held]:
        """
        Begin.

        Args:
            marks: What is remembered; those of other sinks may be among them.

        Returns:
            What is in the sink beyond the marks: it was written shortly before a death. When
            it comes again it is not written again.

        """
        ...

    def has(self, place: str) -> bool:
        """Whether what an earlier :meth:`open` found at a place is there still."""
        return True

    async def write(self, batches: Sequence[Batch]) -> None:
        """Take records, in order; when this returns they may still be on their way."""
        ...

    async def sync(self) -> Synced:
        """
        Make safe what was written before this call, if there is something.

        While it waits, :meth:`write` may be called.
        """
        ...

    async def close(self) -> Marks:
        """End, when all is safe; return what is to be remembered of that."""
        ...

    def rotate(self) -> None:
        """Take note of SIGHUP: all that somebody relies on is safe and remembered now."""

    async def gone(self) -> None:
        """
        Return, or raise SinkClosedError, as soon as nobody wants records any more.

        That may be never: this default returns at once, and means it.
        """
