"""
Simulate a fleet: 100,000 acknowledged senders, several receivers, and what can happen to them.

Usage: python bench/fleet.py [--senders N] [--receivers N] [--lines N] [--seed N] [--smoke]

Discrete events; nothing is sent. Senders do what src/zmqpush/sender/acked.py and
core/protocol/sender.py do: the order of their receivers, patience, reconnection, GOODBYE, ERROR.
A receiver is a bounded queue of connections that come, a rate of handshakes, and a rate of records
that its sessions share evenly, as those that are behind do (docs/performance.md: Jain's index
0.99). A HELLO is answered within its 2 s here, so none is repeated. A sender writes a block a
second. Prints the table of docs/scaling.md; the same seed gives the same table.
"""

import argparse
import gc
import random
from collections import Counter
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from multiprocessing import Pool

# src/zmqpush/sender/acked.py, core/protocol/
PATIENCE, PATIENCE_OF_SEVERAL, MAX_PATIENCE = 8.0, 2.0, 10.0
SILENCE = 15.0  # 3 pings
REFUSED_DELAY = 30.0
# src/zmqpush/transport/; the kernel sends a SYN again after 1 and 3 s
RECONNECT, MAX_RECONNECT, CONNECT_TIMEOUT = 0.05, 2.0, 5.0  # the first: up to twice as much
SYN_AGAIN = (1.0, 3.0)
BACKLOG = 1024
CONNECTIONS = 65536 - 600  # contrib/systemd/zmqpull.service, less the spare ones
# docs/security.md: half a millisecond each; bench/senders.py: 1,000 in 0.34 s without keys
HANDSHAKES = 2000.0
# bench/senders.py: 0.77 M records/s in blocks of 100, 26,000 blocks/s of one record;
# docs/performance.md: 0.86 of that with keys
BLOCK_SECONDS, RECORD_SECONDS, WITH_KEYS = 39e-6, 0.9e-6, 0.86
# docs/performance.md: idle, a connection; 164 bytes a record; half of --memory is credit
IDLE_BYTES, SESSION_BYTES, RECORD_BYTES, MEMORY_BYTES = 30 << 20, 40 << 10, 164, 256 << 20


@dataclass(slots=True, eq=False)
class Sender:
    """A sender; ``turn`` changes with each socket and session, and outdates older events."""

    order: tuple[int, ...]
    patience: float
    place: int = 0  # in the order
    turn: int = 0
    give_up_at: float = 0.0
    wait: float = 0.0  # before libzmq connects again
    backlog: float = 0.0  # when the last session ended, in records
    since: float = 0.0
    in_flight: float = 0.0  # then, at most
    last: int = -1
    refused: dict[int, float] = field(default_factory=dict)

    @property
    def receiver(self) -> int:
        """The number of the one that it connects to."""
        return self.order[self.place]


@dataclass(slots=True, eq=False)
class Cohort:
    """Sessions that have the same backlog: ``mark`` less the receiver's level."""

    size: int = 0
    mark: float = 0.0
    within: "Cohort | None" = None

    def find(self) -> "Cohort":
        """Return the cohort that this one has become part of."""
        cohort = self
        while cohort.within:
            cohort = cohort.within
        return cohort


