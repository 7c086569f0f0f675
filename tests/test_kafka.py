"""The sink for Kafka: the installed commands, with a mocked and a real broker."""

import json
import os
import random
import re
import subprocess
import time
from collections import Counter

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from chaos import (
    DOSE,
    Pipeline,
    compare,
    fault_points,
    kill,
    killed,
    number_of,
    patched,
    resident_bytes,
    spooled,
)
from engines import (
    DISCONNECT,
    PRODUCE,
    mock_kafka,
    needs_mock_kafka,
    needs_real_kafka,
    real_kafka,
)
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
from peers import STREAM, bare, deliver, greet, receive
from test_docs import engine_commands
from zmqpush.core.protocol.messages import Ack, Data, encode

__all__ = ["mock_kafka", "real_kafka"]  # fixtures

pytest.importorskip("confluent_kafka")
from zmqpush.runtime.reporting import Reporter
from zmqpush.sinks.base import Context
from zmqpush.sinks.kafka.client import KafkaClient
from zmqpush.sinks.kafka.sink import KafkaSink, _clean

# Errors of a broker, by number.
UNKNOWN_TOPIC, NOT_LEADER, TOO_LARGE, NOT_ENOUGH_REPLICAS = 3, 6, 10, 19
TOPIC_AUTHORIZATION_FAILED, OUT_OF_ORDER, POLICY_VIOLATION = 29, 45, 44
NOWHERE = "kafka://127.0.0.1:9/logs"
TRANSACTIONS = ("-X", "transactional.id=the-test")


@pytest.fixture
def kafka(mock_kafka):
    """Return a mock of one broker, with a topic."""
    kafka = mock_kafka(1)
    kafka.create("logs", 3)
    return kafka


@pytest.fixture
def endpoint(tmp_path):
    return f"ipc://{tmp_path}/socket"


@pytest.fixture
def deliver_to(start, endpoint):
    """Start a zmqpull that writes to a URL."""

    def run(url, *options):
        return start(ZMQPULL, "-a", endpoint, "--to", url, *options)

    return run


def finish(child):
    """End a program in order; return what it said."""
    wait_until_ready(child)
    child.terminate()
    _, err = child.communicate(timeout=PATIENCE)
    assert b"Traceback" not in err
    assert child.returncode == 0, err
    return err.decode()


def line_of(child):
    """Return the next line on standard error."""
    return child.stderr.readline().decode()


def values(records):
    return [record.value for record in records]


MODES = pytest.mark.parametrize(
    "options",
    [(), ("--state",), ("--state", *TRANSACTIONS)],
    ids=["plain", "state", "transactions"],
)


@pytest.fixture
def with_state(tmp_path):
    """Return a function that names the directory after ``--state``."""

    def complete(options):
        return [
            part for o in options for part in ((o, tmp_path / "state") if o == "--state" else (o,))
        ]

    return complete


@needs_mock_kafka
@MODES
def test_every_record_is_there_once_in_order_with_its_key_and_headers(
    kafka, deliver_to, endpoint, options, with_state
):
    child = deliver_to(kafka.url("logs"), *with_state(options))
    lines = [b"%d" % number for number in range(20_000)]
    done = push("--ack", "-c", endpoint, "--format", "raw", "nginx", data=b"\n".join(lines))
    assert (done.returncode, sent(done)) == (0, 20_000)
    records = kafka.read("logs")

    told = "zmqpull: 20000 records written, 20000 of them were no JSON object\n"
    assert finish(child) == told
    assert lines_of(values(records)) == lines
    (key,) = {record.key for record in records}
    assert re.fullmatch(rb"[0-9a-f]{32}", key)
    for number, record in enumerate(records, 1):
        assert record.headers == [
            ("first", b"%d" % number),
            ("stream", key),
            ("type", b"nginx"),
            ("host", os.uname().nodename.encode()),
        ]
    assert {record.partition for record in records} == {records[0].partition}


