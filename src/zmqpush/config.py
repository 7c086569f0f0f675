"""TOML files into click's ``default_map``."""

import os
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from zmqpush.errors import ConfigError


def find(name: str) -> Path | None:
    """Return the first of the places where ``name`` may lie that exists."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    places = (Path(home) / "zmqpush" / name, Path("/etc/zmqpush") / name)
    return next((place for place in places if place.is_file()), None)


def load(path: Path, known: Collection[str]) -> dict[str, Any]:
    """
    Read a configuration file.

    Args:
        path: Where it lies.
        known: The names of all options, with underscores.

    Returns:
        Values by option name, with underscores.

    Raises:
        ConfigError: If it cannot be read, is no TOML, or has an unknown key.

    """
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not TOML: {exc}") from exc
    by_name = {key.replace("-", "_"): value for key, value in values.items()}
    for name, value in by_name.items():
        if name not in known:
            names = ", ".join(sorted(known)).replace("_", "-")
            raise ConfigError(f"{path}: unknown key {name!r}; there are {names}")
        if isinstance(value, dict):  # a table of fields
            by_name[name] = [f"{key}={text}" for key, text in value.items()]
    return by_name