class Receiver:
    """A receiver; ``level`` is how much each session that is behind has caught up."""

    def __init__(self, capacity: float, lines: float) -> None:
        self.capacity, self.lines = capacity, lines
        self.outages: list[tuple[float, float, bool]] = []  # from, to, silent
        self.refuses = False
        self.life = self.queue = self.most = 0
        self.free_at = self.now = self.level = self.stored = 0.0
        self.sessions: dict[Sender, Cohort] = {}
        self.caught_up = Cohort()
        self.behind: list[tuple[float, int, Cohort]] = []
        self.ticket = count()
        self.sizes, self.marks = 0, 0.0  # of those behind: how many, the sum of their marks
        self.connects: Counter[int] = Counter()
        self.handshakes: Counter[int] = Counter()

    def outage(self, now: float) -> tuple[float, bool] | None:
        """Return until when it is down, and whether it is silent then; None if it is up."""
        for begin, end, silent in self.outages:
            if begin <= now < end:
                return end, silent
        return None

    @property
    def backlog(self) -> float:
        """How many records wait at its senders."""
        return self.marks - self.sizes * self.level if self.sizes else 0.0

    def _push(self, cohort: Cohort) -> None:
        heappush(self.behind, (cohort.mark, next(self.ticket), cohort))
        self.sizes += cohort.size
        self.marks += cohort.size * cohort.mark

    def advance(self, now: float) -> None:
        """Take what the sessions send until ``now``."""
        while self.now < now:
            demand = len(self.sessions) * self.lines
            if demand > self.capacity and self.caught_up.size:
                self.caught_up.mark = self.level
                self._push(self.caught_up)
                self.caught_up = Cohort()
            step = now - self.now
            while self.behind and not self.behind[0][2].size:
                heappop(self.behind)
            if not self.sizes:
                self.stored += demand * step
                self.now = now
                return
            speed = (self.capacity - demand) / self.sizes
            top = self.behind[0][0]
            if speed * step < top - self.level:
                self.level += speed * step
                self.now = now
            else:
                step = (top - self.level) / speed
                self.level, self.now = top, self.now + step
                cohort = heappop(self.behind)[2]
                self.sizes -= cohort.size
                self.marks -= cohort.size * cohort.mark
                self.caught_up.size += cohort.size
                cohort.within = self.caught_up
            self.stored += self.capacity * step

    def join(self, sender: Sender, backlog: float) -> None:
        """Begin a session."""
        cohort = self.caught_up
        if backlog > 0:
            cohort = Cohort(1, self.level + backlog)
            self._push(cohort)
        else:
            cohort.size += 1
        self.sessions[sender] = cohort
        self.most = max(self.most, len(self.sessions))

    def leave(self, sender: Sender) -> float:
        """End a session; return what the sender still holds."""
        cohort = self.sessions.pop(sender).find()
        cohort.size -= 1
        if cohort is self.caught_up:
            return 0.0
        self.sizes -= 1
        self.marks -= cohort.mark
        return max(0.0, cohort.mark - self.level)