@needs_mock_kafka
def test_labels_and_time_name_topics(kafka, deliver_to, endpoint):
    deliver_to(kafka.url("logs-{type}-%Y"), "-q")
    for kind in ("nginx", "../x y"):
        assert push("--ack", "-qc", endpoint, "--format", "raw", kind, data=b"x").returncode == 0

    for topic in ("logs-nginx", "logs-.._x_y"):
        assert lines_of(values(kafka.read(time.strftime(f"{topic}-%Y")))) == [b"x"]


@needs_mock_kafka
@pytest.mark.parametrize("topic", ["logs", "logs-{type}"])
def test_records_of_senders_without_acknowledgements_have_no_key(start, kafka, endpoint, topic):
    child = start(ZMQPULL, "-b", endpoint, "--to", kafka.url(topic))
    assert push("-qc", endpoint, "nginx", data=b"1\n2\n3\n").returncode == 0
    name = topic.replace("{type}", "nginx")
    wait_until(lambda: len(kafka.read(name)) == 3)
    err, records = finish(child), kafka.read(name)

    assert err == "zmqpull: 3 records written\n"
    assert sorted(json.loads(record.value)["message"] for record in records) == ["1", "2", "3"]
    labels = [("type", b"nginx")] if "{" in topic else []
    assert {(record.key, tuple(record.headers)) for record in records} == {(None, tuple(labels))}


@given(st.text())
def test_a_label_makes_a_name_that_kafka_takes(label):
    topic = _clean(label)

    assert re.fullmatch(r"[A-Za-z0-9._-]{1,249}", topic)
    assert topic not in (".", "..")


# Refused.


@needs_mock_kafka
@MODES
def test_a_record_that_is_too_large_is_written_down_and_the_others_pass(
    kafka, deliver_to, endpoint, options, with_state, tmp_path
):
    large = b"x" * 3000
    letters = tmp_path / "letters"
    options = [*with_state(options), "--dead-letters", letters, "-X", "message.max.bytes=2000"]
    child = deliver_to(kafka.url("logs"), *options)
    lines = [b"1", large, b"2"]
    done = push("--ack", "-c", endpoint, "--format", "raw", data=b"\n".join(lines))
    assert (done.returncode, sent(done)) == (0, 3)
    err = finish(child)

    assert lines_of(values(kafka.read("logs"))) == [b"1", b"2"]
    name = kafka.url("logs")
    assert f"zmqpull: {name} refuses 1 records (Message size too large): they are in" in err
    told = "zmqpull: 2 records written, 3 of them were no JSON object, 1 were refused by the sink\n"
    assert told in err
    (letter,) = map(json.loads, letters.read_text().splitlines())
    assert (letter["seq"], letter["sink"]) == (2, name)
    assert lines_of([letter["record"]]) == [large]


@needs_mock_kafka
@MODES
def test_what_the_broker_refuses_with_others_is_sent_again(
    kafka, deliver_to, endpoint, options, with_state
):
    kafka.fail(PRODUCE, 3, TOO_LARGE)
    child = deliver_to(kafka.url("logs"), *with_state(options))
    lines = [b"%d" % number for number in range(1000)]
    done = push("--ack", "-c", endpoint, "--format", "raw", data=b"\n".join(lines))
    assert done.returncode == 0
    err = finish(child)

    assert "refuse" not in err
    assert Counter(lines_of(values(kafka.read("logs")))) == Counter(lines)


@needs_mock_kafka
@MODES
def test_what_the_broker_refuses_alone_is_written_down(
    kafka, deliver_to, endpoint, options, with_state, tmp_path
):
    letters = tmp_path / "letters"
    child = deliver_to(kafka.url("logs"), *with_state(options), "--dead-letters", letters)
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer)
        deliver(peer, session, 1, b"one")
        kafka.fail(PRODUCE, 1, TOO_LARGE)
        deliver(peer, session, 2, b"two")
        deliver(peer, session, 3, b"three")
    finish(child)

    assert values(kafka.read("logs")) == [b"one", b"three"]
    (letter,) = map(json.loads, letters.read_text().splitlines())
    assert (letter["stream"], letter["seq"], letter["record"]) == (STREAM, 2, "two")


