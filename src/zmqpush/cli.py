"""
The commands: flags, environment and TOML into settings.

Every option is named once, here. Its flag, its environment variable
(``ZMQPUSH_WHEN_FULL``) and its TOML key (``when-full``) are the same word.

An option that has nothing to do is an error on the command line. In the environment or in the
file, which are for all that runs on a machine, it is none, and has no effect.
"""

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from zmqpush import __version__, config, values
from zmqpush.core.dialogue import Marks
from zmqpush.core.envelope import Format
from zmqpush.core.framing import Framing
from zmqpush.errors import ConfigError, SettingsError
from zmqpush.failures import CONFIG_FILE, report_failure
from zmqpush.queue import WhenFull
from zmqpush.settings import (
    DEFAULT_ACK_ENDPOINT,
    DEFAULT_ENDPOINT,
    MAX_ACK_LINE_BYTES,
    Confirm,
    Endpoints,
    NatsUnit,
    PullSettings,
    PushSettings,
    Security,
    Sync,
    check_endpoint,
)
from zmqpush.telemetry import Reporter

if TYPE_CHECKING:
    from zmqpush.pull import Puller
    from zmqpush.push import Pusher


# Variables that begin like ours, and are for tests or set by Docker and Kubernetes for a service.
_NO_OPTIONS = re.compile(r"ZMQPU(SH|LL)_(FAULT|CHAOS|TEST\w*|VERSION|(SERVICE|PORT)(_\w+)?)")
# So many rsyslog actions may use one spool.
_OMPROG_SLOTS = 8
# How explicit a setting is: who says more wins.
_EXPLICIT = (
    ParameterSource.DEFAULT,
    ParameterSource.DEFAULT_MAP,
    ParameterSource.ENVIRONMENT,
    ParameterSource.COMMANDLINE,
)


