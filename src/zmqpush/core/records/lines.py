"""
Chunks of input into blocks of whole lines.

This file knows what a line is: where it ends, that a carriage return before a
newline belongs to the line end, and where a line that is too long is split. What
comes out depends on the bytes alone, never on where the chunks were cut.
"""

import re
from typing import NamedTuple

_find_lone_return = re.compile(rb"\r(?!\n)").search


class Block(NamedTuple):
    """
    Whole lines read together.

    Attributes:
        data: The lines, with the delimiter between them and none at the end.
        partial: Whether ``data`` is one piece of a line that goes on.

    """

    data: bytes
    partial: bool = False


class LineSplitter:
    r"""
    Cuts a stream of bytes into blocks of whole lines.

    Args:
        delimiter: What ends a line, one byte or more. Only for a newline is a
            carriage return before it taken off, too.
        max_line_bytes: Longest line, at least 4. A longer one is split into pieces of
            at most this size, between two UTF-8 characters.

    """

    def __init__(self, delimiter: bytes = b"\n", max_line_bytes: int = 1 << 20) -> None:
        if not delimiter or max_line_bytes < 4:
            raise ValueError("the delimiter must not be empty and max_line_bytes at least 4")
        self._delimiter = delimiter
        self._max_line_bytes = max_line_bytes
        # So many bytes at the end of an unfinished line may belong to its delimiter.
        self._doubtful = 1 if delimiter == b"\n" else len(delimiter) - 1
        self._parts: list[bytes] = []
        self._held_bytes = 0

    def feed(self, chunk: bytes) -> list[Block]:
        """Take the next bytes of the input and return the lines that they complete."""
        chunk = self._rejoin(chunk)
        end = self._last_delimiter(chunk)
        if end < 0:
            self._parts.append(chunk)
            self._held_bytes += len(chunk)
            return self._split_unfinished()
        lines = chunk[:end]
        if self._parts:
            lines = b"".join((*self._parts, lines))
        rest = chunk[end + len(self._delimiter) :]
        self._parts = [rest] if rest else []
        self._held_bytes = len(rest)
        if self._delimiter == b"\n":
            lines = _strip_returns(lines)
        blocks = [Block(lines)] if len(lines) <= self._max_line_bytes else self._split_long(lines)
        return blocks + self._split_unfinished() if rest else blocks

    def finish(self, *, cut: bool = False) -> list[Block]:
        """
        Return what was fed after the last delimiter, if there is something: the last line.

        Args:
            cut: The line goes on, but what is fed next does not belong to it.

        """
        rest = b"".join(self._parts)
        self._parts = []
        self._held_bytes = 0
        blocks = self._split_long(rest) if rest else []
        if cut and blocks:
            blocks[-1] = blocks[-1]._replace(partial=True)
        return blocks

    def _rejoin(self, chunk: bytes) -> bytes:
        # A delimiter of several bytes may lie across two chunks.
        overlap = len(self._delimiter) - 1
        if not overlap or not self._parts:
            return chunk
        last = self._parts.pop()
        kept, doubtful = last[:-overlap], last[-overlap:]
        if kept:
            self._parts.append(kept)
        self._held_bytes -= len(doubtful)
        return doubtful + chunk

    def _last_delimiter(self, chunk: bytes) -> int:
        if len(self._delimiter) == 1:
            return chunk.rfind(self._delimiter)
        # Delimiters are found from the left: in "aaa", "aa" stands at 0, not at 1.
        rest = chunk.split(self._delimiter)[-1]
        return len(chunk) - len(rest) - len(self._delimiter) if len(rest) < len(chunk) else -1

    def _split_unfinished(self) -> list[Block]:
        if self._held_bytes <= self._max_line_bytes + self._doubtful:
            return []
        line = b"".join(self._parts)
        blocks = []
        start = 0
        while len(line) - start > self._max_line_bytes + self._doubtful:
            end = self._piece_end(line, start)
            blocks.append(Block(line[start:end], partial=True))
            start = end
        self._parts = [line[start:]]
        self._held_bytes = len(line) - start
        return blocks

    def _split_long(self, lines: bytes) -> list[Block]:
        delimiter = self._delimiter
        blocks: list[Block] = []
        run: list[bytes] = []
        whole = lines.split(delimiter)
        if max(map(len, whole)) <= self._max_line_bytes:
            return [Block(lines)]
        for line in whole:
            if run and len(line) > self._max_line_bytes:
                blocks.append(Block(delimiter.join(run)))
                run = []
            start = 0
            while len(line) - start > self._max_line_bytes:
                end = self._piece_end(line, start)
                blocks.append(Block(line[start:end], partial=True))
                start = end
            run.append(line[start:])
        blocks.append(Block(delimiter.join(run)))
        return blocks

    def _piece_end(self, line: bytes, start: int) -> int:
        limit = start + self._max_line_bytes
        for end in range(limit, limit - 4, -1):
            if line[end] & 0xC0 != 0x80:  # the first byte of a UTF-8 character
                return end
        return limit


def _strip_returns(lines: bytes) -> bytes:
    # Called without the last newline. Deleting one byte value is six times as fast as
    # replacing two bytes by one, so first see whether that would be the same.
    if b"\r" not in lines:
        return lines
    if lines.endswith(b"\r"):
        lines = lines[:-1]
    if _find_lone_return(lines) is None:
        return lines.replace(b"\r", b"")
    return lines.replace(b"\r\n", b"\n")
