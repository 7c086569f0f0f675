"""
What knows no sockets, files, clocks or event loops: bytes and time in, bytes out.

records: lines into records and back; protocol: acknowledged delivery; zmtp: the wire, which
knows nothing of the rest; omprog.py: rsyslog's dialogue; held.py, holes.py: ranges of numbers.
"""
