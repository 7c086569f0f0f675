"""
Where ``zmqpull`` puts records: standard output, files, Kafka, NATS JetStream.

base.py is the contract, registry.py finds a sink; template.py fills names with labels and
time; each package is one sink. A sink knows its engine only: waiting, dead letters and the
state are the receiver's part. A sink knows no settings but what its context says.
"""