# Outages.


@needs_mock_kafka
@MODES
def test_a_broker_that_is_down_is_waited_for(kafka, deliver_to, endpoint, options, with_state):
    child = deliver_to(kafka.url("logs"), *with_state(options))
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer)
        deliver(peer, session, 1, b"1")
        kafka.down()
        peer.send(encode(Data.of(2, 1, b"2\n"), session))
        told = line_of(child)
        kafka.up()
        while receive(peer, Ack)[0].acked < 2:
            pass
        deliver(peer, session, 3, b"3")

    name = re.escape(kafka.url("logs"))
    assert re.fullmatch(
        rf"zmqpull: cannot write to {name}: no (broker answers|answer).*: waiting\n", told
    )
    assert re.search(rf"writing to {name} again \(after .* s\)\n", finish(child))
    assert values(kafka.read("logs")) == [b"1", b"2", b"3"]


@needs_mock_kafka
@MODES
def test_without_a_broker_at_the_start_it_waits_until_one_comes(
    kafka, deliver_to, endpoint, options, with_state
):
    kafka.down()
    child = deliver_to(kafka.url("logs"), *with_state(options))
    name = kafka.url("logs")
    told = f"zmqpull: cannot write to {name}: no broker answers: Connection refused: waiting\n"
    while (line := line_of(child)) != told:
        # Where the machine is slow it is not known yet that it is refused.
        assert line == f"zmqpull: cannot write to {name}: no answer: waiting\n"
    kafka.up()
    assert push("--ack", "-qc", endpoint, "--format", "raw", data=b"x").returncode == 0

    assert f"writing to {name} again" in finish(child)
    assert lines_of(values(kafka.read("logs"))) == [b"x"]


@needs_mock_kafka
@MODES
def test_a_slow_broker_is_waited_for(kafka, deliver_to, endpoint, options, with_state):
    kafka.slow(300)
    child = deliver_to(kafka.url("logs"), *with_state(options))
    lines = [b"%d" % number for number in range(1000)]
    done = push("--ack", "-qc", endpoint, "--format", "raw", data=b"\n".join(lines))
    kafka.slow(0)

    assert done.returncode == 0
    finish(child)
    assert lines_of(values(kafka.read("logs"))) == lines


@needs_mock_kafka
@MODES
@pytest.mark.parametrize(
    "error",
    [
        NOT_LEADER,
        NOT_ENOUGH_REPLICAS,
        UNKNOWN_TOPIC,
        TOPIC_AUTHORIZATION_FAILED,
        POLICY_VIOLATION,
        OUT_OF_ORDER,
        DISCONNECT,
    ],
)
def test_after_an_error_of_the_broker_it_goes_on(
    kafka, deliver_to, endpoint, options, with_state, error
):
    child = deliver_to(kafka.url("logs"), *with_state(options))
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer)
        deliver(peer, session, 1, b"1")
        kafka.fail(PRODUCE, 2, error)
        deliver(peer, session, 2, b"2", b"3")
        kafka.heal(PRODUCE)
        deliver(peer, session, 4, b"4")
    err = finish(child)

    assert values(kafka.read("logs")) == [b"1", b"2", b"3", b"4"]
    assert all(
        re.match(r"zmqpull: (cannot write|writing|4 records)", one) for one in err.splitlines()
    )


@needs_mock_kafka
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UNKNOWN_TOPIC, "Unknown topic or partition"),
        (TOPIC_AUTHORIZATION_FAILED, "Topic authorization failed"),
    ],
)
def test_a_topic_that_is_not_there_or_not_ours_is_told_and_waited_for(
    kafka, deliver_to, endpoint, error, reason
):
    kafka.topic_error("logs", error)
    child = deliver_to(kafka.url("logs"))
    told = f"zmqpull: cannot write to {kafka.url('logs')}: topic logs: {reason}: waiting\n"
    assert line_of(child) == told
    kafka.topic_error("logs", 0)
    assert push("--ack", "-qc", endpoint, "--format", "raw", data=b"x").returncode == 0

    finish(child)
    assert lines_of(values(kafka.read("logs"))) == [b"x"]


