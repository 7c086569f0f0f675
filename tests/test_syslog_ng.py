"""
The configuration of ``contrib/syslog-ng``, run by a real syslog-ng.

It conflicts with rsyslog, so it may also be unpacked, not installed: where
``ZMQPUSH_TEST_SYSLOG_NG`` says, or in ``build/syslog-ng``.
"""

import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import socket
import termios
from pathlib import Path

import pytest

from helpers import BIN, PATIENCE, ZMQPULL, wait_until
from zmqpush.descriptors import pending_bytes

ROOT = Path(__file__).parent.parent
SNIPPET = ROOT / "contrib" / "syslog-ng" / "zmqpush.conf"
UNPACKED = Path(os.environ.get("ZMQPUSH_TEST_SYSLOG_NG", ROOT / "build" / "syslog-ng"))

# What Debian's syslog-ng.conf has, too: a source of this name, and the directory included.
CONFIGURATION = """\
@version: 3.38
source s_src {{
    unix-dgram("{here}/log");
    unix-stream("{here}/stream" flags(syslog-protocol));
}};
@include "{here}/conf.d/*.conf"
"""


def installed():
    """Return the command of syslog-ng and its environment."""
    if program := shutil.which("syslog-ng", path=f"{os.environ['PATH']}:/usr/sbin"):
        return [program], os.environ
    program = UNPACKED / "usr/sbin/syslog-ng"
    if not program.exists():
        pytest.skip("syslog-ng is not installed: package syslog-ng-core")
    (modules,) = (UNPACKED / "usr/lib/syslog-ng").glob("[0-9]*")
    libraries = {path.parent for path in UNPACKED.rglob("lib*.so.*")}
    path = ":".join(map(str, libraries))
    return [program, "--module-path", modules], os.environ | {"LD_LIBRARY_PATH": path}


class SyslogNg:
    """
    syslog-ng with the snippet, whose paths are made local, and sources to write to.

    Args:
        start: Starts a process.
        here: Where all files lie.

    """

    def __init__(self, start, here):
        self._start = start
        self._here = here
        self._command, environment = installed()
        self._environment = environment | {"ZMQPUSH_CONNECT": f"ipc://{here}/acked"}
        snippet = SNIPPET.read_text().replace("/usr/local/bin", str(BIN))
        (here / "conf.d").mkdir(exist_ok=True)
        (here / "conf.d/zmqpush.conf").write_text(re.sub(r"/(run|var/\w+)/", f"{here}/", snippet))
        (here / "syslog-ng.conf").write_text(CONFIGURATION.format(here=here))
        self.start()

    def start(self):
        """Start it, and wait until it takes messages."""
        options = "--foreground --stderr --no-caps --verbose --cfgfile syslog-ng.conf"
        files = "--persist-file persist --control control"
        (self._here / "log").unlink(missing_ok=True)
        with open(self._here / "errors", "ab") as errors:
            self.child = self._start(
                *self._command,
                *options.split(),
                *files.split(),
                "--pidfile",
                self._here / "pid",
                cwd=self._here,
                env=self._environment,
                stderr=errors,
            )
        wait_until(lambda: self.child.poll() is not None or (self._here / "log").exists())
        assert self.child.poll() is None, self.errors()

    def errors(self):
        return (self._here / "errors").read_text()

    def shippers(self):
        """Return the processes that it has started."""
        return [int(pid) for pid in _children(self.child.pid)]

    def shipper(self):
        """Return the process of zmqpush, once it is that."""
        wait_until(lambda: any("zmqpush" in _command_line(pid)[1] for pid in self.shippers()))
        (pid,) = self.shippers()
        return pid

    def log(self, *messages):
        """Log messages, as syslog(3) does, and wait until syslog-ng has read them."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
            log.connect(str(self._here / "log"))
            for message in messages:
                log.send(b"<13>Oct 11 22:14:15 app[12]: " + message)
            wait_until(lambda: not pending_bytes(log.fileno(), termios.TIOCOUTQ))

    def log_until_it_waits(self):
        """Log messages from number 1 on until syslog-ng takes no more; return the last number."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
            log.connect(str(self._here / "log"))
            log.settimeout(2)
            with contextlib.suppress(TimeoutError):
                for number in itertools.count(1):
                    log.send(b"<13>Oct 11 22:14:15 app[12]: number %d" % number)
        return number - 1


def _children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _command_line(pid):
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return [*words, "", ""]


@pytest.fixture
def syslog_ng(start, tmp_path):
    """Return a function that starts syslog-ng; what it has started ends with the test."""
    started = []

    def run():
        started.append(SyslogNg(start, tmp_path))
        return started[-1]

    yield run
    for daemon in started:
        if daemon.child.poll() is None:
            shippers = daemon.shippers()
            daemon.child.kill()
            for pid in shippers:
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def collector(start, tmp_path):
    """Return a function that starts a zmqpull."""

    def run():
        options = f"--ack-bind ipc://{tmp_path}/acked --state {tmp_path}/state".split()
        return start(ZMQPULL, "-q", *options, "--to", tmp_path / "{type}.ndjson")

    return run


