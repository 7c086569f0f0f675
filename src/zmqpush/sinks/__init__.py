"""
Where ``zmqpull`` puts records: standard output, files, Kafka, NATS JetStream.

base.py is the contract; registry.py finds a sink by its entry point (pyproject.toml); each
package is one sink; template.py makes names of labels and time. A sink knows its engine only:
waiting, dead letters and the state are the receiver's part; its options are in its context.
"""
