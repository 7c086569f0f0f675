"""The bounded queue against a plain list."""

from hypothesis import given
from hypothesis import strategies as st

from zmqpush.core.records.encode import Payload
from zmqpush.sender.queue import Queue
from zmqpush.settings import WhenFull

MAX_BYTES = 1000
payloads = st.lists(
    st.builds(lambda size, n: Payload(bytes(size), n), st.integers(1, 900), st.integers(1, 9))
)


@given(payloads, st.sampled_from([WhenFull.DROP_OLDEST, WhenFull.DROP_NEWEST]))
def test_what_is_put_is_kept_or_counted_as_dropped(values, policy):
    queue = Queue(MAX_BYTES, policy)
    for payload in values:
        queue.put(payload)
    waiting = queue.records
    kept = []
    while queue:
        kept.append(queue.get())

    assert waiting == sum(payload.records for payload in kept)
    assert waiting + queue.dropped == sum(payload.records for payload in values)
    assert queue.records == 0
    assert kept == [payload for payload in values if any(payload is k for k in kept)]
    assert sum(len(payload.data) for payload in kept[:-1]) <= MAX_BYTES
    if values and policy is WhenFull.DROP_OLDEST:
        assert kept[-1] is values[-1]


@given(payloads)
def test_block_keeps_everything_and_says_when_it_is_full(values):
    queue = Queue(MAX_BYTES, WhenFull.BLOCK)
    kept = []
    for payload in values:
        while queue.full:
            kept.append(queue.get())
        queue.put(payload)
    while queue:
        kept.append(queue.get())

    assert kept == values
    assert queue.dropped == 0
