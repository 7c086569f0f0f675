"""
Lists of the public keys that are admitted.

A list is a file with a line ``KEY NAME [HOST…]`` for each key, and comments that begin with
``#``; or a directory with a file of each key, as czmq's ``zcertstore`` has it, that may say
``hosts = "HOST…"``. One such file alone is a list, too.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from zmqpush.errors import KeyFileError
from zmqpush.security.keyfile import compose, is_key, parse, read_public, read_text, sync_directory

_NOT_IN_A_DIRECTORY = ("_secret", "~")


class Admitted(NamedTuple):
    """
    A key that is admitted.

    Attributes:
        name: Whose it is.
        hosts: The hosts that it may name as its own; all, if there are none.

    """

    name: str
    hosts: frozenset[str] = frozenset()


class _Entry(NamedTuple):
    """A key of a list, and where it stands."""

    key: str
    admitted: Admitted
    where: str


def read_admitted(path: Path) -> dict[str, Admitted]:
    """
    Return the public keys that a file or a directory admits.

    Raises:
        KeyFileError: If any of it cannot be understood; the message names file and line.

    """
    if os.path.isdir(path):
        return _without_doubles(_in_directory(path))
    text = read_text(path)
    values = parse(text)
    if "secret-key" in values:
        raise KeyFileError(f"{path} holds a secret key: it is no list")
    if "public-key" in values:
        return _without_doubles([_in_file(path)])
    return _without_doubles(_in_lines(path, text))


@contextlib.contextmanager
def editing(path: Path) -> Iterator[dict[str, Admitted]]:
    """
    Yield what a list admits, and write down what it has become.

    Nobody else edits it meanwhile, and whoever reads it sees all of a file or nothing. A
    list that does not exist is a file to be made.

    Raises:
        KeyFileError: If the list cannot be understood or written.

    """
    path = Path(os.path.realpath(path))
    if os.path.isdir(path):
        with _locked(path):
            entries = list(_in_directory(path))
            admitted = _without_doubles(entries)
            yield admitted
            _write_directory(path, entries, admitted)
        return
    with _locked(path.parent):
        text = read_text(path) if os.path.lexists(path) else ""
        admitted = _without_doubles(_in_lines(path, text))
        yield admitted
        _replace(path, "".join(line + "\n" for line in _edited(text, admitted)))


def _without_doubles(entries: Iterable[_Entry]) -> dict[str, Admitted]:
    # Of two that say different things one would have to win, and who removes one believes
    # that the key is out.
    found: dict[str, _Entry] = {}
    for entry in entries:
        if entry.key in found:
            raise KeyFileError(f"{entry.where} has the same key as {found[entry.key].where}")
        if not "".join((entry.admitted.name, *entry.admitted.hosts)).isprintable():
            raise KeyFileError(f"{entry.where} has a name with control characters")
        found[entry.key] = entry
    return {entry.key: entry.admitted for entry in found.values()}


# A file.


def _in_lines(path: Path, text: str) -> Iterator[_Entry]:
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path}, line {number}"
        if entry := _in_line(line):
            if not is_key(entry[0]):  # not shown: it may be a secret that got there
                raise KeyFileError(f"{where}: no public key, which has 40 characters of Z85")
            yield _Entry(*entry, where)


def _in_line(line: str) -> tuple[str, Admitted] | None:
    key, *words = line.split() or [""]
    if not key or key.startswith("#"):
        return None
    words = list(takewhile(lambda word: not word.startswith("#"), words))
    return key, Admitted(words[0] if words else "", frozenset(words[1:]))


def _edited(text: str, admitted: dict[str, Admitted]) -> Iterator[str]:
    left = dict(admitted)
    for line in text.removesuffix("\n").split("\n") if text else ():
        if not (entry := _in_line(line)):
            yield line
        elif now := left.pop(entry[0], None):
            yield line if now == entry[1] else _line(entry[0], now)
    for key, now in left.items():
        yield _line(key, now)


def _line(key: str, admitted: Admitted) -> str:
    return " ".join((key, admitted.name, *sorted(admitted.hosts)))


# A directory.


def _in_directory(path: Path) -> Iterator[_Entry]:
    try:
        files = sorted(path.iterdir())
    except OSError as exc:
        raise KeyFileError(f"cannot read {path}: {exc.strerror}") from exc
    for file in files:
        if not file.name.startswith(".") and not file.name.endswith(_NOT_IN_A_DIRECTORY):
            yield _in_file(file)


def _in_file(path: Path) -> _Entry:
    key, values = read_public(path)
    if "host" in values:
        raise KeyFileError(f"{path} says host: hosts is what restricts a key")
    hosts = frozenset(values.get("hosts", "").split())
    return _Entry(key, Admitted(values.get("name", path.name), hosts), str(path))


def _write_directory(path: Path, entries: list[_Entry], admitted: dict[str, Admitted]) -> None:
    left = dict(admitted)
    for key, before, where in entries:
        now = left.pop(key, None)
        if now is None:
            _remove(Path(where))
        elif now != before:
            _write_file(Path(where), key, now, read_public(Path(where))[1])
    for key, now in left.items():
        file = path / now.name
        if "/" in now.name or file.name.startswith(".") or file.name.endswith(_NOT_IN_A_DIRECTORY):
            raise KeyFileError(f"{now.name!r} cannot be the name of a key in a directory")
        if os.path.lexists(file):
            raise KeyFileError(f"{file} is there, with another key")
        _write_file(file, key, now, {})


def _write_file(path: Path, key: str, admitted: Admitted, values: dict[str, str]) -> None:
    values |= {"name": admitted.name, "hosts": " ".join(sorted(admitted.hosts))}
    if not admitted.hosts:
        del values["hosts"]
    _replace(path, compose(key, values), like_directory=True)


def _remove(path: Path) -> None:
    try:
        path.unlink()
        sync_directory(path.parent)
    except OSError as exc:
        raise KeyFileError(f"cannot remove {path}: {exc.strerror}") from exc


# Both.


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise KeyFileError(f"cannot read {directory}: {exc.strerror}") from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _replace(path: Path, text: str, *, like_directory: bool = False) -> None:
    """Write a file anew, with its owner and mode: a new one's are its directory's, or ours."""
    import tempfile  # the programs that only read lists start faster without it

    try:
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(fd, "w", encoding="utf-8") as file:
                if like := _status(path):
                    os.fchown(fd, like.st_uid, like.st_gid)
                    os.fchmod(fd, stat.S_IMODE(like.st_mode))
                elif like_directory:
                    like = path.parent.stat()
                    os.fchown(fd, like.st_uid, like.st_gid)
                    os.fchmod(fd, 0o600 | like.st_mode & 0o040)
                file.write(text)
                file.flush()
                os.fsync(fd)
            os.rename(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        sync_directory(path.parent)
    except OSError as exc:
        raise KeyFileError(f"cannot write {path}: {exc.strerror}") from exc


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
