"""TOML files into click's ``default_map``: texts, which are read as those of flags are."""

import difflib
import json
import os
from collections.abc import Collection, Mapping
from enum import Enum, auto
from pathlib import Path
from typing import Any, NamedTuple

from zmqpush.errors import ConfigError

# These may be tables, of names and texts.
_TABLES = {"field", "option"}
# A path or an address with a NUL in it would be cut there, or refused with a traceback.
_MAY_HOLD_NUL = {"field", "delimiter"}


class Kind(Enum):
    """What an option takes."""

    FLAG = auto()
    NUMBER = auto()
    TEXT = auto()


class Option(NamedTuple):
    """What a file may say of an option: of which kind it is, and whether it may be a list."""

    kind: Kind
    multiple: bool


def find(name: str) -> Path | None:
    """Return the first of the places where ``name`` may lie that exists."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    places = (Path(home) / "zmqpush" / name, Path("/etc/zmqpush") / name)
    return next((place for place in places if os.path.isfile(place)), None)


def nearest(name: str, known: Collection[str]) -> str:
    """Return what a mistyped name may have meant, as the end of a message."""
    if found := difflib.get_close_matches(name, known, n=1):
        return f"is it {found[0]}?"
    return f"there are {', '.join(sorted(known))}"


def load(path: Path, known: Mapping[str, Option]) -> dict[str, Any]:
    """
    Read a configuration file.

    Args:
        path: Where it lies.
        known: All options, by their names with underscores.

    Returns:
        Texts, or True and False, by option name, with underscores.

    Raises:
        ConfigError: If it cannot be read, is no TOML, has an unknown key or a value of no
            possible type.

    """
    import tomllib  # who has no such file starts sooner

    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not TOML: {exc}") from exc
    except RecursionError as exc:
        raise ConfigError(f"{path} is not TOML: it is nested too deeply") from exc
    by_name: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            keys = [known_name.replace("_", "-") for known_name in known]
            raise ConfigError(f"{path}: unknown key {key!r}; {nearest(key, keys)}")
        if name in by_name:
            raise ConfigError(f"{path}: {key} is there twice")
        try:
            by_name[name] = _read(name, value, known[name])
        except ValueError as exc:
            raise ConfigError(f"{path}: {key}: {exc}") from exc
    return by_name


def _read(name: str, value: Any, option: Option) -> Any:
    if option.kind is Kind.FLAG:
        if isinstance(value, bool):
            return value
        raise ValueError(f"{_shown(value)} is not true or false")
    if name in _TABLES and isinstance(value, dict):
        return [_pair(key, part) for key, part in value.items()]
    if option.multiple:
        parts = value if isinstance(value, list) else [value]
        return [_text(name, part, option.kind) for part in parts]
    return _text(name, value, option.kind)


def _pair(key: str, value: Any) -> str:
    if not key or "=" in key:
        raise ValueError(f"{key!r} is no name: it is empty, or holds a '='")
    if isinstance(value, str):
        return f"{key}={value}"
    if isinstance(value, bool | int | float):
        return f"{key}={json.dumps(value)}"
    raise ValueError(f"{key} is {_shown(value)}: a name with dots stands in quotes")


def _text(name: str, value: Any, kind: Kind) -> str:
    if isinstance(value, str):
        if "\0" in value and name not in _MAY_HOLD_NUL:
            raise ValueError(f"{value!r} holds a NUL")
        return value
    if kind is Kind.NUMBER and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{_shown(value)} is not a {kind.name.lower()}")


def _shown(value: Any) -> str:
    """Return a value as a message shows it; what is in a list or a table may be secret."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return json.dumps(value)
    return repr(value) if isinstance(value, str) else str(value)
