"""
What both programs need of the system, and no business of records.

shutdown.py: signals and the grace period; reporting.py: the lines on standard error; fds.py and
files.py: descriptors, directories, locks; background.py: tasks beside the program; failures.py:
exceptions into one line and an exit code; faults.py: the named points where tests kill.
"""
