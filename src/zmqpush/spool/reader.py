"""Reading back what is in the segments of a slot, as ``docs/spool.md`` specifies."""

import contextlib
import os
from pathlib import Path

from zmqpush.core.protocol.messages import Data, Labels
from zmqpush.spool.segment import HEADER, Segment, find_block, read_block, read_header

_DAMAGED_BYTES = 64 << 20


class SegmentReader:
    """
    Reads blocks, in one pass while they are asked for in their order.

    Args:
        slot: Where the segments are. What is damaged in one is copied to ``damaged``.

    """

    def __init__(self, slot: Path) -> None:
        self._damaged = slot / "damaged"
        self._segment: Segment | None = None  # the open one
        self._fd = -1
        self._mark = b""
        self._offset = self._number = 0  # of the next block in it

    def labels(self, segment: Segment, number: int) -> Labels | None:
        """
        Return what the records of a segment have in common, if that is known.

        Args:
            segment: Which one.
            number: Of the record that will be asked for next.

        Raises:
            OSError: If the file cannot be read.

        """
        if segment.header is None:
            with contextlib.suppress(FileNotFoundError):  # somebody removed it
                self._position(segment, number)
        return segment.header.labels if segment.header else None

    def read(self, segment: Segment, number: int, follows: int) -> Data | int:
        """
        Return the block that holds a record, or if there is none the next number to ask for.

        Args:
            segment: Where it is.
            number: Of the record.
            follows: The number that the next segment begins with.

        Raises:
            OSError: If the file cannot be read.

        """
        try:
            self._position(segment, number)
        except FileNotFoundError:  # somebody removed it
            return follows
        size = os.fstat(self._fd).st_size
        while self._number < follows and self._offset < size:
            block = read_block(self._fd, self._offset, size, self._mark)
            if block is not None and block.first == self._number and block.end < follows:
                self._offset += HEADER.size + len(block.payload)
                self._number = block.end + 1
                if self._number > number:
                    return block
            else:
                begin, missing = self._offset, self._number
                found = find_block(self._fd, begin, size, self._mark, missing)
                if found is None or found[1] >= follows:
                    found = size, follows
                self._offset, self._number = found
                self._keep_damaged(begin, self._offset, missing)
                if self._number > number:
                    return self._number
        return follows

    def _position(self, segment: Segment, number: int) -> None:
        if self._segment is segment and self._number <= number:
            return
        self.close()
        self._fd = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
        self._segment, self._number = segment, segment.first
        self._mark, self._offset, _ = read_header(segment, self._fd)

    def _keep_damaged(self, begin: int, end: int, number: int) -> None:
        with contextlib.suppress(OSError):  # there may be no room for it
            self._damaged.mkdir(mode=0o700, exist_ok=True)
            kept = sum(path.stat().st_size for path in self._damaged.iterdir())
            if kept + end - begin > _DAMAGED_BYTES:
                return
            path = self._damaged / f"{number:020d}.{begin}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            with open(os.open(path, flags, 0o600), "wb") as file:
                file.write(os.pread(self._fd, end - begin, begin))

    def forget(self, segment: Segment) -> None:
        """Close a segment that is about to be removed."""
        if self._segment is segment:
            self.close()

    def close(self) -> None:
        """Close what is open."""
        if self._segment is not None:
            os.close(self._fd)
            self._segment = None
