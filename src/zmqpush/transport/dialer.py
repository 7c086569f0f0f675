"""Connects to one endpoint, again and again."""

import asyncio
import contextlib
import errno
import os
import random
import socket
import threading
from collections.abc import Callable

from zmqpush.transport.addresses import Address, is_literal, resolve

# How long a connection may take to be made, in seconds.
_CONNECT_TIMEOUT = 5.0
# When to try again, in seconds: at first, so that a fleet does not come back at once, and at
# most. Each time it is twice as long.
_FIRST_DELAY = 0.05, 0.1
_MAX_DELAY = 2.0
_GONE = {errno.ECONNREFUSED, errno.ENOENT}


class Dialer:
    """
    Connects to an endpoint, by any of its addresses.

    Args:
        endpoint: Where.
        there: The program that is expected there.
        adopt: Called with each connection that was made, and the endpoint.
        explain: Called with the endpoint, and why there is no connection.

    Attributes:
        closed: Whether it connects no more.

    """

    def __init__(
        self,
        endpoint: str,
        there: str,
        adopt: Callable[[socket.socket, str], None],
        explain: Callable[[str, str], None],
    ) -> None:
        self._endpoint = endpoint
        self._there = there
        self._adopt = adopt
        self._explain = explain
        self._loop = asyncio.get_running_loop()
        self._addresses: list[Address] = []
        self._reason = ""
        self._sock: socket.socket | None = None  # which is being connected
        self._timer: asyncio.TimerHandle | None = None
        self._delay = 0.0
        self.closed = False

    def dial(self) -> None:
        """Begin to connect."""
        self._timer = None
        if is_literal(self._endpoint):
            self._try_all(resolve(self._endpoint))
            return

        def look_up() -> None:
            try:
                found, reason = resolve(self._endpoint), ""
            except OSError as exc:
                found, reason = [], str(exc.strerror)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._try_all, found, reason)

        try:
            # A daemon: a name server that does not answer keeps nobody from the end.
            threading.Thread(target=look_up, daemon=True).start()
        except RuntimeError:
            self._try_all([], f"{self._endpoint}: no thread to look up the name")

    def dial_again(self, *, soon: bool) -> None:
        """Connect again after a delay, which grows unless the last connection was good."""
        if self.closed:
            return
        if soon or not self._delay:
            self._delay = random.uniform(*_FIRST_DELAY)
        else:
            self._delay = min(2 * self._delay, _MAX_DELAY)
        # What the first address leads to may be no receiver: then it is the next one's turn.
        dial = self._try_next if self._addresses and not soon else self.dial
        self._timer = self._loop.call_later(self._delay, dial)

    def close(self) -> None:
        """Stop."""
        self.closed = True
        if self._timer:
            self._timer.cancel()
        self._give_up()

    def _try_all(self, addresses: list[Address], reason: str = "") -> None:
        self._addresses = addresses
        self._reason = reason
        self._try_next()

    def _try_next(self) -> None:
        while self._addresses and not self.closed:
            family, address = self._addresses.pop(0)
            try:
                self._sock = sock = socket.socket(family, socket.SOCK_STREAM)
                sock.setblocking(False)
                sock.connect(address)
            except BlockingIOError as exc:
                if exc.errno == errno.EINPROGRESS:
                    self._loop.add_writer(sock, self._on_connected)
                    self._timer = self._loop.call_later(_CONNECT_TIMEOUT, self._on_timeout)
                    return
                self._failed(exc)  # a Unix socket with too many that wait
            except OSError as exc:
                self._failed(exc)
            else:
                self._hand_over()
                return
        if not self.closed:
            self._explain(self._endpoint, self._reason)
            self.dial_again(soon=False)

    def _on_connected(self) -> None:
        assert self._sock
        self._loop.remove_writer(self._sock)
        if self._timer:
            self._timer.cancel()
        try:
            number = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not number and _is_connected_to_itself(self._sock):
                number = errno.ECONNREFUSED
            if number:
                raise OSError(number, os.strerror(number))
        except OSError as exc:  # also: it has gone since
            self._failed(exc)
            self._try_next()
        else:
            self._hand_over()

    def _on_timeout(self) -> None:
        self._give_up()
        self._reason = (
            f"{self._endpoint}: no answer: is that the address, and does a firewall let us?"
        )
        self._try_next()

    def _give_up(self) -> None:
        if self._sock:
            self._loop.remove_writer(self._sock)
            self._sock.close()
            self._sock = None

    def _failed(self, error: OSError) -> None:
        self._give_up()
        self._reason = f"{self._endpoint}: {error.strerror or error}"
        if error.errno in _GONE:
            self._reason += f": is {self._there} running there?"

    def _hand_over(self) -> None:
        sock, self._sock = self._sock, None
        assert sock
        self._adopt(sock, self._endpoint)


def _is_connected_to_itself(sock: socket.socket) -> bool:
    # A port that is free and is ours by chance: TCP connects it to itself.
    return sock.family != socket.AF_UNIX and sock.getsockname() == sock.getpeername()
