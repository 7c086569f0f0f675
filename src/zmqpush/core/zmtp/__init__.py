"""
ZMTP 3.1 and 2.0, the wire of ZeroMQ: bytes in, messages out; ``docs/zmtp-profile.md``.

::

    bytes ─▶ FrameReader ─▶ Mechanism ─▶ whole messages    all of it in a Connection,
             frames.py      null.py                        connection.py
                            curve.py

No sockets, clocks or event loops. What a peer sends is taken within all bounds, or ends in
a :class:`~zmqpush.core.zmtp.errors.ZmtpError`, never in any other error.
"""
