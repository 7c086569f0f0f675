"""
Who reaches the open port can harm neither zmqpull nor the honest senders.

They send all the time here, and nothing of theirs is lost or repeated.
"""

import contextlib
import os
import socket
import threading
import time
import tracemalloc

import pytest
import zmq

from chaos import DOSE, patched
from chaos import LONG as LONG_DOSE
from helpers import PATIENCE, ZMQPULL, ZMQPUSH, losses, statistics, wait_until
from hostile import (
    COMMAND,
    HASTY,
    LONG,
    MORE,
    Target,
    connect,
    frame,
    greeting,
    is_closed,
    peak_memory,
    pour,
    ready,
    shake_hands,
)
from keyring import Keyring
from peers import bare, deliver, greet, receive
from zmqpush.core.protocol.messages import (
    Ack,
    Data,
    Goodbye,
    Hello,
    Message,
    Reset,
    Welcome,
    checksum,
    decode,
    encode,
    public_name,
)
from zmqpush.core.protocol.receiver import Receiver

MIB = 1 << 20
# The program, and what honest senders bring.
AT_REST = 80 * MIB
# What all peers may have it hold, at most.
MEMORY = 96 * MIB
IDLE, MUTE = (10_000, 9_000) if DOSE is LONG_DOSE else (2_000, 500)


@pytest.fixture
def target(start, tmp_path):
    return Target(start, tmp_path, plain=True)


def test_lengths_that_peers_claim_are_not_believed(target):
    claims = [
        greeting() + ready() + frame(b"", LONG, claim=8 << 30),
        greeting() + ready() + frame(b"", LONG, claim=1 << 40),
        greeting() + ready() + frame(b"", LONG | MORE, claim=(1 << 64) - 1),
        greeting() + frame(b"", LONG | COMMAND, claim=256 * MIB),
        greeting(b"CURVE") + frame(b"", LONG | COMMAND, claim=256 * MIB),
    ]
    with target.under_attack("lengths"):
        for port in (target.port, target.plain_port):
            for claim in claims:
                with connect(port, claim) as peer:
                    pour(peer, bytes(MIB), 256 * MIB)
                    wait_until(lambda peer=peer: is_closed(peer))

    assert target.peak < AT_REST
    target.verify()


def test_garbage_ends_its_own_connection_only(target):
    garbage = [
        b"GET / HTTP/1.1\r\nHost: collector\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(500),
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"<34>1 2026-01-01T00:00:00Z host app - - - a line of syslog\n",
        os.urandom(MIB),
    ]
    with target.under_attack("garbage"):
        for number in range(200):
            with contextlib.ExitStack() as stack:
                # The MiB only now and then: libzmq reads little of it.
                some = garbage if not number % 10 else garbage[:4] * 2
                port = target.port if number % 2 else target.plain_port
                peers = [stack.enter_context(connect(port, data)) for data in some]
                if not number % 10:
                    wait_until(lambda peers=peers: all(map(is_closed, peers)))

    assert target.peak < AT_REST
    assert "does not speak ZMTP 3" in target.errors
    assert target.errors.count("\n") < 30
    target.verify()


@pytest.mark.parametrize("with_keys", [False, True], ids=["open", "keys"])
def test_who_connects_and_does_not_finish_the_handshake_is_cut_off(start, tmp_path, with_keys):
    keys = Keyring(tmp_path) if with_keys else None
    target = Target(start, tmp_path, command=patched("zmqpull", HASTY), keys=keys)
    before = target.connections
    memory = target.memory
    with target.under_attack(f"{IDLE} idle connections"), contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connect(target.port)) for _ in range(IDLE)]
        wait_until(lambda: target.connections > before + IDLE // 2)
        print(f"{(target.memory - memory) / IDLE:.0f} bytes each")
        # Some send their greeting, a byte at a time.
        slow, rest = peers[:20], iter(greeting())
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.2):
                byte = bytes((next(rest),))
                for peer in slow:
                    with contextlib.suppress(ConnectionError):
                        peer.sendall(byte)

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            # The honest ones may connect just now.
            wait_until(lambda: target.connections < before + 10)
        finally:
            stop.set()
            dripping.join()

    assert target.peak < AT_REST + IDLE * 10_000
    target.verify()


