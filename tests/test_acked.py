"""``zmqpush --ack`` and ``--spool`` as a user sees them, and zmqpull among hostile peers."""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import zmq

import test_pull
from helpers import (
    NOBODY,
    PATIENCE,
    SUMMARY,
    ZMQPULL,
    ZMQPUSH,
    losses,
    push,
    sent,
    statistics,
    wait_until,
    wait_until_ready,
)
from peers import bare, deliver, greet, receive
from test_pull import finish
from zmqpush.core.protocol.messages import (
    Ack,
    Data,
    Error,
    Goodbye,
    Hello,
    Ping,
    Reset,
    Skip,
    encode,
)

endpoint = test_pull.endpoint
NUMBERS = b"".join(b"%d\n" % number for number in range(1, 50_001))


@pytest.fixture
def spool(tmp_path):
    return tmp_path / "spool"


def messages(*paths):
    """Return the messages in files."""
    return [json.loads(line)["message"] for p in paths for line in p.read_bytes().splitlines()]


def feed(child, data):
    child.stdin.write(data)
    child.stdin.flush()


def fill_spool(spool, data=b"1\n2\n"):
    done = push("--spool", spool, "-c", NOBODY, "--timeout", "0", data=data)
    assert done.returncode == 75
    return done


def status(spool):
    return push("--spool", spool, "--spool-status")


# What is delivered.


@pytest.mark.parametrize("options", [["--ack"], ["--spool", "{spool}"]])
def test_the_summary_counts_what_was_acknowledged(start, endpoint, tmp_path, spool, options):
    path = tmp_path / "all"
    start(ZMQPULL, "-qa", endpoint, "--to", path)
    args = [word.format(spool=spool) for word in options]
    done = push(*args, "-c", endpoint, data=NUMBERS)

    assert (done.returncode, sent(done), losses(done.stderr)) == (0, 50_000, (0, 0))
    assert messages(path) == NUMBERS.decode().split()


def test_both_commands_find_each_other_without_any_endpoint(start, tmp_path):
    with socket.socket() as probe:
        if not probe.connect_ex(("127.0.0.1", 5015)):
            pytest.skip("somebody listens at the default port")
    child = start(ZMQPULL, "-q", "-n", 1)
    done = push("--ack", "--timeout", PATIENCE, data=b"one\n")

    assert (done.returncode, sent(done)) == (0, 1)
    assert json.loads(finish(child)[1])["message"] == "one"


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (b"\x01" * (1 << 20) + b"\n" + b"\n" * 100, ["--format", "ecs"]),
        (b"\xff" * (3 << 20), []),
        (b"\n" * (32 << 10), ["--format", "ecs", "--field", f"x={'y' * 1000}"]),
        (b"\n" * 300, ["--format", "ecs", "--field", f"x={'y' * 100_000}"]),
        (b"\0" * (1 << 20) + b"\xff" + b"\n" * 999, ["--field", "x=" + "\\" * 60_000]),
        (b"\x01" * 200_000 + b"\n", ["--format", "raw", "--max-line", "4"]),
    ],
    ids=["long line", "no UTF-8", "empty lines", "long fields", "both", "raw pieces"],
)
def test_blocks_stay_within_the_protocol_however_the_lines_grow(start, endpoint, data, options):
    child = start(ZMQPULL, "-a", endpoint, "--to", os.devnull)
    done = push("--ack", "-c", endpoint, "--timeout", PATIENCE / 2, *options, data=data)
    child.terminate()
    _, _, err = finish(child)

    assert done.returncode == 0, done
    told = b"zmqpull: %d records written" % sent(done)
    if "raw" in options:
        told += b", %d of them were no JSON object" % sent(done)
    assert err == told + b"\n"


