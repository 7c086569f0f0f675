"""Which records of a stream are held, next to a set of their numbers."""

from hypothesis import given
from hypothesis import strategies as st

from zmqpush.core.held import HeldRecords

RANGES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 8)))


def numbers(ranges):
    return [number for first, records in ranges for number in range(first, first + records)]


@given(RANGES, st.integers(1, 40), st.integers(1, 10))
def test_what_is_missing_is_what_is_not_held(added, first, records):
    held = HeldRecords()
    for begin, count in added:
        held.add("x", begin, count)
    wanted = range(first, first + records)
    missing = held.missing("x", first, records)

    assert numbers(missing) == [n for n in wanted if n not in numbers(added)]
    assert all(count > 0 for _, count in missing)
    assert held.missing("y", first, records) == [(first, records)]
    assert held.ends_by("x", first) == (max(numbers(added), default=0) <= first)


@given(RANGES.filter(bool))
def test_what_is_held_is_remembered_as_text(added):
    held, again = HeldRecords(), HeldRecords()
    for begin, count in added:
        held.add("x", begin, count)
    again.add_text("x", held.to_text("x"))

    assert again.to_text("x") == held.to_text("x")
    assert again.missing("x", 1, 50) == held.missing("x", 1, 50)
    again.forget("x")
    assert not again
    assert "x" not in again
    assert "x" in held
