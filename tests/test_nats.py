"""JetStream behind zmqpull: a real nats-server, killed, hung, full, and read by another client."""

import json
import os
import random
import re
import time

import pytest
import zmq

import engines
from chaos import (
    DOSE,
    Pipeline,
    compare,
    end,
    kill,
    killed,
    lines,
    number_of,
    resident_bytes,
    spooled,
)
from engines import certificate, needs_nats, needs_openssl
from helpers import (
    BIN,
    PATIENCE,
    ZMQPULL,
    ZMQPUSH,
    lines_of,
    push,
    sent,
    wait_until,
    wait_until_ready,
)
from peers import bare, deliver, greet, receive
from proxy import Proxy
from test_acked import statistics
from test_docs import blocks
from test_pull import finish
from zmqpush.core.protocol.messages import Ack, Data, encode

nats_server = engines.nats_server
pytestmark = needs_nats

SUBJECT = "logs.{type}.{host}"
UNITS = pytest.mark.parametrize("unit", ["record", "block"])
ID = re.compile(r"(\w{32}):(\d+)(?:-\d+)?")
# Published again within this time, a message is known to the server by its name.
WINDOW = 0.2


class NatsPipeline(Pipeline):
    """A spool, a receiver with a state, and a stream of JetStream."""

    def __init__(self, start, directory, server):
        super().__init__(start, directory)
        self.server = server
        self.url = f"nats://127.0.0.1:{server.port}/{SUBJECT}"

    def receive(self, *options, fault="", command=(ZMQPULL,)):
        args = ("-a", self.endpoint, "--state", self.state, "--to", self.url, *options)
        return self._start(*command, *args, env=os.environ | {"ZMQPUSH_FAULT": fault})

    @property
    def records(self):
        """All records of the stream, in its order."""
        messages = self.server.messages("LOGS")
        return [r for message in messages for r in message.data.removesuffix(b"\n").split(b"\n")]

    @property
    def count(self):
        """How many messages are in the stream."""
        return self.server.do(lambda js: js.stream_info("LOGS")).state.messages

    def send_slowly(self):
        """Start a sender whose input waits while much is in its spool."""
        return self.send("--spool-max", "1MiB")

    def look_what_is_safe(self):
        safe = {*spooled(self.spool), *map(number_of, self.records)}
        self.fed = max(safe, default=0)
        assert len(safe) == self.fed

    def verify(self):
        lost, too_often = compare(map(number_of, self.records), range(1, self.fed + 1))
        assert (lost[:10], too_often[:10]) == ([], []), (self.fed, len(lost), len(too_often))


@pytest.fixture
def server(nats_server):
    """Return a nats-server with a stream."""
    server = nats_server()
    server.add_stream("LOGS", ["logs.>"])
    return server


@pytest.fixture
def pipeline(start, tmp_path, server):
    return NatsPipeline(start, tmp_path, server)


def told(child, text):
    """Return the line of standard error that holds a text; fail when it does not come."""
    while line := child.stderr.readline():
        if text in line:
            return line
    raise AssertionError(f"{text!r} was not told")


def stop(receiver):
    """End a receiver in order; return what it says."""
    wait_until_ready(receiver)
    receiver.terminate()
    code, out, err = finish(receiver)
    assert (code, out) == (0, b""), err
    return err


# What arrives.


@UNITS
def test_every_record_arrives_once_with_a_name(pipeline, unit):
    receiver = pipeline.receive("-X", f"unit={unit}")
    sender = pipeline.send("web")
    pipeline.put(sender, 20_000)
    assert end(sender, read=20_000) == (20_000, 0, 0, 0)
    told = b"zmqpull: 20000 records written, 20000 of them were no JSON object\n"
    assert stop(receiver) == told

    messages = pipeline.server.messages("LOGS")
    assert lines_of(pipeline.records) == lines(range(1, 20_001)).splitlines()
    assert {message.subject for message in messages} == {f"logs.web.{os.uname().nodename}"}
    numbers = []
    for message in messages:
        records = message.data.count(b"\n") or 1
        assert message.data.endswith(b"\n") == (unit == "block")
        assert message.headers.get("Records") == (str(records) if unit == "block" else None)
        name = message.headers["Nats-Msg-Id"]
        first = ID.fullmatch(name)[2]
        assert name.endswith(f"-{int(first) + records - 1}" if records > 1 else first)
        numbers += range(int(first), int(first) + records)
    assert numbers == [*range(1, 20_001)]
    assert len({ID.fullmatch(m.headers["Nats-Msg-Id"])[1] for m in messages}) == 1


