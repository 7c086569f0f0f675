"""Holes against a dictionary."""

from hypothesis import given
from hypothesis import strategies as st

from zmqpush.core.holes import Holes

NUMBERS = st.integers(1, 30)
RANGES = st.tuples(NUMBERS, NUMBERS).map(sorted)


@given(st.lists(st.tuples(RANGES, st.integers(0, 3))), RANGES)
def test_a_hole_is_what_was_added_last_and_not_clipped(steps, window):
    holes, expected = Holes(), {}
    for (first, last), reason in steps:
        if reason:
            holes.add(first, last, reason)
            expected |= dict.fromkeys(range(first, last + 1), reason)
        else:
            holes.clip(first, last)
            expected = {n: why for n, why in expected.items() if first <= n <= last}
    found = {}
    number = 1
    while hole := holes.find(number):
        # Neighbours are one.
        assert found.get(hole.first - 1) != hole.reason
        found |= dict.fromkeys(range(hole.first, hole.end + 1), hole.reason)
        number = hole.end + 1
    first, last = window

    assert found == expected
    assert holes.present(first, last) == sum(n not in expected for n in range(first, last + 1))