class Fleet:
    """Senders, receivers, and the events to come."""

    def __init__(self, senders: int, receivers: int, lines: float, seed: int, spread: bool) -> None:
        self.random = random.Random(seed)
        self.lines = lines
        capacity = WITH_KEYS / (BLOCK_SECONDS / max(1.0, lines) + RECORD_SECONDS)
        self.receivers = [Receiver(capacity, lines) for _ in range(receivers)]
        self.first_patience = PATIENCE if receivers == 1 else PATIENCE_OF_SEVERAL
        numbers = list(range(receivers))
        draw = self.random.sample if spread else lambda numbers, _: numbers
        orders = (tuple(draw(numbers, receivers)) for _ in range(senders))
        self.senders = [Sender(order, self.first_patience) for order in orders]
        self.events: list[tuple[float, int, object, tuple[object, ...]]] = []
        self.ticket = count()
        # Of senders without a session: how many, and what they hold beside rate x time.
        self.adrift, self.adrift_records = senders, 0.0
        self.repeated = self.peak = self.now = 0.0
        self.whole_at = self.drained_at = 0.0

    def at(self, when: float, what: object, *args: object) -> None:
        """Call something then."""
        heappush(self.events, (when, next(self.ticket), what, args))

    def _ended(self, sender: Sender, receiver: Receiver, safe: bool) -> None:
        sender.backlog = receiver.leave(sender)
        # A block at least; what more is in flight the credit bounds.
        share = MEMORY_BYTES / 2 / (len(receiver.sessions) + 1) / RECORD_BYTES
        sender.in_flight = 0.0 if safe else max(self.lines, min(share, sender.backlog))
        sender.since, sender.last = self.now, sender.receiver
        sender.turn += 1
        self.adrift += 1
        self.adrift_records += sender.backlog - self.lines * self.now

    def dial(self, sender: Sender) -> None:
        """Make a new socket, as AckedOutlet does."""
        now, draw = self.now, self.random.random
        while True:  # until there is a receiver that hears it
            sender.turn += 1
            sender.wait = RECONNECT * (1 + draw())
            sender.give_up_at = now + sender.patience * (1 + draw() / 2)
            sender.patience = min(2 * sender.patience, MAX_PATIENCE)
            if self._knock(sender, now):
                self.at(sender.give_up_at, self.give_up, sender, sender.turn)
                return
            now = self._next(sender, sender.give_up_at)
            if now > sender.give_up_at:
                self.at(now, self.dial, sender)
                return

    def _next(self, sender: Sender, now: float) -> float:
        """Choose the next receiver; return when to try it."""
        size = len(sender.order)
        sender.place = (sender.place + 1) % size
        if not sender.refused:
            return now
        places = [(sender.place + n) % size for n in range(size)]
        times = [max(now, sender.refused.get(sender.order[place], 0.0)) for place in places]
        sender.place = places[times.index(min(times))]
        return min(times)

    def give_up(self, sender: Sender, turn: int, delay: float = 0.0) -> None:
        """Close the socket and go to the next receiver, if nothing has happened meanwhile."""
        if sender.turn != turn:
            return
        sender.turn += 1
        if delay:
            sender.refused[sender.receiver] = self.now + delay
        self.at(self._next(sender, self.now), self.dial, sender)

    def _knock(self, sender: Sender, start: float) -> bool:
        """Connect from ``start`` on, as libzmq does; whether a SYN is heard before it gives up."""
        receiver = self.receivers[sender.receiver]
        while start < sender.give_up_at:
            if (outage := receiver.outage(start)) is None:
                self.at(start, self.come, sender, sender.turn, 0)
                return True
            end, silent = outage
            if end >= sender.give_up_at:
                return False
            if silent:
                for later in SYN_AGAIN:
                    if end <= start + later < sender.give_up_at:
                        self.at(start + later, self.come, sender, sender.turn, 0)
                        return True
                start += CONNECT_TIMEOUT
            start += sender.wait
            sender.wait = min(2 * sender.wait, MAX_RECONNECT)
        return False

    def come(self, sender: Sender, turn: int, syns: int) -> None:
        """Knock at the port: taken, refused, or not heard."""
        if sender.turn != turn:
            return
        receiver = self.receivers[sender.receiver]
        receiver.connects[int(self.now)] += 1
        if len(receiver.sessions) + receiver.queue >= CONNECTIONS or receiver.outage(self.now):
            self._knock(sender, self.now + sender.wait)  # refused
            sender.wait = min(2 * sender.wait, MAX_RECONNECT)
        elif receiver.queue >= BACKLOG:  # the kernel drops the SYN
            waits = (*SYN_AGAIN, CONNECT_TIMEOUT + sender.wait)
            wait = waits[syns] - (waits[syns - 1] if syns else 0)
            self.at(self.now + wait, self.come, sender, turn, (syns + 1) % len(waits))
        else:
            receiver.queue += 1
            receiver.free_at = max(receiver.free_at, self.now) + 1 / HANDSHAKES
            self.at(receiver.free_at, self.greet, sender, turn, receiver, receiver.life)

    def greet(self, sender: Sender, turn: int, receiver: Receiver, life: int) -> None:
        """Finish a handshake, HELLO and WELCOME."""
        if receiver.life != life:
            if sender.turn == turn:
                self._knock(sender, self.now + sender.wait)
            return
        receiver.queue -= 1
        receiver.handshakes[int(self.now)] += 1
        if sender.turn != turn:
            return  # it has gone meanwhile, and the work was in vain
        if receiver.refuses:
            self.give_up(sender, turn, REFUSED_DELAY)
            return
        sender.turn += 1
        sender.patience = self.first_patience
        self.repeated += sender.in_flight if sender.last != sender.receiver else 0.0
        self.adrift -= 1
        if not self.adrift:
            self.whole_at = self.now
        self.adrift_records -= sender.backlog - self.lines * sender.since
        receiver.advance(self.now)
        receiver.join(sender, sender.backlog + self.lines * (self.now - sender.since))

    def end(self, number: int, how: str) -> None:
        """End all sessions of a receiver, and those that wait for one."""
        receiver = self.receivers[number]
        receiver.advance(self.now)
        receiver.refuses = how == "refuse"
        if how != "refuse":
            receiver.life, receiver.queue, receiver.free_at = receiver.life + 1, 0, self.now
        for n, sender in enumerate(list(receiver.sessions)):
            self._ended(sender, receiver, safe=how == "goodbye")
            if how == "kill":  # libzmq connects again, for as long as patience lasts
                sender.wait = RECONNECT * (1 + self.random.random())
                sender.give_up_at = self.now + sender.patience * (1 + self.random.random() / 2)
                self.at(sender.give_up_at, self.give_up, sender, sender.turn)
                self._knock(sender, self.now + sender.wait)
            else:
                # One GOODBYE after the other; an ERROR answers the next block.
                waits = {"cut": SILENCE, "goodbye": n * BLOCK_SECONDS}
                wait = waits.get(how, self.random.random())
                delay = REFUSED_DELAY if how == "refuse" else 0.0
                self.at(self.now + wait, self.give_up, sender, sender.turn, delay)

    def stop(self, number: int, begin: float, seconds: float, how: str) -> None:
        """Have a receiver end then, and come back."""
        self.receivers[number].outages.append((begin, begin + seconds, how == "cut"))
        self.at(begin, self.end, number, how)

    def change(self, number: int, factor: float = 1.0) -> None:
        """Make a receiver faster, or admit all again."""
        receiver = self.receivers[number]
        receiver.advance(self.now)
        receiver.capacity *= factor
        receiver.refuses = False

    def connect_all(self) -> None:
        """Begin with a session for each sender, at its first receiver."""
        for sender in self.senders:
            self.receivers[sender.receiver].join(sender, 0.0)
        self.adrift = 0

    def look(self) -> None:
        """Note how things stand."""
        for receiver in self.receivers:
            receiver.advance(self.now)
        self.peak = max(self.peak, self.backlog)
        if self.adrift:
            self.whole_at = self.now
        if self.backlog > 0.01 * self.lines * len(self.senders):
            self.drained_at = self.now

    @property
    def backlog(self) -> float:
        """How many records wait at all senders."""
        held = self.adrift_records + self.adrift * self.lines * self.now
        return held + sum(receiver.backlog for receiver in self.receivers)

    def run(self, until: float, at_most: float = 1800.0) -> None:
        """Go on until all is quiet, at least to ``until``, and no longer than ``at_most`` more."""
        for second in count(1):
            while self.events and self.events[0][0] <= second:
                self.now, _, what, args = heappop(self.events)
                what(*args)  # type: ignore[operator]
            self.now = float(second)
            self.look()
            quiet = second > max(self.whole_at, self.drained_at)
            if second > until and (quiet or second > until + at_most):
                return