class _Checked(click.ParamType):  # type: ignore[type-arg]  # click 8.1 has no type arguments
    """A parameter read by a function that raises SettingsError with a good message."""

    def __init__(self, name: str, read: Callable[[str], Any]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if isinstance(value, bytes | tuple | Path):  # read already
            return value
        try:
            return self._read(str(value))
        except SettingsError as exc:
            self.fail(str(exc), param, ctx)


class _Path(click.Path):
    """A path that is not empty, as that of a variable that is not set."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not os.fspath(value):
            self.fail("'' is not a path", param, ctx)
        return super().convert(value, param, ctx)


class _Enum(click.Choice):  # type: ignore[type-arg]
    """A parameter that is one of the values of an enumeration."""

    def __init__(self, options: type[StrEnum]) -> None:
        super().__init__([option.value for option in options])
        self._options = options

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return self._options(super().convert(str(value), param, ctx))


class _Word(click.Argument):
    """An argument that is not given if it is empty: rsyslog makes one of two spaces in a row."""

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> Any:
        given = {name: value for name, value in opts.items() if value != ""}
        return super().consume_value(ctx, given)


_SIZE = _Checked("size", values.read_size)
_BIND = _Checked("endpoint", lambda text: check_endpoint(text, bind=True))
_CONNECT = _Checked("endpoint", check_endpoint)
_MARK = _Checked("text", values.read_mark)
_SECONDS = _Checked("seconds", values.read_seconds)


def _load_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    path = value or config.find(f"{ctx.info_name}.toml")
    if ctx.resilient_parsing:
        return
    options = {str(p.name): _describe(p) for p in ctx.command.params if p.expose_value}
    _warn_of_unknown_variables(ctx, [*options, "config"])
    if path is not None:
        ctx.meta[CONFIG_FILE] = path
        ctx.default_map = config.load(path, options)


def _describe(param: click.Parameter) -> config.Option:
    kind = config.Kind.TEXT
    if getattr(param, "is_flag", False):
        kind = config.Kind.FLAG
    elif param.type.name in ("size", "seconds", "number"):
        kind = config.Kind.NUMBER
    return config.Option(kind, getattr(param, "multiple", False))


def _warn_of_unknown_variables(ctx: click.Context, options: Sequence[str]) -> None:
    # No more than a warning: who runs us may have variables of that name for something else.
    known = [f"{ctx.auto_envvar_prefix}_{name.upper()}" for name in options]
    for name in sorted(os.environ):
        if name.startswith(f"{ctx.auto_envvar_prefix}_") and name not in known:
            if _NO_OPTIONS.fullmatch(name) or name.startswith("ZMQPUSH_KEYS_"):
                continue
            found = config.nearest(name, known)
            Reporter(str(ctx.info_name)).warn(f"the variable {name} is no option: {found}")


def _common(command: Callable[..., None]) -> Callable[..., None]:
    for decorate in (
        click.help_option("-h", "--help", allow_from_autoenv=False),
        click.version_option(
            __version__, "-V", "--version", message="%(prog)s %(version)s", allow_from_autoenv=False
        ),
        click.option(
            "--config",
            type=_Path(exists=True, dir_okay=False, path_type=Path),
            callback=_load_config,
            is_eager=True,
            expose_value=False,
            help="TOML file with any of these options.  [default: the first of "
            "$XDG_CONFIG_HOME/zmqpush/PROGRAM.toml and /etc/zmqpush/PROGRAM.toml]",
        ),
        click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings and errors."),
        click.option(
            "--grace",
            type=_SECONDS,
            default=4.0,
            show_default=True,
            metavar="SECONDS",
            help="How long to go on after SIGTERM or Ctrl-C. A second signal means now.",
        ),
    ):
        command = decorate(command)
    return command


def _secured(command: Callable[..., None]) -> Callable[..., None]:
    for decorate in (
        click.option(
            "--insecure",
            is_flag=True,
            help="Bind an address that the network can reach, without keys.",
        ),
        click.option(
            "--allow",
            type=_Checked("keys", values.read_allow),
            metavar="FILE|DIR|any",
            help="Public keys that may connect to what is bound. SIGHUP reads them anew.",
        ),
        click.option(
            "--server-key",
            multiple=True,
            metavar="KEY|FILE",
            help="Public key of what is connected to: one for all, or one for each --connect.",
        ),
        click.option(
            "--key",
            type=_Path(dir_okay=False, path_type=Path),
            metavar="FILE",
            help="Encrypt, with this key pair; zmqpush-keys new makes one.",
        ),
    ):
        command = decorate(command)
    return command


@click.command(
    context_settings={
        "auto_envvar_prefix": "ZMQPUSH",
        "max_content_width": 100,
        "allow_extra_args": True,  # push() answers them
    },
    epilog="""\b
Examples:
  app 2>&1 | zmqpush nginx
  tail -n +1 -F app.log | zmqpush --format logstash -c tcp://logs.example.com:2120 app
  app | zmqpush --spool /var/spool/zmqpush -c tcp://logs.example.com:5015 nginx

Every option can also be set in the environment (ZMQPUSH_CONNECT, ZMQPUSH_WHEN_FULL, …) or in
the TOML file. Without --ack a record counts as sent when the system's buffers have taken it, and
may be lost when the receiver dies. With --ack a record counts when zmqpull has it safe, and with
--spool it survives until then whatever dies. Exit codes: 0 all delivered, 1 something was dropped,
lost or left unread, 2 usage, 69 no receiver and no spool, 71 too little memory or too few file
descriptors, 73 others use the spool, 74 unreadable input or a failing spool, 75 the rest is in the
spool, 78 bad configuration or keys.""",
)
@click.argument("logtype", cls=_Word, default="syslog", envvar="ZMQPUSH_LOGTYPE")
@click.option(
    "-c",
    "--connect",
    multiple=True,
    type=_CONNECT,
    metavar="ENDPOINT",
    help=f"Receiver to connect to; may be repeated.  [default: {DEFAULT_ENDPOINT}, with --ack "
    f"{DEFAULT_ACK_ENDPOINT}]",
)
@click.option(
    "-b",
    "--bind",
    multiple=True,
    type=_BIND,
    metavar="ENDPOINT",
    help="Address to listen on for receivers that connect; may be repeated.",
)
@click.option(
    "--format",
    type=_Enum(Format),
    default=Format.JSON.value,
    show_default=True,
    help="What a record looks like.",
)
@click.option(
    "--field",
    multiple=True,
    type=_Checked("field", values.read_field),
    metavar="KEY=VALUE",
    help="Add a field to every record; may be repeated. In ECS it is a label, or what a name with "
    "dots says.",
)
@click.option(
    "--framing",
    type=_Enum(Framing),
    default=Framing.SINGLE.value,
    show_default=True,
    help="What a ZeroMQ message carries: one record, one record a frame, a JSON array of records, "
    "or JSON lines.",
)
@click.option("-0", "--null", is_flag=True, help=r"Lines end with NUL: --delimiter '\0'.")
@click.option(
    "--delimiter",
    type=_Checked("text", values.read_delimiter),
    help=r"What ends a line; escapes such as \t and \x1e are understood.  [default: \n]",
)
@click.option(
    "--max-line",
    type=_Checked("size", values.read_max_line),
    default="1MiB",
    show_default=True,
    help="Longest line; a longer one is split, and in JSON all pieces but the last are marked "
    "@partial (in ECS: tagged partial).",
)
@click.option(
    "--queue-max",
    type=_SIZE,
    default="64MiB",
    show_default=True,
    help="How much to hold in memory while no receiver takes messages.",
)
@click.option(
    "--when-full",
    type=_Enum(WhenFull),
    default=WhenFull.BLOCK.value,
    show_default=True,
    help="What to do when the queue or the spool is full: stop reading, or drop records and "
    "count them.",
)
@click.option(
    "--ack",
    is_flag=True,
    help="Have zmqpull acknowledge what it has safe. Several receivers are a list: the next one "
    "is for when one fails.",
)
@click.option(
    "--spread",
    is_flag=True,
    help="With --ack, try the receivers in an order that differs from spool to spool.",
)
@click.option(
    "--spool",
    type=_Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep records there, on disk, until they are acknowledged; implies --ack.",
)
@click.option(
    "--spool-max",
    type=_Checked("size", values.read_spool_size),
    default="1GiB",
    show_default=True,
    help="How much the spool holds before --when-full.",
)
@click.option(
    "--spool-slots",
    type=_Checked("number", values.read_slots),
    metavar="N",
    help="How many processes may use the spool at once.  [default: 1, with --omprog 8]",
)
@click.option("--spool-status", is_flag=True, help="Tell what the spool holds, and exit.")
@click.option(
    "--sync",
    type=_Enum(Sync),
    help="When to sync the spool: after each block, at most every 50 ms, or never. Only what is "
    "synced is sent.  [default: interval, with --omprog block]",
)
@click.option(
    "--omprog",
    is_flag=True,
    help='Answer rsyslog\'s omprog (confirmMessages="on") when a message is safe; implies --ack.',
)
@click.option(
    "--transactions",
    is_flag=True,
    help='With --omprog: rsyslog hands over transactions (useTransactions="on").',
)
@click.option(
    "--begin-mark",
    type=_MARK,
    metavar="TEXT",
    help=f"rsyslog's beginTransactionMark.  [default: {Marks().begin.decode()}]",
)
@click.option(
    "--commit-mark",
    type=_MARK,
    metavar="TEXT",
    help=f"rsyslog's commitTransactionMark.  [default: {Marks().commit.decode()}]",
)
@click.option(
    "--confirm",
    type=_Enum(Confirm),
    help="What safe means: in the spool, synced in the spool, or at the receiver.  [default: "
    "remote, with --spool fsync]",
)
@click.option(
    "--timeout",
    type=_SECONDS,
    metavar="SECONDS",
    help="Give up after so long without delivery while something waits for it; with --spool, "
    "whose disk keeps what is read, at the end of the input only.  [default: wait]",
)
@_secured
@_common
def push(spool: Path | None, spool_status: bool, omprog: bool, **_: Any) -> None:
    """
    Ship each line of standard input as a JSON record over ZeroMQ.

    LOGTYPE is the type that the records carry.  [default: syslog]
    """
    # Imported here: --help and --version start sooner.
    from zmqpush.omprog import claim_stdout

    answers = claim_stdout() if omprog and not spool_status else None
    from zmqpush.push import Pusher

    said = _Said()
    if spool_status:
        if not spool:
            raise click.UsageError("--spool-status needs --spool")
        _print_spool_status(spool)
        return
    _run("zmqpush", lambda: Pusher(_push_settings(said), said.reporter, answers=answers))


@click.command(
    context_settings={"auto_envvar_prefix": "ZMQPULL", "max_content_width": 100},
    epilog="""\b
Examples:
  zmqpull | jq --unbuffered .message
  zmqpull -b 'tcp://*:5014' --key collector --allow senders --to /var/log/all.ndjson
  zmqpull --ack-bind 'tcp://*:5015' --insecure --state /var/lib/zmqpull --to '%Y%m%d.ndjson'
  zmqpull --ack-bind 'tcp://*:5015' --insecure --state /var/lib/zmqpull --to kafka://kafka1/logs

Every option can also be set in the environment (ZMQPULL_BIND, ZMQPULL_TO, …) or in the TOML
file. SIGHUP reopens the files and reads --allow anew. Exit codes: 0 done, 1 something plain was
lost at the end, 2 usage, 69 the endpoint cannot be used, 71 too little memory or too few file
descriptors, 73 another process uses the state or the file, 74 the output or the state cannot be
written, 78 bad configuration or keys, or nothing in the engine takes the records.""",
)
@click.option(
    "-b",
    "--bind",
    multiple=True,
    type=_BIND,
    metavar="ENDPOINT",
    help=f"Address to listen on for senders; may be repeated.  [default: {DEFAULT_ENDPOINT}]",
)
@click.option(
    "-a",
    "--ack-bind",
    multiple=True,
    type=_BIND,
    metavar="ENDPOINT",
    help="Address to listen on for zmqpush --ack; may be repeated.  "
    f"[default: {DEFAULT_ACK_ENDPOINT}, if no other is given]",
)
@click.option(
    "-c",
    "--connect",
    multiple=True,
    type=_CONNECT,
    metavar="ENDPOINT",
    help="Sender to connect to, one that binds; may be repeated.",
)
@click.option(
    "--to",
    default="-",
    metavar="PATH|URL",
    help="File to append the records to; {type}, {host} and time codes such as %Y%m%d make a "
    "file of each. Or kafka://BROKER[,BROKER]/TOPIC, or nats://HOST/SUBJECT.  "
    "[default: standard output]",
)
@click.option(
    "-X",
    "--option",
    multiple=True,
    type=_Checked("option", values.read_option),
    metavar="NAME=VALUE",
    help="Property of the client library behind --to URL; may be repeated.",
)
@click.option(
    "--nats-unit",
    type=_Enum(NatsUnit),
    help="What a message of --to nats:// carries: a record, or many as JSON lines.  "
    "[default: record]",
)
@click.option(
    "--dead-letters",
    type=_Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where to write down records that --to refuses for good, and those whose file cannot be "
    "opened.  [default, for an engine: dead-letters.ndjson in --state; without either it waits]",
)
@click.option(
    "--state",
    type=_Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Remember there what was acknowledged, so that no record is in a file twice.",
)
@click.option(
    "--memory",
    type=_Checked("size", values.read_memory),
    default="256MiB",
    show_default=True,
    help="How much memory all senders together may take, from 1MiB.",
)
@click.option(
    "-n",
    "--count",
    type=_Checked("number", values.read_count),
    help="Stop after so many records; if they are acknowledged, at the end of what has come.",
)
@_secured
@_common
def pull(**_: Any) -> None:
    """Receive records from zmqpush, or any ZeroMQ PUSH socket, and write them as JSON lines."""
    from zmqpush.pull import Puller

    said = _Said()
    _run("zmqpull", lambda: Puller(_pull_settings(said), said.reporter))


class _Said:
    """
    What the options of the command say, and how explicitly.

    Attributes:
        values: By name, all of them.

    """

    def __init__(self) -> None:
        self.context = click.get_current_context()
        self.values: dict[str, Any] = dict(self.context.params)
        self.reporter = Reporter(str(self.context.info_name), quiet=self.values["quiet"])
        self._explicit: dict[str, int] = {}
        for name, value in self.values.items():
            source = self.context.get_parameter_source(name)
            if source in _EXPLICIT[1:] and value is not False and value not in (None, ()):
                self._explicit[name] = _EXPLICIT.index(source)

    def note(self, fact: str, *options: str, unless: bool = False, default: bool = False) -> None:
        """Note that something is the case if one of these options is given, or by default."""
        ranks = [self._explicit[name] for name in options if name in self._explicit]
        if default:
            ranks.append(_EXPLICIT.index(ParameterSource.COMMANDLINE))
        if ranks and not unless:
            self._explicit[fact] = max(ranks)

    def has(self, name: str) -> bool:
        """Whether an option is given, or something is the case."""
        return name in self._explicit

    def needs(self, option: str, fact: str, why: str) -> None:
        """Refuse an option without something that it is about, or have it say nothing."""
        if self.has(option) and not self.has(fact):
            self._drop(option, _EXPLICIT.index(ParameterSource.COMMANDLINE), why)

    def yields(self, option: str, fact: str, why: str = "") -> None:
        """Have an option say nothing where something else is said more explicitly."""
        if self.has(option) and self.has(fact):
            self._drop(option, self._explicit[fact], why)

    def _drop(self, option: str, rank: int, why: str) -> None:
        if self._explicit[option] < rank:
            del self._explicit[option]
            self.values[option] = None
        elif why:
            raise SettingsError(why)

    def settings(self, **others: Any) -> dict[str, Any]:
        """Return those that are left, and others, as the settings of a program."""
        return {name: v for name, v in (self.values | others).items() if v is not None}

    def take(self, *names: str) -> list[Any]:
        """Return some values; the settings have other names for them."""
        return [self.values.pop(name) or () for name in names]


def _push_settings(said: _Said) -> PushSettings:
    values = said.values
    _check_words(values["logtype"], said.context.args)
    said.note("ack", "ack", "spool", "omprog")
    said.note("several", "connect", unless=len(values["connect"]) < 2)
    said.note("raw", "format", unless=values["format"] is not Format.RAW)
    for option in ("sync", "spool_max", "spool_slots"):
        said.needs(option, "spool", f"--{option.replace('_', '-')} is about a --spool")
    said.needs("confirm", "omprog", "--confirm says when --omprog answers")
    said.needs("transactions", "omprog", "--transactions are rsyslog's: they need --omprog")
    for option in ("begin_mark", "commit_mark"):
        said.needs(option, "transactions", "--begin-mark and --commit-mark need --transactions")
    said.needs("spread", "ack", "--spread orders the receivers of --ack")
    said.needs("spread", "several", "--spread orders several receivers: give another --connect")
    said.note("bound", "bind")
    _check_keys(said, "--insecure is about a --bind")
    said.yields("queue_max", "spool", "with --spool nothing waits in --queue-max: see --spool-max")
    said.yields("framing", "ack")
    said.yields("field", "raw")
    if values["max_line"] > MAX_ACK_LINE_BYTES:
        said.yields("max_line", "ack")
    if values["framing"] is Framing.ARRAY:
        said.yields("framing", "raw")
    if values["sync"] is Sync.OFF:
        said.yields("sync", "omprog")
    if values["confirm"] is not Confirm.REMOTE and not values["spool"]:
        said.needs("confirm", "spool", f"--confirm {values['confirm']} needs a --spool")
    for option in ("when_full", "delimiter", "null"):
        said.yields(option, "omprog")
    if said.has("delimiter"):
        said.yields("null", "delimiter")
    said.yields("delimiter", "null", "--null and --delimiter exclude each other")

    ack, spool, omprog = said.has("ack"), said.has("spool"), said.has("omprog")
    bind, connect, null = said.take("bind", "connect", "null")
    if not bind and not connect:
        connect = (DEFAULT_ACK_ENDPOINT if ack else DEFAULT_ENDPOINT,)
    begin, commit, transactions = said.take("begin_mark", "commit_mark", "transactions")
    marks = Marks()
    marks = Marks(begin or marks.begin, commit or marks.commit)
    (fields,) = said.take("field")
    if len(dict(fields)) < len(fields):
        raise SettingsError("a --field is given twice")
    said.take("spool_status")
    return PushSettings(
        endpoints=Endpoints(bind=bind, connect=connect),
        fields=dict(fields),
        marks=marks if transactions else None,
        security=_security(said),
        **said.settings(
            ack=ack,
            delimiter=b"\0" if null else values["delimiter"],
            confirm=values["confirm"] or (Confirm.FSYNC if spool else None),
            sync=values["sync"] or (Sync.BLOCK if omprog else None),
            spool_slots=values["spool_slots"] or (_OMPROG_SLOTS if omprog else None),
        ),
    )


def _check_words(logtype: str, others: Sequence[str]) -> None:
    """Refuse what looks like the name of the file to read."""
    if others and os.path.exists(others[0]):
        how = f"zmqpush {shlex.quote(logtype)} < {shlex.quote(others[0])}"
    elif others:
        raise SettingsError(f"{others[0]!r} is one word too many: a type is one word")
    elif os.path.isfile(logtype) and os.isatty(0):
        how = f"zmqpush TYPE < {shlex.quote(logtype)}"
    else:
        return
    raise SettingsError(f"zmqpush reads standard input: {how}")


def _pull_settings(said: _Said) -> PullSettings:
    values = said.values
    to = values["to"]
    listed = said.has("bind") or said.has("connect") or said.has("ack_bind")
    said.note("bound", "bind", "ack_bind", default=not listed)
    said.note("kept", "to", unless=to == "-")
    said.note("engine", "to", unless="://" not in to)
    said.note("nats", "to", unless=not to.lower().startswith("nats://"))
    said.needs("option", "engine", "-X is for what --to SCHEME:// names")
    said.needs("nats_unit", "nats", "--nats-unit is for --to nats://")
    said.needs("dead_letters", "kept", "--dead-letters is for what --to PATH or URL refuses")
    said.needs("state", "kept", "--state is about what is in --to PATH or URL")
    _check_keys(said, "--insecure is about a --bind or an --ack-bind")

    option = _merged_options(values["option"]) if said.has("option") else {}
    said.take("option")
    bind, connect, ack_bind = said.take("bind", "connect", "ack_bind")
    if not listed:
        bind, ack_bind = (DEFAULT_ENDPOINT,), (DEFAULT_ACK_ENDPOINT,)
    return PullSettings(
        endpoints=Endpoints(bind=bind, connect=connect) if bind or connect else None,
        ack_endpoints=Endpoints(bind=ack_bind) if ack_bind else None,
        options=option,
        security=_security(said),
        **said.settings(),
    )


def _merged_options(given: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return what -X says, and of what it does not name what the environment and the file say."""
    context = click.get_current_context()
    said = []
    for place, texts, error in (
        (f"{context.meta.get(CONFIG_FILE)}: option", (context.default_map or {}), ConfigError),
        ("ZMQPULL_OPTION", {"option": os.environ.get("ZMQPULL_OPTION", "").split()}, SettingsError),
    ):
        try:
            said += [values.read_option(text) for text in texts.get("option", ())]
        except SettingsError as exc:
            raise error(f"{place}: {exc}") from exc
    return dict([*said, *given])


def _check_keys(said: _Said, insecure: str) -> None:
    said.yields("insecure", "key", "--key and --insecure exclude each other")
    said.needs("insecure", "bound", insecure)
    # One file may hold the keys of programs that bind and of those that connect.
    if said.has("key"):
        said.needs(
            "allow", "bound", "--allow is for who connects to what is bound, and nothing is bound"
        )
    if said.has("key") and not said.has("connect"):
        said.yields(
            "server_key", "bound", "--server-key is for --connect, and nothing is connected to"
        )


def _security(said: _Said) -> Security:
    key, server_keys, allow, insecure = said.take("key", "server_key", "allow", "insecure")
    return Security(
        key=key or None, server_keys=server_keys, allow=allow or None, insecure=bool(insecure)
    )


def _print_spool_status(spool: Path) -> None:
    from zmqpush.slots import status_of

    for held in status_of(spool):
        whose = f", in use by process {held.pid}" if held.pid is not None else ""
        size = f"{held.segments} segments, {held.bytes} bytes"
        if held.records and held.labels:
            size += f", the first of type {held.labels.type!r} from {held.labels.host!r}"
        text = f"{held.path}: {held.records} records to be acknowledged, {size}{whose}"
        click.echo(os.fsencode(text))  # the path may not be text


def _run(program: str, make: "Callable[[], Pusher | Puller]") -> None:
    import asyncio

    from zmqpush.background import run_with_background
    from zmqpush.descriptors import require_descriptors

    context = click.get_current_context()
    reporter = Reporter(program)
    require_descriptors()

    async def run() -> NoReturn:
        try:
            code = await run_with_background(make().run(), reporter)
        except Exception as exc:
            code = report_failure(exc, program, context)
        # At once, while signals still have their handlers: a thread that waits for a disk or a
        # name server must not keep the process, and there is nothing else to clean up.
        os._exit(code)

    asyncio.run(run())