@pytest.mark.parametrize(("options", "code"), [(["--ack"], 69), (["--spool", "{spool}"], 75)])
def test_the_time_limit_tells_what_became_of_the_rest(spool, options, code):
    args = [word.format(spool=spool) for word in options]
    done = push(*args, "-c", NOBODY, "--timeout", "0.2", data=b"1\n2\n")

    assert (done.returncode, sent(done)) == (code, 0)
    line = b"0 dropped, 2 lost" if code == 69 else b"0 dropped, 0 lost, 2 left in the spool"
    assert done.stderr == b"zmqpush: gave up after 0.2 s without delivery\nzmqpush: %s\n" % line


@pytest.mark.parametrize("signals", [1, 2])
@pytest.mark.parametrize("spooled", [False, True])
def test_a_signal_without_a_receiver_leaves_the_rest_in_the_spool(start, spool, signals, spooled):
    store = ["--spool", spool] if spooled else ["--ack"]
    grace = 10 * PATIENCE if signals == 2 else 0.5
    child = start(ZMQPUSH, *store, "-c", NOBODY, "--grace", grace)
    feed(child, b"1\n2\n")
    wait_until(lambda: statistics(child)[0] == 2)
    child.send_signal(signal.SIGTERM)
    if signals == 2:
        assert statistics(child)[0] == 2  # so the first one was taken
        child.send_signal(signal.SIGTERM)
    code, out, err = finish(child)

    assert (code, SUMMARY.fullmatch(out)[1]) == (75 if spooled else 1, b"0")
    assert losses(err) == (0, 0) if spooled else (0, 2)
    assert (b"zmqpush: 0 dropped, 0 lost, 2 left in the spool\n" in err) == spooled


def test_the_next_run_delivers_what_is_left_first(start, spool, endpoint, tmp_path):
    fill_spool(spool)
    fill_spool(spool, b"3\n")
    start(ZMQPULL, "-qa", endpoint, "--to", tmp_path / "all")
    done = push("--spool", spool, "-c", endpoint, "other", data=b"4\n")

    assert (done.returncode, sent(done), losses(done.stderr)) == (0, 4, (0, 0))
    assert messages(tmp_path / "all") == ["1", "2", "3", "4"]


def test_one_endpoint_after_the_other_is_tried(start, endpoint, tmp_path):
    start(ZMQPULL, "-qa", endpoint, "--to", tmp_path / "all")
    child = start(ZMQPUSH, "--ack", "-c", NOBODY, "-c", f"ipc://{tmp_path}/no", "-c", endpoint)
    feed(child, b"1\n")
    child.stdin.close()

    assert child.wait(PATIENCE) == 0
    assert f"zmqpush: sending to {endpoint} now\n".encode() in child.stderr.read()
    assert messages(tmp_path / "all") == ["1"]


@pytest.mark.parametrize("spooled", [False, True])
def test_a_rolling_restart_loses_and_doubles_nothing(start, tmp_path, spool, spooled):
    names = [tmp_path / name for name in "ab"]
    endpoints = [f"ipc://{name}.socket" for name in names]

    def restart(at):
        state = tmp_path / f"state{at}"
        child = start(ZMQPULL, "-qa", endpoints[at], "--to", names[at], "--state", state)
        wait_until_ready(child)
        wait_until(names[at].exists)
        return child

    receivers = [restart(0), restart(1)]
    store = ["--spool", spool] if spooled else ["--ack"]
    child = start(ZMQPUSH, *store, "-c", endpoints[0], "-c", endpoints[1], "--format", "raw")
    stop = threading.Event()
    written = 0

    def write():
        nonlocal written
        while not stop.is_set():
            written += 1
            try:
                feed(child, b'{"n":%d}\n' % written)
            except BrokenPipeError:
                return
        child.stdin.close()

    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    for _ in range(4):
        before = [path.stat().st_size for path in names]
        # Where it goes on: on a busy machine it may have turned back.
        wait_until(lambda before=before: [p.stat().st_size for p in names] != before)
        at = int(names[1].stat().st_size > before[1])
        receivers[at].terminate()
        assert finish(receivers[at])[::2] == (0, b"")
        receivers[at] = restart(at)
    stop.set()
    writing.join(PATIENCE)
    child.stdin = None
    code, out, _ = finish(child)
    lines = [line for path in names for line in path.read_bytes().splitlines()]

    assert (code, SUMMARY.fullmatch(out)[1]) == (0, b"%d" % written)
    assert sorted(json.loads(line)["n"] for line in lines) == list(range(1, written + 1))
    assert all(path.stat().st_size for path in names)