@UNITS
def test_plain_records_arrive_too(start, server, tmp_path, unit):
    to = f"{server.url}/logs.{{type}}"
    endpoint = f"ipc://{tmp_path}/socket"
    receiver = start(ZMQPULL, "-b", endpoint, "--to", to, "-n", 3, "-X", f"unit={unit}")
    records = [b'{"type":"a","n":%d}' % number for number in range(3)]
    with bare(zmq.PUSH, endpoint) as peer:
        peer.send(b"\n".join(records))
        assert finish(receiver) == (0, b"", b"zmqpull: 3 records written\n")

    messages = server.messages("LOGS")
    assert b"\n".join(m.data.removesuffix(b"\n") for m in messages).splitlines() == records
    assert {message.subject for message in messages} == {"logs.a"}


LABELS = {
    "": "unknown",
    "a.b*c>d": "a_b_c_d",
    "a b\t\r\nc\0\x7f": "a_b___c__",
    "$JS": "_JS",
    "Müller": "Müller",
    "ü" * 256: "ü" * 100,
}


@pytest.mark.parametrize("label", LABELS)
def test_a_label_is_one_token_whatever_is_in_it(start, server, tmp_path, label):
    endpoint = f"ipc://{tmp_path}/socket"
    start(ZMQPULL, "-a", endpoint, "--to", f"{server.url}/logs.%Y.{{type}}.{{host}}")
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer, type=label, host="h")
        deliver(peer, session, 1, b"one")

    (message,) = server.messages("LOGS")
    assert message.subject == f"logs.{time.strftime('%Y')}.{LABELS[label]}.h"


def test_a_block_is_cut_at_records_where_the_server_takes_no_more(nats_server, start, tmp_path):
    server = nats_server(max_payload=4096)
    server.add_stream("LOGS", ["logs.>"])
    pipeline = NatsPipeline(start, tmp_path, server)
    receiver = pipeline.receive("-X", "unit=block")
    sender = pipeline.send()
    pipeline.put(sender, 5000)
    assert end(sender, read=5000) == (5000, 0, 0, 0)
    stop(receiver)

    sizes = [len(message.data) for message in server.messages("LOGS")]
    assert max(sizes) <= 4096 - 256
    assert len(sizes) < 2 * len(lines(range(5000))) / 3840
    pipeline.verify()


# Who dies.


@UNITS
def test_nothing_is_lost_or_repeated_whoever_is_killed(pipeline, unit):
    """Each of the three, again and again, in any order: lost 0, repeated 0."""
    rng = random.Random(1)
    victims = ["server", "receiver", "sender"] * DOSE.kills
    rng.shuffle(victims)
    receiver = pipeline.receive("-X", f"unit={unit}")
    sender = pipeline.send_slowly()
    feeder = pipeline.feed(sender)
    for victim in victims:
        before = pipeline.count
        wait_until(lambda before=before: pipeline.count > before)
        time.sleep(rng.uniform(0, 0.2))
        if victim == "server":
            pipeline.server.kill()
            pipeline.server.start()
        elif victim == "receiver":
            kill(receiver)
            receiver = pipeline.receive("-X", f"unit={unit}")
        else:
            kill(sender)
            feeder.stop()
            pipeline.look_what_is_safe()
            sender = pipeline.send_slowly()
            feeder = pipeline.feed(sender)
    count = feeder.stop() - pipeline.fed
    pipeline.fed += count
    _, err = sender.communicate(timeout=PATIENCE)

    assert sender.returncode == 0, err
    stop(receiver)
    pipeline.verify()


POINTS = ["engine-written", "engine-synced", "state-committed", "written"]