@needs_mock_kafka
@pytest.mark.parametrize("acked", [False, True])
def test_memory_is_bounded_and_a_signal_heeded_while_the_broker_is_down(
    start, kafka, endpoint, acked
):
    bind = "-a" if acked else "-b"
    options = ("--grace", "1", "--memory", "64MiB", "--to", kafka.url("logs"))
    child = start(ZMQPULL, bind, endpoint, *options)
    mode = ("--ack",) if acked else ("--framing", "lines")
    probe = push(*mode, "-qc", endpoint, data=b"x\n")
    assert probe.returncode == 0
    wait_until(lambda: kafka.read("logs"))
    before = resident_bytes(child)
    kafka.down()
    sender = start(ZMQPUSH, *mode, "-qc", endpoint, "--queue-max", "1MiB", stdin=subprocess.PIPE)
    os.set_blocking(sender.stdin.fileno(), False)
    block = b"%099d\n" % 0 * 600
    idle_since = time.monotonic()
    written = 0
    while time.monotonic() < idle_since + 2 and written < 1 << 30:
        try:
            written += os.write(sender.stdin.fileno(), block)
            idle_since = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
    assert written < 1 << 30  # it was stopped
    assert resident_bytes(child) - before < 400 << 20
    wait_until_ready(child)
    child.terminate()
    _, err = child.communicate(timeout=PATIENCE)

    assert child.returncode == 74
    assert b"no broker answers" in err
    assert (b"lost: they could not be written" in err) != acked


# Deaths.


class KafkaPipeline(Pipeline):
    """A pipeline into a topic."""

    def __init__(self, start, directory, kafka, *options):
        super().__init__(start, directory)
        self.kafka = kafka
        self.options = ("--to", kafka.url("logs"), *options)

    def receive(self, *options, **kwargs):
        return super().receive(*self.options, *options, **kwargs)

    def written(self):
        return [number_of(record.value) for record in self.kafka.read("logs")]

    def look_what_is_safe(self):
        safe = {*spooled(self.spool), *self.written()}
        self.fed = max(safe)
        assert len(safe) == self.fed

    def verify(self):
        lost, too_often = compare(self.written(), range(1, self.fed + 1))
        assert not lost, f"of {self.fed} {len(lost)} are lost: {lost[:10]}"
        assert not too_often, f"of {self.fed} {len(too_often)} are repeated: {too_often[:10]}"


STATES = pytest.mark.parametrize("options", [(), TRANSACTIONS], ids=["state", "transactions"])


@needs_mock_kafka
@STATES
def test_a_receiver_that_is_killed_repeats_nothing_with_a_state(start, tmp_path, kafka, options):
    pipeline = KafkaPipeline(start, tmp_path, kafka, *options)
    sender = pipeline.send("-q")
    for number in range(4):
        receiver = pipeline.receive()
        kafka.slow(20 * number)
        enough = len(pipeline.written()) + 200
        while len(pipeline.written()) < enough:
            pipeline.put(sender, 100)
            assert receiver.poll() is None, receiver.stderr.read()
        pipeline.put(sender, 1000)
        kill(receiver)
    kafka.slow(0)
    receiver = pipeline.receive()
    sender.stdin.close()
    assert sender.wait(PATIENCE) == 0, sender.stderr.read()

    pipeline.finish(receiver)


@needs_mock_kafka
@STATES
def test_nothing_is_lost_or_repeated_whoever_is_killed(start, tmp_path, kafka, options):
    """Both ends, again and again, in any order: lost 0, repeated 0."""
    victims = ["receiver", "sender"] * DOSE.kills
    random.Random(1).shuffle(victims)
    pipeline = KafkaPipeline(start, tmp_path, kafka, *options)
    receiver, sender = pipeline.receive(), pipeline.send("-q")
    for victim in victims:
        enough = len(pipeline.written()) + 200
        while len(pipeline.written()) < enough:
            pipeline.put(sender, 100)
        pipeline.put(sender, 1000)
        if victim == "receiver":
            kill(receiver)
            receiver = pipeline.receive()
        else:
            kill(sender)
            pipeline.look_what_is_safe()
            sender = pipeline.send("-q")
    sender.stdin.close()
    assert sender.wait(PATIENCE) == 0, sender.stderr.read()

    pipeline.finish(receiver)


