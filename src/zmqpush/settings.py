"""Settings: one frozen dataclass a stage, each checked where it is made."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from zmqpush.core.omprog import Marks
from zmqpush.core.records.encode import Format
from zmqpush.core.records.framing import Framing
from zmqpush.errors import SettingsError

# Escaped, a line may become six times as long, and a message may have 64 MiB.
MAX_LINE_BYTES = 8 << 20
# A block of acknowledged delivery has 16 MiB.
MAX_ACK_LINE_BYTES = 1 << 20
MAX_SPOOL_SLOTS = 64
DEFAULT_ENDPOINT = "tcp://127.0.0.1:5014"
DEFAULT_ACK_ENDPOINT = "tcp://127.0.0.1:5015"

_TCP = re.compile(
    r"tcp://(?P<host>\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]|\*|\w[\w.-]*):(?P<port>[0-9]{1,5}|\*)"
)
_LOCAL = re.compile(r"ipc://|tcp://(127\.[\d.]+|localhost|\[::1\]):")
ALLOW_ANY = "any"
_IPC = re.compile(r"ipc://[^\0\ud800-\udfff]{1,107}")


def check_endpoint(endpoint: str, *, bind: bool = False) -> str:
    """
    Return ``endpoint`` if it is one that ZeroMQ understands.

    Raises:
        SettingsError: If it is not; the message shows a good one.

    """
    if _IPC.fullmatch(endpoint) and (bind or endpoint != "ipc://*"):
        return endpoint
    match = _TCP.fullmatch(endpoint)
    port = match["port"] if match else ""
    is_port = port == "*" or 0 < int(port or 0) < 65536
    if match and is_port and (bind or "*" not in (match["host"], port)):
        return endpoint
    raise bad_endpoint(endpoint, bind=bind)


def bad_endpoint(endpoint: str, *, bind: bool) -> SettingsError:
    """Return the error that says so and shows a good endpoint."""
    example = "tcp://*:5014" if bind else "tcp://collector.example.com:5014"
    return SettingsError(
        f"{endpoint!r} is not an endpoint; a good one is {example} or ipc:///run/x"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """
    Where a socket binds and connects: ``tcp://host:port`` or ``ipc://path``.

    Raises:
        SettingsError: If there is none, or one is malformed.

    """

    bind: tuple[str, ...] = ()
    connect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.count:
            raise SettingsError("there must be an endpoint to bind or to connect")
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
        """Whether the system is to choose a port, or a path."""
        return any(endpoint.endswith((":*", "//*")) for endpoint in self.bind)

    def __str__(self) -> str:
        return ", ".join(self.connect + self.bind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """
    Keys, by CURVE (https://rfc.zeromq.org/spec/26/).

    Attributes:
        key: The file with the own key pair.
        server_keys: The public keys, or files with them, of what is connected to: one for
            all, or one for each.
        allow: The list of public keys that are admitted, or ``any``.
        insecure: Whether an address may be bound that the network reaches, without keys.

    """

    key: Path | None = None
    server_keys: tuple[str, ...] = ()
    allow: Path | str | None = None
    insecure: bool = False

    def check(self, *links: Endpoints) -> None:
        """
        Check that it fits the endpoints of all links.

        Raises:
            SettingsError: If it does not.

        """
        bind = [endpoint for link in links for endpoint in link.bind]
        connect = [endpoint for link in links for endpoint in link.connect]
        if self.key is None:
            if self.server_keys or self.allow:
                raise SettingsError(
                    "--server-key and --allow need a --key: zmqpush-keys new makes one"
                )
            open_to_all = [e for e in bind if not _LOCAL.match(e)]
            if open_to_all and not self.insecure:
                raise SettingsError(
                    f"the network can reach {open_to_all[0]}: give --key and --allow, or say "
                    "--insecure if whoever gets there may read and write records"
                )
            return
        if self.insecure:
            raise SettingsError("--key and --insecure exclude each other")
        if any(link.bind and link.connect for link in links):
            raise SettingsError("with a --key, either --bind or --connect")
        if bind and self.allow is None:
            raise SettingsError("--key needs --allow, a list of the keys that may connect, or any")
        if self.allow and not bind:
            raise SettingsError(
                "--allow is for who connects to what is bound, and nothing is bound"
            )
        if connect and len(self.server_keys) not in (1, len(connect)):
            raise SettingsError("--key needs --server-key: one for all --connect, or one for each")
        if len(self.server_keys) > 1 and len(set(connect)) < len(connect):
            raise SettingsError("a --connect is given twice, with a --server-key each")
        if self.server_keys and not connect:
            raise SettingsError("--server-key is for --connect, and nothing is connected to")


class WhenFull(StrEnum):
    """What happens to records when the queue is full."""

    BLOCK = "block"
    DROP_OLDEST = "drop-oldest"
    DROP_NEWEST = "drop-newest"


class Sync(StrEnum):
    """When a block in the spool counts as safe, and may be sent."""

    OFF = "off"
    INTERVAL = "interval"
    BLOCK = "block"


class Confirm(StrEnum):
    """What a message must have reached before rsyslog is told that it is safe."""

    WRITE = "write"
    FSYNC = "fsync"
    REMOTE = "remote"


@dataclass(frozen=True, slots=True, kw_only=True)
class PushSettings:
    """
    What ``zmqpush`` is told; its ``--help`` describes each.

    Sizes are in bytes, times in seconds.

    Raises:
        SettingsError: If two settings exclude each other.

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
    ack: bool = False
    spread: bool = False
    spool: Path | None = None
    spool_max: int = 1 << 30
    spool_slots: int = 1
    sync: Sync = Sync.INTERVAL
    omprog: bool = False
    marks: Marks | None = None
    confirm: Confirm = Confirm.REMOTE
    security: Security = Security()
    grace: float = 4.0
    timeout: float | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        self.security.check(self.endpoints)
        if self.spread and not self.ack:
            raise SettingsError("--spread orders the receivers of --ack")
        if self.ack:
            self._check_ack()
        if self.omprog:
            self._check_omprog()
        elif self.marks:
            raise SettingsError("--transactions are rsyslog's: they need --omprog")
        if self.format is Format.RAW and self.framing is Framing.ARRAY:
            raise SettingsError(
                "--framing array makes JSON of records and cannot hold --format raw"
            )

    def _check_ack(self) -> None:
        if self.endpoints.bind:
            raise SettingsError("--ack needs receivers to connect to, not --bind")
        if self.framing is not Framing.SINGLE:
            raise SettingsError(
                "--framing is for receivers that do not acknowledge: not with --ack"
            )
        if self.format is Format.RAW and self.delimiter != b"\n":
            raise SettingsError("--ack --format raw needs lines that end with a newline")
        if self.max_line > MAX_ACK_LINE_BYTES:
            raise SettingsError(f"--max-line can be {MAX_ACK_LINE_BYTES >> 20}MiB with --ack")

    def _check_omprog(self) -> None:
        if self.delimiter != b"\n":
            raise SettingsError("--omprog reads what rsyslog writes: newlines end its messages")
        if self.when_full is not WhenFull.BLOCK:
            raise SettingsError("--omprog lets rsyslog keep what finds no room: --when-full block")
        if self.confirm is not Confirm.REMOTE and not self.spool:
            raise SettingsError(f"--confirm {self.confirm} needs a --spool to hold the messages")
        if self.confirm is Confirm.FSYNC and self.sync is Sync.OFF:
            raise SettingsError("--confirm fsync and --sync off exclude each other")
        if self.marks and (len({*self.marks}) < 2 or any(not m or b"\n" in m for m in self.marks)):
            raise SettingsError("--begin-mark and --commit-mark are two different lines of text")


@dataclass(frozen=True, slots=True, kw_only=True)
class PullSettings:
    """
    What ``zmqpull`` is told; its ``--help`` describes each.

    Sizes are in bytes, times in seconds.

    Raises:
        SettingsError: If two settings exclude each other.

    """

    endpoints: Endpoints | None
    ack_endpoints: Endpoints | None = None
    to: str = "-"
    options: Mapping[str, str] = field(default_factory=dict)
    dead_letters: Path | None = None
    state: Path | None = None
    memory: int = 256 << 20
    count: int | None = None
    security: Security = Security()
    grace: float = 4.0
    quiet: bool = False

    def __post_init__(self) -> None:
        self.security.check(*filter(None, (self.endpoints, self.ack_endpoints)))
