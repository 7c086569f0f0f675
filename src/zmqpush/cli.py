"""
The commands: flags, environment and TOML into settings; exceptions into exit codes.

Every option is named once, here. Its flag, its environment variable
(``ZMQPUSH_WHEN_FULL``) and its TOML key (``when-full``) are the same word.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from zmqpush import __version__, config, values
from zmqpush.core.dialogue import Marks
from zmqpush.core.envelope import Format
from zmqpush.core.framing import Framing
from zmqpush.errors import EXIT_INTERNAL, EXIT_USAGE, ZmqpushError
from zmqpush.omprog import claim_stdout
from zmqpush.queue import WhenFull
from zmqpush.settings import (
    ALLOW_ANY,
    DEFAULT_ACK_ENDPOINT,
    DEFAULT_ENDPOINT,
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


class _Failure(click.ClickException):
    """One line on standard error and an exit code."""

    def __init__(self, error: ZmqpushError, program: str) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]  # click reads it so
        self._program = program

    def show(self, file: Any = None) -> None:
        Reporter(self._program).warn(self.message)


class _Checked(click.ParamType):  # type: ignore[type-arg]  # click 8.1 has no type arguments
    """A parameter read by a function that raises ValueError with a good message."""

    def __init__(self, name: str, read: Callable[[str], Any]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if isinstance(value, bytes | tuple | Path):  # read already
            return value
        try:
            return self._read(str(value))
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


class _Word(click.Argument):
    """An argument that is not given if it is empty: rsyslog makes one of two spaces in a row."""

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> Any:
        given = {name: value for name, value in opts.items() if value != ""}
        return super().consume_value(ctx, given)


_SIZE = _Checked("size", values.read_size)
_BIND = _Checked("endpoint", lambda text: check_endpoint(text, bind=True))
_CONNECT = _Checked("endpoint", check_endpoint)
_MARK = _Checked("text", os.fsencode)
_SECONDS = _Checked("seconds", values.read_seconds)


def _choice(options: type[StrEnum]) -> "click.Choice[str]":
    return click.Choice([option.value for option in options])


def _load_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    program = str(ctx.info_name)
    path = value or config.find(f"{program}.toml")
    if path is None or ctx.resilient_parsing:
        return
    params = {str(p.name): p for p in ctx.command.params if p.expose_value}
    try:
        ctx.default_map = config.load(path, {name: p.multiple for name, p in params.items()})
    except ZmqpushError as exc:
        raise _Failure(exc, program) from exc


def _common(command: Callable[..., None]) -> Callable[..., None]:
    for decorate in (
        click.help_option("-h", "--help", allow_from_autoenv=False),
        click.version_option(
            __version__, "-V", "--version", message="%(prog)s %(version)s", allow_from_autoenv=False
        ),
        click.option(
            "--config",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
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
            type=_Checked("keys", lambda text: text if text == ALLOW_ANY else Path(text)),
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
            type=click.Path(dir_okay=False, path_type=Path),
            metavar="FILE",
            help="Encrypt, with this key pair; zmqpush-keys new makes one.",
        ),
    ):
        command = decorate(command)
    return command


def _take_security(options: dict[str, Any]) -> Security:
    names = ("key", "allow", "insecure")
    server_keys = tuple(options.pop("server_key"))
    return Security(server_keys=server_keys, **{name: options.pop(name) for name in names})


@click.command(
    context_settings={"auto_envvar_prefix": "ZMQPUSH", "max_content_width": 100},
    epilog="""\b
Examples:
  app 2>&1 | zmqpush nginx
  tail -n +1 -F app.log | zmqpush --format logstash -c tcp://logs.example.com:2120 app
  app | zmqpush --spool /var/spool/zmqpush -c tcp://logs.example.com:5015 nginx

