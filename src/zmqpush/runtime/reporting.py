"""What the programs say of themselves, on standard error: one line when something changes."""

import os
import re
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncio import TimerHandle

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\udc80-\udcff]")  # and bytes that are no text
# An outage is told of when it has lasted so long, in seconds, and not sooner than so
# long after the last line about one.
_OUTAGE_DELAY = 1.0
_OUTAGE_INTERVAL = 10.0
# Losses are reported at once, then at intervals that double from the one to the other, in
# seconds, for as long as there are more.
_MIN_TALLY_INTERVAL, _MAX_TALLY_INTERVAL = 10.0, 600.0
# About the same thing one line is printed in so long, in seconds.
_QUIET = 60.0
# Of so many things at once; of more there is one line that counts.
_MAX_THINGS = 20
# How long the summary waits for room in standard output, in seconds.
_SUMMARY_TIMEOUT = 1.0


def write_line(fd: int, text: str, timeout: float = 0.0) -> bool:
    """
    Write one line to ``fd``; whether that worked.

    Never raises, and never waits longer than ``timeout``: a pipe that is ready takes a
    line of up to ``PIPE_BUF`` bytes at once, and one that is full must not stop us.
    What a peer or a file name brings along cannot end the line or steer a terminal.
    """
    text = _CONTROL.sub(lambda match: f"\\x{ord(match[0]) & 0xFF:02x}", text)
    line = text.encode("utf-8", "backslashreplace")[: select.PIPE_BUF - 1] + b"\n"
    try:
        room = select.poll()
        room.register(fd, select.POLLOUT)
        return bool(room.poll(timeout * 1000)) and os.write(fd, line) == len(line)
    except OSError:
        return False


class Reporter:
    """
    Prints lines that begin with the program's name.

    Args:
        program: That name.
        quiet: Print warnings only: what is wrong, not what is well again.

    """

    def __init__(self, program: str, *, quiet: bool = False) -> None:
        self._program = program
        self._quiet = quiet

    def notice(self, text: str) -> None:
        """Say something worth knowing."""
        if not self._quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Say something that must be known."""
        if sys.stderr is not None:
            write_line(2, f"{self._program}: {text}")

    def summary(self, records: int, seconds: float) -> None:
        """Print the summary of the run on standard output."""
        line = f"Processed {records:d} messages in {seconds * 1000:.4f}ms. "
        line += f"Tagged with @pid:{os.getpid():d}"
        if not self._quiet and not write_line(1, line, _SUMMARY_TIMEOUT):
            self.warn("cannot write the summary to standard output")


class Complaints:
    """
    Prints warnings, of each kind one a minute: a hostile peer can cause any number.

    Args:
        reporter: Who prints them.

    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._lock = threading.Lock()  # input may be read in a thread, and complained of there
        self._since = -_QUIET
        self._seen: set[str] = set()
        self._unsaid = 0

    def warn(self, text: str, kind: str = "") -> None:
        """Print a warning, unless one of its kind (or the same) was printed in this minute."""
        with self._lock:
            now = time.monotonic()
            if now - self._since >= _QUIET:
                if self._unsaid:
                    self._reporter.warn(f"{self._unsaid} more warnings in a minute")
                self._since, self._unsaid = now, 0
                self._seen.clear()
            if (kind or text) not in self._seen and len(self._seen) < _MAX_THINGS:
                self._seen.add(kind or text)
                self._reporter.warn(text)
            else:
                self._unsaid += 1


class Outage:
    """
    Notices when nothing moves, and says so once when that begins and once when it ends.

    No timer runs while all is well.

    Args:
        reporter: Who says it.
        why: Tells the reason that ends the line about the beginning, if there is one.

    """

    def __init__(self, reporter: Reporter, why: Callable[[], str] = str) -> None:
        self._reporter = reporter
        self._why = why
        self._since: float | None = None
        self._announced = False
        self._last_line = -_OUTAGE_INTERVAL
        self._timer: TimerHandle | None = None

    def begin(self, what: str) -> None:
        """Note that from now on nothing moves; ``what`` is the line to print."""
        if self._since is None:
            self._since = time.monotonic()
            self._what = what
            if self._timer is None:
                self._check()

    def end(self, what: str) -> None:
        """Note that something moves again; ``what`` is the line to print."""
        if self._since is not None and self._announced:
            self._announced = False
            self._last_line = time.monotonic()
            self._reporter.notice(f"{what} (after {self._last_line - self._since:.1f} s)")
        self._since = None

    def _check(self) -> None:
        self._timer = None
        if self._since is None or self._announced:
            return
        due = max(self._since + _OUTAGE_DELAY, self._last_line + _OUTAGE_INTERVAL)
        delay = due - time.monotonic()
        if delay <= 0:
            self._announced = True
            self._reporter.warn(self._what + self._why())
        else:
            self._timer = _call_later(delay, self._check)


class Tally:
    """
    Reports a number of losses while it grows: at once, then every so often.

    No timer runs while it does not.

    Args:
        reporter: Who says it.
        text: What to say; ``{}`` stands for the number since the last line.

    """

    def __init__(self, reporter: Reporter, text: str) -> None:
        self._reporter = reporter
        self._text = text
        self._number = self._reported = 0
        self._interval = _MIN_TALLY_INTERVAL
        self._timer: TimerHandle | None = None

    def note(self, number: int) -> None:
        """Note how many there are, so far."""
        self._number = number
        if self._timer is None and number != self._reported:
            self._interval = _MIN_TALLY_INTERVAL
            self._report()

    def close(self) -> None:
        """Report what was not reported yet."""
        if self._timer:
            self._timer.cancel()
        self._report()

    def _report(self) -> None:
        self._timer = None
        if self._number == self._reported:
            return
        total = f", {self._number} so far" if self._reported else ""
        self._reporter.warn(self._text.format(self._number - self._reported) + total)
        self._reported = self._number
        self._timer = _call_later(self._interval, self._report)
        self._interval = min(2 * self._interval, _MAX_TALLY_INTERVAL)


def _call_later(delay: float, callback: Callable[[], None]) -> "TimerHandle":
    from asyncio import get_running_loop  # --help and --version start sooner

    return get_running_loop().call_later(delay, callback)
