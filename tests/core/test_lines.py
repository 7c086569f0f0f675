import itertools

from hypothesis import given
from hypothesis import strategies as st

from zmqpush.core.records.lines import Block, LineSplitter

MESSY = st.lists(
    st.sampled_from([b"a", b"\n", b"\r", b"\0", b"ab", b"\xc3\xa9", b"\xff", b"\r\n"]), max_size=60
).map(b"".join)
DELIMITERS = st.sampled_from([b"\n", b"\0", b"ab", b"aa", b"\n\n"])


def lines_of(blocks: list[Block], delimiter: bytes) -> list[tuple[bytes, bool]]:
    return [(line, b.partial) for b in blocks for line in b.data.split(delimiter)]


def split(chunks: list[bytes], delimiter: bytes, max_line: int) -> list[tuple[bytes, bool]]:
    splitter = LineSplitter(delimiter, max_line)
    blocks = [block for chunk in chunks for block in splitter.feed(chunk)]
    return lines_of(blocks + splitter.finish(), delimiter)


@given(MESSY, DELIMITERS, st.integers(4, 70), st.lists(st.integers(0, 150), max_size=8))
def test_where_the_chunks_are_cut_changes_nothing(data, delimiter, max_line, cuts):
    edges = sorted({min(c, len(data)) for c in cuts} | {0, len(data)})
    chunks = [data[a:b] for a, b in itertools.pairwise(edges)]

    assert split(chunks, delimiter, max_line) == split([data], delimiter, max_line)


@given(MESSY)
def test_lines_are_what_stands_between_newlines(data):
    expected = data.split(b"\n")
    last = expected.pop()
    expected = [line.removesuffix(b"\r") for line in expected] + ([last] if last else [])

    assert [line for line, _ in split([data], b"\n", 1 << 20)] == expected


@given(MESSY, st.integers(4, 20))
def test_the_pieces_of_a_long_line_make_the_line_and_are_short(data, max_line):
    lines, held = [], b""
    for piece, partial in split([data], b"\n", max_line):
        assert len(piece) <= max_line
        held += piece
        if not partial:
            lines.append(held)
            held = b""

    assert held == b""
    assert lines == [line for line, _ in split([data], b"\n", 1 << 20)]


@given(MESSY, DELIMITERS, st.integers(4, 70))
def test_a_line_that_is_cut_off_is_partial_and_nothing_else_changes(data, delimiter, max_line):
    splitter = LineSplitter(delimiter, max_line)
    lines = lines_of(splitter.feed(data) + splitter.finish(cut=True), delimiter)
    whole = split([data], delimiter, max_line)
    unfinished = bool(data) and data.split(delimiter)[-1] != b""

    assert [line for line, _ in lines] == [line for line, _ in whole]
    assert [partial for _, partial in lines[:-1]] == [partial for _, partial in whole[:-1]]
    assert not lines or lines[-1][1] == unfinished
    assert splitter.finish(cut=True) == []