Every option can also be set in the environment (ZMQPUSH_CONNECT, ZMQPUSH_WHEN_FULL, …) or in
the TOML file. Without --ack delivery is as sure as ZeroMQ's PUSH socket: records that libzmq
has accepted may be lost when the receiver dies. With --ack a record counts when zmqpull has
it safe, and with --spool it survives until then whatever dies. Exit codes: 0 all delivered,
1 something was dropped, lost or left unread, 2 usage, 69 no receiver and no spool, 73 others
use the spool, 74 unreadable input or a failing spool, 75 the rest is in the spool, 78 bad
configuration or keys.""",
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
    type=_choice(Format),
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
    type=_choice(Framing),
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
    type=_choice(WhenFull),
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
    type=click.Path(file_okay=False, path_type=Path),
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
    type=click.IntRange(1, 64),
    metavar="N",
    help="How many processes may use the spool at once.  [default: 1, with --omprog 8]",
)
@click.option("--spool-status", is_flag=True, help="Tell what the spool holds, and exit.")
@click.option(
    "--sync",
    type=_choice(Sync),
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
    type=_choice(Confirm),
    help="What safe means: in the spool, synced in the spool, or at the receiver.  [default: "
    "remote, with --spool fsync]",
)
@click.option(
    "--timeout",
    type=_SECONDS,
    metavar="SECONDS",
    help="Give up after so long without delivery while something waits for it; with --spool, "
    "where it is safe, at the end of the input only.  [default: wait]",
)
@_secured
@_common
def push(
    bind: Sequence[str],
    connect: Sequence[str],
    field: Sequence[tuple[str, str]],
    delimiter: bytes | None,
    null: bool,
    transactions: bool,
    begin_mark: bytes | None,
    commit_mark: bytes | None,
    spool_status: bool,
    **options: Any,
) -> None:
    """
    Ship each line of standard input as a JSON record over ZeroMQ.

    LOGTYPE is the type that the records carry.  [default: syslog]
    """
    answers = claim_stdout() if options["omprog"] and not spool_status else None
    from zmqpush.push import Pusher

    if null and delimiter:
        raise click.UsageError("--null and --delimiter exclude each other")
    if len(fields := dict(field)) < len(field):
        raise click.UsageError("a --field is given twice")

    if spool_status and not options["spool"]:
        raise click.UsageError("--spool-status needs --spool")
    if options["confirm"] and not options["omprog"]:
        raise click.UsageError("--confirm says when --omprog answers")
    given = {"begin": begin_mark, "commit": commit_mark}
    marks = {name: mark for name, mark in given.items() if mark is not None}
    if marks and not transactions:
        raise click.UsageError("--begin-mark and --commit-mark need --transactions")
    _choose_defaults(options)

    security = _take_security(options)

    async def main() -> int:
        if spool_status:
            return _tell_spool_status(options["spool"])
        ack = options["ack"]
        if not bind and not connect:
            endpoints = Endpoints(connect=(DEFAULT_ACK_ENDPOINT if ack else DEFAULT_ENDPOINT,))
        else:
            endpoints = Endpoints(bind=tuple(bind), connect=tuple(connect))
        settings = PushSettings(
            endpoints=endpoints,
            fields=fields,
            delimiter=b"\0" if null else delimiter or b"\n",
            marks=Marks()._replace(**marks) if transactions else None,
            security=security,
            **options
            | {
                "format": Format(options["format"]),
                "framing": Framing(options["framing"]),
                "when_full": WhenFull(options["when_full"]),
                "sync": Sync(options["sync"]),
                "confirm": Confirm(options["confirm"]),
            },
        )
        reporter = Reporter("zmqpush", quiet=settings.quiet)
        return await Pusher(settings, reporter, answers=answers).run()

    _run("zmqpush", main())


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
lost at the end, 2 usage, 69 the endpoint cannot be used, 73 another process uses the state, 74
the output or the state cannot be written, 78 bad configuration or keys, or nothing in the engine
takes the records.""",
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
    type=_choice(NatsUnit),
    help="What a message of --to nats:// carries: a record, or many as JSON lines.  "
    "[default: record]",
)
@click.option(
    "--dead-letters",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where to write down records that --to refuses for good, and those whose file cannot be "
    "opened.  [default, for an engine: dead-letters.ndjson in --state; without either it waits]",
)
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Remember there what was acknowledged, so that no record is in a file twice.",
)
@click.option(
    "--memory",
    type=_Checked("size", values.read_memory),
    default="256MiB",
    show_default=True,
    help="How much memory all acknowledged senders together may take, from 1MiB.",
)
@click.option(
    "-n",
    "--count",
    type=click.IntRange(min=1),
    help="Stop after so many records; if they are acknowledged, at the end of what has come.",
)
@_secured
@_common
def pull(
    bind: Sequence[str],
    connect: Sequence[str],
    ack_bind: Sequence[str],
    option: Sequence[tuple[str, str]],
    nats_unit: str | None,
    **options: Any,
) -> None:
    """Receive records from zmqpush, or any ZeroMQ PUSH socket, and write them as JSON lines."""
    from zmqpush.pull import Puller

    if not bind and not connect and not ack_bind:
        bind, ack_bind = (DEFAULT_ENDPOINT,), (DEFAULT_ACK_ENDPOINT,)

    security = _take_security(options)

    async def main() -> int:
        plain = Endpoints(bind=tuple(bind), connect=tuple(connect)) if bind or connect else None
        acked = Endpoints(bind=tuple(ack_bind)) if ack_bind else None
        settings = PullSettings(
            endpoints=plain,
            ack_endpoints=acked,
            options=_merged_options(option),
            nats_unit=NatsUnit(nats_unit) if nats_unit else None,
            security=security,
            **options,
        )
        return await Puller(settings, Reporter("zmqpull", quiet=settings.quiet)).run()

    _run("zmqpull", main())