def test_spread_orders_the_receivers_by_the_stream(start, tmp_path):
    endpoints = [f"ipc://{tmp_path}/{name}" for name in "ab"]
    options = [word for endpoint in endpoints for word in ("-c", endpoint)]
    for endpoint in endpoints:
        start(ZMQPULL, "-qa", endpoint, "--to", f"{endpoint.removeprefix('ipc://')}.out")
    for run in range(2):
        for number in range(12):
            spool = tmp_path / f"spool{number}"
            text = b"%d.%d\n" % (number, run)
            done = push("--spool", spool, "--spread", *options, data=text)
            assert (done.returncode, losses(done.stderr)) == (0, (0, 0))
    each = [messages(tmp_path / f"{name}.out") for name in "ab"]

    assert all(each)  # one in 2000 runs fails
    for got in each:
        assert [m[:-2] for m in got if m.endswith(".0")] == [
            m[:-2] for m in got if m.endswith(".1")
        ]


@pytest.mark.parametrize("policy", ["drop-oldest", "drop-newest"])
def test_what_the_queue_has_no_room_for_is_dropped_and_counted(start, endpoint, tmp_path, policy):
    total = 50_000
    options = ("--queue-max", "256KiB", "--when-full", policy)
    child = start(ZMQPUSH, "--ack", "-c", endpoint, *options)
    feed(child, NUMBERS)
    wait_until(lambda: statistics(child)[0] == total)
    read, acked, queued, dropped = statistics(child)
    start(ZMQPULL, "-qa", endpoint, "--to", tmp_path / "all")
    child.stdin.close()
    code = child.wait(PATIENCE)
    got = list(map(int, messages(tmp_path / "all")))

    assert (read, acked, code) == (total, 0, 1)
    assert queued + dropped == total
    assert losses(child.stderr.read()) == (dropped, 0)
    assert SUMMARY.fullmatch(child.stdout.read())[1] == b"%d" % queued
    kept = range(dropped + 1, total + 1) if policy == "drop-oldest" else range(1, queued + 1)
    assert got == list(kept)


def test_the_last_line_waits_for_room_on_the_disk_too(start, endpoint, spool, tmp_path):
    start(ZMQPULL, "-qa", endpoint, "--to", tmp_path / "all")
    command = f"ulimit -S -f 8; exec {ZMQPUSH} --spool {spool} -c {endpoint}"
    child = start("bash", "-c", command)
    feed(child, b"a" * 20_000)  # no newline: it comes with the end of the input
    child.stdin.close()
    child.stdin = None
    while b"the spool is full" not in child.stderr.readline():
        pass  # the receiver may have been slow to come
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    code, out, _ = finish(child)
    assert (code, SUMMARY.fullmatch(out)[1]) == (0, b"1")


