"""The brokers that tests run do what those tests rely on."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import (
    DISCONNECT,
    PRODUCE,
    Message,
    MockKafka,
    NatsServer,
    RealKafka,
    Record,
    certificate,
    mock_kafka,
    nats_server,
    needs_mock_kafka,
    needs_nats,
    needs_openssl,
    needs_real_kafka,
    real_kafka,
)
from helpers import wait_until

__all__ = ["mock_kafka", "nats_server", "real_kafka"]  # fixtures

StartsNats = Callable[..., NatsServer]
StartsKafka = Callable[..., MockKafka]
NOT_LEADER = 6


def publish(server: NatsServer, count: int) -> None:
    async def publish_all(jetstream: Any) -> None:
        for number in range(count):
            headers = {"number": str(number)}
            await jetstream.publish_async(
                f"logs.{number % 2}", b"\0%d\xff" % number, headers=headers
            )
        await jetstream.publish_async_completed()

    server.do(publish_all)


def published(*numbers: int) -> list[Message]:
    return [
        Message(f"logs.{number % 2}", {"number": str(number)}, b"\0%d\xff" % number, number + 1)
        for number in numbers
    ]


@needs_nats
def test_a_stream_is_read_whole_and_in_order(nats_server: StartsNats) -> None:
    server = nats_server()
    server.add_stream("S", ["logs.>"])
    assert server.messages("S") == []
    publish(server, 12_000)

    assert server.messages("S") == published(*range(12_000))


@needs_nats
def test_what_a_killed_nats_server_has_acknowledged_is_there_again_at_the_same_place(
    nats_server: StartsNats,
) -> None:
    server = nats_server(jetstream={"sync_interval": "always"})
    server.add_stream("S", ["logs.>"])
    publish(server, 10)
    url = server.url
    server.kill()
    with pytest.raises(Exception, match="no servers"):
        server.messages("S")
    server.start()
    server.stop()
    server.start()

    assert server.url == url
    assert server.messages("S") == published(*range(10))


@needs_nats
def test_streams_are_changed_and_purged(nats_server: StartsNats) -> None:
    server = nats_server()
    server.add_stream("S", ["logs.>"], max_msgs=5)
    publish(server, 10)
    assert server.messages("S") == published(*range(5, 10))
    server.update_stream("S", max_msgs=2)
    assert server.messages("S") == published(8, 9)
    server.purge("S")

    assert server.messages("S") == []


@needs_nats
def test_a_paused_nats_server_answers_once_it_resumes(nats_server: StartsNats) -> None:
    server = nats_server()

    async def pause(jetstream: Any) -> None:
        server.pause()
        answer = asyncio.create_task(jetstream.account_info())
        done, _ = await asyncio.wait([answer], timeout=0.5)
        assert not done
        server.resume()
        await answer

    server.do(pause)


@needs_nats
def test_a_nats_server_lets_in_its_users_alone_and_lets_them_do_what_they_may(
    nats_server: StartsNats,
) -> None:
    permissions = {"publish": ["logs.0"], "subscribe": ["_INBOX.>"]}
    user = {"user": "zmqpull", "password": "secret"}
    server = nats_server(users=[user | {"permissions": permissions}])
    server.add_stream("S", ["logs.>"])

    async def publish_both(jetstream: Any) -> None:
        await jetstream.publish("logs.0", b"allowed")
        with pytest.raises(Exception, match=r"(?i)timeout|violation"):
            await jetstream.publish("logs.1", b"forbidden", timeout=0.5)

    server.do(publish_both, **user)
    with pytest.raises(Exception, match="Authorization"):
        server.do(publish_both, **user | {"password": "wrong"})

    assert [message.data for message in server.messages("S")] == [b"allowed"]


@needs_nats
def test_a_nats_server_refuses_more_than_its_max_payload(nats_server: StartsNats) -> None:
    server = nats_server()
    server.stop()
    server.configure(max_payload=1000)
    server.start()
    server.add_stream("S", ["logs.>"])
    server.do(lambda jetstream: jetstream.publish("logs.0", bytes(1000)))
    with pytest.raises(Exception, match="maximum payload"):
        server.do(lambda jetstream: jetstream.publish("logs.0", bytes(1001)))


@needs_nats
@needs_openssl
def test_a_nats_server_speaks_tls(nats_server: StartsNats, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    server = nats_server(tls={"cert_file": cert, "key_file": key})
    server.add_stream("S", ["logs.>"])
    publish(server, 1)
    with pytest.raises(Exception, match="CERTIFICATE_VERIFY_FAILED"):
        server.do(lambda jetstream: jetstream.account_info(), tls=None)

    assert server.url.startswith("tls://")
    assert server.messages("S") == published(0)


class Reports(list[tuple[bytes, str]]):
    """The values of which a producer told, and "" or its error."""

    def __call__(self, error: object, message: Any) -> None:
        self.append((message.value(), error.name() if error else ""))


def producer(kafka: MockKafka | RealKafka, **settings: object) -> Any:
    import confluent_kafka

    config = {"bootstrap.servers": kafka.bootstrap, "log_level": 0, "linger.ms": 0}
    settings = {name.replace("_", "."): value for name, value in settings.items()}
    return confluent_kafka.Producer(config | settings)


def is_read_as_it_was_written(kafka: MockKafka | RealKafka) -> None:
    kafka.create("logs", 2)
    everything = bytes(range(256))
    wanted = [
        Record(0, 0, None, [], None),
        Record(0, 1, b"", [], b""),
        *[Record(0, 2 + number, b"key", [], b"%d" % number) for number in range(5000)],
        Record(1, 0, everything, [("a,b", b"\xff\0=,\n"), ("none", None)], everything),
    ]
    client = producer(kafka)
    for record in wanted:
        partition, _, key, headers, value = record
        client.produce("logs", value, key, partition, headers=headers)
    client.flush()

    assert kafka.read("logs") == wanted


@needs_mock_kafka
def test_a_topic_of_the_mock_is_read_whole_and_byte_for_byte(mock_kafka: StartsKafka) -> None:
    kafka = mock_kafka()
    is_read_as_it_was_written(kafka)

    assert kafka.url("logs") == f"kafka://{kafka.bootstrap}/logs"
    assert kafka.bootstrap.count("127.0.0.1:") == 3


@needs_mock_kafka
def test_the_mock_tells_when_it_has_dropped_records(mock_kafka: StartsKafka) -> None:
    kafka = mock_kafka(1)
    kafka.create("logs")
    client = producer(kafka)
    for _ in range(12):
        client.produce("logs", bytes(500_000))
    client.flush()
    with pytest.raises(AssertionError, match="has dropped"):
        kafka.read("logs")


@needs_mock_kafka
def test_brokers_that_are_down_come_up_where_they_were(mock_kafka: StartsKafka) -> None:
    kafka = mock_kafka()
    kafka.create("logs")
    kafka.down()
    reports = Reports()
    client = producer(kafka)
    client.produce("logs", b"waits", on_delivery=reports)
    client.flush(0.5)
    assert reports == []
    kafka.up()
    client.flush()

    assert reports == [(b"waits", "")]
    assert [record.value for record in kafka.read("logs")] == [b"waits"]


@needs_mock_kafka
def test_an_answer_is_lost_and_the_record_is_not(mock_kafka: StartsKafka) -> None:
    kafka = mock_kafka(1)
    kafka.create("logs")
    client = producer(kafka, retries=0)
    reports = Reports()
    client.produce("logs", b"written", on_delivery=reports)
    client.flush()
    kafka.slow(60_000)
    client.produce("logs", b"written, too", on_delivery=reports)
    wait_until(lambda: client.poll(0.01) or kafka.requests(PRODUCE) == 2)
    kafka.down()
    client.flush()
    kafka.slow(0)
    kafka.up()

    assert reports == [(b"written", ""), (b"written, too", "_TRANSPORT")]
    assert [record.value for record in kafka.read("logs")] == [b"written", b"written, too"]


@needs_mock_kafka
@pytest.mark.parametrize("error", [NOT_LEADER, DISCONNECT])
def test_requests_fail_as_often_as_they_are_told_to(mock_kafka: StartsKafka, error: int) -> None:
    kafka = mock_kafka(1)
    kafka.create("logs")
    kafka.fail(PRODUCE, 2, error)
    reports = Reports()
    client = producer(kafka)
    client.produce("logs", b"in the end", on_delivery=reports)
    client.flush()

    assert reports == [(b"in the end", "")]
    assert kafka.requests(PRODUCE) == 3
    assert [record.value for record in kafka.read("logs")] == [b"in the end"]


@needs_mock_kafka
def test_a_topic_is_refused_and_a_partition_has_no_leader_until_told_otherwise(
    mock_kafka: StartsKafka,
) -> None:
    from confluent_kafka import KafkaException

    kafka = mock_kafka(2)
    kafka.create("logs")
    kafka.topic_error("logs", 29)  # TOPIC_AUTHORIZATION_FAILED
    reports = Reports()
    client = producer(kafka)
    try:
        client.produce("logs", b"refused", on_delivery=reports)
        client.flush()
    except KafkaException as exc:  # where the client has asked for the topic by then
        reports.append((b"refused", exc.args[0].name()))
    kafka.topic_error("logs", 0)
    kafka.lead("logs", 0, MockKafka.ALL)
    client = producer(kafka)
    client.produce("logs", b"waits", on_delivery=reports)
    client.flush(0.5)
    assert reports == [(b"refused", "TOPIC_AUTHORIZATION_FAILED")]
    kafka.lead("logs", 0, 2)
    client.flush()

    assert reports[1:] == [(b"waits", "")]
    assert [record.value for record in kafka.read("logs")] == [b"waits"]


@needs_mock_kafka
def test_the_mock_refuses_what_it_does_not_know(mock_kafka: StartsKafka) -> None:
    kafka = mock_kafka(1)
    kafka.create("logs")
    with pytest.raises(AssertionError, match="TOPIC_ALREADY_EXISTS"):
        kafka.create("logs")
    with pytest.raises(AssertionError, match="BROKER_NOT_AVAILABLE"):
        kafka.down(2)


@needs_real_kafka
def test_a_topic_of_a_real_broker_is_read_whole_and_byte_for_byte(real_kafka: RealKafka) -> None:
    is_read_as_it_was_written(real_kafka)


@needs_real_kafka
def test_a_real_broker_does_not_write_again_what_it_has_from_an_idempotent_producer(
    real_kafka: RealKafka,
) -> None:
    real_kafka.create("logs")
    offsets = []
    client = producer(real_kafka, enable_idempotence=True)

    def report(error: object, message: Any) -> None:
        assert error is None
        offsets.append(message.offset())

    client.produce("logs", b"first", on_delivery=report)
    client.flush()
    real_kafka.lose_answer(b"twice")
    client.produce("logs", b"sent twice", on_delivery=report)
    client.flush()

    assert offsets == [0, None]  # the second answer tells of a duplicate, and no offset
    assert [record.value for record in real_kafka.read("logs")] == [b"first", b"sent twice"]


@needs_real_kafka
def test_a_real_broker_that_is_down_or_paused_answers_later(real_kafka: RealKafka) -> None:
    real_kafka.create("logs")
    reports = Reports()
    client = producer(real_kafka)
    for hold, let_go in (
        (real_kafka.down, real_kafka.up),
        (real_kafka.pause, real_kafka.resume),
    ):
        hold()
        client.produce("logs", b"waits", on_delivery=reports)
        client.flush(0.5)
        assert reports == []
        let_go()
        client.flush()
        assert reports == [(b"waits", "")]
        reports.clear()

    assert [record.offset for record in real_kafka.read("logs")] == [0, 1]
