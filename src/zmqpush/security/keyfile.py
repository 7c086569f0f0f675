"""
CURVE keys, and the files that hold them.

A key pair is two files, ``NAME`` with the public key and ``NAME_secret`` with both, in
the format that czmq and pyzmq write and read (https://rfc.zeromq.org/spec/4/ and czmq's
``zcert``).
"""

import base64
import hashlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from zmqpush.errors import KeyFileError, SettingsError

_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
# Z85 (https://rfc.zeromq.org/spec/32/) is base64's base 85 in another alphabet.
_Z85_DIGITS = (
    b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
)
_B85_DIGITS = (
    b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
)
_TO_Z85 = bytes.maketrans(_B85_DIGITS, _Z85_DIGITS)
_FROM_Z85 = bytes.maketrans(_Z85_DIGITS, _B85_DIGITS)
_VALUE = re.compile(r"^[ \t]*([\w.-]+)[ \t]*=[ \t]*(\S.*)$", re.MULTILINE)
_SECRET_SUFFIX = "_secret"
# A key file has some 400 bytes; a list of 100,000 keys some 10 MB.
_MAX_FILE_BYTES = 64 << 20
_NOT_WAITING = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class KeyPair(NamedTuple):
    """A public key and its secret key, 40 characters of Z85 each."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyPair({self.public!r})"


def encode(key: bytes) -> str:
    """Return the 40 characters that stand for the 32 bytes of a key."""
    return base64.b85encode(key).translate(_TO_Z85).decode()


def decode(text: str) -> bytes:
    """
    Return the 32 bytes that 40 characters stand for.

    Raises:
        ValueError: If five of them are too large a number.

    """
    return base64.b85decode(text.encode().translate(_FROM_Z85))


def is_key(text: str) -> bool:
    """Whether a text is a key. None begins with ``#`` or ``$``: such numbers are too large."""
    if not _Z85.fullmatch(text):
        return False
    try:
        decode(text)
    except ValueError:
        return False
    return True


def check_name(text: str) -> str:
    """
    Return what is to name a key or a host.

    Raises:
        SettingsError: If it would be taken for something else in a list, a log or a shell.

    """
    if (
        not text.isprintable()
        or set(text) & set(" \"'")
        or text[:1] in ("", "-", "#")
        or is_key(text)
    ):
        raise SettingsError(
            f"{text!r} is not a name: one has no blanks, quotes or control characters, "
            "does not begin with - or # and is no key"
        )
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
    with_suffix = Path(f"{path}{_SECRET_SUFFIX}")
    if os.path.lexists(with_suffix):
        path = with_suffix
    values = parse(read_text(path, secret=True))
    public, secret = values.get("public-key", ""), values.get("secret-key", "")
    if not is_key(public) or not is_key(secret):
        raise KeyFileError(f"{path} holds no secret key; zmqpush-keys new makes one")
    from nacl.bindings import crypto_scalarmult_base  # sooner without keys

    if encode(crypto_scalarmult_base(decode(secret))) != public:
        raise KeyFileError(f"the keys in {path} do not belong together")
    return KeyPair(public, secret)


def read_public(path: Path) -> tuple[str, dict[str, str]]:
    """
    Return the public key in a file, and what else the file says, such as ``name``.

    Raises:
        KeyFileError: If it cannot be read or holds none.

    """
    values = parse(read_text(path))
    values.pop("secret-key", None)
    if not is_key(public := values.pop("public-key", "")):
        raise KeyFileError(f"{path} holds no public key")
    return public, values


def find_public(text: str) -> tuple[str, dict[str, str]]:
    """
    Return the public key that a user means: the one in a file, or the text itself.

    Raises:
        KeyFileError: If it is neither.

    """
    if is_key(text):  # also if a file has that name: who made it may not be who has the key
        return text, {}
    if not os.path.exists(text):
        raise KeyFileError(f"{text!r} is not a public key, nor a file with one")
    return read_public(Path(text))


def write_pair(path: Path, values: Mapping[str, str]) -> KeyPair:
    """
    Make a key pair and write it to ``path`` and ``path_secret``.

    Args:
        path: The file for the public key. Neither file may exist.
        values: What else both say, such as ``name``.

    Raises:
        KeyFileError: If they cannot be written; then neither is there.

    """
    from nacl.bindings import crypto_box_keypair  # sooner without keys

    public, secret = map(encode, crypto_box_keypair())
    secret_path = Path(f"{path}{_SECRET_SUFFIX}")
    text = compose(public, values) + f'    secret-key = "{secret}"\n'
    _create(secret_path, 0o600, "#   A secret key. Nobody else may read it.\n\n" + text)
    try:
        _create(path, 0o644, "#   A public key.\n\n" + compose(public, values))
    except KeyFileError:
        secret_path.unlink()
        raise
    return KeyPair(public, secret)


def compose(public: str, values: Mapping[str, str]) -> str:
    """Return what a file with a public key says."""
    metadata = "".join(f'    {name} = "{value}"\n' for name, value in values.items())
    return f'metadata\n{metadata}curve\n    public-key = "{public}"\n'


def parse(text: str) -> dict[str, str]:
    """Return the values that a file with a key has; nobody needs their sections."""
    return {name: _unquoted(value.rstrip()) for name, value in _VALUE.findall(text)}


def _unquoted(value: str) -> str:
    return value[1:-1] if value[0] in "\"'" and value[0] == value[1:][-1:] else value


def read_text(path: Path, *, secret: bool = False) -> str:
    """
    Return what a file says.

    Args:
        path: The file. It must be a regular one: others may have no end, or not begin.
        secret: Refuse it if others may read it.

    Raises:
        KeyFileError: If it cannot be read.

    """
    try:
        with open(
            path, "rb", opener=lambda name, flags: os.open(name, flags | _NOT_WAITING)
        ) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise KeyFileError(f"{path} is not a regular file")
            data = file.read(_MAX_FILE_BYTES + 1)
            if secret and b"secret-key" in data:
                _refuse_open_secret(status, path)
        if len(data) > _MAX_FILE_BYTES:
            raise KeyFileError(f"{path} is too long for a key file")
        return data.decode()
    except OSError as exc:
        raise KeyFileError(f"cannot read {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise KeyFileError(f"{path} is not text") from exc


def sync_directory(path: Path) -> None:
    """Have the kernel write down which files a directory holds."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
        try:
            with open(fd, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(fd)
            sync_directory(path.parent)
        except BaseException:
            path.unlink()
            raise
    except OSError as exc:
        raise KeyFileError(f"cannot write {path}: {exc.strerror}") from exc