@pytest.mark.parametrize("passage", DOSE.passages)
@pytest.mark.parametrize("point", POINTS)
def test_a_receiver_may_die_at_any_point(pipeline, point, passage):
    pipeline.server.update_stream("LOGS", duplicate_window=WINDOW)
    receiver = pipeline.receive(fault=f"{point}:{passage}")
    sender = pipeline.send_slowly()
    feeder = pipeline.feed(sender)
    assert killed(receiver)
    time.sleep(2 * WINDOW)
    assert killed(pipeline.receive(fault=f"{point}:2"))
    time.sleep(2 * WINDOW)
    receiver = pipeline.receive()
    pipeline.fed = feeder.stop()

    assert end(sender, read=pipeline.fed) == (pipeline.fed, 0, 0, 0)
    stop(receiver)
    pipeline.verify()


def test_a_block_that_is_there_in_part_goes_on_without_a_spool(pipeline):
    receiver = pipeline.receive(fault="engine-written:3")
    sender = pipeline._start(ZMQPUSH, "--ack", "-c", pipeline.endpoint, "--format", "raw")
    pipeline.put(sender, 1000)
    assert killed(receiver)
    receiver = pipeline.receive()
    assert end(sender, read=1000) == (1000, 0, 0, 0)
    stop(receiver)

    pipeline.verify()


def test_a_name_that_the_server_knows_stands_for_these_records_only(start, server, tmp_path):
    """Killed without a state, and then the same records cut in another way: none is lost."""
    endpoint = f"ipc://{tmp_path}/socket"
    args = ("-qa", endpoint, "--to", f"nats://127.0.0.1:{server.port}/logs.x")
    receiver = start(ZMQPULL, *args, env=os.environ | {"ZMQPUSH_FAULT": "engine-written"})
    options = ("-c", endpoint, "--spool", tmp_path / "spool", "--format", "raw", "web")
    sender = start(ZMQPUSH, *options)
    sender.stdin.write(b"".join(b"%d\n" % number for number in range(200)))
    sender.stdin.close()
    assert killed(receiver)
    wait_until(lambda: server.messages("LOGS"))
    receiver = start(ZMQPULL, *args, "-X", "unit=block")
    assert sender.wait(PATIENCE) == 0

    records = [r for m in server.messages("LOGS") for r in m.data.split()]
    assert {*lines_of(records)} == {b"%d" % number for number in range(200)}


@pytest.mark.parametrize("elsewhere", ["a file", "a stream made anew"])
def test_what_one_place_held_is_not_taken_for_there_in_another(pipeline, tmp_path, elsewhere):
    receiver = pipeline.receive(fault="engine-synced")
    with bare(zmq.DEALER, pipeline.endpoint) as peer:
        _, session = greet(peer)
        peer.send(encode(Data.of(1, 1, b"one\n"), session))
        assert killed(receiver)
    stop(pipeline.receive())  # has remembered what it found
    if elsewhere == "a file":
        pipeline.url = tmp_path / "file"
    else:
        pipeline.server.do(lambda js: js.delete_stream("LOGS"))
        pipeline.server.add_stream("LOGS", ["logs.>"])
    receiver = pipeline.receive()
    with bare(zmq.DEALER, pipeline.endpoint) as peer:
        welcome, session = greet(peer)
        deliver(peer, session, 1, b"one")
    stop(receiver)

    assert welcome["acked"] == 0
    there = (tmp_path / "file").read_bytes().split() if elsewhere == "a file" else pipeline.records
    assert there == [b"one"]


def test_one_answer_that_is_lost_holds_nothing_up_while_others_come(start, server, tmp_path):
    endpoint, plain = f"ipc://{tmp_path}/socket", f"ipc://{tmp_path}/plain"
    lost = []

    def lose_one(data):
        if b"logs.x" in data and b"lost" in data and not lost:
            lost.append(data)
            return without_answers(data)
        return data

    with Proxy(server.port) as proxy:
        proxy.change = lose_one
        url = f"nats://127.0.0.1:{proxy.port}/logs.x"
        args = ("-a", endpoint, "-b", plain, "--to", url, "--state", tmp_path / "state")
        receiver = start(ZMQPULL, *args)
        with bare(zmq.DEALER, endpoint) as peer, bare(zmq.PUSH, plain) as other:
            _, session = greet(peer)
            peer.send(encode(Data.of(1, 1, b"lost\n"), session))

            def is_acknowledged():
                other.send(b"{}")
                time.sleep(0.1)
                return peer.poll(0) and receive(peer, Ack)[0].acked == 1

            wait_until(is_acknowledged)
        stop(receiver)

    assert lost
    assert [m.data for m in server.messages("LOGS")].count(b"lost") == 1


