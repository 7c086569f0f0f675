"""
What networks do to acknowledged delivery: the fault matrix, rows 25 to 29, 41 and 46.

Each line has its number; the numbers tell what was lost, came twice or out of order. With
``ZMQPUSH_CHAOS=long`` the faults last as long as the matrix says.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq

from helpers import PATIENCE, ZMQPULL, ZMQPUSH, wait_until, wait_until_ready
from peers import SECRET, bare, deliver, greet, receive
from proxy import Proxy
from test_pull import finish
from zmqpush.core.protocol.messages import Data, Labels, Reset, Skip, encode
from zmqpush.core.protocol.receiver import Receiver
from zmqpush.core.protocol.sender import Sender

LONG = os.environ.get("ZMQPUSH_CHAOS") == "long"
SOAK = Path(__file__).parent.parent / "bench" / "soak.py"
FILLER = b"x" * 80
# A sender has noticed a silent cut after so many seconds, and tells of it a second later.
DEAD = 15.0
TOLD = DEAD + 1.0


class Feed(threading.Thread):
    """Writes numbered lines into a sender until told to stop: ``fed`` are in the pipe."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self._pipe = child.stdin
        self._done = threading.Event()
        self.fed = 0
        self.start()

    def run(self) -> None:
        """Write some ten thousand lines a second, or as many as the sender reads."""
        with contextlib.suppress(BrokenPipeError, ValueError):  # the test has failed
            while not self._done.wait(0.01):
                numbers = range(self.fed + 1, self.fed + 501)
                self._pipe.write(b"".join(b"%d %s\n" % (n, FILLER) for n in numbers))
                self._pipe.flush()
                self.fed += 500

    def end(self) -> int:
        """Write no more; return how many lines there were."""
        self._done.set()
        self.join(PATIENCE)
        assert not self.is_alive()
        return self.fed


@pytest.fixture
def path(tmp_path):
    """Return where the records go."""
    return tmp_path / "all"


@pytest.fixture
def receiving(start, tmp_path, path):
    """Return a function that starts a receiver with a state; and its port."""

    def receiver(bind="tcp://127.0.0.1:*", *before):
        args = ("-a", bind, "--insecure", "--state", tmp_path / "state", "--to", path)
        child = start(*before, ZMQPULL, *args)
        if not bind.endswith("*"):
            return child, 0
        line = child.stderr.readline()
        return child, int(re.search(rb"listening at tcp://127.0.0.1:(\d+)", line)[1])

    return receiver


@pytest.fixture
def sending(start, tmp_path):
    """Return a function that starts a sender with a small spool."""

    def sender(endpoint, *before):
        spool = ("--spool", tmp_path / "spool", "--spool-max", "16MiB")
        return start(*before, ZMQPUSH, *spool, "--format", "raw", "-c", endpoint)

    return sender


def size(path):
    return path.stat().st_size if path.exists() else 0


def grows(path, by=1):
    """Wait until there is more in the file."""
    before = size(path)
    wait_until(lambda: size(path) >= before + by)


def verdict(path):
    """Return how many lines there are, how many are lost and doubled, and whether in order."""
    seen = []
    with path.open("rb") as file:
        for record in file:
            number, _, rest = json.loads(record)["message"].partition(" ")
            assert rest == FILLER.decode()
            seen.append(int(number))
    total = max(seen, default=0)
    return total, total - len(set(seen)), len(seen) - len(set(seen)), seen == sorted(seen)


def settle(child, feed, receiver, path):
    """End the input; see that all of it arrived once; return what the receiver refused."""
    fed = feed.end()
    code, _, told = finish(child)
    assert code == 0, told
    wait_until_ready(receiver)
    receiver.terminate()
    code, _, told = finish(receiver)
    assert code == 0, told
    assert verdict(path) == (fed, 0, 0, True)
    refused = re.findall(rb" (\d+) frames were refused", told)
    return int(refused[-1]) if refused else 0


# 25: a silent cut.


def ip(*args):
    subprocess.run(["ip", *args], check=True, capture_output=True, timeout=PATIENCE)


