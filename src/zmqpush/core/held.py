"""Records that a sink holds and that no sender was told of: its receiver died in between."""

from collections.abc import Iterator


class HeldRecords:
    """Ranges of sequence numbers, by the stream."""

    def __init__(self) -> None:
        self._ranges: dict[str, list[tuple[int, int]]] = {}  # first and last, in order, apart

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranges)

    def __contains__(self, stream: str) -> bool:
        return stream in self._ranges

    def add(self, stream: str, first: int, records: int) -> None:
        """Add records, some of which may be there."""
        last = first + records - 1
        ranges = self._ranges.setdefault(stream, [])
        if ranges and first > ranges[-1][1]:  # mostly they come in order
            if first == ranges[-1][1] + 1:
                first = ranges.pop()[0]
            ranges.append((first, last))
            return
        ranges = sorted([*ranges, (first, last)])
        merged = ranges[:1]
        for first, last in ranges[1:]:
            if first <= merged[-1][1] + 1:
                merged[-1] = merged[-1][0], max(last, merged[-1][1])
            else:
                merged.append((first, last))
        self._ranges[stream] = merged

    def missing(self, stream: str, first: int, records: int) -> list[tuple[int, int]]:
        """Return the first ones and the numbers of those that are not held, of these records."""
        missing = []
        end = first + records
        for begin, last in self._ranges.get(stream, ()):
            if first < min(begin, end):
                missing.append((first, min(begin, end) - first))
            first = max(first, last + 1)
        return [*missing, (first, end - first)] if first < end else missing

    def ends_by(self, stream: str, last: int) -> bool:
        """Whether nothing of a stream is held beyond ``last``."""
        return stream not in self._ranges or self._ranges[stream][-1][1] <= last

    def forget(self, stream: str) -> None:
        """Remove a stream."""
        del self._ranges[stream]

    def to_text(self, stream: str) -> str:
        """Return the ranges of a stream, as :meth:`add_text` reads them."""
        return ",".join(f"{first}-{last}" for first, last in self._ranges[stream])

    def add_text(self, stream: str, text: str) -> None:
        """Add what :meth:`to_text` has returned."""
        for part in text.split(","):
            first, last = map(int, part.split("-"))
            self.add(stream, first, last - first + 1)
