"""Settings: one frozen dataclass a stage, each checked where it is made."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from zmqpush.core.envelope import Format
from zmqpush.core.framing import Framing
from zmqpush.queue import WhenFull

# Escaped, a line may become six times as long, and a message may have 64 MiB.
MAX_LINE_BYTES = 8 << 20
DEFAULT_ENDPOINT = "tcp://127.0.0.1:5014"

_TCP = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.%\w]+\]|\*|[\w.-]+):(?P<port>[0-9]{1,5}|\*)")
_IPC = re.compile(r"ipc://.{1,107}")


def check_endpoint(endpoint: str, *, bind: bool = False) -> str:
    """
    Return ``endpoint`` if it is one that ZeroMQ understands.

    Raises:
        ValueError: If it is not; the message shows a good one.

    """
    if _IPC.fullmatch(endpoint):
        return endpoint
    match = _TCP.fullmatch(endpoint)
    port = match["port"] if match else ""
    is_port = port == "*" or 0 < int(port or 0) < 65536
    if match and is_port and (bind or "*" not in (match["host"], port)):
        return endpoint
    raise bad_endpoint(endpoint, bind=bind)


def bad_endpoint(endpoint: str, *, bind: bool) -> ValueError:
    """Return the error that says so and shows a good endpoint."""
    example = "tcp://*:5014" if bind else "tcp://collector.example.com:5014"
    return ValueError(f"{endpoint!r} is not an endpoint; a good one is {example} or ipc:///run/x")


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """
    Where a socket binds and connects: ``tcp://host:port`` or ``ipc://path``.

    Raises:
        ValueError: If there is none, or one is malformed.

    """

    bind: tuple[str, ...] = ()
    connect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.count:
            raise ValueError("there must be an endpoint to bind or to connect")
        for endpoint in self.bind:
            check_endpoint(endpoint, bind=True)
        for endpoint in self.connect:
            check_endpoint(endpoint)

    @property
    def count(self) -> int:
        """How many endpoints there are."""
        return len(self.bind) + len(self.connect)

    @property
    def has_open_port(self) -> bool:
        """Whether the system is to choose a port."""
        return any(endpoint.endswith(":*") for endpoint in self.bind)

    def __str__(self) -> str:
        return ", ".join(self.connect + self.bind)


@dataclass(frozen=True, slots=True, kw_only=True)
class PushSettings:
    """
    What ``zmqpush`` is told; its ``--help`` describes each.

    Sizes are in bytes, times in seconds.

    Raises:
        ValueError: If two settings exclude each other.

    """

    endpoints: Endpoints
    logtype: str = "syslog"
    format: Format = Format.JSON
    fields: Mapping[str, str] = field(default_factory=dict)
    framing: Framing = Framing.SINGLE
    delimiter: bytes = b"\n"
    max_line: int = 1 << 20
    queue_max: int = 64 << 20
    when_full: WhenFull = WhenFull.BLOCK
    grace: float = 4.0
    timeout: float | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.format is Format.RAW and self.framing is Framing.ARRAY:
            raise ValueError("--framing array makes JSON of records and cannot hold --format raw")


@dataclass(frozen=True, slots=True, kw_only=True)
class PullSettings:
    """What ``zmqpull`` is told; its ``--help`` describes each. Times are in seconds."""

    endpoints: Endpoints
    to: str = "-"
    count: int | None = None
    grace: float = 4.0
    quiet: bool = False