@needs_mock_kafka
def test_a_producer_that_is_given_up_is_replaced_however_slow_that_is(
    kafka, deliver_to, endpoint, tmp_path
):
    child = deliver_to(kafka.url("logs"), "-q", "--state", tmp_path / "state")
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer)
        deliver(peer, session, 1, b"1")
        kafka.slow(300)
        kafka.fail(PRODUCE, 2, 45)  # out of order: fatal
        deliver(peer, session, 2, b"2", b"3")
        kafka.slow(0)
    finish(child)

    assert sorted(values(kafka.read("logs"))) == [b"1", b"2", b"3"]


@needs_mock_kafka
def test_of_records_that_are_alike_each_keeps_its_number(kafka, deliver_to, endpoint, tmp_path):
    batches = ("-X", "batch.num.messages=5")
    child = deliver_to(kafka.url("logs"), "-q", "--state", tmp_path / "state", *batches)
    with bare(zmq.DEALER, endpoint) as peer:
        _, session = greet(peer)
        deliver(peer, session, 1, b"x")
        kafka.slow(30)
        before = kafka.requests(PRODUCE)
        peer.send(encode(Data.of(2, 40, b"x\n" * 40), session))
        wait_until(lambda: kafka.requests(PRODUCE) > before)
        kafka.fail(PRODUCE, 1, 10)  # too large
        while receive(peer, Ack)[0].acked < 41:
            pass
        kafka.slow(0)
    finish(child)

    numbers = [int(dict(record.headers)["first"]) for record in kafka.read("logs")]
    assert sorted(numbers) == [*range(1, 42)]


@needs_real_kafka
@STATES
def test_the_same_with_a_broker_that_is_no_mock(start, tmp_path, real_kafka, options):
    real_kafka.create("logs", 2)
    test_a_receiver_that_is_killed_repeats_nothing_with_a_state(
        start, tmp_path, real_kafka, options
    )


@needs_mock_kafka
@STATES
@pytest.mark.parametrize("point", fault_points("kafka"))
@pytest.mark.parametrize("passage", [1, 3])
def test_a_death_at_any_point_of_the_sink_repeats_nothing(
    start, tmp_path, kafka, options, point, passage
):
    pipeline = KafkaPipeline(start, tmp_path, kafka, *options)
    sender = pipeline.send("-q")
    receiver = pipeline.receive(fault=f"{point}:{passage}")
    while receiver.poll() is None:
        pipeline.put(sender, 50)
        time.sleep(0.01)
    assert killed(receiver)
    receiver = pipeline.receive()
    pipeline.put(sender, 1000)
    sender.stdin.close()
    assert sender.wait(PATIENCE) == 0, sender.stderr.read()

    pipeline.finish(receiver)


@needs_mock_kafka
@STATES
@pytest.mark.parametrize(
    "point", ["written:2", "state-committed:3", "acknowledged:2", "engine-buried:1"]
)
def test_a_death_around_the_sink_repeats_nothing_even_with_a_refused_record(
    start, tmp_path, kafka, options, point, endpoint
):
    args = ("-a", endpoint, "--to", kafka.url("logs"), "--state", tmp_path / "state", *options)
    args = (*args, "-X", "message.max.bytes=2000")
    spool = ("--spool", tmp_path / "spool", "-qc", endpoint, "--format", "raw")
    lines = [b"%d" % number for number in range(500)]
    lines[200] = b"x" * 3000
    child = start(ZMQPULL, *args, env=os.environ | {"ZMQPUSH_FAULT": point})
    sender = start(ZMQPUSH, *spool)
    sender.stdin.write(b"first\n")
    sender.stdin.flush()
    wait_until(lambda: child.poll() is not None or kafka.read("logs"))
    sender.stdin.write(b"\n".join(lines))
    sender.stdin.close()
    assert killed(child)
    child = start(ZMQPULL, *args)

    assert sender.wait(PATIENCE) == 0
    finish(child)
    del lines[200]
    assert lines_of(values(kafka.read("logs"))) == [b"first", *lines]


