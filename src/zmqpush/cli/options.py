"""
What the options of both commands have in common: flags, environment and TOML into settings.

Every option is named once, in one of the files here. Its flag, its environment variable
(``ZMQPUSH_WHEN_FULL``) and its TOML key (``when-full``) are the same word.

An option that has nothing to do is an error on the command line. In the environment or in the
file, which are for all that runs on a machine, it is none, and has no effect.
"""

import os
import re
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from zmqpush import __version__
from zmqpush.cli import config_file, values
from zmqpush.errors import SettingsError
from zmqpush.runtime.failures import CONFIG_FILE, report_failure
from zmqpush.runtime.reporting import Reporter
from zmqpush.settings import Security, check_endpoint

if TYPE_CHECKING:
    from zmqpush.receiver.app import Puller
    from zmqpush.sender.app import Pusher

# Variables that begin like ours, and are for tests or set by Docker and Kubernetes for a service.
_NO_OPTIONS = re.compile(r"ZMQPU(SH|LL)_(FAULT|CHAOS|TEST\w*|VERSION|(SERVICE|PORT)(_\w+)?)")
# How explicit a setting is: who says more wins.
_EXPLICIT = (
    ParameterSource.DEFAULT,
    ParameterSource.DEFAULT_MAP,
    ParameterSource.ENVIRONMENT,
    ParameterSource.COMMANDLINE,
)


class Checked(click.ParamType):  # type: ignore[type-arg]  # click 8.1 has no type arguments
    """A parameter read by a function that raises SettingsError with a good message."""

    def __init__(self, name: str, read: Callable[[str], Any]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return what a text says."""
        if isinstance(value, bytes | tuple | Path):  # read already
            return value
        try:
            return self._read(str(value))
        except SettingsError as exc:
            self.fail(str(exc), param, ctx)


class PathOption(click.Path):
    """A path that is not empty, as that of a variable that is not set."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return what a text says."""
        if not os.fspath(value):
            self.fail("'' is not a path", param, ctx)
        return super().convert(value, param, ctx)


class EnumOption(click.Choice):  # type: ignore[type-arg]
    """A parameter that is one of the values of an enumeration."""

    def __init__(self, options: type[StrEnum]) -> None:
        super().__init__([option.value for option in options])
        self._options = options

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return what a text says."""
        return self._options(super().convert(str(value), param, ctx))


BIND = Checked("endpoint", lambda text: check_endpoint(text, bind=True))
CONNECT = Checked("endpoint", check_endpoint)
SECONDS = Checked("seconds", values.read_seconds)


def _load_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    path = value or config_file.find(f"{ctx.info_name}.toml")
    if ctx.resilient_parsing:
        return
    options = {str(p.name): _describe(p) for p in ctx.command.params if p.expose_value}
    _warn_of_unknown_variables(ctx, [*options, "config"])
    if path is not None:
        ctx.meta[CONFIG_FILE] = path
        ctx.default_map = config_file.load(path, options)


def _describe(param: click.Parameter) -> config_file.Option:
    kind = config_file.Kind.TEXT
    if getattr(param, "is_flag", False):
        kind = config_file.Kind.FLAG
    elif param.type.name in ("size", "seconds", "number"):
        kind = config_file.Kind.NUMBER
    return config_file.Option(kind, getattr(param, "multiple", False))


def _warn_of_unknown_variables(ctx: click.Context, options: Sequence[str]) -> None:
    # No more than a warning: who runs us may have variables of that name for something else.
    known = [f"{ctx.auto_envvar_prefix}_{name.upper()}" for name in options]
    for name in sorted(os.environ):
        if name.startswith(f"{ctx.auto_envvar_prefix}_") and name not in known:
            if _NO_OPTIONS.fullmatch(name) or name.startswith("ZMQPUSH_KEYS_"):
                continue
            found = config_file.nearest(name, known)
            Reporter(str(ctx.info_name)).warn(f"the variable {name} is no option: {found}")


def common(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that both commands have."""
    for decorate in (
        click.help_option("-h", "--help", allow_from_autoenv=False),
        click.version_option(
            __version__, "-V", "--version", message="%(prog)s %(version)s", allow_from_autoenv=False
        ),
        click.option(
            "--config",
            type=PathOption(exists=True, dir_okay=False, path_type=Path),
            callback=_load_config,
            is_eager=True,
            expose_value=False,
            help="TOML file with any of these options.  [default: the first of "
            "$XDG_CONFIG_HOME/zmqpush/PROGRAM.toml and /etc/zmqpush/PROGRAM.toml]",
        ),
        click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings and errors."),
        click.option(
            "--grace",
            type=SECONDS,
            default=4.0,
            show_default=True,
            metavar="SECONDS",
            help="How long to go on after SIGTERM or Ctrl-C. A second signal means now.",
        ),
    ):
        command = decorate(command)
    return command


def secured(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that are about keys."""
    for decorate in (
        click.option(
            "--insecure",
            is_flag=True,
            help="Bind an address that the network can reach, without keys.",
        ),
        click.option(
            "--allow",
            type=Checked("keys", values.read_allow),
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
            type=PathOption(dir_okay=False, path_type=Path),
            metavar="FILE",
            help="Encrypt, with this key pair; zmqpush-keys new makes one.",
        ),
    ):
        command = decorate(command)
    return command


class Said:
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


def check_keys(said: Said, insecure: str) -> None:
    """Check that options about keys fit the others; the text is for a vain ``--insecure``."""
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


def read_security(said: Said) -> Security:
    """Return what the options say about keys."""
    key, server_keys, allow, insecure = said.take("key", "server_key", "allow", "insecure")
    return Security(
        key=key or None, server_keys=server_keys, allow=allow or None, insecure=bool(insecure)
    )


def run_program(program: str, make: "Callable[[], Pusher | Puller]") -> None:
    """Make a program and run it; the process ends with its exit code."""
    import asyncio

    from zmqpush.runtime.background import run_with_background
    from zmqpush.runtime.fds import require_descriptors

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
