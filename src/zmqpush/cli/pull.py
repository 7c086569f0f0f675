"""The command ``zmqpull``."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from zmqpush.cli import values
from zmqpush.cli.options import (
    BIND,
    CONNECT,
    Checked,
    PathOption,
    Said,
    check_keys,
    common,
    read_security,
    run_program,
    secured,
)
from zmqpush.errors import ConfigError, SettingsError
from zmqpush.runtime.failures import CONFIG_FILE
from zmqpush.settings import (
    DEFAULT_ACK_ENDPOINT,
    DEFAULT_ENDPOINT,
    Endpoints,
    PullSettings,
)


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
    type=BIND,
    metavar="ENDPOINT",
    help=f"Address to listen on for senders; may be repeated.  [default: {DEFAULT_ENDPOINT}]",
)
@click.option(
    "-a",
    "--ack-bind",
    multiple=True,
    type=BIND,
    metavar="ENDPOINT",
    help="Address to listen on for zmqpush --ack; may be repeated.  "
    f"[default: {DEFAULT_ACK_ENDPOINT}, if no other is given]",
)
@click.option(
    "-c",
    "--connect",
    multiple=True,
    type=CONNECT,
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
    type=Checked("option", values.read_option),
    metavar="NAME=VALUE",
    help="Property of the client library behind --to URL; may be repeated.",
)
@click.option(
    "--dead-letters",
    type=PathOption(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where to write down records that --to refuses for good, and those whose file cannot be "
    "opened.  [default, for an engine: dead-letters.ndjson in --state; without either it waits]",
)
@click.option(
    "--state",
    type=PathOption(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Remember there what was acknowledged, so that no record is in a file twice.",
)
@click.option(
    "--memory",
    type=Checked("size", values.read_memory),
    default="256MiB",
    show_default=True,
    help="How much memory all senders together may take, from 1MiB.",
)
@click.option(
    "-n",
    "--count",
    type=Checked("number", values.read_count),
    help="Stop after so many records; if they are acknowledged, at the end of what has come.",
)
@secured
@common
def pull(**_: Any) -> None:
    """Receive records from zmqpush, or any ZeroMQ PUSH socket, and write them as JSON lines."""
    from zmqpush.receiver.app import Puller

    said = Said()
    run_program("zmqpull", lambda: Puller(_pull_settings(said), said.reporter))


def _pull_settings(said: Said) -> PullSettings:
    values = said.values
    to = values["to"]
    listed = said.has("bind") or said.has("connect") or said.has("ack_bind")
    said.note("bound", "bind", "ack_bind", default=not listed)
    said.note("kept", "to", unless=to == "-")
    said.note("engine", "to", unless="://" not in to)
    said.needs("option", "engine", "-X is for what --to SCHEME:// names")
    said.needs("dead_letters", "kept", "--dead-letters is for what --to PATH or URL refuses")
    said.needs("state", "kept", "--state is about what is in --to PATH or URL")
    check_keys(said, "--insecure is about a --bind or an --ack-bind")

    option = _merged_options(values["option"]) if said.has("option") else {}
    said.take("option")
    bind, connect, ack_bind = said.take("bind", "connect", "ack_bind")
    if not listed:
        bind, ack_bind = (DEFAULT_ENDPOINT,), (DEFAULT_ACK_ENDPOINT,)
    return PullSettings(
        endpoints=Endpoints(bind=bind, connect=connect) if bind or connect else None,
        ack_endpoints=Endpoints(bind=ack_bind) if ack_bind else None,
        options=option,
        security=read_security(said),
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
