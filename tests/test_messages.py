"""What is in messages, large ones above all, as the installed programs take it."""

import json
import re
import signal
from pathlib import Path

import pytest
import zmq

from helpers import PATIENCE, ZMQPULL, push, sent, wait_until
from hostile import peak_memory
from peers import bare, deliver, greet, receive
from test_pull import finish
from zmqpush.core.protocol.messages import Ack, Data, Reset, encode

SIZE = 8 << 20
RECORD = b'{"type":"web","host":"a","message":"%s"}' % (b"x" * 60)
# Messages that are much larger than what is taken at a time, and how many records they hold.
LARGE = {
    "lines": (b"{}\n" * (SIZE // 3), SIZE // 3),
    "an array": (b"[%s{}]" % (b"{}," * (SIZE // 12)), SIZE // 12 + 1),
    "an array of arrays": (b"[%s{}]" % (b'{"a":[{},[]]},' * (SIZE // 60)), SIZE // 60 + 1),
    "an array of one": (b'[{"a":[%s0]}]' % (b"{}," * (SIZE // 3)), 1),
    "one record": (b'{"a":[%s0]}' % (b"0,{}," * (SIZE // 5)), 1),
    "one record of several lines": (b'{\n"a":[\n%s0]}\n' % (b"{},\n" * (SIZE // 4)), 1),
    "lines of text": (b"text\n" * (SIZE // 40), SIZE // 40),
    "a text": (b"\xff" * (SIZE // 8), 1),
    "records": ((RECORD + b"\n") * (SIZE // 100), SIZE // 100),
}


@pytest.fixture
def endpoint(tmp_path):
    return f"ipc://{tmp_path}/socket"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "all"


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("message", "count"), LARGE.values(), ids=LARGE)
def test_a_large_message_takes_a_small_multiple_of_its_size(
    start, endpoint, tmp_path, message, count, labelled
):
    child = start(ZMQPULL, "-b", endpoint, "--to", tmp_path / ("{type}" if labelled else "all"))
    with bare(zmq.PUSH, endpoint) as peer:
        peer.send(b"{}")
        path = tmp_path / ("unknown" if labelled else "all")
        wait_until(lambda: size_of(path) == 3)
        before = peak_memory(child)
        peer.send(message)
        peer.send(b'{"type":"last"}')
        last = tmp_path / ("last" if labelled else "all")
        # Each needs time, but none needs memory.
        wait_until(lambda: last.exists() and last.read_bytes().endswith(b'{"type":"last"}\n'))
        peak = peak_memory(child)
    child.terminate()
    code, _, err = finish(child)

    assert (code, int(re.search(rb"(\d+) records written", err)[1])) == (0, count + 2)
    assert peak - before < 6 * max(len(message), size_of(path)) + (24 << 20)


def test_others_have_their_turn_while_a_large_message_is_checked(start, endpoint, path, tmp_path):
    message, count = LARGE["an array"]
    acked = f"ipc://{tmp_path}/acked"
    child = start(ZMQPULL, "-b", endpoint, "-a", acked, "--to", path)
    with bare(zmq.PUSH, endpoint) as peer, bare(zmq.DEALER, acked) as sender:
        _, session = greet(sender)
        peer.send(message)
        wait_until(lambda: size_of(path))
        deliver(sender, session, 1, b'{"from":"another"}')
        taken = size_of(path)
        wait_until(lambda: path.read_bytes().count(b"{}\n") == count)
    child.terminate()

    assert finish(child)[0] == 0
    assert taken < 3 * count


@pytest.mark.parametrize("signals", [1, 2])
def test_what_a_signal_leaves_of_a_large_message_is_counted(start, endpoint, path, signals):
    message, count = LARGE["an array"]
    child = start(ZMQPULL, "-b", endpoint, "--to", path, "--grace", 10 * PATIENCE / signals)
    with bare(zmq.PUSH, endpoint) as peer:
        peer.send(message)
        wait_until(lambda: size_of(path))
        for number in (signal.SIGTERM, signal.SIGINT)[:signals]:
            child.send_signal(number)
        code, _, err = finish(child)
    written = path.read_bytes().count(b"\n")

    assert int(re.search(rb"(\d+) records written", err)[1]) == written
    if signals == 1:
        assert (code, written) == (0, count)
    else:
        assert code == 74
        assert written < count
        assert int(re.search(rb"(\d+) lost", err)[1]) == count - written


@pytest.mark.parametrize("wanted", [1, 100_003])
@pytest.mark.parametrize("form", ["lines", "an array", "lines of text"])
def test_a_count_ends_within_a_large_message(start, endpoint, path, form, wanted):
    child = start(ZMQPULL, "-b", endpoint, "--to", path, "-n", wanted)
    with bare(zmq.PUSH, endpoint) as peer:
        peer.send_multipart([LARGE[form][0], b"more"])
        code, _, err = finish(child)
    text = b"" if form != "lines of text" else b", %d of them were no JSON object" % wanted
    assert (code, err) == (0, b"zmqpull: %d records written%s\n" % (wanted, text))
    assert path.read_bytes().count(b"\n") == wanted


# Bytes that are not UTF-8.


@pytest.mark.parametrize("framing", ["single", "frames", "lines"])
def test_a_record_with_a_byte_that_is_not_utf8_keeps_its_fields(start, endpoint, path, framing):
    records = [b'{"n":1,"level":"x"}', b'{"n":2,"level":"\xff"}', b'{"n":3}', b'{"n":\xff}']
    child = start(ZMQPULL, "-b", endpoint, "--to", path, "-n", len(records))
    options = ("--format", "raw", "--framing", framing)
    assert sent(push("-c", endpoint, *options, data=b"\n".join(records))) == len(records)
    _, _, err = finish(child)

    bad = rb'{"n":2,"level":"\\xff"}', rb'{"message":"{\"n\":\\xff}"}'
    assert path.read_bytes().splitlines() == [records[0], bad[0], records[2], bad[1]]
    assert b": 4 records written, 1 of them were no JSON object, 2 bytes were not UTF-8\n" in err


# What acknowledged senders say.


def test_raw_lines_become_the_same_records_with_and_without_acknowledgements(start, tmp_path):
    data = b'{"a":1}\nplain text\n\n{"a":"\xff"}\n\xff\n{"b":[1,2]}\r\n"text"\n1\n{"a":\n'
    results = []
    for option, ways in (("-b", ["--framing", "lines"]), ("-a", ["--ack"])):
        endpoint, path = f"ipc://{tmp_path}/{option}", tmp_path / f"all{option}"
        child = start(ZMQPULL, option, endpoint, "--to", path)
        done = push("-c", endpoint, "--format", "raw", *ways, data=data)
        assert (done.returncode, sent(done)) == (0, data.count(b"\n"))
        child.terminate()
        results.append((path.read_bytes(), finish(child)[2]))

    assert results[0] == results[1]
    assert [type(json.loads(line)) for line in results[0][0].splitlines()] == [dict] * 9
    assert (
        b"9 records written, 6 of them were no JSON object, 2 bytes were not UTF-8" in results[0][1]
    )


def test_a_raw_line_with_an_array_stays_one_record(start, endpoint, path):
    child = start(ZMQPULL, "-a", endpoint, "--to", path)
    done = push("--ack", "-c", endpoint, "--format", "raw", data=b'[{"a":1},{"a":2}]\n{"a":3}\n')
    child.terminate()
    finish(child)

    assert sent(done) == 2
    assert path.read_bytes() == b'{"message":"[{\\"a\\":1},{\\"a\\":2}]"}\n{"a":3}\n'


def test_a_large_raw_block_leaves_others_their_turns(start, endpoint, path):
    child = start(ZMQPULL, "-a", endpoint, "--to", path)
    lines = 1 << 19
    with bare(zmq.DEALER, endpoint) as peer, bare(zmq.DEALER, endpoint) as other:
        _, session = greet(peer, raw=True)
        _, theirs = greet(other, "ef" * 16)
        peer.send(encode(Data.of(1, lines, b"\n" * lines), session))
        deliver(other, theirs, 1, b"{}")  # first, or with it, or after it
        while receive(peer, Ack)[0].acked < lines:  # more would be beyond the credit
            pass
        deliver(peer, session, lines + 1, b"last")
    child.terminate()

    assert finish(child)[0] == 0
    records = path.read_bytes().splitlines()
    assert records.count(b'{"message":""}') == lines
    assert records[-1] == b'{"message":"last"}'


@pytest.mark.parametrize(
    ("count", "payload"), [(3, b"{}\n{}\n"), (1, b"{}\n{}\n"), (5, b"12345\n")]
)
def test_a_block_that_lies_about_its_records_is_refused(start, endpoint, path, count, payload):
    child = start(ZMQPULL, "-a", endpoint, "--to", path)
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer)
        deliver(peer, session, 1, b"{}")
        peer.send(encode(Data.of(2, count, payload), session))
        reset, _ = receive(peer, Reset)
        welcome, session = greet(peer)
        deliver(peer, session, 2, b"{}", b"{}")
    child.terminate()

    assert (reset.code, welcome["acked"]) == (400, 1)
    told = finish(child)[2].splitlines()
    assert told[-1] == b"zmqpull: 3 records written, 2 frames were refused"
    assert path.read_bytes() == b"{}\n" * 3
