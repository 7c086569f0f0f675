r"""
Frames from any peer into records, one JSON object a line.

A frame may be one record, a JSON array of records, JSON lines, or anything at all. What is
not a JSON object is passed on as the ``message`` of a record, and counted.

Each record is checked by itself, so that no peer can send pieces that are valid only
together. It stays as it was written but for two things: a newline in it becomes a space, and
a byte that is not UTF-8 becomes the text ``\xNN``, as at the sender. msgspec checks, and
builds nothing. It does not look at UTF-8 and refuses one half of an escaped surrogate pair,
which JSON allows: both are seen to here. What is nested deeper than Python lets a parser
recurse, some 900 levels, is text.

However large a frame is, it is taken in parts, and others have a turn between them.
"""

import codecs
import contextlib
import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from operator import methodcaller

import msgspec

from zmqpush.core.records.encode import HARMLESS, Payload, escape, to_utf8

# What is decoded together, in bytes and in lines, at most.
_GROUP_BYTES = 1 << 20
_GROUP_LINES = 1 << 16
# A payload ends after so many records, most of which may have taken a microsecond or two.
_PAYLOAD_RECORDS = 1 << 14
# A part of what is larger, in bytes.
_PART_BYTES = 1 << 16
# Stands for no record, but for a turn of others.
_PAUSE = Payload(b"", 0)


class _Object(msgspec.Struct, gc=False):
    """Any JSON object: what is in it is checked and skipped."""


class _Array(msgspec.Struct, array_like=True, gc=False):
    """Any JSON array."""


class _Labels(msgspec.Struct, gc=False):
    """The labels among the fields of a JSON object, as they are written."""

    type: msgspec.Raw = msgspec.Raw(b'""')
    host: msgspec.Raw = msgspec.Raw(b'""')


_Check = Callable[[bytes], object]
_check_object: _Check = msgspec.json.Decoder(_Object).decode
_check_array: _Check = msgspec.json.Decoder(_Array).decode
_elements = msgspec.json.Decoder(list[msgspec.Raw]).decode
_labels = msgspec.json.Decoder(_Labels).decode
_to_text = msgspec.json.Decoder(str).decode
_to_json = msgspec.json.Encoder().encode
# What these raise; of UTF-8 they look at the names of fields, sometimes.
_REFUSED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_SPACE = b" \t\n\r"
_without_newline = methodcaller("removesuffix", b"\n")

