"""Payloads into frames."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqpush.core.records.framing import Framing, to_frames

records = st.lists(st.dictionaries(st.text(), st.integers()), min_size=1)


def payload(values):
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


@given(records)
@pytest.mark.parametrize("framing", [Framing.SINGLE, Framing.FRAMES])
def test_a_frame_is_a_record(framing, values):
    assert [json.loads(frame) for frame in to_frames(framing, payload(values))] == values


@given(records)
def test_an_array_is_one_json_document(values):
    (frame,) = to_frames(Framing.ARRAY, payload(values))

    assert json.loads(frame) == values


@given(records)
def test_json_lines_are_the_payload_itself(values):
    assert to_frames(Framing.LINES, payload(values)) == [payload(values)]


def test_raw_records_are_cut_at_their_own_separator():
    assert to_frames(Framing.FRAMES, b"a\nb\0\0c\0", b"\0") == [b"a\nb", b"", b"c"]
