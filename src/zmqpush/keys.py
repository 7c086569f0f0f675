"""
CURVE keys: files that hold them, and lists of those that are admitted.

A key pair is two files, ``NAME`` with the public key and ``NAME_secret`` with both, in
the format that czmq and pyzmq write and read (https://rfc.zeromq.org/spec/4/ and czmq's
``zcert``). A list of admitted keys is a file with one key a line, or a directory with a file of
each, as czmq's ``zcertstore`` has it.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import zmq

from zmqpush.errors import KeyFileError

# Z85, without what a line of a key file cannot hold.
_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_VALUE = re.compile(r'^\s*([a-z-]+)\s*=\s*"([^"\n]*)"\s*$', re.MULTILINE)
_SECRET_SUFFIX = "_secret"
# A key file has some 300 bytes; a list of 100,000 keys some 10 MB.
_MAX_FILE_BYTES = 64 << 20


class KeyPair(NamedTuple):
    """A public key and its secret key, 40 characters of Z85 each."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyPair({self.public!r})"


class Admitted(NamedTuple):
    """
    A key that is admitted.

    Attributes:
        name: Whose it is.
        hosts: The hosts that it may name as its own; all, if there are none.

    """

    name: str
    hosts: frozenset[str] = frozenset()


def check_key(text: str) -> str:
    """
    Return a public key.

    Raises:
        ValueError: If it is none.

    """
    if not _KEY.fullmatch(text):
        raise ValueError(f"{text!r} is not a public key, which has 40 characters of Z85")
    return text


def fingerprint(public: str) -> str:
    """Return what tells a public key from others at a glance: 16 hexadecimal digits in fours."""
    digits = hashlib.sha256(public.encode()).hexdigest()[:16]
    return ":".join(digits[at : at + 4] for at in range(0, 16, 4))


def read_pair(path: Path) -> KeyPair:
    """
    Return the key pair in ``path_secret``, or in ``path`` if there is none.

    Raises:
        KeyFileError: If it cannot be read, others may read it, or it holds no key pair.

    """
    with_suffix = path.with_name(path.name + _SECRET_SUFFIX)
    if with_suffix.exists():
        path = with_suffix
    values = _values(_read(path, secret=True))
    try:
        public, secret = check_key(values["public-key"]), check_key(values["secret-key"])
    except (KeyError, ValueError):
        raise KeyFileError(f"{path} holds no secret key; zmqpush-keys new makes one") from None
    if zmq.curve_public(secret.encode()).decode() != public:
        raise KeyFileError(f"the keys in {path} do not belong together")
    return KeyPair(public, secret)


def read_public(path: Path) -> str:
    """
    Return the public key in a file.

    Raises:
        KeyFileError: If it cannot be read or holds none.

    """
    try:
        return check_key(_values(_read(path))["public-key"])
    except (KeyError, ValueError):
        raise KeyFileError(f"{path} holds no public key") from None


def write_pair(path: Path, values: Mapping[str, str]) -> KeyPair:
    """
    Make a key pair and write it to ``path`` and ``path_secret``.

    Args:
        path: The file for the public key. Neither file may exist.
        values: What else both say, such as ``name``.

    Raises:
        KeyFileError: If they cannot be written.

    """
    public, secret = (key.decode() for key in zmq.curve_keypair())
    metadata = "".join(f'    {key} = "{value}"\n' for key, value in values.items())
    text = f'metadata\n{metadata}curve\n    public-key = "{public}"\n'
    with_secret = f'{text}    secret-key = "{secret}"\n'
    secret_path = path.with_name(path.name + _SECRET_SUFFIX)
    _create(secret_path, 0o600, "#   A secret key. Nobody else may read it.\n\n" + with_secret)
    _create(path, 0o644, "#   A public key.\n\n" + text)
    return KeyPair(public, secret)


def read_admitted(path: Path) -> dict[str, Admitted]:
    """
    Return the public keys that a file or a directory admits.

    Raises:
        KeyFileError: If any of it cannot be understood; the message names file and line.

    """
    if not path.is_dir():
        return dict(_admitted_by_lines(path))
    admitted = {}
    for file in sorted(path.iterdir()):
        if not file.name.startswith(".") and not file.name.endswith((_SECRET_SUFFIX, "~")):
            values = _values(_read(file))
            admitted[read_public(file)] = Admitted(
                values.get("name", file.name), frozenset(values.get("hosts", "").split())
            )
    return admitted


def _admitted_by_lines(path: Path) -> Iterator[tuple[str, Admitted]]:
    for number, line in enumerate(_read(path).splitlines(), 1):
        key, *words = line.split() or [""]
        if key in ("", "#"):
            continue
        try:
            yield check_key(key), Admitted(words[0] if words else "", frozenset(words[1:]))
        except ValueError as exc:
            raise KeyFileError(f"{path}, line {number}: {exc}") from None


def _values(text: str) -> dict[str, str]:
    return dict(_VALUE.findall(text))


def _read(path: Path, *, secret: bool = False) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
            if secret and b"secret-key" in data:
                _refuse_open_secret(os.fstat(file.fileno()), path)
        if len(data) > _MAX_FILE_BYTES:
            raise KeyFileError(f"{path} is too long for a key file")
        return data.decode()
    except OSError as exc:
        raise KeyFileError(f"cannot read {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise KeyFileError(f"{path} is not text") from exc


def _refuse_open_secret(status: os.stat_result, path: Path) -> None:
    # systemd's LoadCredential= gives a service its files by an access list, which looks
    # like a group's right to read.
    by_systemd = os.environ.get("CREDENTIALS_DIRECTORY") == str(path.parent)
    if status.st_mode & (0o007 if by_systemd else 0o077):
        raise KeyFileError(f"others may read {path}, a secret key: chmod 600 {path}")
    if status.st_uid not in (os.geteuid(), 0):
        raise KeyFileError(f"{path}, a secret key, belongs to somebody else")


def _create(path: Path, mode: int, text: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, mode)
        with open(fd, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(fd)
    except OSError as exc:
        raise KeyFileError(f"cannot write {path}: {exc.strerror}") from exc