BEGIN = 10.0


def scenarios(receivers: int) -> dict[str, list[tuple[str, int, float, float]]]:
    """Return what happens in each: how, to which receiver, when, for how long."""
    everyone = range(receivers)
    return {
        "nothing": [],
        "all start within 1 s": [],
        "the same, without `--spread`": [],
        "one killed, back after 1 s": [("kill", 0, BEGIN, 1)],
        "one killed, back after 60 s": [("kill", 0, BEGIN, 60)],
        "SIGTERM to each in turn, back after 5 s": [
            ("goodbye", n, BEGIN + 30 * n, 5) for n in everyone
        ],
        "each killed in turn, back after 1 s": [("kill", n, BEGIN + 30 * n, 1) for n in everyone],
        "the network cut for 600 s": [("cut", n, BEGIN, 600) for n in everyone],
        "one at a tenth of its speed for 600 s": [("slow", 0, BEGIN, 600)],
        "one refuses all keys for 300 s": [("refuse", 0, BEGIN, 300)],
    }


def simulate(name: str, senders: int, receivers: int, lines: float, seed: int) -> Fleet:
    events = scenarios(receivers)[name]
    fleet = Fleet(senders, receivers, lines, seed, "without" not in name)
    if "start" in name or "same" in name:
        for sender in fleet.senders:
            fleet.at(fleet.random.random(), fleet.dial, sender)
    else:
        fleet.connect_all()
    for how, number, begin, seconds in events:
        if how == "slow":
            fleet.at(begin, fleet.change, number, 0.1)
            fleet.at(begin + seconds, fleet.change, number, 10.0)
        elif how == "refuse":
            fleet.at(begin, fleet.end, number, how)
            fleet.at(begin + seconds, fleet.change, number)
        else:
            fleet.stop(number, begin, seconds, how)
    fleet.run(max([begin + seconds for *_, begin, seconds in events], default=BEGIN) + 30)
    return fleet