def without_answers(data):
    """Have the server answer somebody else."""
    return data.replace(b" _INBOX.", b" _INBOY.")


@UNITS
@pytest.mark.parametrize("dies", [False, True])
def test_what_the_server_has_forgotten_the_name_of_is_found_in_the_stream(pipeline, unit, dies):
    """Stored, no answer came, and an outage longer than the duplicate window: repeated 0."""
    pipeline.server.update_stream("LOGS", duplicate_window=WINDOW)
    with Proxy(pipeline.server.port) as proxy:
        pipeline.url = pipeline.url.replace(str(pipeline.server.port), str(proxy.port))
        receiver = pipeline.receive("-X", f"unit={unit}")
        sender = pipeline.send()
        pipeline.put(sender, 1000)
        wait_until(lambda: len(pipeline.records) == 1000)
        proxy.change = without_answers
        pipeline.put(sender, 1000)
        wait_until(lambda: len(pipeline.records) == 2000)
        time.sleep(2 * WINDOW)
        if dies:
            kill(receiver)
        proxy.change = None
        proxy.reset()
        if dies:
            receiver = pipeline.receive("-X", f"unit={unit}")
        assert end(sender, read=2000) == (2000, 0, 0, 0)
        stop(receiver)

    pipeline.verify()


def test_a_stream_that_is_made_anew_is_written_to_from_its_beginning(pipeline):
    receiver = pipeline.receive()
    sender = pipeline.send()
    pipeline.put(sender, 1000)
    wait_until(lambda: pipeline.count == 1000)
    pipeline.server.do(lambda js: js.delete_stream("LOGS"))
    pipeline.put(sender, 1000)
    assert b"no stream takes" in told(receiver, b"waiting")
    pipeline.server.add_stream("LOGS", ["logs.>"])
    wait_until(lambda: pipeline.count == 1000)
    kill(receiver)
    receiver = pipeline.receive()
    assert end(sender, read=2000) == (2000, 0, 0, 0)
    stop(receiver)

    assert [*map(number_of, pipeline.records)] == [*range(1001, 2001)]


# When it does not work.


def test_a_full_stream_is_waited_for(pipeline):
    pipeline.server.update_stream("LOGS", max_msgs=1500, discard="new")
    receiver = pipeline.receive()
    sender = pipeline.send("web")
    pipeline.put(sender, 3000)
    line = told(receiver, b"waiting")
    assert re.fullmatch(
        rb"zmqpull: cannot write to nats://127.0.0.1:\d+/logs.\{type\}.\{host\}: "
        rb"logs.web.\S+: maximum messages exceeded: waiting\n",
        line,
    )
    wait_until(lambda: pipeline.count == 1500)
    first = pipeline.records
    pipeline.server.purge("LOGS")
    wait_until(lambda: pipeline.count == 1500)
    assert end(sender, read=3000) == (3000, 0, 0, 0)
    assert b"writing to nats://" in stop(receiver)

    assert lines_of(first + pipeline.records) == lines(range(1, 3001)).splitlines()


@UNITS
@pytest.mark.parametrize("limit", ["max_payload", "max_msg_size"])
def test_what_is_too_large_is_a_dead_letter_and_the_rest_arrives(
    nats_server, start, tmp_path, unit, limit
):
    server = nats_server(**({"max_payload": 1000} if limit == "max_payload" else {}))
    limits = {"max_msg_size": 1000} if limit == "max_msg_size" else {}
    server.add_stream("LOGS", ["logs.>"], **limits)
    pipeline = NatsPipeline(start, tmp_path, server)
    receiver = pipeline.receive("-X", f"unit={unit}")
    wait_until_ready(receiver)
    data = [b"one", b"x" * 1001, b"three", b"y" * 2000, b"five"]
    done = push("--ack", "-c", pipeline.endpoint, "--format", "raw", data=b"\n".join(data))
    err = stop(receiver)

    assert sent(done) == 5
    assert b"2 were refused by the sink" in err
    assert b"3 records written" in err
    assert lines_of(pipeline.records) == [b"one", b"three", b"five"]
    letters = map(json.loads, (pipeline.state / "dead-letters.ndjson").read_text().splitlines())
    assert [(it["seq"], *lines_of([it["record"]])) for it in letters] == [
        (2, data[1]),
        (4, data[3]),
    ]


