"""
Acknowledged delivery, ``docs/protocol.md``: messages.py, sender.py, receiver.py.

messages.py turns frames into checked messages and back; the two state machines take messages
and the time, and return messages. They know no sockets, files or clocks, and not the wire.
"""
