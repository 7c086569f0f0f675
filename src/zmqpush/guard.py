"""
CURVE: what a link needs to encrypt, and who is admitted.

Whoever binds is CURVE's server: it has a key pair and a list of the public keys that it
admits. Whoever connects has a key pair and the server's public key. libzmq asks about
each key by ZAP (https://rfc.zeromq.org/spec/27/); a thread answers.
"""

import os
import resource
import shlex
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq
from zmq.utils import z85

from zmqpush.core.receiver import ANONYMOUS
from zmqpush.errors import KeyFileError
from zmqpush.key_lists import Admitted, read_admitted
from zmqpush.keys import KeyPair, find_public, fingerprint, read_pair
from zmqpush.settings import ALLOW_ANY, Security
from zmqpush.telemetry import Complaints, Reporter

# Never empty: with a domain libzmq refuses peers that speak ZMTP 1 or 2, which anything is
# taken for that sends bytes, and which know nothing of encryption.
_DOMAIN = b"zmqpush"
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"


class Guard:
    """
    The keys of one run.

    Args:
        security: What to do.
        connect: The endpoints that links connect to.
        reporter: Where to say what happens.

    Raises:
        KeyFileError: If a key or the list cannot be used.

    Attributes:
        complaints: Where links tell of peers.
        reasons: Why there is no connection, by endpoint, as far as it is known.
        revoked: The keys that were admitted once and are not now.
        on_revocation: Called when a key of theirs has connected since it was admitted.

    """

    def __init__(self, security: Security, connect: Sequence[str], reporter: Reporter) -> None:
        self._reporter = reporter
        self._allow = security.allow
        self._pair: KeyPair | None = read_pair(security.key) if security.key else None
        if self._pair and not zmq.has("curve"):
            raise KeyFileError("--key: this libzmq was built without CURVE")
        if self._pair:  # which is not to be found in a core dump
            resource.setrlimit(
                resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1])
            )
        server_keys = [find_public(text)[0] for text in security.server_keys]
        if len(server_keys) == 1:  # one for all
            server_keys *= len(connect)
        self._server_keys = dict(zip(connect, server_keys, strict=False))
        self._admitted: dict[str, Admitted] = {}
        self._load()
        self._let_in: set[str] = set()
        self.revoked: frozenset[str] = frozenset()
        self.on_revocation: Callable[[], None] = lambda: None
        self.complaints = Complaints(reporter)
        self.reasons: dict[str, str] = {}
        self._is_asked = False
        # Made-up keys must not keep other things from being told.
        self._refusals = Complaints(reporter)

    def explain(self, endpoint: str, reason: str, *, said: bool = False) -> None:
        """Note why there is no connection; if that was asked for in vain, and not said, say it."""
        self.reasons[endpoint] = reason
        if self._is_asked and not said:
            self.complaints.warn(reason)
        self._is_asked = False

    def why(self) -> str:
        """Return why there are no connections, in parentheses; if it is not known, say it later."""
        self._is_asked = not self.reasons
        return f" ({'; '.join(self.reasons.values())})" if self.reasons else ""

    @property
    def encrypts(self) -> bool:
        """Whether there is a key pair."""
        return self._pair is not None

    @property
    def own_key(self) -> str:
        """The own public key, and its fingerprint, as users are told of it."""
        assert self._pair
        return f"{self._pair.public} ({fingerprint(self._pair.public)})"

    def _load(self) -> None:
        if isinstance(self._allow, Path):
            self._admitted = read_admitted(self._allow)

    def reload(self) -> None:
        """Read the list of admitted keys anew; if it cannot be used the old one stays."""
        before = set(self._admitted)
        try:
            self._load()
        except KeyFileError as exc:
            self._reporter.warn(f"{exc}: the keys that were admitted before still are")
            return
        self.revoked = (self.revoked | before) - self._admitted.keys()
        if self.revoked & self._let_in:
            self._let_in -= self.revoked
            self.on_revocation()

    def admits(self, principal: str) -> bool:
        """Whether a key is admitted."""
        if self._pair is None:
            return principal == ANONYMOUS
        return self._allow == ALLOW_ANY or principal in self._admitted

    def admits_host(self, principal: str, host: str) -> bool:
        """Whether a key may send records in the name of a host."""
        hosts = self._admitted[principal].hosts if principal in self._admitted else frozenset()
        return not hosts or host in hosts

    def secure_server(self, link: "zmq.Socket[bytes]") -> None:
        """Set the options of a socket that is to be bound."""
        link.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        if self._pair:
            link.setsockopt(zmq.CURVE_SERVER, 1)
            link.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without an answer nobody gets in
            self._set_pair(link, self._pair)

    def secure_client(self, link: "zmq.Socket[bytes]", endpoint: str) -> None:
        """Set the options of a socket that is to connect to an endpoint."""
        link.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        if self._pair:
            link.setsockopt(zmq.CURVE_SERVERKEY, self._server_keys[endpoint].encode())
            self._set_pair(link, self._pair)

    @staticmethod
    def _set_pair(link: "zmq.Socket[bytes]", pair: KeyPair) -> None:
        link.setsockopt(zmq.CURVE_PUBLICKEY, pair.public.encode())
        link.setsockopt(zmq.CURVE_SECRETKEY, pair.secret.encode())

    def admit(self, key: str, address: str) -> bool:
        """Whether a peer that connects is admitted; if not, say so."""
        if self.admits(key):
            if self._allow != ALLOW_ANY:
                self._let_in.add(key)
            return True
        allow = shlex.quote(os.path.abspath(str(self._allow)))
        self._refusals.warn(
            f"not admitted: {key!r} ({fingerprint(key)}) from {address}; "
            f"to admit it: zmqpush-keys allow {allow} '{key}', then SIGHUP",
            kind=key,
        )
        return False


class Doorman:
    """
    Answers in a thread of its own which keys are admitted to the sockets of a context.

    Args:
        context: The context. It must not have another such thread.
        guard: Who knows.

    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", guard: Guard) -> None:
        self._guard = guard
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ZAP_ENDPOINT)

    def start(self) -> None:
        """Begin to answer, until the context ends."""
        try:
            threading.Thread(target=self._serve, name="doorman", daemon=True).start()
        except RuntimeError:  # no more threads, and nobody would be answered
            self._socket.close()
            raise

    def _serve(self) -> None:
        try:
            while True:
                self._answer(self._socket.recv_multipart())
        except zmq.ZMQError:  # the context ends
            self._socket.close()

    def _answer(self, request: list[bytes]) -> None:
        # 300, "try again": after anything else libzmq does not connect again, so whoever is
        # admitted later would stay outside.
        status, user = b"300", b""
        try:
            if key := self._admitted(request):
                status, user = b"200", key.encode()
        except Exception as exc:
            self._guard.complaints.warn(f"internal error, please report it: {exc!r}")
        version, number, *_ = *request, b"", b""
        self._socket.send_multipart((version, number, status, b"", user, b""))

    def _admitted(self, request: list[bytes]) -> str | None:
        _version, _number, _domain, address, _identity, mechanism, *credentials = request
        if not self._guard.encrypts:  # whose peers are to be heard before they are answered
            return ANONYMOUS
        if mechanism != b"CURVE":
            return None
        key = z85.encode(credentials[0]).decode()
        return key if self._guard.admit(key, address.decode("ascii", "replace")) else None