def test_limits_that_get_tighter_are_kept_to(pipeline):
    receiver = pipeline.receive("-X", "unit=block")
    sender = pipeline.send()
    pipeline.put(sender, 1)
    wait_until(lambda: pipeline.count == 1)
    pipeline.server.update_stream("LOGS", max_msg_size=1000)
    pipeline.put(sender, 1000)
    assert end(sender, read=1001) == (1001, 0, 0, 0)
    stop(receiver)

    assert max(len(message.data) for message in pipeline.server.messages("LOGS")) <= 1000 - 256
    pipeline.verify()


def test_without_a_stream_it_says_how_to_make_one(start, nats_server, tmp_path):
    server = nats_server()
    url = f"{server.url}/logs.{{type}}.{{host}}.x-%Y"
    code, out, err = finish(start(ZMQPULL, "-a", f"ipc://{tmp_path}/s", "--to", url))

    assert (code, out) == (78, b"")
    assert err.decode() == (
        f"zmqpull: {url}: no stream takes logs.*.*.*; make one: "
        "nats stream add logs --subjects 'logs.*.*.*'\n"
    )


DOES_NOT_KEEP = (
    b"the stream LOGS confirms messages and does not keep them (retention: %s); "
    b"make one with --retention limits\n"
)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"no_ack": True}, b"the stream LOGS does not acknowledge\n"),
        ({"max_msg_size": 200}, b"the stream LOGS takes no messages of this size\n"),
        ({"allow_msg_counter": True}, b"the stream LOGS holds counters, not records\n"),
        ({"retention": "workqueue"}, DOES_NOT_KEEP % b"workqueue"),
        ({"retention": "interest"}, DOES_NOT_KEEP % b"interest"),
    ],
)
def test_a_stream_that_could_hold_nothing_is_refused(start, nats_server, tmp_path, config, line):
    server = nats_server()
    server.add_stream("LOGS", ["logs"], **config)
    code, _, err = finish(start(ZMQPULL, "-a", f"ipc://{tmp_path}/s", "--to", f"{server.url}/logs"))

    assert code == 78
    assert err.endswith(line)
    assert err.count(b"\n") == 1


@pytest.mark.parametrize(
    ("config", "warnings"),
    [
        ({"storage": "memory"}, [b"is in memory"]),
        ({"persist_mode": "async"}, [b"acknowledges records before they are on its disk"]),
        ({"duplicate_window": 1}, [b"knows the names of messages for 1 s"]),
        ({"max_age": 5}, [b"knows the names of messages for 5 s"]),
        # With sources, a server knows no names unless told to.
        ({"sources": ["OTHER"]}, [b"knows the names of messages for 0 s"]),
        ({"storage": "memory", "duplicate_window": 1}, [b"is in memory", b"for 1 s"]),
        ({"duplicate_window": 10}, []),
        ({"discard": "new", "max_msgs": 10, "deny_delete": True, "deny_purge": True}, []),
        ({"max_msgs_per_subject": 10, "allow_rollup_hdrs": True, "num_replicas": 1}, []),
    ],
)
def test_a_stream_that_promises_less_is_warned_of_once(
    start, nats_server, tmp_path, config, warnings
):
    from nats.js.api import StreamSource

    server = nats_server()
    if "sources" in config:
        server.add_stream("OTHER", ["other"])
        config = {"sources": [StreamSource(name="OTHER")]}
    server.add_stream("LOGS", ["logs"], **config)
    endpoint = f"ipc://{tmp_path}/s"
    with Proxy(server.port) as proxy:
        child = start(ZMQPULL, "-a", endpoint, "--to", f"nats://127.0.0.1:{proxy.port}/logs")
        assert push("-q", "--ack", "-c", endpoint, data=b"one\n").returncode == 0
        proxy.reset()
        assert push("-q", "--ack", "-c", endpoint, data=b"two\n").returncode == 0
        said = stop(child)
    lines = [line for line in said.splitlines() if b": the stream LOGS " in line]

    assert len(lines) == len(warnings)
    assert all(warning in line for line, warning in zip(lines, warnings, strict=True))


