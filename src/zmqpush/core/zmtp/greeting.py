"""
The greeting: https://rfc.zeromq.org/spec/37/, "Version Negotiation".

::

    signature FF, 8 bytes, 7F   version 3, 1   mechanism (20 bytes)   as-server   31 zeros

The padding of the signature says nothing: libzmq puts the length of an identity there.
"""

from collections.abc import Generator

from zmqpush.core.zmtp.errors import Fault, ZmtpError

# What ZMTP 2 peers read as well: the signature and, as their revision, our major version.
OPENING = b"\xff" + (1).to_bytes(8) + b"\x7f" + b"\x03"
_MINOR = b"\x01"
_MECHANISM_BYTES = 20
_FILLER_BYTES = 31
V2 = 2
_FIRST_MAJOR = 3


def read_greeting() -> Generator[int, bytes, int]:
    """
    Read a peer's signature, and what it announces: ZMTP 2, or 3 and more.

    Raises:
        ZmtpError: If it is not ZMTP, or ZMTP 1.0.

    """
    first = yield 1
    if first != OPENING[:1]:
        if first == b"\x01" and (yield 1) == b"\0":  # the frame of an empty identity
            raise _v1()
        raise _not_zmtp()
    padding = yield len(OPENING) - 2
    if not padding[-1] & 1:  # a long frame of ZMTP 1.0, and its flags
        raise _v1()
    if padding[-1] != OPENING[-2]:
        raise _not_zmtp()
    (revision,) = yield 1
    if not revision:
        raise _v1()
    return revision if revision >= _FIRST_MAJOR else V2


def encode_rest(mechanism: bytes, *, as_server: bool) -> bytes:
    """Return what follows :data:`OPENING`."""
    name = mechanism.ljust(_MECHANISM_BYTES, b"\0")
    return _MINOR + name + bytes((as_server,)) + bytes(_FILLER_BYTES)


def read_mechanism() -> Generator[int, bytes, bytes]:
    """Read the rest of a peer's greeting; return the name of its mechanism."""
    rest = yield 64 - len(OPENING)
    return rest[1 : 1 + _MECHANISM_BYTES].rstrip(b"\0")


def _v1() -> ZmtpError:
    return ZmtpError(Fault.VERSION, "it speaks ZMTP 1.0: libzmq 3.2 or later is wanted")


def _not_zmtp() -> ZmtpError:
    return ZmtpError(Fault.NOT_ZMTP, "what it says is not ZMTP")