@pytest.mark.parametrize("port", ["port", "plain_port"])
@pytest.mark.parametrize(
    "part",
    [frame(bytes(MIB), MORE), frame(b"", MORE) * MIB],
    ids=["large parts", "empty parts"],
)
def test_a_message_without_an_end_is_cut_off(start, tmp_path, port, part):
    target = Target(start, tmp_path, plain=True)
    kind = {"port": b"DEALER", "plain_port": b"PUSH"}[port]
    with target.under_attack(f"endless multipart at {port}"):
        for _ in range(2):
            with shake_hands(getattr(target, port), kind) as peer:
                assert pour(peer, part, 4 << 30) < 4 << 30

    assert target.peak < AT_REST + MEMORY
    assert "cut off 127.0.0.1:" in target.errors
    target.verify()


def test_peers_that_finish_the_handshake_and_say_nothing_take_little(target):
    memory = target.memory
    with target.under_attack(f"{MUTE} mute peers"), contextlib.ExitStack() as stack:
        for _ in range(MUTE):
            stack.enter_context(shake_hands(target.port))
        print(f"{(target.memory - memory) / MUTE:.0f} bytes each")
        target.wait_for_more()

    assert target.peak < AT_REST + MUTE * 40_000
    target.verify()


def test_handshakes_without_end_slow_the_others_down_at_most(target):
    with target.under_attack("handshakes"):
        for _ in range(MUTE):
            shake_hands(target.port).close()
            connect(target.port, greeting(b"CURVE")).close()

    assert target.peak < AT_REST
    target.verify()


FEW = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))"


def test_when_descriptors_run_out_who_is_connected_goes_on(start, tmp_path):
    target = Target(start, tmp_path, plain=True, command=patched("zmqpull", FEW))
    with target.under_attack("too many connections"), contextlib.ExitStack() as stack:
        peers = []
        with contextlib.suppress(ConnectionRefusedError, ConnectionResetError):
            while len(peers) < 500:
                peers.append(stack.enter_context(shake_hands(target.port)))
        assert 100 < len(peers) < 200
        wait_until(lambda: "limit on open descriptors" in target.errors)
        target.wait_for_more()

    def is_open() -> bool:
        with contextlib.suppress(ConnectionError):
            shake_hands(target.port).close()
            return True
        return False

    wait_until(is_open)
    assert target.errors.count("limit on open descriptors") == 1
    target.verify()


def test_what_is_stale_replayed_out_of_order_or_too_much_is_refused(target):
    lines = [b"hostile %d\n" % n for n in range(1, 4)]
    endpoint = f"tcp://127.0.0.1:{target.port}"

    def refused(peer: zmq.Socket, message: object, session: int) -> int:
        peer.send(encode(message, session))
        return receive(peer, Reset)[0].code

    with target.under_attack("the protocol"), bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer)
        deliver(peer, session, 1, *(line[:-1] for line in lines))
        # Replayed, it is acknowledged again, and not written.
        deliver(peer, session, 1, *(line[:-1] for line in lines))
        assert refused(peer, Data.of(9, 1, b"gap\n"), session) == 412
        # The session has ended with that; nobody else's can be taken, either.
        assert refused(peer, Data.of(4, 1, b"stale\n"), session) == 404
        _, session = greet(peer)
        with bare(zmq.DEALER, endpoint) as thief:
            assert refused(thief, Data.of(4, 1, b"stolen\n"), session) == 404
        lying = Data(4, 1000, b"short\n", checksum(4, 1000, b"short\n"))
        assert refused(peer, lying, session) == 400
        _, session = greet(peer)
        with contextlib.suppress(zmq.Again):
            for n in range(4, 400):
                peer.send(encode(Data.of(n, 1, b"x" * (MIB - 1) + b"\n"), session), zmq.NOBLOCK)
        assert receive(peer, Reset)[0].code in (404, 429)

    text = target.path.read_bytes()
    assert [text.count(line) for line in lines] == [1, 1, 1]
    assert not any(word in text for word in (b"gap", b"stale", b"stolen", b"short"))
    # Of the 396 that were sent: what libzmq takes in before we look depends on the machine.
    assert target.peak < AT_REST + 256 * MIB