def test_a_stream_that_no_longer_keeps_what_it_confirms_is_waited_for(pipeline):
    """It is changed while records come; what it confirmed before that was noticed is gone."""
    receiver = pipeline.receive()
    sender = pipeline.send("web")
    feeder = pipeline.feed(sender)
    wait_until(lambda: pipeline.count > 100)
    pipeline.server.update_stream("LOGS", retention="interest")
    assert b"(retention: interest)" in told(receiver, b": waiting\n")
    pipeline.server.update_stream("LOGS", retention="limits")
    pipeline.fed = feeder.stop()
    assert end(sender, read=pipeline.fed) == (pipeline.fed, 0, 0, 0)
    assert b"writing to nats://" in stop(receiver)

    numbers = [*map(number_of, pipeline.records)]
    assert numbers == [*range(numbers[0], pipeline.fed + 1)]


def test_the_end_of_a_stream_is_read_whatever_its_limits_of_consumers(nats_server, start, tmp_path):
    from nats.js.api import StreamConsumerLimits

    server = nats_server()
    limits = StreamConsumerLimits(inactive_threshold=5_000_000_000, max_ack_pending=10)
    server.add_stream("LOGS", ["logs.>"], consumer_limits=limits, max_consumers=2)
    pipeline = NatsPipeline(start, tmp_path, server)
    receiver = pipeline.receive(fault="engine-written:2")
    sender = pipeline.send()
    pipeline.put(sender, 1000)
    assert killed(receiver)
    receiver = pipeline.receive()
    assert end(sender, read=1000) == (1000, 0, 0, 0)
    stop(receiver)

    pipeline.verify()


def test_a_server_that_is_down_is_waited_for_from_the_start(pipeline):
    pipeline.server.kill()
    receiver = pipeline.receive()
    sender = pipeline.send()
    pipeline.put(sender, 100)
    assert b": Connection refused: waiting\n" in told(receiver, b"cannot write")
    pipeline.server.start()
    assert end(sender, read=100) == (100, 0, 0, 0)

    stop(receiver)
    pipeline.verify()


def test_a_signal_ends_the_wait_for_a_server_at_the_start(pipeline):
    pipeline.server.kill()
    receiver = pipeline.receive()
    told(receiver, b"cannot write")
    receiver.terminate()

    assert finish(receiver) == (0, b"", b"")


def test_a_signal_ends_the_wait_for_a_server_within_the_grace_period(pipeline):
    receiver = pipeline.receive("--grace", 1)
    sender = pipeline.send("--grace", 1)
    pipeline.put(sender, 100)
    wait_until(lambda: statistics(sender)[1] == 100)
    pipeline.server.kill()
    pipeline.put(sender, 100)
    told(receiver, b"cannot write")
    receiver.terminate()
    code, out, err = finish(receiver)
    assert (code, out) == (74, b"")
    assert b"100 records written" in err
    pipeline.server.start()
    receiver = pipeline.receive()
    assert end(sender, read=200) == (200, 0, 0, 0)

    stop(receiver)
    pipeline.verify()


@UNITS
def test_a_server_that_hangs_is_waited_for_in_little_memory(pipeline, unit):
    receiver = pipeline.receive("-X", f"unit={unit}")
    sender = pipeline.send("--format", "json", "--field", f"x={'y' * 2000}", "--sync", "off")
    pipeline.put(sender, 1)
    wait_until(lambda: pipeline.count == 1)
    before = resident_bytes(receiver)
    pipeline.server.pause()
    pipeline.put(sender, 30_000)
    told(receiver, b": no answer: waiting\n")
    time.sleep(1)
    grown = resident_bytes(receiver) - before
    pipeline.server.resume()
    assert end(sender, read=pipeline.fed) == (pipeline.fed, 0, 0, 0)
    assert b"writing to nats://" in stop(receiver)

    assert grown < 100 << 20
    pipeline.verify()


