"""
A Kafka cluster that ends with its standard input: librdkafka's mock, in a process of its own.

Usage: ``python kafka_mock.py BROKERS``. It prints the brokers' addresses. Then each line on
standard input is a command, and is answered with a line: ``ok``, a number, or ``error`` and
librdkafka's name of the error::

    create TOPIC PARTITIONS     lead TOPIC PARTITION BROKER   topic-error TOPIC ERROR
    down BROKER                 up BROKER                     rtt BROKER MILLISECONDS
    fail API COUNT ERROR        heal API                      requests API

BROKER counts from 1; -1 is all of them. API is the number of a request in Kafka's protocol,
ERROR the number of an error; -195 ends the connection instead of an answer.
"""

import ctypes
import sys
from collections.abc import Callable
from importlib.metadata import files

_PRODUCER = 0


def _library() -> ctypes.CDLL:
    """Load the librdkafka that is in the wheel of confluent-kafka."""
    found = [file for file in files("confluent-kafka") or [] if file.match("librdkafka*.so*")]
    library = ctypes.CDLL(str(found[0].locate()))
    for name in ("conf_new", "new", "mock_cluster_new"):
        getattr(library, f"rd_kafka_{name}").restype = ctypes.c_void_p
    library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    library.rd_kafka_mock_get_requests.restype = ctypes.POINTER(ctypes.c_void_p)
    library.rd_kafka_mock_request_api_key.restype = ctypes.c_int16
    library.rd_kafka_err2name.restype = ctypes.c_char_p
    return library


class Cluster:
    """The mock. Each method with a command's name carries it out and returns an error or none."""

    def __init__(self, brokers: int) -> None:
        self._library = _library()
        reason = ctypes.create_string_buffer(512)
        config = ctypes.c_void_p(self._library.rd_kafka_conf_new())
        self._library.rd_kafka_conf_set(config, b"log_level", b"0", reason, len(reason))
        client = self._library.rd_kafka_new(_PRODUCER, config, reason, len(reason))
        assert client, reason.value
        cluster = self._library.rd_kafka_mock_cluster_new(ctypes.c_void_p(client), brokers)
        assert cluster
        self._cluster = ctypes.c_void_p(cluster)
        self._brokers = brokers
        self._call("start_request_tracking")

    def _call(self, name: str, *args: object) -> int:
        return getattr(self._library, f"rd_kafka_mock_{name}")(self._cluster, *args)

    @property
    def addresses(self) -> str:
        """Where the brokers listen."""
        return self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    def create(self, topic: str, partitions: str) -> int:
        return self._call("topic_create", topic.encode(), int(partitions), self._brokers)

    def lead(self, topic: str, partition: str, broker: str) -> int:
        return self._call("partition_set_leader", topic.encode(), int(partition), int(broker))

    def topic_error(self, topic: str, error: str) -> None:
        self._call("topic_set_error", topic.encode(), int(error))

    def down(self, broker: str) -> int:
        return self._call("broker_set_down", int(broker))

    def up(self, broker: str) -> int:
        return self._call("broker_set_up", int(broker))

    def rtt(self, broker: str, milliseconds: str) -> int:
        return self._call("broker_set_rtt", int(broker), int(milliseconds))

    def fail(self, api: str, count: str, error: str) -> None:
        errors = (ctypes.c_int * int(count))(*[int(error)] * int(count))
        size = ctypes.c_size_t(len(errors))
        self._call("push_request_errors_array", ctypes.c_int16(int(api)), size, errors)

    def heal(self, api: str) -> None:
        self._call("clear_request_errors", ctypes.c_int16(int(api)))

    def requests(self, api: str) -> str:
        """Return how many requests of a kind came."""
        count = ctypes.c_size_t()
        requests = self._call("get_requests", ctypes.byref(count))
        kinds = []
        for index in range(count.value):
            request = ctypes.c_void_p(requests[index])
            kinds.append(self._library.rd_kafka_mock_request_api_key(request))
            self._library.rd_kafka_mock_request_destroy(request)
        return str(kinds.count(int(api)))

    def answer(self, line: str) -> str:
        """Carry out a command."""
        name, *args = line.split()
        command: Callable[..., int | str | None] = getattr(self, name.replace("-", "_"))
        done = command(*args)
        if isinstance(done, str):
            return done
        return f"error {self._library.rd_kafka_err2name(done).decode()}" if done else "ok"


if __name__ == "__main__":
    cluster = Cluster(int(sys.argv[1]))
    print(cluster.addresses, flush=True)
    for line in sys.stdin:
        print(cluster.answer(line), flush=True)
