"""Work that nobody waits for: when it fails, the program ends, and says why."""

import asyncio
import sys
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from zmqpush.runtime.reporting import Reporter

_T = TypeVar("_T")
# How long a program may take to count its records when something beside it has failed, in
# seconds.
_LAST_WORDS = 0.1


def begin(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Begin some work beside the rest of the program, which ends if it fails."""
    task = asyncio.create_task(work)
    end_with(task)
    return task


def end_with(future: "asyncio.Future[Any]") -> None:
    """Let the program end if a task, or a job of an executor, fails."""
    future.add_done_callback(_raise_failure)


def _raise_failure(future: "asyncio.Future[Any]") -> None:
    # Out of a callback: the loop's handler gets it, as it gets what fails in a timer.
    if not future.cancelled() and (error := future.exception()):
        raise error


async def run_with_background(program: Coroutine[Any, Any, _T], reporter: Reporter) -> _T:
    """
    Run a program to its end, or until something beside it fails.

    Args:
        program: What to run.
        reporter: Where to say what libraries leave behind.

    Raises:
        Exception: What the program raised, or a callback, a timer, a thread, or work that was
            begun here.

    """
    loop = asyncio.get_running_loop()
    failure: asyncio.Future[_T] = loop.create_future()

    def note(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception") or RuntimeError(context["message"])
        if isinstance(error, asyncio.CancelledError):
            return
        if "handle" not in context:
            # A transport or a task that a library gave up. Whoever uses it learns of that
            # from the library, or when nothing comes.
            tell(error)
        elif not failure.done():
            failure.set_exception(error)

    def tell(error: BaseException | None) -> None:
        reporter.warn(f"internal error, please report it: {error!r}")

    def note_thread(args: threading.ExceptHookArgs) -> None:
        context = {"exception": args.exc_value, "handle": args.thread}
        loop.call_soon_threadsafe(loop.call_exception_handler, context)

    loop.set_exception_handler(note)
    threading.excepthook = note_thread
    sys.unraisablehook = lambda unraisable: tell(unraisable.exc_value)
    running = asyncio.create_task(program)
    await asyncio.wait({running, failure}, return_when=asyncio.FIRST_COMPLETED)
    if not running.done():
        running.cancel()
        await asyncio.wait({running}, timeout=_LAST_WORDS)
    return (failure if failure.done() else running).result()
