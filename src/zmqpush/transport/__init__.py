"""
ZeroMQ sockets on asyncio: ZMTP over TCP and Unix sockets.

::

    Listener ─┐                      ┌─▶ Inbox ─▶ PullSocket, RouterSocket
              ├─▶ Link ─▶ Channels ──┤
    Dialer ───┘          (connections)└─▶ PushSocket, DealerSocket

Each connection is a non-blocking socket that the event loop watches. What the kernel took
is known, nothing else is buffered, and one connection can be paused.
"""
