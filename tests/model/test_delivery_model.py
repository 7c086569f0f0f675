"""
Acknowledged delivery under everything that can happen between and to both ends.

Every record is a number. What is checked is where the numbers are: what a sender forgets
is in the durable sink of a receiver, no sink holds a number twice, out of order or under the
labels of another run, and once the links are well everything arrives. Numbers of the
protocol are never looked at.
"""

import os
import secrets
from collections import Counter
from itertools import count
from random import Random

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

from zmqpush.core.held import HeldRecords
from zmqpush.core.protocol import receiver, sender
from zmqpush.core.protocol.messages import Data, Labels, decode
from zmqpush.core.protocol.receiver import Receiver
from zmqpush.core.protocol.sender import Sender
from zmqpush.core.records.encode import Payload
from zmqpush.sender.unacked_queue import UnackedQueue
from zmqpush.settings import WhenFull

LONG = os.environ.get("ZMQPUSH_CHAOS") == "long"
SHORT_OR_LONG = settings(
    max_examples=10_000 if LONG else 250,
    stateful_step_count=60 if LONG else 30,
    derandomize=not LONG,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
# Small limits are reached. A block has a few records of a few bytes.
CREDIT_BLOCKS, CREDIT_BYTES, MEMORY, QUEUE_BYTES = 3, 20, 30, 1000
# A refusal costs half a minute, and there may be one for each damaged frame in a row.
SETTLING_STEPS, STEP = 400, 0.5
MONTH = 31 * 86400.0


TRAFFIC = (
    *("produce", "sync", "begin to commit", "commit", "acknowledge", "answer", "all of it"),
    "write a part",
    *("send", "arrive above", "arrive below", "damage") * 2,
)


def numbers_of(block):
    return [int(line) for line in bytes(block.payload).split()] if isinstance(block, Data) else []


class Spool:
    """A durable store: what is synced survives a power cut, the ack floor may be older."""

    spooled = True
    was = ""

    def __init__(self, on_acked, labels, blocks=(), floor=0, secret=None, labelled=()):
        self.on_acked = on_acked
        self.labels = labels
        self.blocks = list(blocks)  # all that there ever were
        self.labelled = dict(labelled)  # by the first number of each: its labels
        self.floor = floor
        self.synced = self.recovered = self.end
        self.secret = secret or secrets.token_hex(16)
        self.on_rename = lambda: None
        self.rewind()

    @property
    def end(self):
        return self.blocks[-1].end if self.blocks else 0

    @property
    def first(self):
        return self.floor + 1

    def put(self, payload):
        self.labelled[self.end + 1] = self.labels
        self.blocks.append(Data.of(self.end + 1, payload.records, payload.data))

    def sync(self):
        self.synced = self.end

    @property
    def next(self):
        blocks = (b for b in self.blocks if self.cursor < b.end <= self.synced)
        return next(blocks, None)

    @property
    def next_labels(self):
        return self.labelled[self.next.first] if self.next else None

    def take(self):
        block = self.next
        self.cursor = block.end if block else self.cursor
        return block

    def rewind(self):
        self.cursor = self.floor

    def acknowledge(self, acked):
        self.on_acked(n for b in self.blocks if b.end <= acked for n in numbers_of(b))
        self.floor = max(self.floor, acked)
        self.cursor = max(self.floor, self.cursor)

    def rename_stream(self):
        self.secret = secrets.token_hex(16)
        self.on_rename()

    @property
    def unacked(self):
        return [n for b in self.blocks if b.end > self.floor for n in numbers_of(b)]


class Queue(UnackedQueue):
    """The queue in memory, watched."""

    def __init__(self, on_acked, labels, when_full):
        self.on_rename = lambda: None
        super().__init__(QUEUE_BYTES, when_full, labels)
        self.on_acked = on_acked
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
    """A connection, and what is on its way."""

    def __init__(self, node, peer):
        self.node = node
        self.peer = peer
        self.up, self.down = [], []


def damage(frames, how, random):
    at = random.randrange(len(frames))
    if how == "lose":
        del frames[at]
    elif how == "repeat":
        frames.insert(random.randint(at, len(frames)), frames[at])
    else:
        bit = random.randrange(8 * len(frames[at]))
        frame = bytearray(frames[at])
        frame[bit // 8] ^= 1 << bit % 8
        frames[at] = bytes(frame)


class Process:
    """One life of a sender, and what was sent in all of them."""

    def __init__(self, name, store, sent=()):
        self.name = name
        self.store = store
        self.node = 0
        self.sender = Sender(store, secrets.token_hex(16))
        self.link = None
        self.dial_at = 0.0
        self.sent = set(sent)
        self.twin = False  # another process may use the same stream


class Node:
    """A receiver with a sink and floors, which change as one if the sink is no engine."""

    def __init__(self, tokens, engine=False):
        self.tokens = tokens
        self.engine = engine
        self.floors = {}
        self.sink = []  # names of senders and numbers
        self.tail = HeldRecords()  # what is in the engine and not acknowledged
        self.start()

    def start(self):
        self.receiver = Receiver(self.floors, MEMORY, "disk", self.tokens)
        self.arrivals = []
        self.writing = None

    def begin_commit(self):
        forgotten = self.receiver.take_forgotten()
        records = []
        for (_, stream), labels, block, _ in self.arrivals:
            numbers = numbers_of(block)
            for first, missing in self.tail.missing(stream, block.first, block.records):
                records += [
                    (stream, seq, labels["type"], numbers[seq - block.first])
                    for seq in range(first, first + missing)
                ]
        self.writing = (self.receiver.take_accepted(), records, forgotten, False)
        self.arrivals = []


def after_traffic(**strategies):
    """Make a rule of a method, which is called after some traffic that a seed chooses."""

    def decorate(act):
        def run(self, seed, **drawn):
            self.steps += 1
            self.traffic(Random(seed + self.steps))
            act(self, **drawn)

        run.__name__ = act.__name__
        return rule(seed=st.integers(0, 1 << 32), **strategies)(run)

    return decorate


class Machine(RuleBasedStateMachine):
    """One receiver: nothing is lost, nothing twice, order is kept."""

    nodes_count = 1
    engine = False

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        for module in (sender, receiver):
            self.patch.setattr(module, "MAX_CREDIT_BLOCKS", CREDIT_BLOCKS)
            self.patch.setattr(module, "MAX_CREDIT_BYTES", CREDIT_BYTES)
        self.now = 1000.0
        self.steps = 0
        self.numbers, self.names, self.peers, self.runs = (count(1) for _ in range(4))
        self.made = {}  # number: the type that its run gives it
        tokens = count(0x123456789ABCDEF0, 0x9E3779B97F4A7C15)  # no bit makes one of another
        self.nodes = [
            Node(lambda: next(tokens) % (1 << 64), self.engine) for _ in range(self.nodes_count)
        ]
        self.processes = []
        self.safe = Counter()  # in how many sinks, how often
        self.excused = Counter()  # how often more than once is documented
        self.last = {}  # by sink and sender
        self.lost = set()  # as documented

    @initialize(
        kinds=st.lists(st.sampled_from(["spool", *WhenFull]), min_size=1, max_size=2),
        damages=st.sets(st.sampled_from(["lose", "repeat", "flip"])),
    )
    def begin(self, kinds, damages):
        self.damages = sorted(damages)
        for kind in kinds:
            self.start_process(kind)

    def start_process(self, kind):
        name = str(next(self.names))
        if kind == "spool":
            store = Spool(self.check_acked, self.label(name))
        else:
            store = Queue(self.check_acked, self.label(name), kind)
        self.adopt(Process(name, store))

    def label(self, name):
        return Labels(f"{name}/{next(self.runs)}")

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

    def write(self, at, kind, number):
        assert kind == self.made[number], "under the labels of another run"
        name = kind.split("/")[0]
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
            assert all(len(s.pending) <= CREDIT_BLOCKS for s in receiver._streams.values())
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
        self.goes_to(process, (process.node + 1) % len(self.nodes))

    def goes_to(self, process, node):
        if node != process.node:
            # To another receiver go again at most what was in flight.
            self.excused.update(process.sent.intersection(process.store.unacked))
        process.node = node

    def pick(self, at):
        return self.processes[at % len(self.processes)]

    def produce(self, store, sizes):
        for size in sizes:
            if getattr(store, "full", False):
                return
            numbers = [next(self.numbers) for _ in range(size)]
            self.made |= dict.fromkeys(numbers, store.labels.type)
            lines = [b"%d\n" % number for number in numbers]
            store.put(Payload(b"".join(lines), size))

    @after_traffic(at=st.integers(0, 3), power=st.booleans(), rolled_back=st.integers(0, 5))
    def kill_sender(self, at, power, rolled_back):
        process = self.pick(at)
        if not process.twin:  # see test_two_users_of_a_spool_that_start_again
            self.replace(process, power, rolled_back)

    def replace(self, process, power, rolled_back):
        self.processes.remove(process)
        if process.kind == "spool":
            store = process.store
            kept = [b for b in store.blocks if b.end <= store.synced or not power]
            self.lost |= {n for b in store.blocks if b not in kept for n in numbers_of(b)}
            floors = [0, *(b.end for b in store.blocks if b.end <= store.floor)]
            floor = floors[max(0, len(floors) - 1 - rolled_back)]
            self.rolls_back(store, floor)
            self.goes_to(process, 0)
            labels = self.label(process.name)
            store = Spool(self.check_acked, labels, kept, floor, store.secret, store.labelled)
            self.adopt(Process(process.name, store, process.sent))
        else:
            self.lost |= set(process.store.unacked) | process.store.dropped_numbers
            self.start_process(process.kind)

    def rolls_back(self, store, floor):
        pass  # the receiver knows

    @after_traffic(at=st.integers(0, 3))
    def end_sender(self, at):
        process = self.pick(at)
        for _ in range(3):
            self.round_trip(process)
        if process.store.unacked or process.link is None or process.twin:
            return
        if goodbye := process.sender.goodbye():
            process.link.up.append(goodbye)
        self.deliver_up(process, 100)
        self.replace(process, power=False, rolled_back=0)

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

    def traffic(self, random):
        for _ in range(random.randint(1, 15)):
            process, node = random.choice(self.processes), random.choice(self.nodes)
            match random.choice(TRAFFIC):
                case "produce":
                    self.produce(process.store, random.choices((1, 2, 3), k=random.randint(1, 4)))
                case "sync" if process.kind == "spool":
                    process.store.sync()
                case "send":
                    self.turn(process, random.randint(1, 5))
                case "arrive above":
                    self.deliver_up(process, random.randint(1, 5))
                case "arrive below":
                    self.deliver_down(process, random.randint(1, 5))
                case "begin to commit" if node.writing is None:
                    node.begin_commit()
                case "write a part" if node.engine and node.writing:
                    self.write_records(node, random.randint(1, 3))
                case "commit":
                    self.make_durable(node)
                case "acknowledge":
                    self.tell(node)
                case "answer":
                    self.flush(node)
                case "all of it":
                    self.round_trip(process)
                case "damage" if process.link and self.damages:
                    way = random.choice((process.link.up, process.link.down))
                    if way:
                        damage(way, random.choice(self.damages), random)

    @after_traffic()
    def nothing_happens(self):
        pass

    def round_trip(self, process):
        self.turn(process)
        self.deliver_up(process, 100)
        for node in self.nodes:
            self.commit(node)
        self.deliver_down(process, 100)

    @after_traffic(at=st.integers(0, 3), told=st.booleans())
    def cut(self, at, told):
        self.cut_link(self.pick(at), told)

    def cut_link(self, process, told):
        if process.link:
            process.link = Link(process.node, b"%d" % next(self.peers))
            if told:
                process.sender.disconnected(self.now)

    # Receivers.

    def commit(self, node):
        if node.writing is None:
            node.begin_commit()
        self.make_durable(node)
        self.tell(node)

    def make_durable(self, node):
        if node.writing is None or node.writing[3]:
            return
        moved, records, forgotten, _ = node.writing
        self.write_records(node, len(records))
        for key in forgotten:
            node.floors.pop(key, None)
        node.floors |= {progress.key: progress.floor for progress in moved}
        for (_, stream), (acked, _) in moved:
            if stream in node.tail and node.tail.ends_by(stream, acked):
                node.tail.forget(stream)
        node.writing = (moved, [], [], True)

    def write_records(self, node, most):
        records = node.writing[1]
        for stream, seq, kind, number in records[:most]:
            self.write(self.nodes.index(node), kind, number)
            node.tail.add(stream, seq, 1)
        del records[:most]

    def tell(self, node):
        if node.writing and node.writing[3]:
            node.receiver.committed(node.writing[0])
            node.writing = None
            self.flush(node)

    @after_traffic(at=st.integers(0, 1), gently=st.booleans(), told=st.booleans())
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

    @after_traffic(seconds=st.sampled_from([0.1, 0.5, 1.0, 2.0, 6.0, 16.0, 31.0]))
    def wait(self, seconds):
        self.pass_time(seconds)

    def pass_time(self, seconds):
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


class Engine(Machine):
    """The sink has some of what is not remembered yet when its receiver dies."""

    engine = True

    @after_traffic(produced=st.integers(1, 3), records=st.integers(0, 5), told=st.booleans())
    def die_while_writing(self, produced, records, told):
        (node,) = self.nodes
        for process in self.processes:
            self.produce(process.store, [produced] * produced)
            if process.kind == "spool":
                process.store.sync()
            self.turn(process)
            self.deliver_up(process, 100)
        if node.writing is None:
            node.begin_commit()
        if not node.writing[3]:
            self.write_records(node, records)
        node.start()
        for process in self.processes:
            self.cut_link(process, told)


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

    @after_traffic(at=st.integers(0, 1))
    def delete_state(self, at):
        node = self.nodes[at % len(self.nodes)]
        node.floors = {}
        node.start()
        for process in self.processes:
            # What the sender has not seen acknowledged.
            self.excused.update(process.store.unacked)
            if process.node == self.nodes.index(node):
                self.cut_link(process, told=True)

    @after_traffic()
    def wait_for_a_month(self):
        for process in self.processes:
            self.excused.update(process.store.unacked)
        self.pass_time(MONTH)

    @precondition(lambda self: len(self.processes) < 4)
    @after_traffic(at=st.integers(0, 3))
    def copy_the_spool(self, at):
        original = self.pick(at)
        if original.kind != "spool" or original.twin:
            return  # see test_two_users_of_a_spool_that_start_again
        self.excused.update(original.store.unacked)
        store = original.store
        name = str(next(self.names))
        held = store.blocks, store.floor, store.secret, store.labelled
        clone = Process(name, Spool(self.check_acked, self.label(name), *held))
        clone.twin = original.twin = True
        self.adopt(clone)


@pytest.mark.xfail(strict=True, reason="docs/protocol.md: a copied file system that starts again")
def test_two_users_of_a_spool_that_start_again():
    """A copy that numbers its own records, and starts again before it meets the receiver."""
    it = Disasters()
    try:
        it.begin(["spool"], set())
        (original,) = it.processes
        it.copy_the_spool(at=0, seed=0)
        copy = it.processes[1]
        for process in (original, copy):
            it.produce(process.store, [1])
            process.store.sync()
        it.replace(copy, power=False, rolled_back=0)
        while original.store.unacked:
            it.round_trip(original)
        it.settle()
    finally:
        it.patch.undo()


@pytest.mark.parametrize("machine", [Machine, Engine, Disasters])
def test_delivery(machine):
    run_state_machine_as_test(machine, settings=SHORT_OR_LONG)
