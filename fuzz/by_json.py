"""What records frames hold, as Python's own JSON reads them: slow, and by the letter."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, NoReturn

_SPACE = " \t\n\r"


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _escape(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    invalid = error.object[error.start : error.end]
    return "".join(f"\\\\x{ord(byte) - 0xDC00:02x}" for byte in invalid), error.end


_decoder = json.JSONDecoder(parse_constant=_refuse, parse_int=str)
codecs.register_error("by-json", _escape)


def values_of(lines: bytes) -> list[Any]:
    """Return the values of JSON lines, of which there must be nothing else."""
    *each, nothing = lines.decode().split("\n")
    assert nothing == ""
    return [_decoder.decode(line) for line in each]


def records_of(frames: list[bytes]) -> bytes:
    """Return the records of some frames, a newline after each."""
    texts = (_to_text(frame.removesuffix(b"\n")) for frame in frames)
    return b"".join(record + b"\n" for text in texts for record in _from_text(text))


def records_of_lines(lines: bytes) -> bytes:
    """Return the record of each line, a newline after it."""
    texts = map(_to_text, lines.split(b"\n")[:-1])
    return b"".join(_to_record(_value(text), text) + b"\n" for text in texts)


def _to_text(data: bytes) -> str:
    # To JSON the bytes that are not UTF-8 are characters like others.
    return data.decode("utf-8", "surrogateescape")


def _from_text(text: str) -> Iterator[bytes]:
    value = _value(text)
    if isinstance(value, list):
        for element, source in _elements(text):
            yield _to_record(element, source.replace("\n", " "))
    elif isinstance(value, dict) or "\n" not in text:
        yield _to_record(value, text.replace("\n", " "))
    else:
        for line in text.split("\n"):
            yield from _from_text(line)


def _elements(text: str) -> Iterator[tuple[object, str]]:
    at = _skip(text, 0) + 1
    while text[at := _skip(text, at)] != "]":
        value, end = _decoder.raw_decode(text, at)
        yield value, text[at:end]
        at = _skip(text, end)
        at += text[at] == ","


def _skip(text: str, at: int) -> int:
    while text[at] in _SPACE:
        at += 1
    return at


def _value(text: str) -> object:
    try:
        return _decoder.decode(text)
    except (ValueError, RecursionError):
        return None


def _to_record(value: object, text: str) -> bytes:
    if isinstance(value, dict):
        return text.encode("utf-8", "by-json")
    message = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return json.dumps({"message": message}, ensure_ascii=False, separators=(",", ":")).encode()
