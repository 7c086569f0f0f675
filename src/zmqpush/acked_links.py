"""ZeroMQ sockets of acknowledged delivery, and every option that is set on them."""

import contextlib
import os

import zmq

from zmqpush.core.frames import MAX_CREDIT_BLOCKS, MAX_FRAME_BYTES
from zmqpush.core.receiver import ANONYMOUS
from zmqpush.guard import Guard
from zmqpush.links import MAX_REPLY_BYTES, NOBLOCK, POLLOUT, TURN_BYTES, TURN_FRAMES, Link
from zmqpush.settings import Endpoints

# With acknowledgements the receiver's credit is the bound; libzmq's queues never fill.
_BLOCKS_HWM = 4 * MAX_CREDIT_BLOCKS
# A frame that is longer is not copied: it waits where libzmq has received it.
_COPY_BYTES = 8192
# One turn of a receiver ends after so many messages: those of one are committed together.
_TURN_MESSAGES = 1024


class DealerLink(Link):
    """
    A DEALER socket: one sender's connection to one receiver that acknowledges.

    Args:
        endpoint: What to connect to.
        guard: How to encrypt.
        context: The context of all such links, one after the other.

    """

    def __init__(
        self,
        endpoint: str,
        guard: Guard,
        context: "zmq.Context[zmq.Socket[bytes]]",
    ) -> None:
        options = {
            zmq.SNDHWM: _BLOCKS_HWM,
            zmq.RCVHWM: _BLOCKS_HWM,
            zmq.IMMEDIATE: 1,
            zmq.MAXMSGSIZE: MAX_REPLY_BYTES,
        }
        connect = Endpoints(connect=(endpoint,))
        super().__init__(zmq.DEALER, connect, guard, options, context)

    @property
    def connected(self) -> bool:
        """Whether there is a connection; credit keeps its queue from being full."""
        return bool(self._events() & POLLOUT)

    def send(self, frame: bytes) -> bool:
        """Send a frame; whether there was a connection to take it."""
        try:
            self._send(frame, NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> list[bytes]:
        """Return frames that are there, some at a time, however many there are."""
        frames: list[bytes] = []
        with contextlib.suppress(zmq.Again):
            for _ in range(TURN_FRAMES):
                frame = self._socket.recv(NOBLOCK, copy=False)
                self._note(frame)
                frames.append(frame.bytes)
        return frames

    def discard(self, linger: float) -> None:
        """Close the socket; what it holds may be sent for so many seconds."""
        self._stop_watching()
        self._socket.close(linger=int(linger * 1000))


class RouterLink(Link):
    """
    A ROUTER socket, for senders that want acknowledgements.

    Args:
        endpoints: Where to bind.
        guard: How to encrypt, and whom to admit.
        memory: How much messages may take, in bytes, before peers are suspected.

    Attributes:
        malformed: How many messages were not of one frame.

    """

    def __init__(self, endpoints: Endpoints, guard: Guard, memory: int) -> None:
        options = {
            zmq.SNDHWM: _BLOCKS_HWM,
            zmq.RCVHWM: _BLOCKS_HWM,
            zmq.MAXMSGSIZE: MAX_FRAME_BYTES,
            zmq.ROUTER_MANDATORY: 1,
            zmq.ROUTER_HANDOVER: 0,  # a peer that claims another's routing id does not get it
        }
        _shuffle_routing_ids()
        super().__init__(zmq.ROUTER, endpoints, guard, options, memory=memory)
        self.malformed = 0
        self._skipping = False  # the rest of a message that is not of one frame

    def receive(self) -> list[tuple[bytes, bytes | memoryview, str]]:
        """Return peers, their frames and keys, those that are there, until they make a MiB."""
        messages: list[tuple[bytes, bytes | memoryview, str]] = []
        size = 0
        encrypts = self._guard.encrypts
        with contextlib.suppress(zmq.Again):
            for _ in range(_TURN_MESSAGES):
                if self._skipping:
                    self._skip()
                    continue
                peer = self._recv(NOBLOCK)
                frame = self._socket.recv(NOBLOCK, copy=False)
                if frame.more:
                    self.malformed += 1
                    self._skipping = True
                    continue
                self._note(frame)
                data = frame.buffer if len(frame) > _COPY_BYTES else frame.bytes
                principal = str(frame["User-Id"]) if encrypts else ANONYMOUS
                messages.append((peer, data, principal))
                size += len(frame)
                if size >= TURN_BYTES:
                    break
        return messages

    def _skip(self) -> None:
        # Some at a time: there may be millions of parts.
        for _ in range(TURN_FRAMES):
            frame = self._socket.recv(NOBLOCK, copy=False)
            if not frame.more:
                self._note(frame)
                self._skipping = False
                return

    def send(self, peer: bytes, frame: bytes) -> bool:
        """Send a frame to a peer; whether the peer is there. One that is behind gets none."""
        try:
            self._socket.send_multipart((peer, frame), NOBLOCK)
        except zmq.Again:
            return True
        except zmq.ZMQError:  # no route
            return False
        return True


def _shuffle_routing_ids() -> None:
    # libzmq numbers peers from rand() on, which it does not seed, believes a peer that says
    # it has such a number, and aborts the process when its own count gets there. From where
    # it counts nobody is to know.
    import ctypes  # senders start faster without it

    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).srand(ctypes.c_uint(int.from_bytes(os.urandom(4))))
