"""
Frames from any peer into records, one JSON object a line.

A frame may be one record, a JSON array of records, JSON lines, or anything at all.
What is not a JSON object is passed on as the ``message`` of a record, and counted.
"""

import json
import secrets
from collections.abc import Iterator, Sequence
from itertools import islice
from operator import methodcaller
from typing import NoReturn

from zmqpush.core.envelope import Payload


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_refuse_constant)
_loads, _scan = _decoder.decode, _decoder.raw_decode
_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_without_newline = methodcaller("removesuffix", b"\n")


def _skip(text: str, at: int) -> int:
    while text[at] in " \t\n\r":
        at += 1
    return at


def _elements(text: str) -> Iterator[tuple[object, str]]:
    """Yield the elements of a valid JSON array, and each as it was written, in one line."""
    at = _skip(text, 0) + 1
    while text[at := _skip(text, at)] != "]":
        value, end = _scan(text, at)
        yield value, text[at:end].replace("\n", " ")
        at = _skip(text, end)
        at += text[at] == ","


class RecordDecoder:
    """
    Makes payloads of frames.

    Attributes:
        foreign: How many records were no JSON object but text, so far.

    """

    def __init__(self) -> None:
        self.foreign = 0
        # Stands between records while many are checked at once. No peer can know it,
        # and so none can send pieces that are valid only together.
        self._mark = secrets.token_hex(8)
        self._mark_between = f',"{self._mark}",'

    def decode(self, frames: Sequence[bytes], most: int | None = None) -> Payload:
        """Return the (first ``most``) records of some frames, each followed by a newline."""
        data = b"\n".join(map(_without_newline, frames))
        if self._all_objects(data):
            payload = Payload(data + b"\n", data.count(b"\n") + 1)
            return payload if most is None or payload.records <= most else payload.first(most)
        # Lazily: what is not taken is not counted either.
        each = (record for frame in frames for record in self._from_frame(frame))
        records = list(islice(each, most))
        text = "".join(f"{record}\n" for record in records)
        # A lone surrogate can come only from the escape \uD800 and becomes it again.
        return Payload(text.encode("utf-8", "backslashreplace"), len(records))

    def _all_objects(self, data: bytes) -> bool:
        try:
            text = data.decode().replace("\n", self._mark_between)
            values = _loads(f"[{text}]")
        except (ValueError, RecursionError):
            return False
        # As many marks as newlines, and all of them between values: none is inside one.
        newlines = data.count(b"\n")
        marks = [self._mark] * newlines
        return {type(value) for value in values[::2]} == {dict} and values[1::2] == marks

    def _from_frame(self, frame: bytes) -> Iterator[str]:
        frame = frame.removesuffix(b"\n")
        try:
            text = frame.decode()
        except UnicodeDecodeError:
            lines = frame.split(b"\n")
            if len(lines) == 1:
                yield self._from_foreign(frame.decode("utf-8", "backslashreplace"))
            else:
                for line in lines:
                    yield from self._from_frame(line)
            return
        yield from self._from_text(text)

    def _from_text(self, text: str) -> Iterator[str]:
        try:
            value = _loads(text)
            if isinstance(value, dict):
                yield text.replace("\n", " ")
                return
            if isinstance(value, list):
                for element, source in _elements(text):
                    yield source if isinstance(element, dict) else self._from_foreign(source)
                return
        except (ValueError, RecursionError):
            pass
        lines = text.split("\n")
        if len(lines) == 1:
            yield self._from_foreign(text)
        else:
            for line in lines:
                yield from self._from_text(line)

    def _from_foreign(self, text: str) -> str:
        self.foreign += 1
        return _dumps({"message": text})