def test_small_messages_that_nobody_asked_for_wait_at_their_sender(target):
    """They come faster than they can be refused."""
    small = frame(bytes(255))
    with target.under_attack("small messages"), shake_hands(target.port) as peer:
        assert pour(peer, small * 100, 128 * MIB) >= 128 * MIB

    assert target.peak < AT_REST
    target.verify()


def test_streams_that_never_sent_a_block_are_not_remembered():
    # One that did is: for 30 days, or until it says that it is over.
    receiver = Receiver({}, 64 * MIB, "disk", iter(range(1, 1 << 63)).__next__)

    def greet_with(streams: range) -> None:
        for stream in streams:
            values = {"versions": [2, 2], "secret": f"{stream:032x}", "run": "cd" * 16, "first": 1}
            receiver.receive(b"peer %d" % (stream % 50), encode(Hello(values), 0), 0.0)
            receiver.take_replies()

    greet_with(range(1000))
    tracemalloc.start()
    greet_with(range(1000, 5000))
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()

    assert grown < MIB // 4
    assert receiver.sessions == 50


def test_from_where_libzmq_numbers_its_peers_is_not_to_be_guessed(target):
    """Of two with the same number the second made libzmq abort; it began with this one."""
    endpoint = f"tcp://127.0.0.1:{target.port}"
    with contextlib.ExitStack() as stack:
        for number in range(20):
            claimed = b"\0" + (0x6B8B4567 + number).to_bytes(4)
            greet(stack.enter_context(bare(zmq.DEALER, endpoint, claimed)))
        for _ in range(20):
            greet(stack.enter_context(bare(zmq.DEALER, endpoint)))

    assert target.child.poll() is None
    target.verify()


def test_what_waits_for_the_sink_is_bounded_whoever_sent_it():
    receiver = Receiver({}, 64 * MIB, "disk", iter(range(1, 1 << 63)).__next__)
    accepted = 0
    for stream in range(1, 400):
        values = {"versions": [2, 2], "secret": f"{stream:032x}", "run": "cd" * 16, "first": 1}
        receiver.receive(b"peer", encode(Hello(values), 0), 0.0)
        block = Data.of(1, 1, b"x" * (MIB - 1) + b"\n")
        accepted += receiver.receive(b"peer", encode(block, stream), 0.0) is not None
        receiver.take_replies()
    assert accepted == 128

    receiver.committed(receiver.take_accepted())
    receiver.receive(b"peer", encode(Hello(values | {"secret": "ab" * 16}), 0), 0.0)
    token = accepted + 400 - 128
    assert receiver.receive(b"peer", encode(block, token), 0.0)


def test_honest_senders_are_not_cut_off_while_the_output_is_slow(start, tmp_path):
    """They fill all the memory that they may, and are not read until there is some again."""
    errors, data = tmp_path / "errors", tmp_path / "data"
    data.write_bytes(b"".join(b"%0110d\n" % n for n in range(400_000)))
    with errors.open("wb") as file:
        options = ("--memory", "16MiB", "-b", "tcp://127.0.0.1:*", "--to", "-")
        pull = start(ZMQPULL, *options, stderr=file)
    wait_until(lambda: b"listening" in errors.read_bytes())
    endpoint = f"tcp://127.0.0.1:{port_of(errors)}"
    senders = []
    for number in range(3):
        with data.open("rb") as lines, (tmp_path / f"errors {number}").open("wb") as file:
            command = (ZMQPUSH, "--framing", "frames", "-c", endpoint)
            senders.append(start(*command, stdin=lines, stderr=file))
    for number in range(3):
        said = tmp_path / f"errors {number}"
        wait_until(lambda said=said: b"no receiver takes messages" in said.read_bytes())
    peak = peak_memory(pull)
    found = 0
    while found < 1_200_000:
        found += os.read(pull.stdout.fileno(), 1 << 20).count(b"\n")

    assert found == 1_200_000
    assert [sender.wait(PATIENCE) for sender in senders] == [0, 0, 0]
    assert b"cut off" not in errors.read_bytes()
    assert peak < 96 * MIB


def port_of(errors):
    """Return the port that a program says it listens at."""
    return int(errors.read_text().rpartition(":")[2])


