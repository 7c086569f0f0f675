"""The commands of ``zmqpush-keys``: make key pairs, and keep lists of those that are admitted."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from zmqpush import __version__
from zmqpush.errors import KeyFileError, SettingsError
from zmqpush.security.allowlist import Admitted, editing, read_admitted
from zmqpush.security.keyfile import (
    check_name,
    find_public,
    fingerprint,
    is_key,
    write_pair,
)

PROGRAM = "zmqpush-keys"


class _TakesKeys(click.Command):
    """A command that does not take a key for an option because it begins with ``-``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        keys = [arg for arg in args if arg.startswith("-") and is_key(arg)]
        others = [arg for arg in args if arg not in keys]
        mark = [] if "--" in others else ["--"]
        return super().parse_args(ctx, others + mark + keys)


def _check_names(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    try:
        for text in value if isinstance(value, tuple) else (value,):
            if text is not None:
                check_name(text)
    except SettingsError as exc:
        raise click.BadParameter(str(exc), ctx, param) from exc
    return value


_PATH = click.Path(path_type=Path)
_NAME = click.option("--name", callback=_check_names, help="Whose key it is.")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  zmqpush-keys new /etc/zmqpush/collector
  zmqpush-keys allow /etc/zmqpush/allowed web1.pub --name web1 --host web1.example.com
  zmqpush-keys show /etc/zmqpush/allowed
  zmqpush-keys revoke /etc/zmqpush/allowed web1

Each end of an encrypted connection has a key pair (--key FILE). Who connects knows the public key
of who binds (--server-key), and who binds has a list of the public keys that may connect (--allow
LIST). Exit codes: 0 done, 2 usage, 74 standard output cannot be written, 78 a file with keys
cannot be used.""",
)
@click.version_option(__version__, "-V", "--version", message="%(prog)s %(version)s")
def keys() -> None:
    """Make CURVE keys for zmqpush and zmqpull, and keep lists of those that may connect."""


@keys.command()
@click.argument("file", type=_PATH)
@_NAME
def new(file: Path, name: str | None) -> None:
    """
    Make a key pair.

    FILE gets the public key, FILE_secret both; neither may exist. The name is that of FILE, if
    no other is given.
    """
    if name is None:
        name = _named(file.name)
    public = write_pair(file, {"name": name}).public
    click.echo(f"{public} ({fingerprint(public)})")
    click.echo(f"{PROGRAM} allow LIST '{public}' --name {shlex.quote(name)}")


@keys.command()
@click.argument("paths", metavar="FILE|DIR...", type=_PATH, nargs=-1, required=True)
def show(paths: Sequence[Path]) -> None:
    """
    Print the public keys in files, lists and directories.

    A line has the fingerprint of a key, the key, its name, and the hosts that it may name as its
    own: all, if there is none.
    """
    for path in paths:
        for key, admitted in read_admitted(path).items():
            click.echo(_told(key, admitted))


@keys.command(cls=_TakesKeys)
@click.argument("path", metavar="LIST", type=_PATH)
@click.argument("texts", metavar="KEY|FILE...", nargs=-1, required=True)
@_NAME
@click.option(
    "--host",
    "hosts",
    multiple=True,
    callback=_check_names,
    help="A host that it may name as its own; may be repeated.  [default: all]",
)
def allow(path: Path, texts: Sequence[str], name: str | None, hosts: Sequence[str]) -> None:
    """
    Add public keys to a list.

    LIST is a file, which is made if there is none, or a directory. Of a key that is there already
    the name and the hosts are replaced, where others are given.
    """
    told = []
    with editing(path) as admitted:
        for text in texts:
            key, values = find_public(text)
            before = admitted.get(key, Admitted(""))
            named = values.get("name", Path(text).name) if key != text else ""
            new_name = name or before.name or (_named(named) if named else fingerprint(key))
            admitted[key] = Admitted(new_name, frozenset(hosts) or before.hosts)
            told.append(f"allowed {_told(key, admitted[key])}")
    _tell_change(told)


@keys.command(cls=_TakesKeys)
@click.argument("path", metavar="LIST", type=_PATH)
@click.argument("texts", metavar="KEY|FILE|NAME...", nargs=-1, required=True)
def revoke(path: Path, texts: Sequence[str]) -> None:
    """
    Take public keys away from a list.

    A name takes away all keys of that name.
    """
    told = []
    with editing(path) as admitted:
        for text in texts:
            found = [key for key, known in admitted.items() if text in (key, known.name)]
            if not found and os.path.exists(text):
                found = [key for key in admitted if key == find_public(text)[0]]
            if not found:
                raise KeyFileError(f"{text!r} is not in {path}")
            told += [f"revoked {_told(key, admitted.pop(key))}" for key in found]
    _tell_change(told)


def _named(text: str) -> str:
    try:
        return check_name(text)
    except SettingsError as exc:
        raise click.UsageError(f"{exc}; give a --name") from exc


def _told(key: str, admitted: Admitted) -> str:
    return " ".join((fingerprint(key), key, admitted.name, *sorted(admitted.hosts))).rstrip()


def _tell_change(lines: Sequence[str]) -> None:
    for line in lines:
        click.echo(line)
    click.echo("Programs that run take notice at SIGHUP.")
