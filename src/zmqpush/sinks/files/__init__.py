"""
Files by template, and standard output.

sink.py chooses files and syncs them, output.py writes one of them, journal.py proves which end
of a file is ours, so that it may be cut off after a kill.
"""
