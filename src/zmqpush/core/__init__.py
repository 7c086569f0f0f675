"""
What knows no sockets, files, clocks or event loops: bytes and time in, bytes out.

records: lines into records, frames into checked records; protocol: acknowledged delivery; zmtp:
the wire, which knows nothing of the rest; omprog.py: rsyslog's dialogue; held.py: what a sink
holds and nobody has acknowledged; holes.py: what a spool has lost.
"""