def _merged_options(given: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return what -X says, and of what it does not name what the environment and the file say."""
    from_file = (click.get_current_context().default_map or {}).get("option") or ()
    from_environment = os.environ.get("ZMQPULL_OPTION", "").split()
    said = [values.read_option(str(text)) for text in (*from_file, *from_environment)]
    return dict([*said, *given])


def _choose_defaults(options: dict[str, Any]) -> None:
    """Fill in what depends on other options."""
    omprog, spool = options["omprog"], options["spool"] is not None
    options["ack"] = options["ack"] or spool or omprog
    framing = click.get_current_context().get_parameter_source("framing")
    if options["ack"] and framing is ParameterSource.DEFAULT_MAP:
        options["framing"] = Framing.SINGLE  # a machine's file may be for plain delivery, too
    options["confirm"] = options["confirm"] or (Confirm.FSYNC if spool else Confirm.REMOTE)
    options["sync"] = options["sync"] or (Sync.BLOCK if omprog else Sync.INTERVAL)
    options["spool_slots"] = options["spool_slots"] or (8 if omprog else 1)


def _tell_spool_status(spool: Path) -> int:
    from zmqpush.slots import status_of

    for held in status_of(spool):
        whose = f", in use by process {held.pid}" if held.pid is not None else ""
        size = f"{held.segments} segments, {held.bytes} bytes"
        if held.records and held.labels:
            size += f", the first of type {held.labels.type!r} from {held.labels.host!r}"
        click.echo(
            f"{held.path}: {held.records} records to be acknowledged, {held.acked} "
            f"acknowledged, {size}{whose}"
        )
    return 0


def _run(program: str, main: Coroutine[Any, Any, int]) -> None:
    context = click.get_current_context()

    async def run() -> NoReturn:
        try:
            code = await main
        except ZmqpushError as exc:
            Reporter(program).warn(str(exc))
            code = exc.exit_code
        except ValueError as exc:
            click.UsageError(str(exc), context).show()
            code = EXIT_USAGE
        except Exception as exc:
            Reporter(program).warn(f"internal error, please report it: {exc!r}")
            code = EXIT_INTERNAL
        # At once, while signals still have their handlers: what libzmq could not hand
        # over in time must not keep the process, and there is nothing else to clean up.
        os._exit(code)

    asyncio.run(run())