@pytest.mark.slow
def test_a_server_that_hangs_for_long_gets_nothing_twice(pipeline):
    """So long that the connection is given up, and made anew."""
    pipeline.server.update_stream("LOGS", duplicate_window=WINDOW)
    receiver = pipeline.receive()
    sender = pipeline.send_slowly()
    feeder = pipeline.feed(sender)
    wait_until(lambda: pipeline.count > 0)
    pipeline.server.pause()
    told(receiver, b": no answer: waiting\n")
    time.sleep(15)
    pipeline.server.resume()
    wait_until(lambda: b"again" in receiver.stderr.readline())
    pipeline.fed = feeder.stop()
    assert end(sender, read=pipeline.fed) == (pipeline.fed, 0, 0, 0)
    stop(receiver)

    pipeline.verify()


# Who may.

USER = {"user": "zmqpull", "password": "s3cret/@:"}
LOGIN = "zmqpull:s3cret%2F%40%3A@"


def with_login(pipeline, login):
    pipeline.url = pipeline.url.replace("nats://", f"nats://{login}")


def test_a_password_that_is_wrong_is_waited_for_and_never_told(nats_server, start, tmp_path):
    server = nats_server(users=[USER])
    server.add_stream("LOGS", ["logs.>"])
    pipeline = NatsPipeline(start, tmp_path, server)
    server.stop()
    users = [{"user": "the-test", "password": "the-test"}]
    server.configure(authorization={"users": [*users, USER | {"password": "another"}]})
    server.start()
    with_login(pipeline, LOGIN)
    receiver = pipeline.receive()
    sender = pipeline.send()
    pipeline.put(sender, 100)
    said = told(receiver, b"cannot write")
    server.stop()
    server.configure(authorization={"users": [*users, USER]})
    server.start()
    assert end(sender, read=100) == (100, 0, 0, 0)
    said += stop(receiver)

    name = f"nats://127.0.0.1:{server.port}/{SUBJECT}"
    line = f"zmqpull: cannot write to {name}: Authorization Violation: waiting\n"
    assert said.startswith(line.encode())
    assert b"s3cret" not in said
    pipeline.verify()


@pytest.mark.parametrize(
    "given",
    [
        ("-X", "user=zmqpull", "-X", f"password={USER['password']}"),
        {"NATS_USER": "zmqpull", "NATS_PASSWORD": USER["password"]},
    ],
)
def test_a_login_may_stand_in_options_or_in_the_environment(
    nats_server, start, tmp_path, given, monkeypatch
):
    server = nats_server(users=[USER])
    server.add_stream("LOGS", ["logs.>"])
    pipeline = NatsPipeline(start, tmp_path, server)
    if isinstance(given, dict):
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        given = ()
    receiver = pipeline.receive(*given)
    sender = pipeline.send()
    pipeline.put(sender, 100)
    assert end(sender, read=100) == (100, 0, 0, 0)

    stop(receiver)
    pipeline.verify()


def test_what_may_not_be_published_is_waited_for(nats_server, start, tmp_path):
    api = [f"$JS.API.{name}" for name in ("STREAM.NAMES", "STREAM.INFO.LOGS")]
    api += [f"$JS.API.CONSUMER.{name}.LOGS.>" for name in ("CREATE", "MSG.NEXT", "DELETE")]
    permissions = {"publish": [*api, "logs.allowed.*"], "subscribe": ["_INBOX.>"]}
    server = nats_server(users=[USER | {"permissions": permissions}])
    server.add_stream("LOGS", ["logs.>"])
    pipeline = NatsPipeline(start, tmp_path, server)
    with_login(pipeline, LOGIN)
    receiver = pipeline.receive("--grace", 1)
    sender = pipeline.send("allowed")
    pipeline.put(sender, 100)
    assert end(sender, read=100) == (100, 0, 0, 0)
    kill(receiver)
    receiver = pipeline.receive("--grace", 1)
    sender = pipeline.send("forbidden", "--grace", 1)
    pipeline.put(sender, 1)
    assert b'permissions violation for publish to "logs.forbidden.' in told(receiver, b"cannot")
    receiver.terminate()

    assert finish(receiver)[0] == 74
    assert pipeline.count == 100