@pytest.mark.parametrize("senders", [1, 3])
@pytest.mark.parametrize(
    ("pushing", "pulling"),
    [
        ((), ("--memory", "1MiB")),
        (("--queue-max", 1), ()),
        (("--spool", "{spool}", "--spool-max", "1MiB"), ()),
        (("--max-line", 4, "--format", "json"), ("--memory", "1MiB")),
    ],
)
def test_the_smallest_bounds_let_the_largest_blocks_through(
    start, endpoint, tmp_path, senders, pushing, pulling
):
    """Lines that are six times as long once they are escaped: each sender delivers all."""
    path = tmp_path / "all"
    receiver = start(ZMQPULL, "-a", endpoint, "--to", path, *pulling)
    data = tmp_path / "data"
    longest = 1 << (14 if "--max-line" in pushing else 20)  # each piece is a block there
    data.write_bytes((b"\x01" * longest + b"\n") * 4)
    children = []
    for number in range(senders):
        spool = tmp_path / f"spool{number}"
        args = [str(word).format(spool=spool) for word in pushing]
        with data.open("rb") as file:
            children.append(start(ZMQPUSH, "--ack", "-c", endpoint, *args, stdin=file))
    codes = [child.wait(PATIENCE) for child in children]
    receiver.terminate()
    finish(receiver)
    pieces = path.read_bytes().count(rb"\u0001")

    assert codes == [0] * senders
    assert pieces == senders * data.read_bytes().count(b"\x01")


@pytest.mark.parametrize("options", [("--grace", 0), ("--timeout", 0)])
@pytest.mark.parametrize("away", [False, True])
def test_no_patience_at_all_ends_it_and_accounts_for_all(start, endpoint, spool, options, away):
    if not away:
        start(ZMQPULL, "-qa", endpoint, "--to", os.devnull)
    child = start(ZMQPUSH, "--spool", spool, "-c", NOBODY if away else endpoint, *options)
    feed(child, NUMBERS)
    wait_until(lambda: statistics(child)[0] == 50_000)
    if "--grace" in options:
        child.terminate()
    code, out, err = finish(child)
    left = re.search(rb"0 dropped, 0 lost, (\d+) left in the spool\n", err)

    assert int(SUMMARY.fullmatch(out)[1]) + (int(left[1]) if left else 0) == 50_000
    assert code == (75 if left else 0)
    assert left or not away


# What cannot be used.


def a_file(spool):
    spool.touch()


def foreign(spool):
    spool.mkdir()
    (spool / "notes").touch()


def below_a_file(spool):
    spool.parent.rmdir()
    spool.parent.touch()


@pytest.mark.parametrize("option", [(), ("--spool-status",)])
@pytest.mark.parametrize(
    ("trouble", "code", "line"),
    [
        (a_file, 2, "zmqpush: --spool: Directory '{}' is a file; see zmqpush --help"),
        (foreign, 78, "zmqpush: {} is no spool: it holds 'notes'"),
        (below_a_file, 74, "zmqpush: cannot use the spool {0}: {0}: Not a directory"),
    ],
)
def test_a_spool_that_cannot_be_used_is_told_in_one_line(tmp_path, option, trouble, code, line):
    spool = tmp_path / "above" / "spool"
    spool.parent.mkdir()
    trouble(spool)
    done = push("--spool", spool, "-c", NOBODY, *option, data=b"1\n")

    assert (done.returncode, done.stdout) == (code, b"")
    assert done.stderr.decode() == line.format(spool) + "\n"


def test_a_spool_in_use_is_told_with_the_process(start, spool):
    child = start(ZMQPUSH, "--spool", spool, "-c", NOBODY)
    feed(child, b"1\n")
    wait_until(lambda: statistics(child)[0] == 1)
    done = push("--spool", spool, "-c", NOBODY, data=b"2\n")
    told = status(spool)

    line = (
        b"zmqpush: the spool %s is in use by process %d: give this one a --spool of its own, "
        b"or --spool-slots 2 to each\n"
    ) % (bytes(spool), child.pid)
    assert (done.returncode, done.stdout, done.stderr) == (73, b"", line)
    assert told.stdout.endswith(b", in use by process %d\n" % child.pid)


