"""The simulated fleet of ``bench/fleet.py`` keeps its books, and does what the programs do."""

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from helpers import PATIENCE, ZMQPULL, ZMQPUSH, push, wait_until, wait_until_ready
from zmqpush.core.protocol import messages as frames
from zmqpush.core.protocol import sender
from zmqpush.sender import acked
from zmqpush.transport import listener

BENCH = Path(__file__).parent.parent / "bench" / "fleet.py"
spec = importlib.util.spec_from_file_location("fleet", BENCH)
fleet = importlib.util.module_from_spec(spec)
sys.modules["fleet"] = fleet  # dataclasses look there
spec.loader.exec_module(fleet)

SENDERS, RECEIVERS, LINES = 400, 4, 20.0


def simulate(name, seed=1):
    return fleet.simulate(name, SENDERS, RECEIVERS, LINES, seed)


@pytest.mark.parametrize("name", fleet.scenarios(RECEIVERS))
@pytest.mark.parametrize("seed", [1, 2])
def test_what_was_produced_is_stored_or_waits(name, seed):
    done = simulate(name, seed)
    stored = sum(receiver.stored for receiver in done.receivers)

    assert stored + done.backlog == pytest.approx(SENDERS * LINES * done.now)


@pytest.mark.parametrize("name", fleet.scenarios(RECEIVERS))
def test_each_sender_ends_in_one_session(name):
    done = simulate(name)
    sessions = Counter(s for receiver in done.receivers for s in receiver.sessions)

    assert sessions == Counter(done.senders)
    assert done.adrift == 0
    for receiver in done.receivers:
        assert receiver.caught_up.size + receiver.sizes == len(receiver.sessions)


def test_the_same_seed_gives_the_same_table():
    first, again = (
        subprocess.run([sys.executable, BENCH, "--smoke"], capture_output=True, check=True)
        for _ in range(2)
    )

    assert first.stdout == again.stdout


def test_a_storm_is_bounded_by_the_rate_of_handshakes():
    done = fleet.simulate("all start within 1 s", 10_000, 2, LINES, 1)
    receivers = done.receivers

    assert all(max(r.connects.values()) > fleet.HANDSHAKES for r in receivers)
    assert all(max(r.handshakes.values()) <= fleet.HANDSHAKES + 1 for r in receivers)
    assert done.whole_at >= 10_000 / 2 / fleet.HANDSHAKES


def test_who_is_not_heard_knocks_again_before_it_gives_up():
    done = fleet.simulate("all start within 1 s", 6000, 1, LINES, 1)

    assert max(done.receivers[0].connects.values()) > fleet.BACKLOG + fleet.HANDSHAKES
    assert done.whole_at < fleet.PATIENCE


@pytest.mark.parametrize(("load", "drains"), [(0.9, True), (1.1, False)])
def test_a_backlog_is_drained_if_there_is_capacity_beyond_the_load(load, drains):
    done = fleet.Fleet(SENDERS, RECEIVERS, LINES, 1, spread=True)
    done.connect_all()
    for receiver in done.receivers:
        receiver.capacity = load**-1 * len(receiver.sessions) * LINES
    for number in range(RECEIVERS):
        done.stop(number, 10.0, 20.0, "cut")
    done.run(40.0, 600.0)

    assert (done.drained_at < done.now) is drains
    assert done.peak >= SENDERS * LINES * 20


def test_sessions_that_are_behind_share_a_receiver_evenly():
    receiver = fleet.Receiver(capacity=10.0, lines=1.0)
    one, other = (fleet.Sender((0,), 8.0) for _ in range(2))
    receiver.join(one, 8.0)
    receiver.join(other, 100.0)
    receiver.advance(2.0)  # 5 a second for each, of which 1 is new

    assert receiver.backlog == pytest.approx(0 + 92)
    receiver.advance(3.0)  # the first one has caught up and needs 1, so 9 are left
    assert receiver.leave(one) == 0
    assert receiver.leave(other) == pytest.approx(84)
    assert receiver.stored == pytest.approx(30)


def test_a_killed_receiver_gets_its_senders_back_only_if_it_is_quick():
    quick = simulate("one killed, back after 1 s")
    late = simulate("one killed, back after 60 s")

    assert all(s.place == 0 for s in quick.senders)
    assert not late.receivers[0].sessions
    assert (quick.repeated, late.repeated > 0) == (0, True)


def test_one_that_refuses_is_left_alone_for_thirty_seconds():
    done = fleet.Fleet(100, 2, LINES, 1, spread=True)
    done.connect_all()
    done.at(10.0, done.end, 0, "refuse")
    done.stop(1, 20.0, 600.0, "kill")
    done.run(30.0, 0.0)

    connects = done.receivers[0].connects
    assert sum(connects.values()) == sum(s.order[0] == 1 for s in done.senders)  # each once
    done.run(60.0, 0.0)
    assert max(connects) >= 40


def test_the_simulated_times_are_those_of_the_programs():
    assert fleet.PATIENCE == acked._PATIENCE
    assert fleet.PATIENCE_OF_SEVERAL == acked._PATIENCE_OF_SEVERAL
    assert fleet.MAX_PATIENCE == sender._MAX_PATIENCE
    assert fleet.SILENCE == sender._DEAD_PINGS * frames.PING_INTERVAL
    assert fleet.REFUSED_DELAY == sender._REFUSED_DELAY
    assert 65536 - fleet.CONNECTIONS == listener._SPARE_DESCRIPTORS


def test_spread_deals_first_and_second_receivers_evenly():
    orders = [acked._spread("abcd", f"{n:032x}") for n in range(4000)]
    pairs = Counter(tuple(order[:2]) for order in orders)

    assert len(pairs) == 12
    assert all(abs(n - 4000 / 12) < 100 for n in pairs.values())


def test_a_sender_stays_with_its_second_receiver_until_it_starts_again(start, tmp_path):
    files = [tmp_path / name for name in "ab"]
    endpoints = [f"ipc://{file}.socket" for file in files]
    options = ("--spool", tmp_path / "spool", "-c", endpoints[0], "-c", endpoints[1])
    first, _ = (
        start(ZMQPULL, "-qa", e, "--to", f, "--state", f"{f}.state")
        for e, f in zip(endpoints, files, strict=True)
    )
    child = start(ZMQPUSH, *options)

    def ships_to(file, line):
        child.stdin.write(line)
        child.stdin.flush()
        wait_until(lambda: file.exists() and line.strip() in file.read_bytes())

    ships_to(files[0], b"one\n")
    wait_until_ready(first)
    first.terminate()
    assert first.wait(PATIENCE) == 0
    ships_to(files[1], b"two\n")
    back = start(ZMQPULL, "-qa", endpoints[0], "--to", files[0], "--state", f"{files[0]}.state")
    probe = push("--ack", "-c", endpoints[0], data=b"probe\n")
    assert (probe.returncode, back.poll()) == (0, None)
    ships_to(files[1], b"three\n")
    child.stdin.close()
    assert child.wait(PATIENCE) == 0
    assert push(*options, data=b"four\n").returncode == 0

    assert [b"four" in file.read_bytes() for file in files] == [True, False]
