import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqpush.core.records.encode import Envelope, Format
from zmqpush.core.records.lines import Block, LineSplitter

NOON = 1_700_000_000.25


def readable(line: bytes) -> str:
    return line.decode("utf-8", "backslashreplace")


def test_a_json_record_is_this_byte_for_byte():
    payload = Envelope(logtype="nginx", pid=7).format(Block(b"a\n\tb"), NOON)

    assert payload.data == (
        b'{"message":"a","type":"nginx","@pid":7}\n{"message":"\\tb","type":"nginx","@pid":7}\n'
    )
    assert payload.records == 2


@given(st.binary(max_size=200), st.sampled_from([b"\n", b"\0", b"ab", b"\xc3", b"\\", b'"']))
def test_what_a_json_parser_reads_is_what_went_in(data, delimiter):
    splitter = LineSplitter(delimiter, 1 << 20)
    blocks = splitter.feed(data) + splitter.finish()
    for block in blocks:
        payload = Envelope(logtype="x", pid=1, delimiter=delimiter).format(block, NOON)
        records = payload.data.decode().split("\n")

        assert records.pop() == ""
        assert len(records) == payload.records
        assert [json.loads(r)["message"] for r in records] == [
            readable(line) for line in block.data.split(delimiter)
        ]


def test_bytes_that_are_not_utf8_are_counted():
    envelope = Envelope(pid=1)
    envelope.format(Block(b"a\xff\xfe\n\xc3\xa9"), NOON)

    assert envelope.invalid_bytes == 2


@pytest.mark.parametrize("format", [Format.LOGSTASH, Format.ECS])
def test_the_time_of_reading_is_utc_with_milliseconds(format):
    payload = Envelope(format=format, pid=1, host="h").format(Block(b"x"), NOON)

    assert json.loads(payload.data)["@timestamp"] == "2023-11-14T22:13:20.250Z"


def test_a_piece_of_a_long_line_is_marked():
    payload = Envelope(pid=1).format(Block(b"x", partial=True), NOON)

    assert json.loads(payload.data)["@partial"] is True


def test_a_field_of_the_format_cannot_be_set():
    with pytest.raises(ValueError, match="part of the format"):
        Envelope(pid=1, fields={"type": "x"})


def test_arguments_that_are_not_utf8_become_text():
    payload = Envelope(pid=1, logtype="\udcff").format(Block(b"x"), NOON)

    assert json.loads(payload.data)["type"] == "\\xff"


def ecs(fields: dict[str, str]) -> dict[str, object]:
    payload = Envelope(format=Format.ECS, pid=1, host="h", fields=fields).format(Block(b""), NOON)
    record: dict[str, object] = json.loads(payload.data)
    return record


def test_in_ecs_a_field_is_a_label_and_a_dotted_one_a_path():
    record = ecs({"region": "eu", "labels.x": "1", "service.name": "shop", "host.os.type": "linux"})

    assert record["labels"] == {"region": "eu", "x": "1"}
    assert record["service"] == {"name": "shop"}
    assert record["host"] == {"name": "h", "os": {"type": "linux"}}


@pytest.mark.parametrize(
    "names",
    [
        ["host"],
        ["host.name"],
        ["process.pid.x"],
        ["message.x"],
        ["tags"],
        ["tags.x"],
        ["labels.a.b"],
        ["a."],
        [".a"],
        ["."],
        ["a.b", "a.b.c"],
        ["a.b.c", "a.b"],
        ["labels.a", "a"],
    ],
)
def test_in_ecs_two_values_never_meet_in_one_place(names):
    with pytest.raises(ValueError, match=f"the field {names[-1]!r}"):
        ecs(dict.fromkeys(names, "x"))


def test_in_ecs_a_piece_of_a_long_line_is_tagged():
    payload = Envelope(format=Format.ECS, pid=1).format(Block(b"x", partial=True), NOON)

    assert json.loads(payload.data)["tags"] == ["partial"]
    assert "@partial" not in json.loads(payload.data)
