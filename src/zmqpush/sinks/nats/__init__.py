"""NATS JetStream: sink.py delivers and remembers, client.py connects by nats-py."""
