"""Kafka: sink.py delivers and remembers, client.py speaks to librdkafka."""
