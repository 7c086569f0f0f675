"""
Acknowledged delivery under everything that can happen between and to both ends.

Every record is a number. What is checked is where the numbers are: what a sender forgets
is in the durable sink of a receiver, no sink holds a number twice nor out of order, and
once the links are well everything arrives. Numbers of the protocol are never looked at.
"""

import os
import secrets
from collections import Counter
from itertools import count

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from zmqpush.core import delivery
from zmqpush.core.delivery import Receiver, Sender
from zmqpush.core.envelope import Payload
from zmqpush.core.frames import Data, decode
from zmqpush.queue import UnackedQueue, WhenFull

LONG = os.environ.get("ZMQPUSH_CHAOS") == "long"
SHORT_OR_LONG = settings(
    max_examples=5000 if LONG else 100,
    stateful_step_count=120 if LONG else 60,
    derandomize=not LONG,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
# Small limits are reached. A block has a few records of a few bytes.
CREDIT_BLOCKS, CREDIT_BYTES, MEMORY, QUEUE_BYTES = 3, 20, 30, 1000
# A refusal costs half a minute, and there may be one for each damaged frame in a row.
SETTLING_STEPS, STEP = 400, 0.5
MONTH = 31 * 86400.0


def numbers_of(block):
    return [int(line) for line in bytes(block.payload).split()] if isinstance(block, Data) else []


class Spool:
    """A durable store: what is synced survives a power cut, the ack floor may be older."""

    spooled = True

    def __init__(self, on_acked, blocks=(), floor=0, stream=None):
        self.on_acked = on_acked
        self.blocks = list(blocks)  # all that there ever were
        self.floor = floor
        self.synced = self.recovered = self.end
        self.stream = stream or secrets.token_hex(16)
        self.on_rename = lambda: None
        self.rewind()

    @property
    def end(self):
        return self.blocks[-1].end if self.blocks else 0

    @property
    def first(self):
        return self.floor + 1

    def put(self, payload):
        self.blocks.append(Data.of(self.end + 1, payload.records, payload.data))

    def sync(self):
        self.synced = self.end

    def take(self):
        for block in self.blocks:
            if self.cursor < block.end <= self.synced:
                self.cursor = block.end
                return block
        return None

    def rewind(self):
        self.cursor = self.floor

    def acknowledge(self, acked):
        self.on_acked(n for b in self.blocks if b.end <= acked for n in numbers_of(b))
        self.floor = max(self.floor, acked)
        self.cursor = max(self.floor, self.cursor)

    def rename_stream(self):
        self.stream = secrets.token_hex(16)
        self.on_rename()

    @property
    def unacked(self):
        return [n for b in self.blocks if b.end > self.floor for n in numbers_of(b)]


class Queue(UnackedQueue):
    """The queue in memory, watched."""

    def __init__(self, on_acked, when_full):
        super().__init__(QUEUE_BYTES, when_full)
        self.on_acked = on_acked
        self.on_rename = lambda: None
        self.put_numbers, self.acked_numbers = [], set()

    def put(self, payload):
        self.put_numbers += numbers_of(Data.of(1, payload.records, payload.data))
        super().put(payload)

    def acknowledge(self, acked):
        gone = [n for b in self._blocks if b.end <= acked for n in numbers_of(b)]
        self.on_acked(gone)
        self.acked_numbers |= set(gone)
        super().acknowledge(acked)

    def rename_stream(self):
        super().rename_stream()
        self.on_rename()

    @property
    def unacked(self):
        return [n for b in self._blocks for n in numbers_of(b)]

    @property
    def dropped_numbers(self):
        return set(self.put_numbers) - self.acked_numbers - set(self.unacked)


class Link:
    """A connection that delays, loses, repeats and damages what is on its way."""

    def __init__(self, node, peer):
        self.node = node
        self.peer = peer
        self.up, self.down = [], []

    def lose(self, way, at):
        if frames := getattr(self, way):
            del frames[at % len(frames)]

    def repeat(self, way, at, later):
        if frames := getattr(self, way):
            at %= len(frames)
            frames.insert(at + 1 + later, frames[at])

    def flip(self, way, at, bit):
        if frames := getattr(self, way):
            at %= len(frames)
            frame = bytearray(frames[at])
            bit %= 8 * len(frame)
            frame[bit // 8] ^= 1 << bit % 8
            frames[at] = bytes(frame)


class Process:
    """One life of a sender."""

    def __init__(self, name, store, node):
        self.name = name
        self.store = store
        self.node = node
        self.sender = Sender(store, secrets.token_hex(16), {"type": name, "host": ""})
        self.link = None
        self.dial_at = 0.0
        self.sent = set()
        self.twin = False  # another process may use the same stream


class Node:
    """A receiver with a sink and floors that change as one."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.floors = {}
        self.sink = []  # names of senders and numbers
        self.start()

    def start(self):
        self.receiver = Receiver(self.floors, MEMORY, "disk", self.tokens)
        self.arrivals = []
        self.writing = None

    def begin_commit(self):
        forgotten = self.receiver.take_forgotten()
        self.writing = (self.receiver.take_accepted(), self.arrivals, forgotten, False)
        self.arrivals = []


class Machine(RuleBasedStateMachine):
    """One receiver: nothing is lost, nothing twice, order is kept."""

    nodes_count = 1

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(delivery, "MAX_CREDIT_BLOCKS", CREDIT_BLOCKS)
        self.patch.setattr(delivery, "_MAX_CREDIT_BYTES", CREDIT_BYTES)
        self.now = 1000.0
        self.numbers, self.names, self.peers = count(1), count(1), count(1)
        tokens = count(0x123456789ABCDEF0, 0x9E3779B97F4A7C15)  # no bit makes one of another
        self.nodes = [Node(lambda: next(tokens) % (1 << 64)) for _ in range(self.nodes_count)]
        self.processes = []
        self.safe = Counter()  # in how many sinks, how often
        self.excused = Counter()  # how often more than once is documented
        self.last = {}  # by sink and sender
        self.lost = set()  # as documented

    @initialize(kinds=st.lists(st.sampled_from(["spool", *WhenFull]), min_size=1, max_size=2))
    def begin(self, kinds):
        for kind in kinds:
            self.start_process(kind)

    def start_process(self, kind):
        store = Spool(self.check_acked) if kind == "spool" else Queue(self.check_acked, kind)
        self.adopt(Process(str(next(self.names)), store, 0))

    def adopt(self, process):
        process.kind = getattr(process.store, "_when_full", "spool")
        process.store.on_rename = lambda: self.renamed(process)
        self.processes.append(process)
        self.dial(process)

    def dial(self, process):
        process.link = Link(process.node, b"%d" % next(self.peers))
        process.sender.connect(self.now)

    # What must hold.

    def check_acked(self, numbers):
        assert not [n for n in numbers if not self.safe[n]], "forgotten and in no sink"

    def renamed(self, process):
        raise AssertionError("a new name without a reason")

    def write(self, at, name, number):
        self.safe[number] += 1
        assert self.safe[number] <= 1 + self.excused[number], "twice"
        assert self.excused[number] or number > self.last.get((at, name), 0), "out of order"
        self.last[at, name] = max(number, self.last.get((at, name), 0))
        self.nodes[at].sink.append((name, number))

    @invariant()
    def bounds_hold(self):
        for process in self.processes:
            if process.kind != "spool":
                assert len(process.store.dropped_numbers) == process.store.dropped
        for node in self.nodes:
            receiver = node.receiver
            assert all(s.blocks <= CREDIT_BLOCKS for s in receiver._streams.values())
            assert receiver._granted <= MEMORY + receiver.sessions

    # Senders.

    def turn(self, process, frames=100):
        if process.link is None:
            if self.now >= process.dial_at:
                self.dial(process)
            return
        if redial := process.sender.tick(self.now):
            self.hang_up(process, redial)
            return
        for _ in range(frames):
            frame = process.sender.next_frame(self.now)
            if frame is None:
                return
            message, _ = decode(frame)
            process.sent |= set(numbers_of(message))
            process.link.up.append(frame)

    def hang_up(self, process, redial):
        process.link = None
        process.dial_at = self.now + redial.delay
        process.sender.disconnected(self.now)
        following = (process.node + 1) % len(self.nodes)
        if following != process.node:
            self.fails_over(process)
        process.node = following

    def fails_over(self, process):
        # At most what was in flight.
        self.excused.update(process.sent.intersection(process.store.unacked))

    def pick(self, at):
        return self.processes[at % len(self.processes)]

    @rule(at=st.integers(0, 3), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4))
    def produce(self, at, sizes):
        store = self.pick(at).store
        for size in sizes:
            if getattr(store, "full", False):
                return
            lines = [b"%d\n" % next(self.numbers) for _ in range(size)]
            store.put(Payload(b"".join(lines), size))

    @rule(at=st.integers(0, 3))
    def sync(self, at):
        if self.pick(at).kind == "spool":
            self.pick(at).store.sync()

    @rule(at=st.integers(0, 3), frames=st.integers(1, 5))
    def send(self, at, frames):
        self.turn(self.pick(at), frames)

    @rule(at=st.integers(0, 3), power=st.booleans(), rolled_back=st.integers(0, 5))
    def kill_sender(self, at, power, rolled_back):
        process = self.pick(at)
        if process.twin:
            return  # see test_two_users_of_a_spool_that_start_again
        self.processes.remove(process)
        if process.kind == "spool":
            store = process.store
            kept = [b for b in store.blocks if b.end <= store.synced or not power]
            self.lost |= {n for b in store.blocks if b not in kept for n in numbers_of(b)}
            floors = [0, *(b.end for b in store.blocks if b.end <= store.floor)]
            floor = floors[max(0, len(floors) - 1 - rolled_back)]
            self.rolls_back(store, floor)
            store = Spool(self.check_acked, kept, floor, store.stream)
            self.adopt(Process(process.name, store, 0))
        else:
            self.lost |= set(process.store.unacked) | process.store.dropped_numbers
            self.start_process(process.kind)

    def rolls_back(self, store, floor):
        pass  # the receiver knows

    @rule(at=st.integers(0, 3))
    def end_sender(self, at):
        process = self.pick(at)
        if process.store.unacked or process.link is None or process.twin:
            return
        if goodbye := process.sender.goodbye():
            process.link.up.append(goodbye)
        self.deliver_up(process, 100)
        self.kill_sender(at, False, 0)

    # Links.

    def deliver_up(self, process, frames):
        link = process.link
        if link is None:
            return
        node = self.nodes[link.node]
        for frame in link.up[:frames]:
            if arrival := node.receiver.receive(link.peer, frame, self.now):
                node.arrivals.append(arrival)
        del link.up[:frames]

    def deliver_down(self, process, frames):
        link = process.link
        if link is None:
            return
        for frame in link.down[:frames]:
            if redial := process.sender.receive(frame, self.now):
                self.hang_up(process, redial)
                return
        del link.down[:frames]

    def flush(self, node):
        links = {p.link.peer: p.link for p in self.processes if p.link}
        for peer, frame in node.receiver.take_replies():
            if peer in links:
                links[peer].down.append(frame)
            else:
                node.receiver.forget(peer)

    @rule(at=st.integers(0, 3), frames=st.integers(1, 9))
    def arrive_above(self, at, frames):
        self.deliver_up(self.pick(at), frames)

    @rule(at=st.integers(0, 3), frames=st.integers(1, 9))
    def arrive_below(self, at, frames):
        self.deliver_down(self.pick(at), frames)

    @rule(at=st.integers(0, 3))
    def go_well(self, at):
        self.round_trip(self.pick(at))

    def round_trip(self, process):
        self.turn(process)
        self.deliver_up(process, 100)
        for node in self.nodes:
            self.commit(node)
        self.deliver_down(process, 100)

    @rule(at=st.integers(0, 3), told=st.booleans())
    def cut(self, at, told):
        self.cut_link(self.pick(at), told)

    def cut_link(self, process, told):
        if process.link:
            process.link = Link(process.node, b"%d" % next(self.peers))
            if told:
                process.sender.disconnected(self.now)

    @rule(
        at=st.integers(0, 3),
        way=st.sampled_from(["up", "down"]),
        how=st.sampled_from(["lose", "repeat", "flip"]),
        frame=st.integers(0, 5),
        more=st.integers(0, 999),
    )
    def damage(self, at, way, how, frame, more):
        link = self.pick(at).link
        if link and how == "lose":
            link.lose(way, frame)
        elif link:
            getattr(link, how)(way, frame, more)

    # Receivers.

    def commit(self, node):
        if node.writing is None:
            node.begin_commit()
        self.make_durable(node)
        self.tell(node)

    def make_durable(self, node):
        if node.writing is None or node.writing[3]:
            return
        moved, arrivals, forgotten, _ = node.writing
        for key in forgotten:
            node.floors.pop(key, None)
        node.floors |= {progress.key: progress.floor for progress in moved}
        for labels, block in arrivals:
            for number in numbers_of(block):
                self.write(self.nodes.index(node), labels["type"], number)
        node.writing = (moved, [], [], True)

    def tell(self, node):
        if node.writing and node.writing[3]:
            node.receiver.committed(node.writing[0])
            node.writing = None
            self.flush(node)

    @rule(at=st.integers(0, 1))
    def begin_commit(self, at):
        node = self.nodes[at % len(self.nodes)]
        if node.writing is None:
            node.begin_commit()

    @rule(at=st.integers(0, 1))
    def end_commit(self, at):
        self.make_durable(self.nodes[at % len(self.nodes)])

    @rule(at=st.integers(0, 1))
    def acknowledge(self, at):
        self.tell(self.nodes[at % len(self.nodes)])

    @rule(at=st.integers(0, 1))
    def answer(self, at):
        self.flush(self.nodes[at % len(self.nodes)])

    @rule(at=st.integers(0, 1), gently=st.booleans(), told=st.booleans())
    def end_receiver(self, at, gently, told):
        node = self.nodes[at % len(self.nodes)]
        if gently:
            node.receiver.stop()
            self.commit(node)
            self.commit(node)
            links = {p.link.peer: p for p in self.processes if p.link}
            for peer, frame in node.receiver.goodbyes():
                if peer in links:
                    links[peer].link.down.append(frame)
                    self.deliver_down(links[peer], 1000)
        node.start()
        for process in self.processes:
            if process.node == self.nodes.index(node):
                self.cut_link(process, told)

    # Time.

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 2.0, 6.0, 16.0, 31.0]))
    def wait(self, seconds):
        self.now += seconds
        for node in self.nodes:
            node.receiver.tick(self.now)

    # In the end.

    def teardown(self):
        try:
            self.settle()
        finally:
            self.patch.undo()

    def settle(self):
        for _ in range(SETTLING_STEPS):
            self.now += STEP
            for process in self.processes:
                if process.kind == "spool":
                    process.store.sync()
                self.round_trip(process)
            for node in self.nodes:
                node.receiver.tick(self.now)
            if not any(process.store.unacked for process in self.processes):
                break
        else:
            raise AssertionError("it does not go on")
        dropped = set()
        for process in self.processes:
            if process.kind != "spool":
                dropped |= process.store.dropped_numbers
        made = set(range(1, next(self.numbers)))
        assert made - set(self.safe) <= self.lost | dropped, "lost"


class Disasters(Machine):
    """Two receivers, states that are deleted, spools that are copied: each has its price."""

    nodes_count = 2

    def renamed(self, process):
        assert process.twin, "a new name without a reason"
        process.twin = False
        # What it holds, once more.
        self.excused.update(process.store.unacked)

    def rolls_back(self, store, floor):
        # Of the receiver that takes it now, the state may be gone or another one.
        again = (n for b in store.blocks if floor < b.end <= store.floor for n in numbers_of(b))
        self.excused.update(again)

    @rule(at=st.integers(0, 1))
    def delete_state(self, at):
        node = self.nodes[at % len(self.nodes)]
        node.floors = {}
        node.start()
        for process in self.processes:
            # What the sender has not seen acknowledged.
            self.excused.update(process.store.unacked)
            if process.node == self.nodes.index(node):
                self.cut_link(process, told=True)

    @rule()
    def wait_for_a_month(self):
        for process in self.processes:
            self.excused.update(process.store.unacked)
        self.wait(MONTH)

    @precondition(lambda self: len(self.processes) < 4)
    @rule(at=st.integers(0, 3))
    def copy_the_spool(self, at):
        original = self.pick(at)
        if original.kind != "spool" or original.twin:
            return  # see test_two_users_of_a_spool_that_start_again
        self.excused.update(original.store.unacked)
        store = original.store
        copy = Spool(self.check_acked, store.blocks, store.floor, store.stream)
        clone = Process(str(next(self.names)), copy, 0)
        clone.twin = original.twin = True
        self.adopt(clone)


@pytest.mark.parametrize("machine", [Machine, Disasters])
def test_delivery(machine):
    run_state_machine_as_test(machine, settings=SHORT_OR_LONG)