# What there is in a valid array up to the end of an element, within it or within a nested one;
# group 1 is what ends it, unless it has too many parts to go on at once. A part is a string, or
# an object or an array without others in it, or text between them.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_FLAT = rb'[\[{](?:[^][{}"]++|%b)*+[]}]' % _STRING
_WITHIN = re.compile(rb'(?:[^][{}",]++|%b|%b){,4096}+([][{},])?' % (_STRING, _FLAT), re.DOTALL)
_NESTED = re.compile(rb'(?:[^][{}"]++|%b|%b){,4096}+([][{}])?' % (_STRING, _FLAT), re.DOTALL)
# A line that is JSON begins so; the text of another is between these.
_PERHAPS_JSON = re.compile(rb"\n[ \t\r]*+[\[{]")
_HEAD, _TAIL = b'{"message":"', b'"}\n'
# What begins as an escaped half of a surrogate pair does.
_PERHAPS_HALF = re.compile(rb"\\u[dD]")
# Such a half; a whole pair, or an escaped backslash, is group 1.
_SURROGATE = re.compile(
    rb"(\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)


def _escape(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    invalid = error.object[error.start : error.end]
    return "".join(f"\\\\x{byte:02x}" for byte in invalid), error.end


# As "backslashreplace", in what is JSON already.
_REPLACE_IN_JSON = "zmqpush.backslashreplace-in-json"
codecs.register_error(_REPLACE_IN_JSON, _escape)


class RecordDecoder:
    """
    Makes payloads of frames.

    Attributes:
        foreign: How many records were no JSON object but text, so far.
        invalid_bytes: How many bytes were not UTF-8, so far.

    """

    def __init__(self) -> None:
        self.foreign = 0
        self.invalid_bytes = 0
        self._counts_each = False  # since not all may be taken

    def decode(self, frames: Sequence[bytes], most: int | None = None) -> Iterator[Payload]:
        """
        Yield the (first ``most``) records of some frames, each followed by a newline.

        A payload takes some milliseconds to make. One without records means only that
        others should have a turn. What is not taken is not counted either.
        """
        self._counts_each = most is not None
        return _to_payloads(self._from_frames(frames), most)

    def wrap(self, lines: bytes) -> Iterator[Payload]:
        """
        Yield one record for each line, in order: the object that it is, or its text.

        A newline ends each line. The payloads are as those of :meth:`decode`.
        """
        return _to_payloads(self._from_lines(lines, self._from_line))

    def _from_frames(self, frames: Sequence[bytes]) -> Iterator[Payload]:
        for group in _group(frames):
            if records := _join_objects(group) or self._join_texts(group):
                yield records
            else:
                for frame in group:
                    yield from self._from_frame(frame)

    def _from_frame(self, frame: bytes) -> Iterator[Payload]:
        if _is_valid(frame, b"{", _check_object):
            return self._from_object(frame.removesuffix(b"\n"))
        if _is_valid(frame, b"[", _check_array):
            return self._from_array(frame)
        if b"\n" in frame:
            return self._from_lines(frame, self._from_frame)
        return self._from_text(frame)

    def _from_line(self, line: bytes) -> Iterator[Payload]:
        is_object = _is_valid(line, b"{", _check_object)
        return self._from_object(line) if is_object else self._from_text(line)

    def _from_lines(
        self, lines: bytes, from_line: Callable[[bytes], Iterator[Payload]]
    ) -> Iterator[Payload]:
        for part in _split_lines(lines):
            each = part.split(b"\n")
            if records := _join_objects(each) or self._join_texts(each):
                yield records
            else:
                for line in each:
                    yield from from_line(line)

    def _from_array(self, array: bytes) -> Iterator[Payload]:
        for elements in _split_array(array):
            if records := _join_objects(elements):
                yield records
                continue
            for element in elements:
                if element.startswith(b"{"):
                    yield from self._from_object(element)
                else:
                    yield from self._from_text(element.replace(b"\n", b" "))
            if len(array) > _GROUP_BYTES:
                yield _PAUSE

    def _from_object(self, record: bytes) -> Iterator[Payload]:
        record = record.replace(b"\n", b" ")
        is_long = len(record) > _PART_BYTES
        if is_long:
            yield _PAUSE
        parts = [record]
        if not record.isascii():
            parts = []
            for part in _decode(record, _REPLACE_IN_JSON):
                parts.append(part.encode())
                if is_long:
                    yield _PAUSE
            self.invalid_bytes += (sum(map(len, parts)) - len(record)) // 4  # one became five
        yield Payload(b"".join((*parts, b"\n")), 1)

    def _join_texts(self, frames: Sequence[bytes]) -> Payload | None:
        """Return a record for each line of frames, if none looks like JSON and there are many."""
        if len(frames) == 1 or self._counts_each:
            return None
        lines = b"\n".join(map(_without_newline, frames))
        if len(lines) > _GROUP_BYTES + len(frames) or _PERHAPS_JSON.search(b"\n" + lines):
            return None
        texts = lines if lines.isascii() else to_utf8(lines)
        records = lines.count(b"\n") + 1
        self.foreign += records
        self.invalid_bytes += (len(texts) - len(lines)) // 3  # one became four
        escaped = escape(texts, HARMLESS + b"\n").replace(b"\n", _TAIL + _HEAD)
        return Payload(_HEAD + escaped + _TAIL, records)

    def _from_text(self, text: bytes) -> Iterator[Payload]:
        self.foreign += 1
        parts = [_HEAD]
        size = 0
        for part in _decode(text, "backslashreplace"):
            parts.append(_to_json(part)[1:-1])
            size += len(part.encode())
            if len(text) > _PART_BYTES:
                yield _PAUSE
        self.invalid_bytes += (size - len(text)) // 3  # one became four
        yield Payload(b"".join((*parts, _TAIL)), 1)


def labels_of(record: bytes) -> tuple[str, str]:
    """
    Return the type and the host that a record names, each empty if it is no text.

    What is half a surrogate pair in them becomes the character 0.
    """
    try:
        labels = _labels(record)
    except _REFUSED:
        try:
            labels = _labels(_SURROGATE.sub(lambda match: match[1] or rb"\u0000", record))
        except _REFUSED:  # it is nested too deep
            labels = _Labels()
    return _label(labels.type), _label(labels.host)


def _label(value: msgspec.Raw) -> str:
    try:
        return _to_text(value)
    except msgspec.ValidationError:
        return ""


def _to_payloads(parts: Iterator[Payload], most: int | None = None) -> Iterator[Payload]:
    """Join parts, which are whole records or pauses."""
    joined: list[bytes] = []
    records = size = 0
    for part, count in parts:
        joined.append(part)
        records += count
        size += len(part)
        enough = most is not None and records >= most
        if enough or not part or records >= _PAYLOAD_RECORDS or size >= _GROUP_BYTES:
            payload = Payload(b"".join(joined), records)
            yield payload if most is None or records <= most else payload.first(most)
            if enough:
                return
            most = most and most - records
            joined.clear()
            records = size = 0
    if records:
        yield Payload(b"".join(joined), records)


def _group(frames: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """Cut frames into groups of at most so many bytes, or one frame that has more."""
    ends = list(accumulate(map(len, frames)))
    start = 0
    while start < len(frames):
        most = (ends[start - 1] if start else 0) + _GROUP_BYTES
        end = max(start + 1, bisect_right(ends, most, start))
        yield frames[start:end]
        start = end


def _join_objects(frames: Sequence[bytes]) -> Payload | None:
    """Return the lines of frames, a newline after each, if each line is a JSON object."""
    joined = b"".join(frames)
    if not frames or len(joined) > _GROUP_BYTES:
        return None
    if b"\n" in joined:
        data = b"\n".join(map(_without_newline, frames))
        if data.count(b"\n") > _GROUP_LINES:
            return None
        frames = data.split(b"\n")
    else:
        data = b"\n".join(frames)
    try:
        deque(map(_check_object, frames), maxlen=0)
        valid = data.isascii() or data.decode()
    except _REFUSED:
        return None
    return Payload(data + b"\n", len(frames)) if valid else None


def _is_valid(data: bytes, first: bytes, check: _Check) -> bool:
    """Whether bytes are the JSON that is wanted, but for what is not UTF-8 in its strings."""
    if data.lstrip(_SPACE)[:1] != first:
        return False  # sooner
    try:
        check(data)
    except _REFUSED:
        if not _PERHAPS_HALF.search(data):
            return False
        # With other characters it is as valid.
        whole = data.replace(rb"\ud", rb"\u0").replace(rb"\uD", rb"\u0")
        return _is_valid(whole, first, check)
    return True


def _split_lines(lines: bytes) -> Iterator[bytes]:
    """Cut lines into parts of at most so many bytes, or one line that has more."""
    start = 0
    while len(lines) - start > _PART_BYTES:
        end = lines.rfind(b"\n", start, start + _PART_BYTES)
        if end < 0 and (end := lines.find(b"\n", start)) < 0:
            break
        yield lines[start:end]
        start = end + 1
    if start < len(lines):  # else a newline was the last
        yield lines[start:].removesuffix(b"\n")


def _split_array(array: bytes) -> Iterator[list[bytes]]:
    """Yield some elements of a valid JSON array after the other, each as it is written."""
    if len(array) <= _GROUP_BYTES:
        with contextlib.suppress(*_REFUSED):
            yield [*map(bytes, _elements(array))]
            return
    elements: list[bytes] = []
    depth = 0
    at = start = begin = array.index(b"[") + 1
    while depth >= 0:
        found = (_NESTED if depth else _WITHIN).match(array, at)
        assert found
        at, stop = found.end(), found[1]
        if stop in (b"[", b"{"):
            depth += 1
        elif stop in (b"]", b"}"):
            depth -= 1
        if stop == b"," or depth < 0:
            if element := array[start : at - 1].strip(_SPACE):
                elements.append(element)
            start = at
        if not stop or at - begin > _PART_BYTES:
            yield elements
            elements = []
            begin = at
    yield elements


def _decode(data: bytes, errors: str) -> Iterator[str]:
    """Yield the text of some bytes, in parts."""
    if len(data) <= _PART_BYTES:
        yield data.decode("utf-8", errors)
        return
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    for start in range(0, len(data), _PART_BYTES):
        yield decoder.decode(data[start : start + _PART_BYTES])
    yield decoder.decode(b"", final=True)
