"""What rsyslog's end holds for committed, next to what it was told is safe."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zmqpush.core.dialogue import DEFER_COMMIT, OK, REFUSED, Dialogue, MarkFilter

BEGIN, COMMIT = b"BEGIN TRANSACTION", b"COMMIT TRANSACTION"
MARKS = {BEGIN, COMMIT}
ALIKE = [b" " + BEGIN, BEGIN + b"\r", BEGIN[:-1], COMMIT.lower(), COMMIT + b"S", b"x\n" + BEGIN]
ORDINARY = st.sampled_from([b"", b"a", b"bb", b"c\nd", *ALIKE])
MESSAGES = st.lists(st.one_of(ORDINARY, st.sampled_from(sorted(MARKS))), max_size=12)
SIZES = st.integers(1, 60)


class Rsyslog:
    """
    Its end of the dialogue: what it handed over, and what of that is safe.

    Nothing that it holds for committed, and forgets, may be unsafe.
    """

    def __init__(self, max_bytes=1 << 20):
        self.dialogue = Dialogue(max_bytes)
        self.max_bytes = max_bytes
        self.began = False
        self.given = []
        self.safe = []
        self.answers = []

    def _say(self, text):
        turn = self.dialogue.take(text)
        self.safe += turn.messages
        return turn

    def hand_over(self, message, *, in_transaction=False):
        """Hand over a message; only in a transaction is it kept after DEFER_COMMIT."""
        self.given.append(message)
        turn = self._say(message)
        self.answers.append(turn.answer)
        assert turn.answer in ({OK, DEFER_COMMIT} if in_transaction else {OK})
        if turn.answer == OK:
            self.look()
        assert sum(len(text) + 1 for text in self.missing()) < self.max_bytes

    def commit(self, messages):
        """Hand over a transaction, and the first one once more, since it is refused."""
        if not self.began:
            self.began = True
            assert self._say(BEGIN) == ([], OK)
            assert REFUSED in (self._say(message).answer for message in [*messages, COMMIT])
            assert self.safe == []
        assert self._say(BEGIN) == ([], OK)
        for message in messages:
            self.hand_over(message, in_transaction=True)
        assert self._say(COMMIT).answer == OK
        self.look()

    def missing(self):
        """Return what was handed over and is not safe; what is safe is so in order, and once."""
        given, safe = ([t for t in texts if t not in MARKS] for texts in (self.given, self.safe))
        assert given[: len(safe)] == safe
        rest = iter(self.given)
        assert all(text in rest for text in self.safe)  # those that look like marks, too
        return given[len(safe) :]

    def look(self):
        """Everything is held for committed now: all but what looks like a mark must be safe."""
        assert self.missing() == []


@given(MESSAGES, SIZES)
def test_without_transactions_each_message_is_safe_before_its_answer(messages, max_bytes):
    rsyslog = Rsyslog(max_bytes)
    rsyslog.hand_over(b"the first message of all")
    for message in messages:
        rsyslog.hand_over(message)

    assert rsyslog.safe == rsyslog.given


@given(st.lists(MESSAGES, max_size=5), SIZES)
@example([[COMMIT, BEGIN, b"a"], [b"b"]], 60)
@example([[COMMIT, b"a"], [BEGIN, BEGIN, b"b"]], 60)
@example([[]], 1)
def test_a_transaction_is_safe_before_its_end_is_answered(transactions, max_bytes):
    rsyslog = Rsyslog(max_bytes)
    for messages in transactions:
        rsyslog.commit(messages)


@given(st.lists(st.lists(ORDINARY, max_size=8), max_size=5))
def test_a_transaction_is_made_safe_as_one(transactions):
    rsyslog = Rsyslog()
    for messages in transactions:
        before = len(rsyslog.safe)
        rsyslog.commit(messages)

        assert rsyslog.safe[before:] == messages
    assert set(rsyslog.answers) <= {DEFER_COMMIT}


@given(st.lists(ORDINARY, max_size=8), SIZES)
def test_the_first_transaction_is_refused_whole_since_it_may_be_the_rest_of_one(messages, size):
    dialogue = Dialogue(size)
    turns = [dialogue.take(message) for message in [BEGIN, *messages, COMMIT]]

    assert [turn.messages for turn in turns] == [[]] * len(turns)
    assert [turn.answer for turn in turns[:-1]] == [OK, *[DEFER_COMMIT] * len(messages)]
    assert turns[-1].answer not in (OK, DEFER_COMMIT, b"PREVIOUS_COMMITTED")


@given(st.lists(ORDINARY, min_size=1, max_size=8))
def test_what_is_not_committed_is_never_made_safe(messages):
    dialogue = Dialogue(1 << 20)
    dialogue.take(BEGIN)

    assert [dialogue.take(message) for message in messages] == [([], DEFER_COMMIT)] * len(messages)


@pytest.mark.parametrize(
    ("max_bytes", "released"),
    [(1, [1, 1, 1, 1]), (5, [0, 0, 3, 0]), (6, [0, 0, 3, 0]), (7, [0, 0, 0, 4]), (9, [0] * 4)],
)
def test_of_a_large_transaction_no_more_is_held_than_allowed(max_bytes, released):
    dialogue = Dialogue(max_bytes)
    for mark in (BEGIN, COMMIT, BEGIN):
        dialogue.take(mark)
    turns = [dialogue.take(message) for message in (b"a", b"b", b"c", b"d")]

    assert [len(turn.messages) for turn in turns] == released
    assert {turn.answer for turn in turns} == {DEFER_COMMIT}
    assert dialogue.take(COMMIT) == ([b"a", b"b", b"c", b"d"][sum(released) :], OK)


def test_a_first_message_that_looks_like_the_mark_is_taken_for_it():
    # This is what cannot be told apart; a template that begins with a date rules it out.
    dialogue = Dialogue(1 << 20)

    assert dialogue.take(BEGIN) == ([], OK)
    assert dialogue.take(b"a") == ([], DEFER_COMMIT)


# Where rsyslog wants no answers.

LINES = st.lists(st.one_of(st.sampled_from([b"", b"a", *ALIKE[:-1]]), st.sampled_from([*MARKS])))


@given(LINES, st.lists(st.integers(0, 40)))
@example([BEGIN, BEGIN, BEGIN, BEGIN], [])
@example([b"a", COMMIT, COMMIT, b"b"], [])
@example([BEGIN, b"a", COMMIT, COMMIT, COMMIT], [2])
@example([BEGIN, b"", COMMIT, b"", b""], [1, 2, 3, 4])
@example([BEGIN, b""], [])
def test_marks_are_taken_out_wherever_the_blocks_are_cut(lines, cuts):
    marked = lines[:1] == [BEGIN]
    expected = [line for line in lines if not (marked and line in MARKS)]
    marks = MarkFilter()
    got = []
    edges = sorted({min(cut, len(lines)) for cut in cuts} | {0, len(lines)})
    for begin, end in itertools.pairwise(edges):
        block = marks.strip(b"\n".join(lines[begin:end]))
        assert (block is None) == (marked and not set(lines[begin:end]) - MARKS)
        got += [] if block is None else block.split(b"\n")

    assert got == expected


def test_no_mark_is_looked_for_in_blocks_without_one():
    marks = MarkFilter()
    marks.strip(BEGIN)
    block = b"a\n\nb"

    assert marks.strip(block) is block
