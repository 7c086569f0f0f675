"""
Records on the sender's disk until they are acknowledged, ``docs/spool.md``.

spool.py writes, syncs and removes; reader.py reads back; segment.py is the format of a file;
slots.py gives each process a directory of its own. Nothing here knows how records are sent.
"""
