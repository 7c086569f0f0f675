"""The spool against a list, whatever is done to it and in whatever order."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from spools import HEADER_BYTES, Receiver, account, numbers_in, open_spool
from zmqpush.core.protocol.messages import DAMAGED, Data
from zmqpush.core.records.encode import Payload
from zmqpush.settings import Sync, WhenFull

LONG = os.environ.get("ZMQPUSH_CHAOS") == "long"


class SpoolModel(RuleBasedStateMachine):
    """
    What was put, as numbers in the payloads, and a receiver that gets it.

    Attributes:
        expected: The numbers that are to arrive, or to be dropped by policy.
        meanings: What was handed out under each sequence number; 0 for a skip.
        dropped: How many records, in earlier runs.
        failing: Nothing was synced since the last failure.
        synced: The last number that may be sent.

    """

    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.slot = self.directory / "0"
        self.expected = []
        self.last = self.dropped = 0
        self.meanings = {}
        self.receiver = Receiver()
        self.spool = None

    def teardown(self):
        if self.spool:
            self.check_everything_arrives()
            self.spool.close()
        shutil.rmtree(self.directory)

    @initialize(
        policy=st.sampled_from(WhenFull),
        sync=st.sampled_from(Sync),
        max_bytes=st.sampled_from([600 + 4 * HEADER_BYTES, 1500 + 8 * HEADER_BYTES, 1 << 20]),
    )
    def begin(self, policy, sync, max_bytes):
        self.policy, self.off = policy, sync is Sync.OFF
        self.options = {"when_full": policy, "sync": sync, "max_bytes": max_bytes}
        self.open()

    def open(self):
        self.spool = open_spool(self.slot, **self.options)
        self.came = self.spool.records
        self.job = None
        self.failing = False
        self.synced = self.spool.recovered
        assert self.spool.recovered >= max(self.meanings, default=0)
        if self.policy is WhenFull.DROP_OLDEST:  # and at the front it is forgotten
            self.receiver.end = max(self.receiver.end, self.spool.first - 1)
        assert self.spool.first - 1 <= self.receiver.end

    @rule(
        sizes=st.lists(st.integers(2, 120), min_size=1, max_size=4),
        failure=st.sampled_from([0, 0, 0, errno.ENOSPC, errno.EIO]),
    )
    def put(self, sizes, failure):
        if self.spool.full:
            return
        numbers = range(self.last + 1, self.last + 1 + len(sizes))
        self.last += len(sizes)
        self.expected += numbers
        self.came += len(sizes)
        lines = [b"%0*d\n" % (size, n) for size, n in zip(sizes, numbers, strict=True)]
        with self.failing_once(failure):
            self.spool.put(Payload(b"".join(lines), len(lines)))

    @contextlib.contextmanager
    def failing_once(self, failure):
        if not failure or (failure == errno.EIO and self.failing):
            yield
            return
        real = os.pwritev
        left = [OSError(failure, os.strerror(failure))]

        def pwritev(*args):
            if left:
                self.failing |= failure == errno.EIO and not self.off
                raise left.pop()
            return real(*args)

        with mock.patch("os.pwritev", pwritev):
            yield

    @precondition(lambda self: self.job is None and not self.off)
    @rule()
    def begin_sync(self):
        self.job = self.spool.begin_sync()

    @precondition(lambda self: self.job is not None)
    @rule(fails=st.sampled_from([False, False, True]))
    def end_sync(self, fails):
        job, self.job = self.job, None
        given_up = job.given_up
        failure = None
        if fails and not self.failing:
            failure = OSError(errno.EIO, "broken")
        else:
            job.run()
        self.spool.end_sync(job, failure)
        if not given_up:
            self.failing = bool(failure) and not self.off
            self.synced = self.synced if failure else job.end

    @rule(count=st.integers(1, 8))
    def take(self, count):
        for _ in range(count):
            entry = self.spool.take()
            if entry is None:
                return
            assert self.off or entry.end <= self.synced
            if isinstance(entry, Data):
                meaning = numbers_in(entry)
            else:
                assert self.policy is WhenFull.DROP_OLDEST
                meaning = [0] * entry.records
            for number, record in enumerate(meaning, entry.first):
                # It may be dropped later, but never mean another record.
                assert record in (self.meanings.get(number, record), 0)
                self.meanings[number] = record
            self.receiver.accept(entry)

    @rule(share=st.floats(0, 1))
    def acknowledge(self, share):
        first = self.spool.first
        acked = first - 1 + round(share * (self.receiver.end - first + 1))
        self.spool.acknowledge(acked)
        assert self.spool.first == acked + 1

    @rule()
    def rewind(self):
        self.spool.rewind()

    @rule()
    def retry(self):
        self.spool.retry()

    @rule()
    def unlink_removable(self):
        self.spool.unlink_removable()

    @rule()
    def rename_stream(self):
        before = self.spool.secret
        self.spool.rename_stream()
        assert self.spool.secret != before

    @rule()
    def close_and_reopen(self):
        self.spool.close()
        first = self.spool.first
        self.reopen()
        assert self.spool.first >= first

    @rule()
    def crash_and_reopen(self):
        # As by kill -9: what was written is still in the page cache.
        after = self.directory / "after"
        shutil.copytree(self.slot, after)
        held = self.spool.unsafe
        self.spool.close()
        shutil.rmtree(self.slot)
        after.rename(self.slot)
        # It is the same slot, not a copy.
        meta = json.loads((self.slot / "meta").read_bytes())
        meta["inode"] = self.slot.stat().st_ino
        (self.slot / "meta").write_text(json.dumps(meta))
        self.reopen(held)

    def reopen(self, held=None):
        before = self.spool
        held = before.unsafe if held is None else held
        if held:
            del self.expected[-held:]
        self.dropped += before.dropped
        self.open()
        assert self.spool.secret == before.secret

    @invariant()
    def every_record_is_accounted_for(self):
        if self.spool:
            assert account(self.spool) == self.came

    @invariant()
    def records_come_in_order(self):
        assert self.receiver.numbers == sorted(set(self.receiver.numbers))

    def check_everything_arrives(self):
        """Let the spool work on until nothing is left, and compare what came with the list."""
        if self.job:
            self.end_sync(fails=False)
        while self.spool.records:
            self.spool.retry()
            if not self.off:
                self.begin_sync()
                self.end_sync(fails=False)
            self.spool.acknowledge(self.receiver.end)
            self.take(1000)
            self.spool.acknowledge(self.receiver.end)
        self.every_record_is_accounted_for()
        self.dropped += self.spool.dropped
        numbers = self.receiver.numbers
        if self.policy is WhenFull.BLOCK:
            assert (numbers, self.dropped) == (self.expected, 0)
        elif self.policy is WhenFull.DROP_NEWEST:
            assert set(numbers) <= set(self.expected)
            assert len(numbers) + self.dropped == len(self.expected)
        else:
            assert set(numbers) <= set(self.expected)
            # What was delivered, not yet acknowledged and sent anew may be dropped, too.
            assert len(numbers) + self.dropped >= len(self.expected)
        if self.policy is not WhenFull.DROP_OLDEST:
            assert self.spool.damaged == self.receiver.skipped[DAMAGED] == 0


TestSpoolModel = SpoolModel.TestCase
TestSpoolModel.settings = settings(
    max_examples=5000 if LONG else 150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
