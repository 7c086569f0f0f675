"""A real rsyslogd with the configuration of ``contrib/rsyslog``, its senders, and an oracle."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from helpers import PATIENCE, ZMQPULL, ZMQPUSH, wait_until

CONTRIB = Path(__file__).parent.parent / "contrib" / "rsyslog"
RSYSLOGD = shutil.which("rsyslogd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
_MODULES = [Path("/usr/lib64/rsyslog"), *Path("/usr/lib").glob("*/rsyslog")]

needs_rsyslogd = pytest.mark.skipif(
    RSYSLOGD is None, reason="rsyslogd is not installed (Debian: rsyslog)"
)


def needs_module(name: str) -> pytest.MarkDecorator:
    """Skip a test where rsyslogd lacks a module."""
    found = any((directory / f"{name}.so").exists() for directory in _MODULES)
    reason = f"rsyslogd's module {name} is not installed (Debian: rsyslog-czmq)"
    return pytest.mark.skipif(not found, reason=reason)


# The messages. Each holds a number, and text that follows from it.

_TEXT = re.compile(rb"(\d{9})# (x*)!")


def text(number: int) -> str:
    """Return the text of a message."""
    return f"{number:09d}# {'x' * (number % 40)}!"


def syslog(number: int) -> bytes:
    """Return a message as a host sends it, without its newline."""
    return f"<13>Nov 24 20:15:00 host app: {text(number)}".encode()


def numbers(*paths: Path) -> list[int]:
    """Return the numbers of the messages in files, in order; each must be whole."""
    found = []
    for path in paths:
        for digits, xs in _TEXT.findall(path.read_bytes() if path.exists() else b""):
            found.append(int(digits))
            assert len(xs) == found[-1] % 40, (path, digits)
    return found


# The daemon.


class Rsyslogd:
    """
    One rsyslogd and what belongs to it, all in one directory.

    Args:
        start: The fixture that starts programs.
        directory: Where everything goes.

    Attributes:
        endpoint: Where a receiver that acknowledges listens.
        plain_endpoint: Where another one does.
        path: The receiver's file.
        local: A file of rsyslogd's own.
        output: What zmqpush says.

    """

    def __init__(self, start: Callable[..., subprocess.Popen[bytes]], directory: Path) -> None:
        self._start = start
        self.directory = directory
        self.endpoint = f"ipc://{directory}/acked"
        self.plain_endpoint = f"ipc://{directory}/plain"
        self.path = directory / "all"
        self.local = directory / "local"
        self.output = directory / "zmqpush.log"
        self._port = directory / "port"
        self._config = directory / "rsyslog.conf"
        self._environment = os.environ | {"XDG_CONFIG_HOME": f"{directory}/config"}
        shutil.copytree(os.environ["XDG_CONFIG_HOME"], directory / "config")
        self._child: subprocess.Popen[bytes] | None = None

    def translate(self, config: str) -> str:
        """Make the paths and endpoints of a configuration local."""
        config = config.replace("/usr/local/bin/zmqpush", ZMQPUSH)
        config = config.replace("tcp://logs.example.com:5014", self.plain_endpoint)
        config = config.replace("tcp://logs.example.com:5015", self.endpoint)
        return re.sub(r"/var/(log|lib|spool)\b", str(self.directory), config)

    def configure(self, *parts: str, **values: object) -> None:
        """
        Write the configuration: inputs by TCP and by a socket like ``/dev/log``, and ``parts``.

        All messages go to a local file, too.

        Args:
            parts: Names of files in ``contrib/rsyslog``, or configuration itself.
            values: Parameters that stand in ``parts`` get these values; those that do not are
                added to the action.

        """
        config = "\n".join(
            (CONTRIB / part).read_text() if part.endswith(".conf") else part for part in parts
        )
        for name, value in values.items():
            setting = f'{name.replace("_", ".")}="{value}"'
            pattern = rf'(?<!\S){name.replace("_", "[.]")}="[^"]*"'
            config, count = re.subn(pattern, lambda _, s=setting: s, config, flags=re.IGNORECASE)
            if not count:
                config = config.replace('type="omprog"', f'type="omprog" {setting}')
        self._config.write_text(
            f'global(workDirectory="{self.directory}")\n'
            'module(load="imtcp") module(load="imuxsock" SysSock.Use="off")\n'
            f'input(type="imtcp" port="0" address="127.0.0.1" listenPortFileName="{self._port}")\n'
            f'input(type="imuxsock" Socket="{self.directory}/log")\n'
            f'*.* action(type="omfile" file="{self.local}" template="RSYSLOG_FileFormat")\n'
            + self.translate(config)
        )

    def run(self, **environment: str) -> None:
        """Start it, and return once its inputs are open."""
        for made in (self._port, self.directory / "log"):
            made.unlink(missing_ok=True)
        with open(self.directory / "rsyslogd.log", "ab") as log:
            self._child = self._start(
                *(RSYSLOGD, "-n", "-f", self._config, "-i", self.directory / "pid"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment | environment,
            )
        wait_until(lambda: self._child.poll() is not None or self._listens())
        assert self._child.poll() is None, (self.directory / "rsyslogd.log").read_text()

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._child
        return self._child.pid

    def connect(self) -> socket.socket:
        """Connect to its input by TCP."""
        return socket.create_connection(("127.0.0.1", int(self._port.read_text())), PATIENCE)

    def _listens(self) -> bool:
        if not (self.directory / "log").exists():
            return False
        try:
            self.connect().close()
        except (FileNotFoundError, ValueError, ConnectionRefusedError):  # each for a moment
            return False
        return True

    def send(self, wanted: Iterable[int]) -> None:
        """Send messages by TCP; return once rsyslogd has them."""
        assert self._child
        assert self._child.poll() is None, self._child.returncode
        wanted = list(wanted)
        with self.connect() as connection:
            connection.sendall(b"".join(syslog(number) + b"\n" for number in wanted))
        wait_until(lambda: set(wanted) <= set(numbers(self.local)))

    def log(self, wanted: Iterable[int]) -> None:
        """Send messages as ``logger`` does; wait for each until it is taken."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
            log.settimeout(PATIENCE)
            log.connect(str(self.directory / "log"))
            for number in wanted:
                log.send(syslog(number))

    def append(self, wanted: Iterable[int]) -> None:
        """Append lines to the file that imfile reads."""
        with open(self.directory / "app.log", "ab", buffering=0) as file:
            file.write("".join(text(number) + "\n" for number in wanted).encode())

    def senders(self) -> list[int]:
        """Return the processes of zmqpush that this rsyslogd has started, and who live."""
        return [pid for pid, parent in self._all_senders() if parent == self.pid]

    def orphans(self) -> list[int]:
        """Return the processes of zmqpush that have outlived their rsyslogd."""
        return [pid for pid, parent in self._all_senders() if parent != self.pid]

    def _all_senders(self) -> list[tuple[int, int]]:
        mark = f"XDG_CONFIG_HOME={self.directory}/config".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = mark in (process / "environ").read_bytes().split(b"\0")
                if is_ours and ZMQPUSH.encode() in (process / "cmdline").read_bytes():
                    stat = (process / "stat").read_text().rpartition(")")[2].split()
                    found.append((int(process.name), int(stat[1])))
            except OSError:  # it has ended
                continue
        return found

    def imfile_states(self) -> list[Path]:
        """Return the files in which imfile notes how far it has read."""
        return list(self.directory.glob("imfile-state:*"))

    def hup(self) -> None:
        """Send SIGHUP."""
        os.kill(self.pid, signal.SIGHUP)

    def begin_to_stop(self) -> None:
        """Ask it to stop in order."""
        assert self._child
        assert self._child.poll() is None
        self._child.terminate()

    def wait(self) -> None:
        """Return once it has ended, whatever it returns: some modules crash at the end."""
        assert self._child
        self._child.wait(PATIENCE)

    def stop(self) -> None:
        """Stop it in order, and return once it has ended."""
        self.begin_to_stop()
        self.wait()

    def kill(self) -> None:
        """Kill it, and leave what it has started to itself."""
        assert self._child
        assert self._child.poll() is None
        self._child.kill()
        self._child.wait(PATIENCE)

    def kill_senders(self) -> int:
        """Kill all processes of zmqpush that live, and wait for their ends; return how many."""
        killed = set()
        for pid in self.senders():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        wait_until(lambda: killed.isdisjoint(self.senders()))
        return len(killed)

    def clean_up(self) -> None:
        """End what is left."""
        if self._child and self._child.poll() is None:
            self.kill()
        for pid, _ in self._all_senders():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    # The receiver.

    def receive(self) -> subprocess.Popen[bytes]:
        """Start a receiver that acknowledges."""
        state = self.directory / "state"
        args = ("--ack-bind", self.endpoint, "--state", state, "--to", self.path)
        return self._start(ZMQPULL, *args, stderr=subprocess.DEVNULL)

    def received(self) -> list[int]:
        """Return the numbers that the receiver has written, in order."""
        return numbers(self.path)

    def wait_for(self, wanted: Iterable[int]) -> None:
        """Return once all these numbers are in the receiver's file."""
        wanted = set(wanted)
        wait_until(lambda: wanted <= set(self.received()))
