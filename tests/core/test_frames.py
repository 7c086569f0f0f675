"""The codec of the delivery protocol, against ``docs/protocol.md``."""

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqpush.core.protocol import messages as frames
from zmqpush.core.protocol.messages import (
    Ack,
    Data,
    Error,
    Goodbye,
    Hello,
    Ping,
    Reset,
    Skip,
    Welcome,
    decode,
    encode,
)
from zmqpush.errors import RemoteProtocolError

seqs = st.integers(1, frames.MAX_SEQ >> 1)
u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
texts = st.text(st.characters(codec="utf-8"), max_size=100)
greetings = st.dictionaries(texts, st.integers() | texts, max_size=4)
payloads = st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")), min_size=1)
messages = st.one_of(
    greetings.map(Hello),
    greetings.map(Welcome),
    st.builds(
        lambda first, lines: Data.of(first, len(lines), b"".join(line + b"\n" for line in lines)),
        seqs,
        payloads,
    ),
    st.builds(Ack, seqs, u32, u64),
    st.builds(Ping, st.integers(0, frames.MAX_SEQ)),
    st.builds(Reset, st.integers(0, 65535), texts),
    st.builds(Skip, seqs, seqs, st.integers(0, 255)),
    st.just(Goodbye()),
    st.builds(Error, st.integers(0, 65535), texts),
)


@given(messages, u64)
def test_what_is_encoded_is_decoded(message, session):
    decoded, its_session = decode(encode(message, session))

    assert type(decoded) is type(message)
    assert (decoded, its_session) == (message, session)


@given(messages, st.data())
def test_a_damaged_frame_changes_nothing(message, data):
    frame = bytearray(encode(message, 7))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    try:
        decoded, session = decode(bytes(frame))
    except RemoteProtocolError:
        return

    # Only a block has a header that its checksum does not cover: it may seem to be of
    # another session or kind, but never is another block of the same one.
    assert decoded is None or isinstance(message, Data | Skip)
    assert not isinstance(decoded, Data | Skip) or decoded == message or session != 7


@given(st.binary(max_size=100) | st.binary(max_size=60).map(lambda b: encode(Ping(), 1)[:4] + b))
def test_garbage_is_an_error_of_the_protocol_or_ignored(frame):
    code = 0
    try:
        decode(frame)
    except RemoteProtocolError as exc:
        code = exc.code

    assert code in (0, 400, 505)


@given(messages, st.integers(1, 40))
def test_a_frame_cut_short_is_never_another_block(message, missing):
    frame = encode(message, 7)[:-missing]
    try:
        decoded, _ = decode(frame)
    except RemoteProtocolError:
        return

    assert decoded is None


def test_a_block_is_these_bytes():
    frame = encode(Data.of(1, 2, b"a\nb\n"), 0x0102030405060708)

    assert frame.hex(" ") == (
        "5a 50 02 03 00 00 00 10 01 02 03 04 05 06 07 08 "  # header
        "00 00 00 00 00 00 00 01 00 00 00 00 00 00 00 02 "  # first, count
        "91 90 e4 e3 "  # CRC
        "61 0a 62 0a"
    )


def test_an_ack_is_these_bytes():
    frame = encode(Ack(1, 2, 3), 0x0102030405060708)

    assert frame.hex(" ") == (
        "5a 50 02 04 00 00 00 10 01 02 03 04 05 06 07 08 "  # header
        "00 00 00 00 00 00 00 01 00 00 00 02 00 00 00 00 00 00 00 03 "
        "7c a8 06 ac"  # CRC
    )


def header(version=2, number=9, flags=0, length=16, more=b""):
    frame = struct.pack(">HBBHHQ", 0x5A50, version, number, flags, length, 9) + more
    return frame + struct.pack(">I", zlib.crc32(frame))


def test_an_unknown_type_is_ignored_unless_it_must_be_understood():
    assert decode(header(number=99)) == (None, 9)
    with pytest.raises(RemoteProtocolError) as caught:
        decode(header(number=99, flags=0x8000))

    assert caught.value.code == 505


@pytest.mark.parametrize("version", [0, 1, 3, 255])
def test_another_version_is_refused(version):
    with pytest.raises(RemoteProtocolError) as caught:
        decode(header(version))

    assert caught.value.code == 505


@pytest.mark.parametrize("message", [Hello({"versions": [2, 2]}), Error(505, "no")])
def test_a_greeting_and_a_refusal_are_understood_by_every_version(message):
    frame = encode(message, 0)
    assert frame[2] == 1
    damaged = frame[:2] + b"\2" + frame[3:]
    with pytest.raises(RemoteProtocolError) as caught:
        decode(damaged)

    assert caught.value.code == 400


def test_what_a_later_version_adds_to_the_header_is_skipped():
    assert decode(header(length=20, more=b"more")) == (Goodbye(), 9)
    block = encode(Data.of(1, 1, b"a\n"), 9)
    longer = block[:6] + b"\0\x14" + block[8:16] + b"more" + block[16:]
    assert decode(longer) == (Data.of(1, 1, b"a\n"), 9)


@pytest.mark.parametrize(
    "message",
    [
        Data.of(0, 1, b"\n"),
        Data.of(1, 2, b"\n"),
        Data.of(1, 2, b"abc\n"),
        Data.of(1, 1, b"a\nb\n"),
        Data.of(1, 1, b"x"),
        Data.of(frames.MAX_SEQ, 2, b"\n\n"),
        Data.of(1, (1 << 64) - 1, b"\n"),
        Skip(1, 0, 1),
        Skip(frames.MAX_SEQ, 2, 1),
        Skip((1 << 64) - 1, 2, 1),
        Skip(1, (1 << 64) - 1, 1),
    ],
)
@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_impossible_numbers_are_refused(message, kind):
    with pytest.raises(RemoteProtocolError) as caught:
        decode(kind(encode(message, 1)))

    assert caught.value.code == 400


@pytest.mark.parametrize("length", [16, 20])
def test_newlines_outside_the_payload_do_not_count(length):
    block = encode(Data.of(0x0A0A, 2, b"a\nb\n"), 0x0A0A0A)
    frame = block[:6] + length.to_bytes(2) + block[8:16] + b"\n" * (length - 16) + block[16:]

    assert decode(frame) == (Data.of(0x0A0A, 2, b"a\nb\n"), 0x0A0A0A)


def test_a_block_that_is_too_long_is_refused():
    payload = b"x" * frames.MAX_PAYLOAD_BYTES + b"\n"
    with pytest.raises(RemoteProtocolError) as caught:
        decode(encode(Data.of(1, 1, payload), 1))

    assert caught.value.code == 400
