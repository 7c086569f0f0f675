import json
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from by_json import records_of, records_of_lines, values_of
from zmqpush.core.records import decode as records
from zmqpush.core.records.decode import RecordDecoder, labels_of
from zmqpush.core.records.encode import Payload

A, B = b'{"a":"\xc3\xa9\\n"}', b'{"b":[1,{}]}'
PIECES = (
    b'{ } [ ] , : " \\ \n \r \t \xff \xc3\xa9 \xe2\x82 \xed\xa0\x80 \0 1 -0 01 1. 1e999 NaN '
    b'-Infinity null tru "a" "a": {"a":1} {} [1] \\ud800 \\udc00 \\uD83D\\uDE00 \\\\ud800 \\x '
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(
    SCALARS,
    lambda it: st.lists(it, max_size=4) | st.dictionaries(st.text(max_size=3), it, max_size=4),
)


@st.composite
def nearly_json(draw):
    """Return JSON in which a byte may be missing, and others too much."""
    value = draw(st.lists(JSON, max_size=4) | st.dictionaries(st.text(max_size=3), JSON))
    style = {"indent": draw(st.sampled_from([None, 0])), "ensure_ascii": draw(st.booleans())}
    data = json.dumps(value, **style).encode()
    at = draw(st.integers(0, 2 * len(data)))
    return data[:at] + draw(st.binary(max_size=2)) + data[at + draw(st.integers(0, 1)) :]


FRAMES = st.lists(
    st.binary(max_size=20)
    | st.lists(st.sampled_from(PIECES.split(b" ") + [b" "]), max_size=9).map(b"".join)
    | st.lists(nearly_json(), max_size=4).map(b"\n".join),
    max_size=8,
)
DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
LIMITS = ("_GROUP_BYTES", "_GROUP_LINES", "_PAYLOAD_RECORDS", "_PART_BYTES")


def joined(payloads) -> Payload:
    """Return one payload for many, each of which holds as many records as it says."""
    whole = b""
    for data, count in payloads:
        assert data.count(b"\n") == count
        assert data.endswith(b"\n") or not data
        whole += data
    return Payload(whole, whole.count(b"\n"))


def decode(frames, most=None) -> Payload:
    return joined(RecordDecoder().decode(frames, most))


@given(FRAMES)
@example([b'{"a":[1\n2]}'])
@example([b'[{"a":1e999}]'])
@example([b'{"a":%s}' % (b"1" * 5000)])
@example([b'{"a":"\\ud800"}', b'{"a":"\\\\ud800"}', b'{"a":"\\ud83d\\ude00"}', b'{"a":"\\ud80"}'])
@example([b'["\\ud800",{"a":"\\uDC00"}]'])
def test_records_are_what_pythons_own_json_finds(frames):
    decoder = RecordDecoder()
    payload = joined(decoder.decode(frames))

    assert payload.data == records_of(frames)
    assert all(type(value) is dict for value in values_of(payload.data))
    assert decoder.foreign <= payload.records


@given(FRAMES, st.sampled_from([1, 7, 40]))
@example([b'[{"a":[{"b":"]},"}]} , "x]", {},\n[[],[1]]]', b"{}\n{}\n[{},{}]\n"], 1)
@example([b'{"a":"%s"}' % ("\xe9".encode() * 9), b'{"a":"\xc3\xff\xe2\x82"}', b"\xc3\xff\xe2"], 1)
@example([b"{}\n\n", b"\n", b"\n\n", b""], 1)
def test_it_does_not_matter_into_which_parts_frames_are_cut(frames, limit):
    whole, parts = RecordDecoder(), RecordDecoder()
    expected = joined(whole.decode(frames))

    with mock.patch.multiple(records, **dict.fromkeys(LIMITS, limit)):
        assert joined(parts.decode(frames)) == expected
    assert (parts.foreign, parts.invalid_bytes) == (whole.foreign, whole.invalid_bytes)


@given(FRAMES, st.integers(1, 9), st.sampled_from([1, 40, 1 << 20]))
def test_the_first_records_are_taken_and_no_more_are_counted(frames, most, limit):
    everything = decode(frames)
    decoder = RecordDecoder()

    with mock.patch.multiple(records, **dict.fromkeys(LIMITS, limit)):
        first = joined(decoder.decode(frames, most))
    assert first == (everything.first(most) if everything.records > most else everything)
    assert decoder.foreign <= most


@given(FRAMES)
@example([b'{"a":1', b'"b":2}'])
@example([b'{"a":1},{"b":2}', b'{"c":3},"x",{"d":4}'])
@example([b'{"a":[1', b"2]}"])
def test_frames_are_never_read_together(frames):
    together, alone = RecordDecoder(), RecordDecoder()
    whole = joined(together.decode(frames))

    assert whole.data == b"".join(joined(alone.decode([frame])).data for frame in frames)
    assert (together.foreign, together.invalid_bytes) == (alone.foreign, alone.invalid_bytes)


@given(FRAMES, st.sampled_from([1, 40, 1 << 20]))
@example([b'[{"a":1},{"a":2}]', b"", b"\xff", b'{"a":"\xff"}', b'{"a":1} '], 1)
def test_each_raw_line_is_one_record_in_its_place(frames, limit):
    lines = b"".join(frame.removesuffix(b"\n") + b"\n" for frame in frames)
    decoder = RecordDecoder()

    with mock.patch.multiple(records, **dict.fromkeys(LIMITS, limit)):
        payload = joined(decoder.wrap(lines))
    assert payload.data == records_of_lines(lines)
    assert payload.records == lines.count(b"\n")


def test_an_empty_frame_is_an_empty_line():
    assert decode([b"", A, b""]).data == b'{"message":""}\n' + A + b'\n{"message":""}\n'


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

    assert [*decoder.decode(frames)] == [Payload(A + b"\n" + B + b"\n", 2)]
    assert decoder.foreign == 0


def test_an_object_of_several_lines_becomes_one_line():
    payload = decode([b'{\n"a":\n1}\n', b'[\n{"b":\n[2,\n{}]}\n]'])

    assert values_of(payload.data) == [{"a": "1"}, {"b": ["2", {}]}]


@pytest.mark.parametrize("value", [b"1e999", b"0.10", b'"\\ud800"'])
def test_an_object_in_an_array_stays_as_it_was_written(value):
    assert decode([b'[{"a":%s}]' % value]).data == b'{"a":%s}\n' % value


@pytest.mark.parametrize(
    "text",
    b'no json|{"a":NaN}|{"a":-Infinity}|1|null| |"\\ud800"|{"a":1},{"b":2}|{"a":1}{"b":2}|{"a":1'
    b'|\xef\xbb\xbf{"a":1}|{"a":\xff}|{\xff"a":1}|{"a":"\\\xff"}|\xed\xa0\x80|\xff'.split(b"|")
    + [DEEP],
    ids=lambda text: repr(text[:20]),
)
def test_what_is_no_json_object_becomes_a_message_and_is_counted(text):
    decoder = RecordDecoder()
    found = values_of(joined(decoder.decode([A, text, b"[1," + B + b"]"])).data)

    assert found[1:3] == [{"message": text.decode("utf-8", "backslashreplace")}, {"message": "1"}]
    assert (len(found), decoder.foreign) == (4, 2)


@pytest.mark.parametrize(
    ("frames", "count"),
    [
        ([A, b'{"a":"x\xff\xfe","b":1}', B], 3),
        ([A + b'\n{"a":"x\xff\xfe","b":1}\n' + B], 3),
        ([b"[" + A + b',{"a":"x\xff\xfe","b":1},' + B + b"]"], 3),
        ([A + b'\nno json \x80\n{"a":"x\xff\xfe","b":1}\n' + B], 4),
    ],
    ids=["frames", "lines", "array", "beside text"],
)
def test_a_record_with_bytes_that_are_not_utf8_keeps_its_fields(frames, count):
    decoder = RecordDecoder()
    payload = joined(decoder.decode(frames))
    lines = payload.data.splitlines()

    assert (lines[0], lines[-1]) == (A, B)
    assert lines[-2] == b'{"a":"x\\\\xff\\\\xfe","b":1}'
    assert json.loads(lines[-2]) == {"a": r"x\xff\xfe", "b": 1}
    assert (payload.records, decoder.invalid_bytes, decoder.foreign) == (
        count,
        count - 1,
        count - 3,
    )


def test_a_field_whose_name_is_not_utf8_keeps_it():
    assert decode([b'{"\xff":"\xe2\x82"}']).data == b'{"\\\\xff":"\\\\xe2\\\\x82"}\n'


@pytest.mark.parametrize(
    ("record", "labels"),
    [
        (b'{"type":"a","host":"b","type":"c"}', ("c", "b")),
        (b'{"type":1e999,"host":"b"}', ("", "b")),
        (b'{"type":{"type":"x"},"host":null}', ("", "")),
        (b'{"t\\u0079pe":"\\ud55c\xc3\xa9"}', ("\ud55c\xe9", "")),
        (b'{"x":"\\ud800","type":"\\ud83d\\ude00","host":"b"}', ("\U0001f600", "b")),
        (b'{"type":"\\\\ud800\\udc00"}', ("\\ud800\0", "")),
        (b'{"x":"\\ud800","type":[],"host":"b"}', ("", "b")),
        (b"{}", ("", "")),
        (DEEP, ("", "")),
    ],
)
def test_the_labels_of_a_record(record, labels):
    assert labels_of(record) == labels


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_first_records_of_a_payload_are_a_payload(n):
    lines = [A + b"\n", B + b"\n", b"{}\n"]

    assert decode(lines).first(n) == Payload(b"".join(lines[:n]), n)
