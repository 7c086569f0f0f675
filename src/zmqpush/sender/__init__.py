"""
The program ``zmqpush``: standard input to receivers.

app.py joins the stages: a source (source.py, omprog.py) reads, a delivery (plain.py, acked.py)
queues and sends. Queues bound memory; what is on disk is the spool's. Formats are in
core.records, the protocol is in core.protocol, sockets are in transport. Nothing here knows
the receiver or its sinks.
"""
