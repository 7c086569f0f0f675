"""
The program ``zmqpush``: standard input to receivers.

app.py joins a source (source.py; omprog.py answers rsyslog) with an outlet: delivery.py is its
contract, plain.py and acked.py are the two. What waits is in a bounded queue in memory (queue.py,
unacked_queue.py) or in the spool. Nothing here knows the receiver or its sinks.
"""
