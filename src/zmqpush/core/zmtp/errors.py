"""The one exception that bytes of a peer can raise."""

from enum import StrEnum

from zmqpush.errors import ZmqpushError


class Fault(StrEnum):
    """What is wrong with a peer."""

    NOT_ZMTP = "not-zmtp"  # what it says first is no greeting
    VERSION = "version"  # it speaks an older ZMTP, which is not taken here
    MECHANISM = "mechanism"  # one end encrypts, and the other does not
    SOCKET_TYPE = "socket-type"
    KEY = "key"  # it does not have the key that it should have, or takes us for another
    NOT_ADMITTED = "not-admitted"
    REFUSED = "refused"  # it says that it refuses us
    PROTOCOL = "protocol"  # it breaks ZMTP
    LIMIT = "limit"  # it sends more at once than is taken
    INTERNAL = "internal"  # nothing: an error of ours, which is the failure's cause


class ZmtpError(ZmqpushError):
    """
    The connection must be closed.

    Attributes:
        fault: What is wrong.

    """

    def __init__(self, fault: Fault, text: str) -> None:
        super().__init__(text)
        self.fault = fault
