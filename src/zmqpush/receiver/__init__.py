"""
The program ``zmqpull``: what senders send, to a sink.

app.py joins the stages: sockets, the protocol of acknowledged delivery, the writer. writer.py
retries, writes dead letters and commits; state.py remembers what was acknowledged. Nothing here
knows an engine or a format of files: that is the sinks' part. Nothing here knows the sender.
"""
