"""
What both programs need of the system, and what they tell the user.

shutdown.py: signals and the grace period; reporting.py: the lines on standard error; fds.py and
files.py: descriptors; room on a disk, and whose a file is; background.py: tasks beside the
program; failures.py: exceptions into one line and an exit code; faults.py: the named points where
tests kill.
"""
