"""
The program ``zmqpull``: what senders send, to a sink.

app.py joins sockets, the protocol of acknowledged delivery and the writer. writer.py retries,
writes dead letters and commits; state.py remembers what was acknowledged, in SQLite. Nothing
here knows an engine: that is the sinks' part. Nothing here knows the sender.
"""