def test_a_user_may_be_a_key(nats_server, start, tmp_path):
    import nkeys

    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    (tmp_path / "user.nk").write_bytes(seed)
    public = nkeys.from_seed(bytearray(seed)).public_key.decode()
    server = nats_server(users=[{"nkey": public}])
    server.add_stream("LOGS", ["logs.>"])
    pipeline = NatsPipeline(start, tmp_path, server)
    receiver = pipeline.receive("-X", f"nkey={tmp_path}/user.nk")
    sender = pipeline.send()
    pipeline.put(sender, 100)
    assert end(sender, read=100) == (100, 0, 0, 0)

    stop(receiver)
    pipeline.verify()


@needs_openssl
def test_tls_takes_the_authority_that_is_named(nats_server, start, tmp_path):
    cert, key = certificate(tmp_path)
    server = nats_server(tls={"cert_file": cert, "key_file": key})
    server.add_stream("LOGS", ["logs.>"])
    pipeline = NatsPipeline(start, tmp_path, server)
    receiver = pipeline.receive()
    said = told(receiver, b"cannot write")
    assert b": TLS: self-signed certificate: waiting\n" in said
    receiver.terminate()
    assert finish(receiver) == (0, b"", b"")
    receiver = pipeline.receive("-X", f"tlsca={cert}")
    sender = pipeline.send()
    pipeline.put(sender, 100)
    server.kill()
    server.start()
    assert end(sender, read=100) == (100, 0, 0, 0)

    stop(receiver)
    pipeline.verify()


@needs_openssl
def test_no_password_is_sent_where_tls_is_wanted_and_not_offered(pipeline, tmp_path):
    cert, _ = certificate(tmp_path)
    with_login(pipeline, LOGIN)
    receiver = pipeline.receive("-X", f"tlsca={cert}")

    assert b": the server does not ask for TLS: waiting\n" in told(receiver, b"cannot write")


WRONG = {
    "nats://": "nats://HOST",
    "nats://host": "nats://HOST",
    "nats://host/": "nats://HOST",
    "nats://ho st/logs": "nats://HOST",
    "nats://user:s3cret@/logs": "nats://HOST",
    "nats://user:s3cret@host/a b": "subject",
    "nats://user:s3cret@host/a.*": "subject",
    "nats://user:s3cret@host/a..b": "subject",
    "nats://user:s3cret@host/{pid}": "is not a template for subjects",
}


@pytest.mark.parametrize("url", WRONG)
def test_a_url_that_cannot_be_understood_is_told(start, url):
    code, _, err = finish(start(ZMQPULL, "--to", url))

    assert code == 2
    assert WRONG[url].encode() in err.splitlines()[-1]
    assert b"s3cret" not in err


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("linger=1", b"-X linger is none of user, password, token, creds, nkey, tlsca"),
        ("creds=/nowhere", b"cannot read /nowhere: No such file or directory"),
        ("creds=/dev/null", b"/dev/null is no file of NATS credentials"),
        ("nkey=/nowhere", b"cannot read /nowhere: No such file or directory"),
        ("tlsca=/nowhere", b"cannot read /nowhere: No such file or directory"),
        ("tlsca=/dev/null", b"the certificates or the key cannot be used"),
    ],
)
def test_an_option_that_cannot_be_used_is_told(start, option, line):
    code, _, err = finish(start(ZMQPULL, "--to", "nats://host/logs", "-X", option))

    assert code == 2
    assert line in err.splitlines()[-1]


COMMANDS = [
    line.removeprefix("$ ")
    for block in blocks("console")
    for line in block.splitlines()
    if "nats://" in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_documentation_writes(command, start, server, tmp_path):
    endpoint = f"ipc://{tmp_path}/socket"
    command = command.replace("nats.example.com", f"127.0.0.1:{server.port}")
    command = command.replace("tcp://*:5015", endpoint).replace("/var/lib", str(tmp_path))
    start("bash", "-c", f"exec {BIN}/{command}")
    assert sent(push("--ack", "-c", endpoint, "--format", "raw", "web", data=b"one")) == 1

    (message,) = server.messages("LOGS")
    assert message.subject == f"logs.web.{os.uname().nodename}"
    assert message.data.removesuffix(b"\n") == b'{"message":"one"}'


def test_all_of_them_are_shown():
    assert len(COMMANDS) == 2