def test_a_sender_that_acknowledges_is_not_filled_by_its_receiver(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        errors = tmp_path / "errors"
        with errors.open("wb") as file:
            endpoint = f"tcp://127.0.0.1:{server.getsockname()[1]}"
            child = start(ZMQPUSH, "--ack", "-c", endpoint, stderr=file)
        child.stdin.write(b"a line\n")
        child.stdin.flush()
        peer, _ = server.accept()
        with peer:
            peer.sendall(greeting() + ready(b"ROUTER"))
            wait_until(lambda: b"READY" in peer.recv(4096))
            assert pour(peer, frame(b"", MORE) * MIB, 4 << 30) < 4 << 30

    wait_until(lambda: b"a message of several parts" in errors.read_bytes())
    assert child.poll() is None
    assert peak_memory(child) < 128 * MIB


@pytest.mark.parametrize(
    "message",
    [b"", encode(Ack(1, 9, 9), 7), b"x" * 60_000],
    ids=["empty", "acks", "long"],
)
def test_a_sender_goes_on_reading_whatever_its_receiver_sends(start, tmp_path, message):
    """Frames without a pause: signals are heard, input is read, memory stays flat."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        child = start(ZMQPUSH, "--ack", "-c", endpoint, "--grace", 1)
        peer, _ = server.accept()
        ended = threading.Event()
        poured = 0

        def flood():
            nonlocal poured
            data = frame(message) * 10_000
            with contextlib.suppress(OSError):
                while not ended.is_set():
                    peer.sendall(data)
                    poured += len(data)

        with peer:
            peer.sendall(greeting() + ready(b"ROUTER"))
            wait_until(lambda: b"READY" in peer.recv(4096))
            flooding = threading.Thread(target=flood)
            flooding.start()
            for number in range(1, 6):
                before = poured
                wait_until(lambda before=before: poured > before)
                child.stdin.write(b"a line\n")
                child.stdin.flush()
                wait_until(lambda number=number: statistics(child)[0] == number)
            peak = peak_memory(child)
            child.terminate()
            code = child.wait(PATIENCE)
            ended.set()
            flooding.join()

    assert code == 1
    assert losses(child.stderr.read()) == (0, 5)
    assert peak < 128 * MIB


@pytest.mark.parametrize("end", [Goodbye(), Reset(404, "who?")])
def test_a_receiver_that_ends_each_session_is_asked_ever_more_rarely(start, end):
    """WELCOME and GOODBYE, or RESET, each time; once it acknowledges, all goes on at once."""
    asked = []
    with bare(zmq.ROUTER, "tcp://127.0.0.1:*") as receiver:

        def hear(wanted: type[Message]):
            while True:
                peer, data = receiver.recv_multipart()
                message, session = decode(data)
                if isinstance(message, wanted):
                    return peer, message, session

        def welcome():
            peer, hello, _ = hear(Hello)
            asked.append(time.monotonic())
            values = {name: hello.values[name] for name in ("type", "host", "raw")}
            values |= {"stream": public_name(hello.values["secret"]), "run": "", "acked": 0}
            values["version"] = 2
            values |= {"session": f"{len(asked):016x}", "blocks": 9, "bytes": 9, "ping": 5}
            receiver.send_multipart((peer, encode(Welcome(values), len(asked))))
            return peer

        child = start(ZMQPUSH, "--ack", "-c", receiver.last_endpoint)
        child.stdin.write(b"a line\n")
        child.stdin.close()
        for _ in range(4):
            peer = welcome()
            receiver.send_multipart((peer, encode(end, len(asked))))
        welcome()
        peer, data, session = hear(Data)
        receiver.send_multipart((peer, encode(Ack(data.end, 9, 9), session)))
        code = child.wait(PATIENCE)

    assert code == 0
    assert asked[2] - asked[1] >= 1
    assert asked[3] - asked[2] >= 2
    assert asked[4] - asked[3] >= 4


def test_a_sender_that_is_bound_is_not_filled_by_its_receivers(start, tmp_path):
    errors = tmp_path / "errors"
    with errors.open("wb") as file:
        child = start(ZMQPUSH, "-b", "tcp://127.0.0.1:*", stderr=file)
    wait_until(lambda: b"listening" in errors.read_bytes())
    with shake_hands(port_of(errors), b"PULL") as peer:
        assert pour(peer, frame(b"", MORE) * MIB, 4 << 30) < 4 << 30

    wait_until(lambda: b"a message of several parts" in errors.read_bytes())
    assert child.poll() is None
    assert peak_memory(child) < 128 * MIB