@contextlib.contextmanager
def namespaces() -> Iterator[SimpleNamespace]:
    """Join two network namespaces of our own with a cable."""
    names = [f"zmqpush-{os.getpid()}-{end}" for end in "ab"]
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces take root and ip")
    with contextlib.ExitStack() as stack:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as exc:
                pytest.skip(f"there are no network namespaces here: {exc.stderr.decode()}")
            stack.callback(ip, "netns", "del", name)
        near, far = names
        ip("link", "add", "cable", "netns", near, "type", "veth", "peer", "cable", "netns", far)
        for name, address in ((near, "192.0.2.1/30"), (far, "192.0.2.2/30")):
            ip("-n", name, "addr", "add", address, "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        yield SimpleNamespace(
            at_sender=("ip", "netns", "exec", near),
            at_receiver=("ip", "netns", "exec", far),
            endpoint="tcp://192.0.2.2:5015",
            cut=lambda: ip("-n", far, "link", "set", "cable", "down"),
            mend=lambda: ip("-n", far, "link", "set", "cable", "up"),
        )


@pytest.mark.parametrize("cable", ["namespaces", "proxy"])
def test_25_a_silent_cut_under_load_loses_nothing(receiving, sending, path, cable):
    with contextlib.ExitStack() as stack:
        if cable == "namespaces":
            cable = stack.enter_context(namespaces())
            receiver, _ = receiving(cable.endpoint, *cable.at_receiver)
            child = sending(cable.endpoint, *cable.at_sender)
            cut, mend = cable.cut, cable.mend
        else:
            receiver, port = receiving()
            proxy = stack.enter_context(Proxy(port))
            child = sending(f"tcp://127.0.0.1:{proxy.port}")
            cut, mend = (lambda now=now: setattr(proxy, "blocked", now) for now in (True, False))
        feed = Feed(child)
        grows(path, 1 << 20)
        cut()
        began = time.monotonic()
        if LONG:
            while b"no receiver acknowledges" not in (line := child.stderr.readline()):
                assert line, "it has ended"
            assert time.monotonic() - began < TOLD + 4
        time.sleep(max(0.0, (30 if LONG else 1) - (time.monotonic() - began)))
        before = size(path)
        time.sleep(0.5)
        assert size(path) == before  # so it was cut
        mend()
        grows(path, 1 << 20)
        settle(child, feed, receiver, path)


# 26: connections that are reset.


def test_26_resets_within_frames_and_stopped_ends_lose_nothing(receiving, sending, path):
    chance = random.Random(26)
    wanted = 150 if LONG else 15
    receiver, port = receiving()
    with Proxy(port) as proxy:
        child = sending(f"tcp://127.0.0.1:{proxy.port}")
        feed = Feed(child)
        grows(path)
        proxy.cut_after = lambda: int(2 ** chance.uniform(8, 21))
        proxy.reset()
        while proxy.resets < wanted:
            before = proxy.resets
            wait_until(lambda before=before: proxy.resets >= min(before + 3, wanted))
            stopped = chance.choice((child, receiver))
            stopped.send_signal(signal.SIGSTOP)
            time.sleep(chance.uniform(0.1, 1.0))
            stopped.send_signal(signal.SIGCONT)
            proxy.half_open()
        proxy.cut_after = None
        proxy.reset()
        grows(path)
        settle(child, feed, receiver, path)


# 27: a link that is slow.


def test_27_on_a_link_that_nearly_stands_still_nobody_hangs_up_too_early(receiving, sending, path):
    receiver, port = receiving()
    with Proxy(port) as proxy:
        child = sending(f"tcp://127.0.0.1:{proxy.port}")
        feed = Feed(child)
        grows(path, 1 << 20)
        proxy.rate = 1.0
        time.sleep(DEAD - 3 if LONG else 3)
        assert proxy.connections == 1
        if LONG:
            time.sleep(60)  # an ack takes longer than a receiver may be silent
            assert proxy.connections < 15
        proxy.rate = None
        grows(path, 1 << 20)
        if not LONG:
            assert proxy.connections == 1
        settle(child, feed, receiver, path)