def test_the_status_of_a_spool(spool):
    assert status(spool).returncode == 74
    assert not spool.exists()
    fill_spool(spool)
    size = sum(path.stat().st_size for path in (spool / "0").glob("*.seg2"))
    done = status(spool)

    line = b"%s/0: 2 records to be acknowledged, 1 segments, %d bytes"
    line += b", the first of type 'syslog' from '%s'\n"
    line %= bytes(spool), size, socket.gethostname().encode()
    assert (done.returncode, done.stdout, done.stderr) == (0, line, b"")
    secret = json.loads((spool / "0" / "meta").read_bytes())["secret"]
    assert secret.encode() not in done.stdout


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--spool x --spool-max 1MB1", "'1MB1' is not a size"),
        ("--spool x --spool-max 1023KiB", "'1023KiB' is too small for a spool"),
        ("--spool x --spool-slots 65", "not a number of processes from 1 to 64"),
        ("--spool x --sync always", "'always' is not one of"),
        ("--ack --bind tcp://127.0.0.1:5999", "needs receivers to connect to, not --bind"),
        ("--ack --framing lines", "--framing is for receivers that do not acknowledge"),
        ("--ack --format raw --delimiter ;", "needs lines that end with a newline"),
        ("--ack --format raw --null", "needs lines that end with a newline"),
        ("--ack --max-line 2MiB", "--max-line can be 1MiB with --ack"),
        ("--spool x --max-line 2MiB", "--max-line can be 1MiB with --ack"),
        ("--spread", "--spread orders the receivers of --ack"),
        ("--spool-status", "--spool-status needs --spool"),
    ],
)
def test_options_that_exclude_each_other_are_told(tmp_path, options, line):
    done = push(*options.split(), cwd=tmp_path)

    assert (done.returncode, done.stdout) == (2, b"")
    assert line in done.stderr.decode().splitlines()[-1]
    assert not list(tmp_path.iterdir())


# Peers that are no zmqpull.


