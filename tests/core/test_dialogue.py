"""What rsyslog's end holds for committed, next to what it was told is safe."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zmqpush.core.omprog import DEFER_COMMIT, OK, REFUSED, Dialogue, MarkFilter, Marks
from zmqpush.core.records.lines import Block

BEGIN, COMMIT = MARKS = Marks()
ALIKE = [b" " + BEGIN, BEGIN + b"\r ", BEGIN[:-1], COMMIT.lower(), COMMIT + b"S", b"x\n" + BEGIN]
ORDINARY = st.sampled_from([b"", b"a", b"bb", b"c\nd", *ALIKE])
MESSAGES = st.lists(st.one_of(ORDINARY, st.sampled_from([BEGIN, COMMIT])), max_size=12)
SIZES = st.integers(1, 60)
MANY = 1 << 20


def records(lines):
    """Return the messages of what is to be made safe."""
    return lines.split(b"\0")[:-1]


def recorded(transactions):
    """Return which messages make records: all, but two in a row that are like two marks."""
    made = []
    for messages in transactions:
        for before, message in itertools.pairwise([b"", *messages]):
            if (before, message) == (COMMIT, BEGIN):
                made.pop()
            else:
                made.append(message)
    return made


class Rsyslog:
    """
    Its end of the dialogue: what it handed over, and what of that is safe.

    Args:
        marks: Whether it uses transactions, and the program knows it.
        starts_over: Whether a message that is refused has all of its transaction handed over
            again, as since 8.2508, or only what follows.

    """

    def __init__(self, marks=MARKS, max_bytes=MANY, *, starts_over=False):
        self.dialogue = Dialogue(marks, b"\0", max_bytes)
        self.max_bytes = max_bytes
        self.starts_over = starts_over
        self.safe = []
        self.answers = []
        self.refused = 0

    def say(self, text):
        """Hand over a message or a mark; return its answer."""
        turn = self.dialogue.take(text)
        self.safe += records(turn.lines)
        self.answers.append(turn.answer)
        self.refused += turn.answer == REFUSED
        return turn.answer

    def commit(self, messages):
        """Hand over a transaction; with OK to a message it is committed, and another begins."""
        at, is_open = 0, False
        while at < len(messages) or is_open:
            if not is_open:
                assert self.say(BEGIN) == OK
            answer = self.say([*messages, COMMIT][at])
            assert answer in (OK, DEFER_COMMIT, REFUSED)
            is_open = answer == DEFER_COMMIT
            if answer != REFUSED:
                at += 1
            elif self.starts_over or at == len(messages):
                at = 0


@given(MESSAGES, SIZES, st.sampled_from([None, MARKS]))
@example([BEGIN, b"one", b"two"], 60, None)
def test_without_transactions_each_message_is_safe_before_its_answer(messages, max_bytes, marks):
    rsyslog = Rsyslog(marks, max_bytes)
    if marks:  # declared, though rsyslog does not use them: nothing may look like a mark
        messages = [message for message in messages if message != BEGIN]
    for at, message in enumerate(messages, 1):
        assert rsyslog.say(message) == OK
        assert rsyslog.safe == messages[:at]


@given(st.lists(MESSAGES, max_size=5), st.booleans())
@example([[COMMIT, BEGIN, b"a"], [b"b"]], False)
@example([[COMMIT, b"a"], [BEGIN, BEGIN, b"b"]], True)
@example([[b"a", COMMIT, b"b"]], False)
@example([[b"a", COMMIT, b"b"]], True)
@example([[b"a", COMMIT, COMMIT]], False)
@example([[b"a"], [COMMIT, b"b", BEGIN, b"c"]], False)
def test_a_transaction_is_safe_when_its_end_is_answered(transactions, starts_over):
    """Each message once and in order, whatever it is but the closing mark itself."""
    rsyslog = Rsyslog(starts_over=starts_over)
    given = [b"the first transaction"]
    rsyslog.commit(given)
    for messages in transactions:
        given += [message for message in messages if message != COMMIT]
        rsyslog.commit(messages)

        assert rsyslog.safe == given
    assert rsyslog.refused == 1


@given(MESSAGES, st.booleans())
@example([b"a", COMMIT, b"b"], False)
@example([b"a", COMMIT, b"b"], True)
@example([b"a", COMMIT, COMMIT, b"b"], False)
@example([COMMIT, b"a"], False)
@example([BEGIN, b"a", COMMIT], False)
def test_nothing_of_the_first_transaction_is_lost_whatever_is_refused(messages, starts_over):
    """Also where rsyslog goes on with the message that was refused, and forgets those before."""
    rsyslog = Rsyslog(starts_over=starts_over)
    rsyslog.commit(messages)
    rsyslog.commit([b"-"])

    safe = [message for message in rsyslog.safe if message != COMMIT]
    assert safe == [*(message for message in messages if message != COMMIT), b"-"]
    assert rsyslog.refused == 1


@given(st.lists(st.lists(ORDINARY, max_size=8), max_size=5))
def test_a_transaction_is_made_safe_as_one(transactions):
    rsyslog = Rsyslog()
    rsyslog.commit([b"the first transaction"])
    for messages in transactions:
        before = len(rsyslog.safe)
        rsyslog.commit(messages)

        assert rsyslog.safe[before:] == messages
    assert set(rsyslog.answers) <= {OK, DEFER_COMMIT, REFUSED}


@given(st.lists(ORDINARY, max_size=8))
def test_the_first_transaction_is_refused_whole_since_it_may_be_the_rest_of_one(messages):
    dialogue = Dialogue(MARKS, b"\0", MANY)
    turns = [dialogue.take(message) for message in [BEGIN, *messages, COMMIT]]

    assert [turn.lines for turn in turns] == [b""] * len(turns)
    assert [turn.answer for turn in turns[:-1]] == [OK, *[DEFER_COMMIT] * len(messages)]
    assert turns[-1].answer not in (OK, DEFER_COMMIT, b"PREVIOUS_COMMITTED")


@given(st.lists(ORDINARY, min_size=1, max_size=8))
def test_what_is_not_committed_is_never_made_safe(messages):
    dialogue = Dialogue(MARKS, b"\0", MANY)
    dialogue.take(BEGIN)

    assert [dialogue.take(message) for message in messages] == [(b"", DEFER_COMMIT)] * len(messages)


@pytest.mark.parametrize(
    ("max_bytes", "released"),
    [(1, [1, 1, 1, 1]), (5, [0, 0, 3, 0]), (6, [0, 0, 3, 0]), (7, [0, 0, 0, 4]), (9, [0] * 4)],
)
def test_of_a_large_transaction_no_more_is_held_than_allowed(max_bytes, released):
    dialogue = Dialogue(MARKS, b"\0", max_bytes)
    for mark in (BEGIN, COMMIT, BEGIN):
        dialogue.take(mark)
    turns = [dialogue.take(message) for message in (b"a", b"b", b"c", b"d")]

    assert [len(records(turn.lines)) for turn in turns] == released
    assert {turn.answer for turn in turns} == {DEFER_COMMIT}
    rest = b"".join(b"%b\0" % message for message in [b"a", b"b", b"c", b"d"][sum(released) :])
    assert dialogue.take(COMMIT) == (rest, OK)


@pytest.mark.parametrize("marks", [Marks(b"<", b">"), Marks(b"BEGIN", COMMIT)])
def test_other_marks_are_the_only_ones(marks):
    dialogue = Dialogue(marks, b"\0", MANY)
    first = [dialogue.take(text).answer for text in (marks.begin, b"a", marks.commit)]
    again = [dialogue.take(text) for text in (marks.begin, BEGIN, b"a", marks.commit)]

    assert first == [OK, DEFER_COMMIT, REFUSED]
    assert again[-1] == (BEGIN + b"\0a\0", OK)
    assert [turn.answer for turn in again[:-1]] == [OK, DEFER_COMMIT, DEFER_COMMIT]


@given(st.lists(st.sampled_from([b"a", b"\r", BEGIN, COMMIT, b"x" * 9]), min_size=1))
def test_a_message_in_parts_is_no_mark_and_has_one_answer(parts):
    rsyslog = Dialogue(MARKS, b"\0", MANY)
    turns = [rsyslog.take(part, ends=False) for part in parts] + [rsyslog.take(COMMIT)]

    assert [turn.answer for turn in turns] == [None] * len(parts) + [OK]
    assert b"".join(turn.lines for turn in turns) == b"".join((*parts, COMMIT, b"\0"))


@pytest.mark.parametrize(
    ("text", "delimiter", "line"),
    [
        (b"a\r", b"\0", b"a\0"),
        (b"a\r\r", b"\0", b"a\r\0"),
        (b"\ra\r\nb", b"\0", b"\ra\r\nb\0"),
        (b"\r", b"\0", b"\0"),
        (b"a\r", b"\n", b"a\r\n"),  # whoever cuts lines takes it off
    ],
)
def test_a_carriage_return_at_the_end_belongs_to_the_end(text, delimiter, line):
    assert Dialogue(None, delimiter, MANY).take(text) == (line, OK)


# Where rsyslog wants no answers.

LINES = st.lists(st.sampled_from([b"", b"a", *ALIKE[:-1], BEGIN, COMMIT]), max_size=8)


def stripped(marks, lines, cuts):
    """Return what is left of lines that come in blocks."""
    got = []
    edges = sorted({min(cut, len(lines)) for cut in cuts} | {0, len(lines)})
    for begin, end in itertools.pairwise(edges):
        for block in marks.strip(Block(b"\n".join(lines[begin:end]))):
            got += block.data.split(b"\n")
    return got


@given(st.lists(LINES), st.lists(st.integers(0, 60)))
@example([[], []], [])
@example([[COMMIT], [b"b"]], [1, 2, 3])
@example([[b"a", COMMIT, b"b"]], [1, 2, 3])
@example([[b""], [b"", b""]], [1, 2, 3, 4])
@example([[BEGIN, b"a", BEGIN]], [2])
@example([[b"a", COMMIT, BEGIN, b"b"], [BEGIN]], [3, 4])
def test_marks_are_taken_out_wherever_the_blocks_are_cut(transactions, cuts):
    lines = [line for messages in transactions for line in (BEGIN, *messages, COMMIT)]

    assert stripped(MarkFilter(MARKS), lines, cuts) == recorded(transactions)


@given(LINES, st.lists(st.integers(0, 60)))
def test_lines_without_marks_stay_as_they_are(lines, cuts):
    lines = [line for line in lines if line != BEGIN]
    marks = MarkFilter(MARKS)

    assert stripped(marks, lines, cuts) == lines
    assert not marks.spoken


@pytest.mark.parametrize("at", [0, 1])
def test_a_part_of_a_long_line_is_no_mark(at):
    marks = MarkFilter(MARKS)
    marks.strip(Block(BEGIN))
    blocks = [Block([b"x", COMMIT][at], partial=True), Block(COMMIT + b"\nz\n" + COMMIT)]
    got = [left for block in blocks for left in marks.strip(block)]

    assert got == [blocks[0], Block(COMMIT + b"\nz")]


def test_a_line_like_the_closing_mark_at_the_end_of_a_block_is_kept():
    marks = MarkFilter(MARKS)
    long = Block(b"x" * 9, partial=True)

    assert marks.strip(Block(BEGIN + b"\na\n" + COMMIT)) == [Block(b"a")]
    assert marks.strip(long) == [Block(COMMIT), long]