def test_27_a_round_trip_of_two_seconds_needs_one_connection(receiving, sending, path):
    receiver, port = receiving()
    with Proxy(port) as proxy:
        child = sending(f"tcp://127.0.0.1:{proxy.port}")
        feed = Feed(child)
        grows(path)
        proxy.delay = 1.0
        time.sleep(60 if LONG else 3)
        grows(path, 1 << 20)
        settle(child, feed, receiver, path)
        assert proxy.connections == 1


@pytest.mark.skipif(not LONG, reason="it may take half a minute: ZMQPUSH_CHAOS=long")
def test_27_a_receiver_two_seconds_away_is_reached(receiving, sending, path):
    receiver, port = receiving()
    with Proxy(port) as proxy:
        proxy.delay = 1.0
        child = sending(f"tcp://127.0.0.1:{proxy.port}")
        feed = Feed(child)
        grows(path)
        settle(child, feed, receiver, path)


def test_27_a_receiver_two_seconds_away_is_reached_by_one_connection(receiving, sending, path):
    _, port = receiving()
    with Proxy(port) as proxy:
        proxy.delay = 1.0
        child = sending(f"tcp://127.0.0.1:{proxy.port}")
        child.stdin.write(b"1\n")
        child.stdin.flush()
        wait_until(lambda: size(path) or proxy.connections > 1)
        assert proxy.connections == 1


# 29: bits that flip on the way, without CURVE.

# Where, in bytes from the beginning of a frame with DATA; before it is what ZMTP says of it.
QUICK = {
    "ZMTP's flags": -9,
    "ZMTP's length": -8,
    "magic": 1,
    "type": 3,
    "flags": 4,
    "header length": 7,
    "session": 12,
    "first": 23,
    "count": 31,
    "CRC": 33,
    "payload": 50,
}
# The sender waits until the receiver seems dead, or for the 30 s of a refusal.
SLOW = {"the end of ZMTP's length": -2, "version": 2, "the middle of ZMTP's length": -4}


class Flipper:
    """Flips a bit in the next frame with DATA that passes, each time that ``at`` is set."""

    def __init__(self) -> None:
        self._chance = random.Random(29)
        self.at: int | None = None

    def __call__(self, data: bytes) -> bytes:
        """Return what to pass."""
        begin = data.find(b"ZP\2\3")
        if self.at is None or begin < 9 or begin + self.at >= len(data):
            return data
        place, self.at = begin + self.at, None
        return b"%b%c%b" % (
            data[:place],
            data[place] ^ 1 << self._chance.randrange(8),
            data[place + 1 :],
        )


def test_29_flipped_bits_on_the_way_of_records_lose_nothing(receiving, sending, path):
    flips = QUICK | SLOW if LONG else QUICK
    receiver, port = receiving()
    with Proxy(port) as proxy:
        proxy.change = flipper = Flipper()
        child = sending(f"tcp://127.0.0.1:{proxy.port}")
        feed = Feed(child)
        grows(path)
        for at in flips.values():
            flipper.at = at
            wait_until(lambda: flipper.at is None)
            grows(path, 1 << 20)
        refused = settle(child, feed, receiver, path)

    # Within a frame each is noticed, but for a flag without a meaning.
    assert refused >= sum(at >= 0 for at in QUICK.values()) - 1
    assert proxy.connections > 1  # for what ZMTP says of a frame there is no other way


class Blocks:
    """A store of blocks of one record."""

    recovered = 0
    spooled = True
    was = ""
    labels = Labels("syslog", "web1")

    def __init__(self, count: int) -> None:
        self.secret = SECRET
        self.count = count
        self.first = 1
        self._next = 1

    @property
    def next_labels(self):
        """What the records of the next block have in common."""
        return self.labels if self._next <= self.count else None

    def take(self):
        """Return the next block."""
        if self._next > self.count:
            return None
        self._next += 1
        return Data.of(self._next - 1, 1, b"%d\n" % (self._next - 1))

    def rewind(self):
        """Begin again."""
        self._next = self.first

    def acknowledge(self, acked):
        """Forget blocks."""
        self.first = max(self.first, min(acked, self.count) + 1)
        self._next = max(self._next, self.first)

    def rename_stream(self):
        """Take a new name."""
        self.secret = "ef" * 16


