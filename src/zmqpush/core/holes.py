"""The sequence numbers of a stream that will never come, and why."""

from zmqpush.core.protocol.messages import Skip


class Holes:
    """Holes in a stream, in the order of their numbers; none overlaps another."""

    def __init__(self) -> None:
        self._holes: list[Skip] = []

    def add(self, first: int, last: int, reason: int) -> None:
        """Add a hole; it takes the place of what others have of it."""
        pieces = [(first, last, reason)]
        for hole in self._holes:
            pieces.append((hole.first, min(hole.end, first - 1), hole.reason))
            pieces.append((max(hole.first, last + 1), hole.end, hole.reason))
        self._holes = []
        for begin, end, why in sorted(pieces):
            before = self._holes[-1] if self._holes else None
            if begin > end:
                continue
            if before and before.end + 1 == begin and before.reason == why:
                begin = self._holes.pop().first
            self._holes.append(Skip(begin, end - begin + 1, why))

    def find(self, number: int) -> Skip | None:
        """Return the hole that a number is in, or else the next one."""
        return next((hole for hole in self._holes if hole.end >= number), None)

    def present(self, first: int, last: int) -> int:
        """Return how many of the numbers from ``first`` to ``last`` are in no hole."""
        holes = (min(last, hole.end) - max(first, hole.first) + 1 for hole in self._holes)
        return last - first + 1 - sum(max(0, records) for records in holes)

    def clip(self, first: int, last: int) -> None:
        """Remove all numbers but those from ``first`` to ``last``."""
        clipped = ((max(first, hole.first), min(last, hole.end), hole) for hole in self._holes)
        self._holes = [
            Skip(begin, end - begin + 1, hole.reason)
            for begin, end, hole in clipped
            if begin <= end
        ]
