"""Exceptions into the line that a user reads, and the exit code."""

import re

import click
from click.core import ParameterSource

from zmqpush.errors import EXIT_CONFIG, EXIT_INTERNAL, ResourceError, SettingsError, ZmqpushError
from zmqpush.runtime.reporting import Reporter

# Where ``Context.meta`` holds the configuration file that was read.
CONFIG_FILE = "zmqpush.cli.config_file"
_FLAG = re.compile(r"--[a-z][a-z-]*")


def report_failure(error: BaseException, program: str, context: click.Context | None = None) -> int:
    """
    Print what has ended a run.

    Args:
        error: The exception.
        program: Its name begins the line.
        context: The command and where its options came from, if the exception does not know.

    Returns:
        The exit code.

    """
    text, code = _explain(error, context)
    Reporter(program).warn(text)
    return code


def _explain(error: BaseException, context: click.Context | None) -> tuple[str, int]:
    if isinstance(error, click.UsageError):
        return _explain_usage(error)
    if isinstance(error, click.ClickException):
        return error.format_message(), error.exit_code
    if isinstance(error, SettingsError):
        places, all_in_file = _origins(str(error), context)
        code = EXIT_CONFIG if all_in_file else error.exit_code
        return f"{error}{places}{_hint(context)}", code
    if known := error if isinstance(error, ZmqpushError) else ResourceError.of(error):
        return str(known), known.exit_code
    return f"internal error, please report it: {error!r}", EXIT_INTERNAL


def _explain_usage(error: click.UsageError) -> tuple[str, int]:
    text = error.format_message().rstrip(".")
    text = text[:1].lower() + text[1:]
    if isinstance(error, click.BadParameter) and error.ctx and error.param and error.message:
        text = error.message.rstrip(".")
        place = place_of(error.ctx, error.param)
        if error.ctx.get_parameter_source(str(error.param.name)) is ParameterSource.DEFAULT_MAP:
            return f"{place}: {text}", EXIT_CONFIG
        text = f"{place}: {text}"
    return f"{text}{_hint(error.ctx)}", error.exit_code


def place_of(context: click.Context, param: click.Parameter) -> str:
    """Return where the value of an option came from: a flag, a variable, or a file and key."""
    name = str(param.name)
    source = context.get_parameter_source(name)
    if source is ParameterSource.DEFAULT_MAP:
        return f"{context.meta[CONFIG_FILE]}: {name.replace('_', '-')}"
    if source is ParameterSource.ENVIRONMENT:
        return f"{context.auto_envvar_prefix}_{name.upper()}"
    return max(param.opts, key=len) if isinstance(param, click.Option) else name.upper()


def _origins(text: str, context: click.Context | None) -> tuple[str, bool]:
    """Return the places of a message's flags but the command line; whether all are in the file."""
    if not context:
        return "", False
    told = []
    sources = set()
    for param in context.command.params:
        if set(param.opts) & set(_FLAG.findall(text)):
            place = place_of(context, param)
            if place not in param.opts:
                told.append(place)
            sources.add(context.get_parameter_source(str(param.name)))
    all_in_file = sources - {ParameterSource.DEFAULT} == {ParameterSource.DEFAULT_MAP}
    return (f" ({', '.join(told)})" if told else ""), all_in_file


def _hint(context: click.Context | None) -> str:
    return f"; see {context.command_path} --help" if context else ""
