import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zmqpush.core.envelope import Payload
from zmqpush.core.records import RecordDecoder

A, B = b'{"a":"\xc3\xa9\\n"}', b'{"b":[1,{}]}'
PIECES = b'{ } [ ] , : " \\ \n \r \xff \xc3\xa9 1 1e999 NaN null "a" "a": {"a":1} \\ud800'
FRAMES = st.lists(
    st.binary(max_size=20)
    | st.lists(st.sampled_from(PIECES.split(b" ") + [b" "]), max_size=9).map(b"".join),
    max_size=8,
)
DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def refuse(name: str) -> None:
    raise ValueError(name)


def parse(data: bytes) -> list[object]:
    """Return the values of JSON lines, read by the letter."""
    *lines, rest = data.decode().split("\n")
    assert rest == ""
    return [json.loads(line, parse_constant=refuse) for line in lines]


@given(FRAMES)
@example([b'{"a":[1\n2]}'])
@example([b'[{"a":1e999}]'])
def test_any_frames_become_json_objects_one_a_line(frames):
    payload = RecordDecoder().decode(frames)
    records = parse(payload.data)

    assert all(type(record) is dict for record in records)
    assert payload.records == len(records)


@given(FRAMES)
@example([b'{"a":1', b'"b":2}'])
@example([b'{"a":1},{"b":2}', b'{"c":3},"x",{"d":4}'])
@example([b'{"a":[1', b"2]}"])
def test_frames_are_never_read_together(frames):
    together, alone = RecordDecoder(), RecordDecoder()

    assert together.decode(frames).data == b"".join(alone.decode([f]).data for f in frames)
    assert together.foreign == alone.foreign


def test_an_empty_frame_is_an_empty_line():
    assert RecordDecoder().decode([b"", A, b""]).data == (
        b'{"message":""}\n' + A + b'\n{"message":""}\n'
    )


@pytest.mark.parametrize(
    "frames",
    [
        [A, B],
        [A + b"\n", B + b"\n"],
        [b"[" + A + b", " + B + b"]"],
        [b"[]", b"[\n" + A + b",\n" + B + b"\n]\n"],
        [A + b"\n" + B],
        [A + b"\n" + B + b"\n"],
    ],
)
def test_every_framing_becomes_the_same_records_byte_for_byte(frames):
    decoder = RecordDecoder()

    assert decoder.decode(frames) == Payload(A + b"\n" + B + b"\n", 2)
    assert decoder.foreign == 0


def test_an_object_of_several_lines_becomes_one_line():
    payload = RecordDecoder().decode([b'{\n"a":\n1}\n', b'[\n{"b":\n[2,\n{}]}\n]'])

    assert parse(payload.data) == [{"a": 1}, {"b": [2, {}]}]


@pytest.mark.parametrize("value", [b"1e999", b"0.10", b'"\\ud800"'])
def test_an_object_in_an_array_stays_as_it_was_written(value):
    assert RecordDecoder().decode([b'[{"a":%s}]' % value]).data == b'{"a":%s}\n' % value


@pytest.mark.parametrize(
    "text",
    b'no json|{"a":NaN}|{"a":-Infinity}|1|null| |"\\ud800"|{"a":1},{"b":2}|{"a":1}{"b":2}|{"a":1'
    b'|\xef\xbb\xbf{"a":1}|{"a":"\xff"}|{"a":"\\\xff"}|\xed\xa0\x80|\xff'.split(b"|")
    + [DEEP],
    ids=lambda text: repr(text[:20]),
)
def test_what_is_no_json_object_becomes_a_message_and_is_counted(text):
    decoder = RecordDecoder()
    records = parse(decoder.decode([A, text, b"[1," + B + b"]"]).data)

    assert records[1:3] == [{"message": text.decode("utf-8", "backslashreplace")}, {"message": "1"}]
    assert (len(records), decoder.foreign) == (4, 2)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_first_records_of_a_payload_are_a_payload(n):
    lines = [A + b"\n", B + b"\n", b"{}\n"]

    assert RecordDecoder().decode(lines).first(n) == Payload(b"".join(lines[:n]), n)