def converse(count, dies_after, flipped=-1, bit=0):
    """
    Let both ends talk until everything is acknowledged, or nothing moves for long.

    After so many frames the receiver dies; in frame number ``flipped`` a bit flips.
    Returns all frames, what the receiver has written, and whether all was acknowledged.
    """
    frames, written, safe, floors, moved = [], [], 0, {}, []
    store, tokens = Blocks(count), iter(range(1000, 2000))
    receiver = Receiver(floors, 1 << 20, "disk", lambda: next(tokens))
    sender = Sender(store, "cd" * 16)
    now, peer = 0.0, 0
    sender.connect(now)

    def passes(frame):
        frames.append(frame)
        if len(frames) - 1 != flipped:
            return frame
        changed = bytearray(frame)
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    while store.first <= count and now < 200:
        before = len(frames), safe
        redial = sender.tick(now)
        if len(frames) >= dies_after:
            dies_after = 1 << 30
            receiver = Receiver(floors, 1 << 20, "disk", lambda: next(tokens))
            del written[safe:]
            moved = []
            peer += 1
            sender.disconnected(now)
        for _ in range(3):
            frame = None if redial else sender.next_frame(now)
            if frame and (arrival := receiver.receive(b"%d" % peer, passes(frame), now)):
                written += bytes(arrival.block.payload).split()
        receiver.committed(moved)
        floors.update((progress.key, progress.floor) for progress in moved)
        safe = max((progress.floor.acked for progress in moved), default=safe)
        moved = receiver.take_accepted()
        for to, frame in receiver.take_replies():
            if int(to) == peer:
                redial = sender.receive(passes(frame), now) or redial
        if redial:
            peer += 1
            now += redial.delay
            sender.disconnected(now)
            sender.connect(now)
        elif before == (len(frames), safe):
            now = max(now, sender.deadline(now))
            receiver.tick(now)
    return frames, written, store.first > count


TOTAL = 7
DIES_AFTER = 6
GOOD = [b"%d" % number for number in range(1, TOTAL + 1)]
CONVERSATION = converse(TOTAL, DIES_AFTER)[0]
TYPES = {"HELLO": 1, "WELCOME": 2, "DATA": 3, "ACK": 4}
LAST = max(at for at, frame in enumerate(CONVERSATION) if frame[3] == TYPES["DATA"])


