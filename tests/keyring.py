"""Keys and lists of keys for tests, and the flags that use them."""

from pathlib import Path

from zmqpush.security.keyfile import write_pair


class Keyring:
    """
    Key pairs by name, made when they are asked for, in a directory.

    Attributes:
        list: The file with the keys that are admitted.

    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._publics: dict[str, str] = {}
        self.list = directory / "senders"

    def public(self, name: str) -> str:
        """Return a public key."""
        if name not in self._publics:
            self._publics[name] = write_pair(self._directory / name, {"name": name}).public
        return self._publics[name]

    def file(self, name: str) -> Path:
        """Return the file of a key pair."""
        self.public(name)
        return self._directory / name

    def admit(self, *names: str) -> None:
        """Write the list; a name may be followed by hosts."""
        lines = [f"{self.public(name.split()[0])} {name}\n" for name in names]
        self.list.write_text("".join(lines))

    def binds(self, name: str = "collector") -> list[object]:
        """Return the flags of who binds."""
        if not self.list.exists():
            self.admit("web1")
        return ["--key", self.file(name), "--allow", self.list]

    def connects(self, name: str = "web1", to: str = "collector") -> list[object]:
        """Return the flags of who connects."""
        return ["--key", self.file(name), "--server-key", self.public(to)]
