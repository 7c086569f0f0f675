"""The command ``zmqpush``."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from zmqpush.cli import values
from zmqpush.cli.options import (
    BIND,
    CONNECT,
    SECONDS,
    Checked,
    EnumOption,
    PathOption,
    Said,
    check_keys,
    common,
    read_security,
    run_program,
    secured,
)
from zmqpush.core.omprog import Marks
from zmqpush.core.records.encode import Format
from zmqpush.core.records.framing import Framing
from zmqpush.errors import SettingsError
from zmqpush.settings import (
    DEFAULT_ACK_ENDPOINT,
    DEFAULT_ENDPOINT,
    MAX_ACK_LINE_BYTES,
    Confirm,
    Endpoints,
    PushSettings,
    Sync,
    WhenFull,
)

# So many rsyslog actions may use one spool.
_OMPROG_SLOTS = 8


class _Word(click.Argument):
    """An argument that is not given if it is empty: rsyslog makes one of two spaces in a row."""

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> Any:
        given = {name: value for name, value in opts.items() if value != ""}
        return super().consume_value(ctx, given)


_SIZE = Checked("size", values.read_size)
_MARK = Checked("text", values.read_mark)


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
    type=CONNECT,
    metavar="ENDPOINT",
    help=f"Receiver to connect to; may be repeated.  [default: {DEFAULT_ENDPOINT}, with --ack "
    f"{DEFAULT_ACK_ENDPOINT}]",
)
@click.option(
    "-b",
    "--bind",
    multiple=True,
    type=BIND,
    metavar="ENDPOINT",
    help="Address to listen on for receivers that connect; may be repeated.",
)
@click.option(
    "--format",
    type=EnumOption(Format),
    default=Format.JSON.value,
    show_default=True,
    help="What a record looks like.",
)
@click.option(
    "--field",
    multiple=True,
    type=Checked("field", values.read_field),
    metavar="KEY=VALUE",
    help="Add a field to every record; may be repeated. In ECS it is a label, or what a name with "
    "dots says.",
)
@click.option(
    "--framing",
    type=EnumOption(Framing),
    default=Framing.SINGLE.value,
    show_default=True,
    help="What a ZeroMQ message carries: one record, one record a frame, a JSON array of records, "
    "or JSON lines.",
)
@click.option("-0", "--null", is_flag=True, help=r"Lines end with NUL: --delimiter '\0'.")
@click.option(
    "--delimiter",
    type=Checked("text", values.read_delimiter),
    help=r"What ends a line; escapes such as \t and \x1e are understood.  [default: \n]",
)
@click.option(
    "--max-line",
    type=Checked("size", values.read_max_line),
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
    type=EnumOption(WhenFull),
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
    type=PathOption(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep records there, on disk, until they are acknowledged; implies --ack.",
)
@click.option(
    "--spool-max",
    type=Checked("size", values.read_spool_size),
    default="1GiB",
    show_default=True,
    help="How much the spool holds before --when-full.",
)
@click.option(
    "--spool-slots",
    type=Checked("number", values.read_slots),
    metavar="N",
    help="How many processes may use the spool at once.  [default: 1, with --omprog 8]",
)
@click.option("--spool-status", is_flag=True, help="Show what the spool holds and exit.")
@click.option(
    "--sync",
    type=EnumOption(Sync),
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
    type=EnumOption(Confirm),
    help="What safe means: in the spool, synced in the spool, or at the receiver.  [default: "
    "remote, with --spool fsync]",
)
@click.option(
    "--timeout",
    type=SECONDS,
    metavar="SECONDS",
    help="Give up after so long without delivery while something waits for it; with --spool, "
    "whose disk keeps what is read, at the end of the input only.  [default: wait]",
)
@secured
@common
def push(spool: Path | None, spool_status: bool, omprog: bool, **_: Any) -> None:
    """
    Ship each line of standard input as a JSON record over ZeroMQ.

    LOGTYPE is the type that the records carry.  [default: syslog]
    """
    # Imported here: --help and --version start sooner.
    from zmqpush.sender.omprog import claim_stdout

    answers = claim_stdout() if omprog and not spool_status else None
    from zmqpush.sender.app import Pusher

    said = Said()
    if spool_status:
        if not spool:
            raise click.UsageError("--spool-status needs --spool")
        _print_spool_status(spool)
        return
    run_program("zmqpush", lambda: Pusher(_push_settings(said), said.reporter, answers=answers))


def _push_settings(said: Said) -> PushSettings:
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
    check_keys(said, "--insecure is about a --bind")
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
        security=read_security(said),
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


def _print_spool_status(spool: Path) -> None:
    from zmqpush.spool.slots import status_of

    for held in status_of(spool):
        whose = f", in use by process {held.pid}" if held.pid is not None else ""
        size = f"{held.segments} segments, {held.bytes} bytes"
        if held.records and held.labels:
            size += f", the first of type {held.labels.type!r} from {held.labels.host!r}"
        text = f"{held.path}: {held.records} records to be acknowledged, {size}{whose}"
        click.echo(os.fsencode(text))  # the path may not be text
