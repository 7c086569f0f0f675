"""
ZeroMQ sockets on asyncio: ZMTP over TCP and Unix sockets.

::

    Listener ─┐                       ┌─▶ Inbox ─▶ PullSocket, RouterSocket, DealerSocket
              ├─▶ Link ─▶ Channels ───┤
    Dialer ───┘          (connections)└─▶ PushSocket

Each connection is a non-blocking socket that the event loop watches. What the kernel took
is known; the rest waits in the channel (out) and the inbox (in, within a budget).
"""
