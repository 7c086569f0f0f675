"""TOML files into click's ``default_map``."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zmqpush.errors import ConfigError


def find(name: str) -> Path | None:
    """Return the first of the places where ``name`` may lie that exists."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    places = (Path(home) / "zmqpush" / name, Path("/etc/zmqpush") / name)
    return next((place for place in places if os.path.isfile(place)), None)


def load(path: Path, known: Mapping[str, bool]) -> dict[str, Any]:
    """
    Read a configuration file.

    Args:
        path: Where it lies.
        known: The names of all options, with underscores, and whether each may be
            given several times.

    Returns:
        Values by option name, with underscores.

    Raises:
        ConfigError: If it cannot be read, is no TOML, has an unknown key or a value of no
            possible type.

    """
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not TOML: {exc}") from exc
    by_name = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            names = ", ".join(sorted(known)).replace("_", "-")
            raise ConfigError(f"{path}: unknown key {key!r}; there are {names}")
        parts = [value]
        if known[name] and isinstance(value, list):
            parts = value
        elif name in ("field", "option") and isinstance(value, dict):
            parts = list(value.values())
        if not all(isinstance(part, str | int | float) for part in parts):
            raise ConfigError(
                f"{path}: {key} cannot be that; a value is a text or a number, and a name with "
                "dots stands in quotes"
            )
        if isinstance(value, dict):
            parts = [f"{field}={text}" for field, text in value.items()]
        by_name[name] = parts if known[name] else value
    return by_name