@pytest.fixture
def arrived(tmp_path):
    """Return a function that returns the records in the collector's file."""

    def read():
        path = tmp_path / "syslog.ndjson"
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        return [json.loads(line) for line in whole.splitlines()]

    return read


def numbers(records):
    """Return the numbers in messages such as ``number 7``."""
    return [int(record["message"].split()[1]) for record in records]


def numbered(first, last):
    return [b"number %d" % number for number in range(first, last)]


def test_a_message_arrives_whole_whatever_its_bytes(syslog_ng, collector, arrived, tmp_path):
    collector()
    daemon = syslog_ng()
    daemon.log(b'two\nlines, \xff, \x1b, \xc3\xa9, \\ and "\t"')
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(str(tmp_path / "stream"))
        stream.send(b'<34>1 2003-10-11T22:14:15.003Z host su 7 ID [x@1 a="b"] structured\n')
    wait_until(lambda: len(arrived()) == 2)
    plain, structured = sorted(arrived(), key=lambda record: record["program"])

    assert plain["message"] == 'two\nlines, \\xff, \x1b, é, \\ and "\t"'
    assert (plain["type"], plain["pid"]) == ("syslog", "12")
    assert (plain["facility"], plain["severity"]) == ("user", "notice")
    assert structured["message"] == "structured"
    assert structured["_SDATA"] == {"x@1": {"a": "b"}}
    assert structured["@timestamp"].startswith("2003-10-11T")
    assert (structured["program"], structured["severity"]) == ("su", "crit")


def test_what_is_logged_goes_on_arriving_when_zmqpush_is_killed(syslog_ng, collector, arrived):
    collector()
    daemon = syslog_ng()
    for first in (0, 100, 200):
        daemon.log(*numbered(first, first + 100))
        wait_until(lambda first=first: len(arrived()) == first + 100)
        shipper = daemon.shipper()
        os.kill(shipper, signal.SIGKILL)
        wait_until(lambda shipper=shipper: shipper not in daemon.shippers())

    assert numbers(arrived()) == list(range(300))


def test_a_killed_zmqpush_takes_with_it_no_more_than_its_pipe_and_one_read(
    syslog_ng, collector, arrived
):
    collector()
    daemon = syslog_ng()
    daemon.log(*numbered(0, 1))
    wait_until(arrived)
    os.kill(daemon.shipper(), signal.SIGSTOP)
    count = daemon.log_until_it_waits()
    with open(f"/proc/{daemon.shipper()}/fd/0", "rb") as pipe:
        capacity = fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)
    os.kill(daemon.shipper(), signal.SIGKILL)
    wait_until(lambda: numbers(arrived())[-1] == count)
    found = numbers(arrived())
    lost = set(range(count + 1)) - set(found)
    line = len(json.dumps(arrived()[-1], separators=(",", ":"), ensure_ascii=False)) + 1
    lost_bytes = sum(line - len(str(count)) + len(str(number)) for number in lost)

    assert found == sorted(set(found))
    assert capacity == 256 << 10
    # It was stopped before it read, so no read is among them.
    assert 0 < lost_bytes <= capacity


def test_a_reload_leaves_zmqpush_alone_and_loses_nothing(syslog_ng, collector, arrived):
    collector()
    daemon = syslog_ng()
    shipper = daemon.shipper()
    for turn in range(5):
        daemon.log(*numbered(200 * turn, 200 * turn + 200))
        daemon.child.send_signal(signal.SIGHUP)
        wait_until(lambda turn=turn: daemon.errors().count("reload request received") > turn)
    wait_until(lambda: len(arrived()) == 1000)

    assert numbers(arrived()) == list(range(1000))
    assert daemon.shippers() == [shipper]


def test_what_was_logged_before_a_shutdown_arrives_when_the_collector_is_up(
    syslog_ng, collector, arrived
):
    daemon = syslog_ng()
    for turn in range(2):
        shipper = daemon.shipper()
        os.kill(shipper, signal.SIGTERM)  # systemd sends it to all processes of a service
        daemon.log(*numbered(1000 * turn, 1000 * turn + 1000))
        ignored = re.search(r"SigIgn:\s+(\w+)", Path(f"/proc/{shipper}/status").read_text())
        assert int(ignored[1], 16) & 1 << (signal.SIGTERM - 1)
        daemon.child.terminate()
        assert daemon.child.wait(PATIENCE) == 0
        daemon.start()  # at once: the old zmqpush may not have ended
    daemon.log(*numbered(2000, 2001))
    collector()

    wait_until(lambda: len(arrived()) == 2001)
    assert numbers(arrived()) == list(range(2001))


def test_the_source_of_the_snippet_and_the_directory_are_those_of_debian():
    configuration = UNPACKED / "etc/syslog-ng/syslog-ng.conf"
    path = configuration if configuration.exists() else Path("/etc/syslog-ng/syslog-ng.conf")
    if not path.exists():
        pytest.skip("syslog-ng is not installed: package syslog-ng-core")

    assert re.search(r"^source s_src \{", path.read_text(), re.MULTILINE)
    assert '@include "/etc/syslog-ng/conf.d/*.conf"' in path.read_text()
