"""Payloads into ZeroMQ messages: what one message carries."""

from enum import StrEnum


class Framing(StrEnum):
    """What a ZeroMQ message carries."""

    SINGLE = "single"
    FRAMES = "frames"
    ARRAY = "array"
    LINES = "lines"


def to_frames(framing: Framing, data: bytes, separator: bytes = b"\n") -> list[bytes]:
    """
    Cut a payload into frames.

    With ``single`` each frame is a message of its own; with the others all frames
    are the parts of one message.

    Args:
        framing: What a message carries.
        data: Records, each followed by ``separator``.
        separator: What ends a record.

    """
    match framing:
        case Framing.LINES:
            return [data]
        case Framing.ARRAY:
            records = data[: -len(separator)]
            return [b"".join((b"[", records.replace(separator, b","), b"]"))]
        case _:
            if len(separator) > 1:  # a record may end with a part of it
                return data[: -len(separator)].split(separator)
            frames = data.split(separator)
            frames.pop()  # nothing follows the last separator
            return frames