@needs_mock_kafka
def test_without_a_state_a_death_loses_nothing_and_repeats_what_was_on_its_way(
    start, tmp_path, kafka, endpoint
):
    args = (ZMQPULL, "-a", endpoint, "--to", kafka.url("logs"))
    lines = [b"%d" % number for number in range(500)]
    child = start(*args, env=os.environ | {"ZMQPUSH_FAULT": "engine-written"})
    sender = start(ZMQPUSH, "--ack", "-qc", endpoint, "--format", "raw")
    sender.stdin.write(b"\n".join(lines))
    sender.stdin.close()
    assert killed(child)
    first = lines_of(values(kafka.read("logs")))
    child = start(*args)

    assert sender.wait(PATIENCE) == 0
    finish(child)
    assert first
    assert Counter(lines_of(values(kafka.read("logs")))) == Counter(lines) + Counter(first)


@needs_mock_kafka
def test_what_a_topic_holds_beyond_the_marks_is_told_without_its_gaps(kafka):
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": kafka.bootstrap})

    def produce(stream, *seqs):
        for seq in seqs:
            headers = [("stream", stream), ("first", str(seq))]
            producer.produce("logs", b"x", stream, 0, headers=headers)

    produce("a", 1, 2, 3)
    produce("b", 9, 8)
    produce("a", 5, 6)
    producer.produce("logs", b"of somebody else", partition=0)
    producer.produce("logs", b"", partition=0, headers=[("stream", b"\xff"), ("first", b"x")])
    produce("a", 6)
    producer.produce("logs", b"", partition=1, headers=[("stream", "c"), ("first", "7")])
    producer.flush()
    client = KafkaClient(kafka.bootstrap, {}, lambda _: None)

    everything = {"a": [range(1, 4), range(5, 7)], "b": [range(8, 10)], "c": [range(7, 8)]}
    assert client.read_tail({"logs": {}}) == everything
    assert client.read_tail({"logs": {0: 99}}) == everything  # the topic is another
    assert client.read_tail({"logs": {0: 5, 1: 1}, "gone": {0: 3}}) == {"a": [range(5, 7)]}
    assert client.read_tail({}) == {}


# Transactions.


@needs_real_kafka
def test_a_second_receiver_of_the_same_transactional_id_ends_the_first(
    start, real_kafka, tmp_path, endpoint
):
    real_kafka.create("logs")
    url = real_kafka.url("logs")
    first = start(ZMQPULL, "-a", endpoint, "--to", url, "--state", tmp_path / "1", *TRANSACTIONS)
    sender = start(ZMQPUSH, "--ack", "-qc", endpoint, "--format", "raw")
    sender.stdin.write(b"1\n")
    sender.stdin.flush()
    wait_until(lambda: real_kafka.read("logs"))
    other = f"ipc://{tmp_path}/other"
    start(ZMQPULL, "-a", other, "--to", url, "--state", tmp_path / "2", *TRANSACTIONS)
    assert push("--ack", "-qc", other, "--format", "raw", data=b"2").returncode == 0
    sender.stdin.write(b"3\n")
    sender.stdin.flush()
    _, err = first.communicate(timeout=PATIENCE)

    assert first.returncode == 74
    assert f"zmqpull: {url}: another process uses this transactional.id\n" in err.decode()


# The documentation.