def believed(flipped):
    """Return the bytes of which a bit may flip without notice, and what that does."""
    wrong = {}
    for bit in range(8 * len(CONVERSATION[flipped])):
        _, written, done = converse(TOTAL, DIES_AFTER, flipped, bit)
        if written != GOOD or not done:
            wrong[bit // 8] = (written, done)
    return wrong


def test_29_the_conversation_has_all_that_matters():
    kinds = [frame[3] for frame in CONVERSATION]
    for kind, times in (("HELLO", 2), ("WELCOME", 2), ("DATA", TOTAL + 2), ("ACK", 2)):
        assert kinds.count(TYPES[kind]) >= times


@pytest.mark.parametrize("kind", ["HELLO", "WELCOME", "DATA", "ACK"])
def test_29_no_flipped_bit_loses_or_doubles_a_record(kind):
    for at, frame in enumerate(CONVERSATION):
        if frame[3] == TYPES[kind] and at != LAST:
            assert believed(at) == {}


def test_29_a_flipped_bit_in_the_last_block_is_noticed_too():
    assert believed(LAST) == {}


# 41: a peer that breaks the rules, and whose frames come again.


def refusals(peer, session, *messages):
    """Send messages of which each is refused; return the codes."""
    for message in messages:
        peer.send(encode(message, session))
    return [receive(peer, Reset)[0].code for _ in messages]


def block(first, count=1):
    return Data.of(first, count, b"".join(b"%d\n" % (first + at) for at in range(count)))


def test_41_what_breaks_the_order_is_refused_and_nothing_is_written_twice(receiving, path):
    receiver, port = receiving()
    with bare(zmq.DEALER, f"tcp://127.0.0.1:{port}") as peer:
        _, session = greet(peer)
        deliver(peer, session, 1, b"1", b"2", b"3")
        _, old = greet(peer)
        _, session = greet(peer, first=4)
        # The older session's number is no good any more, and does no harm to the new one.
        assert refusals(peer, old, block(4)) == [404]
        # Blocks that come again are acknowledged and not written, as often as they like.
        for _ in range(3):
            deliver(peer, session, 1, b"1", b"2", b"3")
            deliver(peer, session, 2, b"2")
        peer.send(encode(Skip(1, 2, 1), session))
        deliver(peer, session, 4, b"4")
        # Each of these ends the session, and what comes after it in the session is refused.
        for wrong in (block(6), block(4, 2), block(2, 9), Skip(6, 1, 1)):
            assert refusals(peer, session, wrong, block(5)) == [412, 404]
            welcome, session = greet(peer, first=5)
            assert (welcome["acked"], welcome["run"]) == (4, "cd" * 16)
        peer.send(encode(Skip(5, 2, 2), session))
        deliver(peer, session, 7, b"7")
    receiver.terminate()
    told = finish(receiver)[2]

    assert path.read_bytes() == b"1\n2\n3\n4\n7\n"
    counted = b"5 records written, 12 came twice, 2 were skipped by their senders, 9 frames were"
    assert counted in told


@pytest.mark.parametrize(
    ("memory", "sizes"),
    [("256MiB", [1 << 17] + [2] * 255), ("1MiB", [1 << 19])],
    ids=["blocks", "bytes"],
)
def test_41_what_is_beyond_the_credit_is_refused_and_not_written(start, tmp_path, memory, sizes):
    endpoint = f"ipc://{tmp_path}/socket"
    receiver = start(ZMQPULL, "-a", endpoint, "--memory", memory)  # nobody reads its output
    with bare(zmq.DEALER, endpoint) as peer:
        welcome, session = greet(peer)
        assert welcome["blocks"] == len(sizes) or sum(sizes) >= welcome["bytes"]
        for number, length in enumerate(sizes, 1):
            block = Data.of(number, 1, b"%*d\n" % (length - 1, number))
            peer.send(encode(block, session))
        assert refusals(peer, session, Data.of(len(sizes) + 1, 1, b"0\n")) == [429]
        # What was within it is acknowledged when it is written, and can go on.
        lines = iter(receiver.stdout.readline, None)
        assert [int(next(lines)) for _ in sizes] == list(range(1, len(sizes) + 1))
        welcome, session = greet(peer)
        assert welcome["acked"] == len(sizes)
        deliver(peer, session, len(sizes) + 1, b"%d" % (len(sizes) + 1))
    receiver.terminate()
    _, out, told = finish(receiver)

    assert int(out) == len(sizes) + 1
    assert b"zmqpull: %d records written, 1 frames were refused\n" % (len(sizes) + 1) in told


def test_41_a_superseded_session_has_ended(receiving):
    _, port = receiving()
    with bare(zmq.DEALER, f"tcp://127.0.0.1:{port}") as peer:
        _, old = greet(peer)
        greet(peer)
        assert refusals(peer, old, block(1)) == [404]


# 46: both ends killed, again and again.


def test_46_a_soak_in_which_both_ends_are_killed_loses_and_doubles_nothing():
    seconds = 120 if LONG else 8
    command = [sys.executable, SOAK, "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, timeout=seconds + PATIENCE, check=False)
    table = dict(re.findall(r"\| \**(.+?)\** \| (\d+) \|", done.stdout.decode()))

    assert done.returncode == 0, done
    assert (table["lost"], table["duplicated"], table["out of order"]) == ("0", "0", "0")
    assert int(table["kills of the sender"])
    assert int(table["kills of the receiver"])
    assert int(table["lines"])
