"""
How a program ends: signals, the grace period, and the end of patience.

The first SIGTERM or SIGINT asks to stop reading and to deliver what is there within the
grace period; the second means now. A signal that the parent made us ignore (``nohup``,
rsyslog's omprog, ``cmd &``) stays ignored.
"""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from enum import Enum, auto
from typing import Any

# After the first signal reading goes on until the input has been quiet so long, in
# seconds: a writer that got the same signal may have last words.
_QUIET = 0.2
# How long work that should be done at once may take when patience has ended, in seconds.
_LAST_CHANCE = 0.1
# Within the time limit it is looked so often whether something was delivered. To count these
# looks, not seconds, forgives us the time in which we were stopped.
_STALL_LOOKS = 8


class Reason(Enum):
    """Why a program gave up."""

    SIGNAL = auto()
    TIMEOUT = auto()


class Ending:
    """
    Ends a program in order.

    Args:
        grace: How long to go on after the first signal, in seconds.
        stop_reading: Called when nothing more shall be read.
        is_quiet: Tells whether nothing is there to be read now.
        progress: Tells how much was read so far, in any unit.

    Attributes:
        reason: Why the program gave up, if it did.

    """

    def __init__(
        self,
        grace: float,
        stop_reading: Callable[[], None],
        is_quiet: Callable[[], bool] = lambda: True,
        progress: Callable[[], int] = lambda: 0,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._grace = grace
        self._stop_reading = stop_reading
        self._is_quiet = is_quiet
        self._progress = progress
        self._signals = 0
        self._given_up = asyncio.Event()
        self._look: asyncio.TimerHandle | None = None
        self._told_twice = asyncio.Event()
        self.reason: Reason | None = None

    def handle_signals(self, *, at_once: bool, hangup: Callable[[], None]) -> None:
        """
        Take over SIGTERM, SIGINT and SIGHUP, unless they are ignored.

        Args:
            at_once: Stop reading at the first signal, not when the input is quiet.
            hangup: What to do on SIGHUP.

        """
        self._handle(signal.SIGHUP, hangup)
        # SIGTERM last: who sees that it is caught (/proc/PID/status) knows that all are.
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handle(number, lambda: self._on_signal(at_once))

    def _handle(self, number: signal.Signals, callback: Callable[[], None]) -> None:
        if signal.getsignal(number) is not signal.SIG_IGN:
            self._loop.add_signal_handler(number, callback)
            # asyncio would have Python print a traceback for each that comes too fast.
            signal.set_wakeup_fd(signal.set_wakeup_fd(-1), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})

    def _on_signal(self, at_once: bool) -> None:
        self._signals += 1
        if self._signals > 2:
            return
        if self._signals == 2:
            # A third one could change nothing, and a flood of them would only delay us.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
            self._told_twice.set()
            self._give_up(Reason.SIGNAL)
            return
        self.begin_grace()
        if at_once:
            self._stop_reading()
        else:
            # The other half of the grace period is for delivery.
            self._loop.call_later(self._grace / 2, self._stop_reading)
            self._loop.call_later(_QUIET, self._stop_when_quiet, self._progress())

    def _stop_when_quiet(self, before: int) -> None:
        now = self._progress()
        if now == before and self._is_quiet():
            self._stop_reading()
        else:
            self._loop.call_later(_QUIET, self._stop_when_quiet, now)

    def begin_grace(self) -> None:
        """Give up when the grace period has gone by from now on."""
        self._loop.call_later(self._grace, self._give_up, Reason.SIGNAL)

    @property
    def signalled(self) -> bool:
        """Whether a signal has asked for the end."""
        return self._signals > 0

    def _give_up(self, reason: Reason) -> None:
        self.reason = self.reason or reason
        self._given_up.set()

    def limit_stall(self, timeout: float, progress: Callable[[], object]) -> None:
        """
        Give up once ``progress`` has not changed for ``timeout`` seconds.

        It is watched until it is None, which means that nothing waits: call this again when
        something does.
        """
        if self._look is None and (now := progress()) is not None:
            self._look_later(timeout, progress, now, 0)

    def _look_later(
        self, timeout: float, progress: Callable[[], object], before: object, looks: int
    ) -> None:
        self._look = self._loop.call_later(
            timeout / _STALL_LOOKS, self._check_stall, timeout, progress, before, looks
        )

    def _check_stall(
        self, timeout: float, progress: Callable[[], object], before: object, looks: int
    ) -> None:
        self._look = None
        if (now := progress()) is None:
            return
        looks = looks + 1 if now == before else 0
        if looks == _STALL_LOOKS:
            self._give_up(Reason.TIMEOUT)
        else:
            self._look_later(timeout, progress, now, looks)

    async def unless_given_up(
        self, work: Coroutine[Any, Any, None], beside: "asyncio.Future[Any] | None" = None
    ) -> bool:
        """
        Do some work, unless patience ends first.

        Args:
            work: What to do; it is cancelled when patience ends.
            beside: A task that runs all the time; if it fails, so does this.

        Returns:
            Whether the work was done.

        """
        return await self._unless(self._given_up, work, beside)

    async def unless_told_twice(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do some work however long it takes, unless a second signal comes."""
        return await self._unless(self._told_twice, work)

    async def _unless(
        self,
        event: asyncio.Event,
        work: Coroutine[Any, Any, None],
        beside: "asyncio.Future[Any] | None" = None,
    ) -> bool:
        working = asyncio.create_task(work)
        giving_up = asyncio.create_task(event.wait())
        tasks: set[asyncio.Future[Any]] = {working, giving_up} | ({beside} if beside else set())
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        failed = beside if beside and beside.done() else None
        if not working.done() and not failed:
            await asyncio.wait({working}, timeout=_LAST_CHANCE)
        giving_up.cancel()
        done = working.done()
        if not done:
            working.cancel()
            await asyncio.wait({working}, timeout=_LAST_CHANCE)
        if failed:
            failed.result()
        if working.done() and not working.cancelled():
            working.result()
        return done