@contextlib.contextmanager
def answering(answer):
    """Listen as a web server would; `answer` is what it says."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection = server.accept()[0]
                    with connection:
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def replying(kind, *replies):
    """Listen with a socket that answers all it hears."""
    with bare(kind, "tcp://127.0.0.1:*") as peer:
        ended = threading.Event()

        def serve():
            while not ended.is_set():
                if kind == zmq.ROUTER and peer.poll(10):
                    name = peer.recv_multipart()[0]
                    for reply in replies:
                        peer.send_multipart((name, reply))

        thread = threading.Thread(target=serve)
        thread.start()
        yield peer.last_endpoint.decode()
        ended.set()
        thread.join()


STRANGERS = {
    "a web server": lambda: answering(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "silence": lambda: replying(zmq.ROUTER),
    "garbage": lambda: replying(zmq.ROUTER, b"", b"x" * 100, encode(Ack(7, 7, 7), 0)),
    "another kind of socket": lambda: replying(zmq.PULL),
    "an error": lambda: replying(zmq.ROUTER, encode(Error(505, "not like this"), 0)),
    "resets": lambda: replying(zmq.ROUTER, encode(Reset(404, "who?"), 0)),
}


def processor_time(child):
    fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_peer_that_is_no_receiver_costs_nothing(start, stranger):
    with STRANGERS[stranger]() as endpoint:
        child = start(ZMQPUSH, "--ack", "-c", endpoint, "--grace", 0)
        feed(child, b"1\n")
        while b"no receiver acknowledges" not in (line := child.stderr.readline()):
            assert (b": it refuses: not like this (505)" in line) == (stranger == "an error")
        before = processor_time(child)
        time.sleep(0.5)
        used = processor_time(child) - before
        child.terminate()
        code, _, err = finish(child)

    assert used < 0.25
    assert (code, err) == (1, b"zmqpush: 0 dropped, 1 lost\n")


def test_what_a_peer_says_is_told_in_one_harmless_line(start):
    with replying(zmq.ROUTER, encode(Error(505, "no\n\x1b[2J"), 0)) as endpoint:
        child = start(ZMQPUSH, "--ack", "-c", endpoint, "--grace", 0)
        while b"it refuses" not in (line := child.stderr.readline()):
            pass

    assert b" (505); " in line
    assert b"\x1b" not in line


def test_after_a_refusal_the_next_receiver_is_tried_at_once(start, endpoint):
    start(ZMQPULL, "-qa", endpoint)
    with replying(zmq.ROUTER, encode(Error(505, "no"), 0)) as refusing:
        done = push("--ack", "-c", refusing, "-c", endpoint, "--timeout", "5", data=b"1\n")

    assert (done.returncode, sent(done)) == (0, 1)


# zmqpull among hostile peers.

HEADER = encode(Ping(), 0)
GREETING = encode(Hello({}), 0)[:16]
HELLO = {"versions": [2, 2], "secret": "ab" * 16, "run": "cd" * 16, "first": 1}
HELLOS = [
    *({**HELLO, key: value} for key in HELLO for value in (None, 0, -1, "", [], {}, True, 1 << 63)),
    *(
        {**HELLO, key: value}
        for key in ("type", "host", "raw", "was")
        for value in (1, "x" * 257, None)
    ),
    {**HELLO, "versions": [3, 9]},
]
GARBAGE = [
    b"",
    b"ZP",
    b"GET / HTTP/1.1\r\n\r\n",
    *(HEADER[:at] + b"\xff" + HEADER[at + 1 :] for at in range(8)),
    *(encode(Hello(values), 0) for values in HELLOS),
    GREETING + b"[" * 4000,
    GREETING + b"9" * 4096,
    GREETING + b'{"versions":[2,2],"secret":"\\ud800"}',
    *(
        encode(message, 77)
        for message in (Data.of(1, 1, b"1\n"), Skip(1, 1, 1), Ping(), Goodbye(), Ack(1, 1, 1))
    ),
]


def test_garbage_on_the_port_is_survived_and_counted(start, endpoint):
    child = start(ZMQPULL, "-a", endpoint)
    with bare(zmq.DEALER, endpoint) as hostile:
        for frame in GARBAGE:
            hostile.send(frame)
        hostile.send(HEADER)
        while receive(hostile, Reset)[1]:
            pass  # until the last one is answered
        done = push("--ack", "-c", endpoint, data=b"1\n")
        child.terminate()
        code, out, err = finish(child)

    assert (done.returncode, sent(done)) == (0, 1)
    assert (code, json.loads(out)["message"]) == (0, "1")
    told, total = err.splitlines()[0], err.splitlines()[-1]
    assert re.fullmatch(rb"zmqpull: \d+ frames were refused: they break the protocol", told)
    assert re.fullmatch(rb"zmqpull: 1 records written, \d+ frames were refused", total)


def test_a_message_of_several_frames_ends_its_connection(start, endpoint):
    child = start(ZMQPULL, "-a", endpoint)
    with bare(zmq.DEALER, endpoint) as hostile:
        greet(hostile)
        hostile.send_multipart((HEADER, HEADER))
        assert child.stderr.readline().endswith(b": a message of several parts\n")
    child.terminate()

    assert finish(child)[2].endswith(b"zmqpull: 0 records written, 1 frames were refused\n")


def test_in_a_session_what_is_wrong_resets_it_and_nothing_of_it_is_written(start, endpoint):
    child = start(ZMQPULL, "-a", endpoint)
    good = Data.of(1, 1, b"1\n")
    wrong = {
        400: [good._replace(crc=0), good._replace(payload=b"1"), good._replace(records=3)],
        412: [Data.of(2, 1, b"2\n"), Skip(5, 1, 1)],
    }
    with bare(zmq.DEALER, endpoint) as peer:
        for code, blocks in wrong.items():
            for block in blocks:
                _, session = greet(peer)
                peer.send(encode(block, session))
                reset, answered = receive(peer, Reset)
                assert (reset.code, answered) == (code, session)
        deliver(peer, greet(peer)[1], 1, b"1")
    child.terminate()

    assert finish(child)[1] == b"1\n"


# The ends of zmqpull.


def test_a_count_of_records_ends_it_and_what_is_written_is_acknowledged(start, endpoint):
    child = start(ZMQPULL, "-a", endpoint, "-n", 3)
    shipping = start(ZMQPUSH, "--ack", "-c", endpoint, "--format", "raw")
    for number in (1, 2, 3):
        feed(shipping, b'{"n":%d}\n' % number)
        assert child.stdout.readline() == b'{"n":%d}\n' % number

    assert finish(child) == (0, b"", b"zmqpull: 3 records written\n")
    assert finish(shipping)[0] == 0


def test_with_a_count_of_records_the_last_block_is_written_to_its_end(start, endpoint):
    child = start(ZMQPULL, "-a", endpoint, "-n", 3)
    with bare(zmq.DEALER, endpoint) as peer:
        deliver(peer, greet(peer)[1], 1, b"1", b"2", b"3", b"4", b"5")

    assert finish(child)[1] == b"1\n2\n3\n4\n5\n"


def test_it_ends_quietly_when_its_reader_goes_and_the_rest_stays_with_the_sender(
    start, endpoint, spool, tmp_path
):
    child = start("sh", "-c", f"{ZMQPULL} -qa {endpoint} | head -1")
    shipping = start(ZMQPUSH, "-q", "--spool", spool, "-c", endpoint, "--format", "raw")
    lines = [b'{"n":%d}\n' % number for number in (1, 2, 3)]
    feed(shipping, lines[0])
    assert finish(child) == (0, lines[0], b"")
    feed(shipping, b"".join(lines[1:]))
    again = start(ZMQPULL, "-qa", endpoint, "--to", tmp_path / "all")

    assert finish(shipping)[0] == 0
    again.terminate()
    assert finish(again)[0] == 0
    assert (tmp_path / "all").read_bytes() in (b"".join(lines[1:]), b"".join(lines))


def test_a_sender_that_is_stopped_does_not_keep_it_from_ending(start, endpoint, tmp_path):
    child = start(ZMQPULL, "-a", endpoint, "--to", tmp_path / "all", "--grace", 1)
    shipping = start(ZMQPUSH, "--ack", "-c", endpoint)
    feed(shipping, b"1\n")
    wait_until(lambda: statistics(shipping)[1] == 1)
    shipping.send_signal(signal.SIGSTOP)
    child.terminate()

    assert finish(child)[::2] == (0, b"zmqpull: 1 records written\n")


def test_a_hangup_while_it_takes_leave_changes_nothing(start, endpoint, tmp_path):
    options = ("--to", tmp_path / "to/{type}", "--state", tmp_path / "state")
    child = start(ZMQPULL, "-a", endpoint, *options)
    with bare(zmq.DEALER, endpoint) as peer:
        deliver(peer, greet(peer)[1], 1, b"1")
        child.terminate()
        receive(peer, Goodbye)  # and no answer
        child.send_signal(signal.SIGHUP)
        code, _, err = finish(child)

    assert (code, err) == (0, b"zmqpull: 1 records written\n" * 2)


# An idle process.


@pytest.mark.slow
@pytest.mark.parametrize("away", [False, True])
def test_an_idle_sender_wakes_up_no_more_than_once_a_second(start, endpoint, tmp_path, away):
    child = start(ZMQPUSH, "--ack", "-c", NOBODY if away else endpoint)
    feed(child, b"1\n")
    if not away:
        start(ZMQPULL, "-qa", endpoint, "--to", tmp_path / "all")
        wait_until(lambda: statistics(child)[1] == 1)
    else:
        assert b"no receiver" in child.stderr.readline()

    def wake_ups():
        tasks = Path(f"/proc/{child.pid}/task").glob("*/status")
        found = (re.search(r"\nvoluntary_ctxt_switches:\s+(\d+)", t.read_text()) for t in tasks)
        return sum(int(match[1]) for match in found)

    before = wake_ups()
    time.sleep(10)
    # While the receiver is away libzmq's own thread connects again, too.
    assert wake_ups() - before <= (40 if away else 10)
