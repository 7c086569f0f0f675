"""What the NATS sink needs of nats-py: who we are, TLS, connections that end, errors in words."""

import contextlib
import logging
import os
import re
import socket
import ssl
import struct
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from nats.aio.client import Client
from nats.errors import Error

from zmqpush.errors import SettingsError

# Options, as the flags of the command ``nats`` are called, and where that looks for them, too.
_AUTH = {
    "user": "NATS_USER",
    "password": "NATS_PASSWORD",
    "token": "NATS_TOKEN",
    "creds": "NATS_CREDS",
    "nkey": "NATS_NKEY",
}
_TLS = {"tlsca": "NATS_CA", "tlscert": "NATS_CERT", "tlskey": "NATS_KEY"}
OPTIONS = [*_AUTH, *_TLS, "tlsfirst", "js-domain", "inbox-prefix"]
_RANDOM = re.compile(r"(?i)(\bzmqpull|_inbox)[-.]\w[\w.]*")
# nats-py keeps what the connection does not take: that is bounded by what is not confirmed.
_NO_LIMIT = 1 << 40

# nats-py is not to print, nor what asyncio says when nats-py writes to a connection that broke.
logging.getLogger("nats").addHandler(logging.NullHandler())
logging.getLogger("asyncio").addFilter(
    lambda record: record.msg != "socket.send() raised exception."
)


class NatsClient(Client):
    """A connection; what nats-py lacks is added where it has no place for it."""

    wants_tls = False

    def _connect_command(self) -> bytes:
        # Nothing is said to a server without TLS, if that is wanted.
        if self.wants_tls and not self._server_info.get("tls_required"):
            raise Error("the server does not ask for TLS")
        return super()._connect_command()

    def abort(self) -> None:
        """End the connection at once, with all that has not left."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer and (connection := writer.get_extra_info("socket")):
            with contextlib.suppress(OSError):  # it may be closed
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


def reason_of(exc: Exception) -> str:
    """Say in a few words what is wrong."""
    if isinstance(exc, TimeoutError):
        return "no answer"
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"TLS: {exc.verify_message}"
    if isinstance(exc, ssl.SSLError):
        return f"TLS: {exc.reason}"
    if isinstance(exc, OSError) and exc.errno:
        text = os.strerror(exc.errno) if exc.errno > 0 else str(exc.strerror)
        return f"{exc.filename}: {text}" if exc.filename else text
    text = str(exc).removeprefix("nats: ").strip("'")
    # Names that are new each time would make each a reason of its own.
    return _RANDOM.sub(lambda match: match[1], text) or type(exc).__name__


def connect_options(options: Mapping[str, str]) -> dict[str, Any]:
    """
    Return what nats-py is told; files are read anew for each connection.

    Raises:
        SettingsError: If one cannot be used.

    """
    tls = None
    if any(name in options for name in (*_TLS, "tlsfirst")):
        tls = _tls_context(options)
    if creds := options.get("creds"):
        _check_creds(creds)
    if nkey := options.get("nkey"):
        _read(nkey)
    user, token = options.get("user"), options.get("token")
    if user and "password" not in options:
        user, token = None, token or user
    prefix = {"inbox_prefix": options["inbox-prefix"]} if "inbox-prefix" in options else {}
    return prefix | {
        "name": "zmqpull",
        "allow_reconnect": False,
        "max_reconnect_attempts": 1,
        "reconnect_time_wait": 0,
        "ping_interval": 5,
        "pending_size": _NO_LIMIT,
        "tls": tls,
        "tls_handshake_first": "tlsfirst" in options,
        "user": user,
        "password": options.get("password"),
        "token": token,
        "user_credentials": creds,
        "nkeys_seed": nkey,
    }


def read_options(given: Mapping[str, str], login: str | None) -> dict[str, str]:
    """
    Return the options by name: of ``-X``, of the URL, of the environment.

    Raises:
        SettingsError: If there is no such option.

    """
    unknown = {*given} - {*OPTIONS, "unit"}
    if unknown:
        raise SettingsError(f"-X {min(unknown)} is none of {', '.join(OPTIONS)}")
    options = {name: value for name, value in given.items() if name in OPTIONS}
    if login:
        user, colon, password = map(unquote, login.partition(":"))
        options = ({"user": user, "password": password} if colon else {"token": user}) | options
    if options.get("tlsfirst", "").lower() in ("false", "no", "0"):
        del options["tlsfirst"]
    # The environment says who we are only if nothing else does.
    names = _TLS if {*_AUTH} & {*options} else _TLS | _AUTH
    found = {name: os.environ[key] for name, key in names.items() if os.environ.get(key)}
    return found | options


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError as exc:
        raise SettingsError(f"cannot read {path}: {exc.strerror}") from exc


def _tls_context(options: Mapping[str, str]) -> ssl.SSLContext:
    for name in _TLS:
        if name in options:
            _read(options[name])
    try:
        context = ssl.create_default_context(cafile=options.get("tlsca"))
        if "tlscert" in options:
            context.load_cert_chain(options["tlscert"], options.get("tlskey"))
    except ssl.SSLError as exc:
        raise SettingsError(f"the certificates or the key cannot be used: {exc.reason}") from exc
    return context


def _check_creds(path: str) -> None:
    # nats-py would look for them for ever.
    text = _read(path)
    if "BEGIN NATS USER JWT" not in text or "BEGIN USER NKEY SEED" not in text:
        raise SettingsError(f"{path} is no file of NATS credentials")