@needs_mock_kafka
@pytest.mark.parametrize("command", engine_commands("kafka"))
def test_the_commands_of_the_documentation_write_to_kafka(
    start, kafka, command, endpoint, tmp_path
):
    brokers = re.compile(r"kafka\d:\d+(,kafka\d:\d+)*")
    command = brokers.sub(kafka.bootstrap, command).replace("tcp://*:5015", endpoint)
    command = command.replace("/var/lib", str(tmp_path))
    child = start("bash", "-c", f"exec {BIN}/{command}")
    if "sasl" in command:  # the mock knows none
        assert "cannot write to kafka://" in line_of(child)
        return
    assert push("--ack", "-qc", endpoint, "--format", "raw", "nginx", data=b"x").returncode == 0
    assert lines_of(values(kafka.read("logs-nginx"))) == [b"x"]


# What is wrong.


@pytest.mark.parametrize(
    ("to", "options", "reason"),
    [
        ("kafka://", (), "needs brokers and a topic; a good one is kafka://"),
        ("kafka://broker", (), "needs brokers and a topic"),
        ("kafka://broker/", (), "needs brokers and a topic"),
        ("kafka://a:9092,/x", (), "needs brokers and a topic"),
        ("kafka://me:hunter2@broker/x", (), "needs brokers and a topic"),
        ("kafka://broker/a/b", (), "needs brokers and a topic"),
        ("kafka://broker/a b", (), "needs brokers and a topic"),
        ("kafka://broker/{pid}", (), "{pid} is not one of {type}, {host}; a good one is kafka://"),
        (NOWHERE, ("no.such=hunter2",), 'No such configuration property: "no.such"'),
        (NOWHERE, ("linger.ms=hunter2",), 'Invalid value for configuration property "'),
        (NOWHERE, ("acks=1",), "-X acks cannot be set: delivery relies on it: it is all"),
        (NOWHERE, ("enable.idempotence=false",), "-X enable.idempotence cannot be set"),
        (NOWHERE, ("message.timeout.ms=5000",), "-X message.timeout.ms cannot be set"),
        (NOWHERE, ("delivery.report.only.error=false",), "cannot be set"),
        (NOWHERE, ("bootstrap.servers=hunter2",), "-X bootstrap.servers cannot be set"),
        (NOWHERE, ("error_cb=hunter2",), "-X error_cb cannot be set"),
        (NOWHERE, ("transactional.id=hunter2",), "-X transactional.id needs --state"),
        (NOWHERE, ("security.protocol=ssl", "ssl.ca.location=/none"), "ssl.ca.location failed"),
        (NOWHERE, ("security.protocol=sasl_ssl", "sasl.mechanism=PLAIN"), "sasl.username"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(start, to, options, reason):
    options = [word for option in options for word in ("-X", option)]
    child = start(ZMQPULL, "--to", to, *options)
    out, err = child.communicate(timeout=PATIENCE)

    assert (child.returncode, out) == (2, b"")
    assert reason in err.decode().splitlines()[-1]
    assert b"hunter2" not in err
    assert len(err.splitlines()) <= 4  # the usage, and the error


@pytest.mark.parametrize(
    "option", [("acks", "ALL"), ("retries", "2147483647"), ("enable.idempotence", "True")]
)
def test_what_delivery_relies_on_may_be_said_again(option):
    async def remember(marks):
        pass

    KafkaSink(NOWHERE, Context(reporter=Reporter("x"), remember=remember, options=dict([option])))


def test_the_missing_package_is_named(start):
    command = patched("zmqpull", "sys.modules['confluent_kafka'] = None")
    child = start(*command, "--to", NOWHERE)
    _, err = child.communicate(timeout=PATIENCE)

    assert child.returncode == 2
    needed = (
        "--to kafka:// needs the Python package confluent_kafka: "
        "pip install '.[kafka]' in the checkout of zmqpush brings it"
    )
    assert err.decode().splitlines()[-1] == f"zmqpull: {needed}; see zmqpull --help"


@needs_mock_kafka
def test_no_secret_is_told(kafka, deliver_to):
    options = ("security.protocol=sasl_plaintext", "sasl.mechanism=PLAIN", "debug=all")
    options += ("sasl.username=me", "sasl.password=hunter2")
    child = deliver_to(kafka.url("logs"), *[word for one in options for word in ("-X", one)])
    told = line_of(child)

    assert "cannot write to" in told
    assert "hunter2" not in told + finish(child)
