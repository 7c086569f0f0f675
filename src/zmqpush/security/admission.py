"""
CURVE: what a link needs to encrypt, and who is admitted.

Whoever binds is CURVE's server: it has a key pair and a list of the public keys that it
admits. Whoever connects has a key pair and the server's public key.
"""

import os
import resource
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from zmqpush.core.protocol.receiver import ANONYMOUS
from zmqpush.core.zmtp.mechanism import Mechanism
from zmqpush.core.zmtp.null import Null
from zmqpush.errors import KeyFileError
from zmqpush.runtime.reporting import Complaints, Reporter
from zmqpush.security.allowlist import Admitted, read_admitted
from zmqpush.security.keyfile import KeyPair, decode, encode, find_public, fingerprint, read_pair
from zmqpush.settings import ALLOW_ANY, Security


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
        reviewers: Called when who is admitted may have changed.

    """

    def __init__(self, security: Security, connect: Sequence[str], reporter: Reporter) -> None:
        self._reporter = reporter
        self._allow = security.allow
        self._pair: KeyPair | None = read_pair(security.key) if security.key else None
        if self._pair:  # which is not to be found in a core dump
            resource.setrlimit(
                resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1])
            )
            from zmqpush.core.zmtp.curve import Keys  # sooner without keys

            self._keys = Keys(decode(self._pair.public), decode(self._pair.secret))
        server_keys = [find_public(text)[0] for text in security.server_keys]
        if len(server_keys) == 1:  # one for all
            server_keys *= len(connect)
        self._server_keys = dict(zip(connect, server_keys, strict=False))
        self._admitted: dict[str, Admitted] = {}
        self._load()
        self.reviewers: list[Callable[[], None]] = []
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
        try:
            self._load()
        except KeyFileError as exc:
            self._reporter.warn(f"{exc}: the keys that were admitted before still are")
            return
        for review in self.reviewers:
            review()

    @staticmethod
    def principal(key: bytes | None) -> str:
        """Return who has a public key, or who is there without one."""
        return ANONYMOUS if key is None else encode(key)

    def admits(self, principal: str) -> bool:
        """Whether a key is admitted."""
        if self._pair is None:
            return principal == ANONYMOUS
        return self._allow == ALLOW_ANY or principal in self._admitted

    def admits_host(self, principal: str, host: str) -> bool:
        """Whether a key may send records in the name of a host."""
        if entry := self._admitted.get(principal):
            return not entry.hosts or host in entry.hosts
        return self.admits(principal)

    def mechanism(self, endpoint: str, peer: str, *, binds: bool) -> Mechanism:
        """Return how a connection is to be encrypted: at an endpoint, with a peer's address."""
        if self._pair is None:
            return Null(binds=binds)
        from zmqpush.core.zmtp.curve import CurveClient, CurveServer

        if binds:
            return CurveServer(self._keys, lambda key: self._admit(encode(key), peer))
        return CurveClient(self._keys, decode(self._server_keys[endpoint]))

    def _admit(self, key: str, address: str) -> bool:
        if self.admits(key):
            return True
        allow = shlex.quote(os.path.abspath(str(self._allow)))
        self._refusals.warn(
            f"not admitted: {key!r} ({fingerprint(key)}) from {address}; "
            f"to admit it: zmqpush-keys allow {allow} '{key}', then SIGHUP",
            kind=key,
        )
        return False
