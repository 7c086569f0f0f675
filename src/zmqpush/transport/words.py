"""Why peers do not get together, in words."""

import time

from zmqpush.core.zmtp.errors import Fault, ZmtpError
from zmqpush.core.zmtp.metadata import SocketType
from zmqpush.security.admission import Guard
from zmqpush.transport.channel import Channel, HandshakeTimeoutError

# The commonest mistake: what our sockets connect to then, and who connects to them.
_WRONG_PORT = {
    SocketType.PUSH: "a port for --ack",
    SocketType.DEALER: "a port for senders without --ack",
    SocketType.PULL: "a port of a receiver",
}
_WRONG_PEER = {
    SocketType.PULL: "a sender with --ack, which belongs at an --ack-bind",
    SocketType.ROUTER: "a sender without --ack, which belongs at a --bind",
    SocketType.PUSH: "a sender or a receiver of --ack",
}
# A peer that restarts may close a connection without a word: so often in a row, and it means it.
_MUTE_FAILURES = 3
# A receiver reports a sender that was never there when it has waited for so long, in seconds.
_ABSENCE_DELAY = 5.0
# The steps of a handshake after which a peer that closes the connection has said what it is.
_GREETED = 3


class Words:
    """
    Reports why there is no connection, once a minute for each kind of reason.

    Args:
        socket_type: What this end is.
        guard: Which keys there are, and where to complain.

    Attributes:
        there: The program that is expected at the other end.

    """

    def __init__(self, socket_type: SocketType, guard: Guard) -> None:
        self._type = socket_type
        self._guard = guard
        # By endpoint: after how many of our steps a peer closed in silence, how often in a row.
        self._mute: dict[str, tuple[int, int]] = {}
        self._waiting_since: float | None = None
        if socket_type is SocketType.PULL:
            self._waiting_since = time.monotonic()
        self.there = "zmqpush" if socket_type is SocketType.PULL else "zmqpull"

    def note_success(self, channel: Channel) -> None:
        """Note that a connection was made."""
        self._mute.pop(channel.endpoint, None)
        self._guard.reasons.pop(channel.endpoint, None)
        self._waiting_since = None

    def complain_full(self) -> None:
        """Report that connections are closed for want of descriptors."""
        self._guard.complaints.warn(
            "as many connections as the limit on open descriptors allows: "
            "new ones are closed until some have ended"
        )

    def explain_absence(self, endpoint: str, why: str) -> None:
        """Note why nothing could be connected to."""
        since = self._waiting_since
        if since is not None and time.monotonic() - since > _ABSENCE_DELAY:
            self._waiting_since = None  # for a receiver that is no outage: it is said once
            self._guard.complaints.warn(why)
        self._guard.explain(endpoint, why)

    def explain_server(self, channel: Channel, why: Exception | None, *, was_ready: bool) -> None:
        """Report why a connection that we made has ended."""
        endpoint = channel.endpoint
        if isinstance(why, ZmtpError):
            text = _internal(why) or self._of_server(endpoint, why)
        elif was_ready:
            return
        elif isinstance(why, HandshakeTimeoutError):
            text = f"{endpoint} says nothing: is it a ZeroMQ peer?"
        else:
            said = channel.connection.said
            before, times = self._mute.get(endpoint, (said, 0))
            times = times + 1 if said == before else 1
            self._mute[endpoint] = said, times
            if times < _MUTE_FAILURES:
                return
            text = self._of_mute_server(endpoint, said)
        self._guard.explain(endpoint, text, said=True)
        self._guard.complaints.warn(text)

    def _of_server(self, endpoint: str, error: ZmtpError) -> str:
        encrypts = self._guard.encrypts
        match error.fault:
            case Fault.NOT_ZMTP:
                return f"{endpoint} does not speak ZMTP 3 (is it an HTTP or ssh server?)"
            case Fault.MECHANISM if encrypts:
                return f"{endpoint} does not encrypt: it has no --key, or is not what you think"
            case Fault.MECHANISM:
                return f"{endpoint} encrypts: it takes a --key and its --server-key"
            case Fault.SOCKET_TYPE:
                wrong = _WRONG_PORT[self._type]
                return f"{endpoint} is {wrong}, or another kind of ZeroMQ socket: {error}"
            case Fault.KEY:
                return f"{endpoint} has another key than --server-key"
            case Fault.REFUSED if encrypts:
                return f"{endpoint} does not admit the key {self._guard.own_key}: {error}"
            case _:
                return f"{endpoint}: {error}"

    def _of_mute_server(self, endpoint: str, said: int) -> str:
        wrong = _WRONG_PORT[self._type]
        if said < _GREETED:
            return f"{endpoint} closes the connection: is it a ZeroMQ peer?"
        if not self._guard.encrypts:
            return f"{endpoint} is {wrong}, or another kind of ZeroMQ socket"
        if said == _GREETED:
            return f"{endpoint} has another key than --server-key"
        return f"{endpoint} does not admit the key {self._guard.own_key}, or it is {wrong}"

    def explain_client(self, channel: Channel, why: Exception | None, *, was_ready: bool) -> None:
        """Report why a connection that a peer made has ended, if it is its fault."""
        endpoint, peer = channel.endpoint, channel.peer
        if isinstance(why, ZmtpError):
            if why.fault is not Fault.NOT_ADMITTED:  # the guard has said it
                is_stranger = why.fault in (Fault.NOT_ZMTP, Fault.VERSION)
                kind = "stranger" if is_stranger else why.fault
                text = _internal(why) or self._of_client(endpoint, peer, why)
                self._guard.complaints.warn(text, f"{endpoint} {kind}")
        elif isinstance(why, HandshakeTimeoutError):
            text = f"{peer} connects to {endpoint}, and does not say what it is"
            self._guard.complaints.warn(text, f"{endpoint} timeout")

    def _of_client(self, endpoint: str, peer: str, error: ZmtpError) -> str:
        who = f"{peer}, which connects to {endpoint},"
        match error.fault:
            case Fault.NOT_ZMTP | Fault.VERSION:
                return (
                    f"something that does not speak ZMTP 3 connects to {endpoint}: {peer}: {error}"
                )
            case Fault.MECHANISM if self._guard.encrypts:
                return f"{who} does not encrypt: it takes a --key and a --server-key"
            case Fault.MECHANISM:
                return f"{who} encrypts, and this end has no --key"
            case Fault.SOCKET_TYPE:
                return f"{who} is {_WRONG_PEER[self._type]}, or another kind of socket: {error}"
            case Fault.KEY:
                return f"{who} has a wrong --server-key: it is {self._guard.own_key}"
            case _:
                return f"cut off {peer}, which connects to {endpoint}: {error}"


def _internal(error: ZmtpError) -> str:
    """Return what to say of an error of ours; nothing if it is the peer's."""
    if error.fault is not Fault.INTERNAL:
        return ""
    return f"internal error, please report it: {error.__cause__!r}"