def report(name: str, fleet: Fleet) -> str:
    sizes = [len(receiver.sessions) for receiver in fleet.receivers]
    total = sum(sizes) or 1
    jain = total**2 / (len(sizes) * sum(size * size for size in sizes) or 1)
    mean = total / len(sizes)
    busiest = [max(receiver.connects.values(), default=0) for receiver in fleet.receivers]
    done = [max(receiver.handshakes.values(), default=0) for receiver in fleet.receivers]
    most = max(receiver.most for receiver in fleet.receivers)
    memory = (IDLE_BYTES + MEMORY_BYTES + most * SESSION_BYTES) >> 20
    # Counted from the last blow, or from when what lasted is over.
    lasting = ("cut", "slow")
    events = scenarios(len(sizes))[name]
    begin = max([b + (s if how in lasting else 0) for how, _, b, s in events], default=0.0)
    grows = fleet.drained_at >= fleet.now
    return (
        f"| {name} | {max(busiest):,} | {max(done):,} | {max(0, fleet.whole_at - begin):.1f} "
        f"| {max(sizes) / mean:.2f}, {min(sizes) / mean:.2f} | {jain:.2f} "
        f"| {fleet.peak / 1e6:,.1f} "
        f"| {'never' if grows else f'{max(0, fleet.drained_at - begin):,.0f}'} "
        f"| {fleet.repeated / 1e6:,.2f} | {memory:,} |"
    )


def row_of(arguments: tuple[str, int, int, float, int]) -> str:
    gc.disable()  # there are no cycles, and it would look at all senders again and again
    return report(arguments[0], simulate(*arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--senders", type=int, default=100_000)
    parser.add_argument("--receivers", type=int, default=10)
    parser.add_argument("--lines", type=float, default=20.0, help="of each sender a second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="see only that everything runs")
    args = parser.parse_args()
    if args.smoke:
        args.senders = 2000
    print(
        "| what happens | connects/s | handshakes/s | all have a session after, s "
        "| fullest, emptiest | Jain | backlog, M | drained after, s | repeated, M | MiB |"
    )
    print("|" + "---|" * 10)
    fleets = [
        (name, args.senders, args.receivers, args.lines, args.seed)
        for name in scenarios(args.receivers)
    ]
    with Pool() as pool:
        for row in pool.imap(row_of, fleets):
            print(row, flush=True)


if __name__ == "__main__":
    main()
