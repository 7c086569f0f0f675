"""
The configuration of ``contrib/syslog-ng``, run by a real syslog-ng.

It conflicts with rsyslog, so it may also be unpacked, not installed: where
``ZMQPUSH_TEST_SYSLOG_NG`` says, or in ``build/syslog-ng``.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import termios
import time
from pathlib import Path

import pytest

from helpers import BIN, PATIENCE, ZMQPULL, ZMQPUSH, wait_until
from zmqpush.runtime.fds import pending_bytes

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
        path = f"{BIN}:{os.environ['PATH']}"
        self._environment = environment | {"XDG_CONFIG_HOME": str(here / "config"), "PATH": path}
        if not (here / "config").exists():
            configure(here, f'connect = ["ipc://{here}/acked"]')
        snippet = SNIPPET.read_text().replace("/usr/local/bin", str(SNIPPET.parent))
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

    def holders(self):
        """Return the processes that it has started, which are to be one zmqpush-hold."""
        return _children(self.child.pid)

    def shippers(self):
        """Return the processes of zmqpush, which are to be one."""
        children = [pid for holder in self.holders() for pid in _children(holder)]
        return [pid for pid in children if _command_line(pid)[1] == ZMQPUSH]

    def shipper(self):
        """Return the process of zmqpush, once there is one."""
        wait_until(self.shippers)
        (pid,) = self.shippers()
        return pid

    def ignores_sigterm(self):
        """Return whether zmqpush-hold does so already, and with it what it starts."""
        for holder in self.holders():
            status = Path(f"/proc/{holder}/status").read_text()
            ignored = re.search(r"^SigIgn:\s+(\w+)$", status, re.MULTILINE)
            return int(ignored[1], 16) & 1 << (signal.SIGTERM - 1)
        return False

    def said(self):
        """Return what zmqpush and zmqpush-hold have to say."""
        return (self._here / "zmqpush-syslog-ng.log").read_text()

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


def configure(here, text):
    """Write the configuration file of zmqpush."""
    (here / "config/zmqpush").mkdir(parents=True, exist_ok=True)
    (here / "config/zmqpush/zmqpush.toml").write_text(text)


def _children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


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
            rest = [*daemon.holders(), *daemon.shippers()]
            daemon.child.kill()
            for pid in rest:
                with contextlib.suppress(ProcessLookupError):
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


@pytest.mark.parametrize("victim", [SyslogNg.shipper, lambda daemon: daemon.holders()[0]])
def test_what_is_logged_goes_on_arriving_when_one_is_killed(syslog_ng, collector, arrived, victim):
    collector()
    daemon = syslog_ng()
    for first in (0, 100, 200):
        daemon.log(*numbered(first, first + 100))
        wait_until(lambda first=first: len(arrived()) == first + 100)
        daemon.shipper()
        pid = victim(daemon)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: pid not in [*daemon.holders(), *daemon.shippers()])

    daemon.log(*numbered(300, 301))
    wait_until(lambda: numbers(arrived())[-1:] == [300])
    assert numbers(arrived()) == list(range(301))


def test_a_killed_zmqpush_does_not_take_with_it_what_is_in_the_pipe(syslog_ng, collector, arrived):
    collector()
    daemon = syslog_ng()
    daemon.log(*numbered(0, 1))
    wait_until(arrived)
    os.kill(daemon.shipper(), signal.SIGSTOP)  # before it reads more
    count = daemon.log_until_it_waits()
    os.kill(daemon.shipper(), signal.SIGKILL)
    wait_until(lambda: numbers(arrived())[-1] == count)

    assert numbers(arrived()) == list(range(count + 1))
    assert "zmqpush has ended: exit code 137." in daemon.said()


@pytest.mark.parametrize("broken_when", ["from the start", "while it runs"])
@pytest.mark.parametrize("wrong", ["connect = [", "conect = 'tcp://x:1'", "when-full = 'never'"])
def test_nothing_is_lost_while_the_configuration_is_wrong(
    syslog_ng, collector, arrived, tmp_path, wrong, broken_when
):
    """With zmqpush alone, syslog-ng lost all that it wrote meanwhile."""
    collector()
    if broken_when == "from the start":
        configure(tmp_path, wrong)
        daemon = syslog_ng()
    else:
        daemon = syslog_ng()
        shipper = daemon.shipper()
        configure(tmp_path, wrong)
        os.kill(shipper, signal.SIGKILL)
    for first in range(0, 50, 10):
        daemon.log(*numbered(first, first + 10))
        time.sleep(0.05)  # so that syslog-ng writes them one by one
    wait_until(lambda: "its arguments or its configuration are wrong" in daemon.said())
    daemon.log(*numbered(50, 60))
    configure(tmp_path, f'connect = ["ipc://{tmp_path}/acked"]')

    wait_until(lambda: len(arrived()) == 60)
    assert numbers(arrived()) == list(range(60))
    (holder,) = daemon.holders()
    daemon.child.terminate()
    assert daemon.child.wait(PATIENCE) == 0
    wait_until(lambda: not Path(f"/proc/{holder}").exists())


def test_a_reload_leaves_zmqpush_alone_and_loses_nothing(syslog_ng, collector, arrived):
    collector()
    daemon = syslog_ng()
    before = daemon.shipper(), daemon.holders()
    for turn in range(5):
        daemon.log(*numbered(200 * turn, 200 * turn + 200))
        daemon.child.send_signal(signal.SIGHUP)
        wait_until(lambda turn=turn: daemon.errors().count("reload request received") > turn)
    wait_until(lambda: len(arrived()) == 1000)

    assert numbers(arrived()) == list(range(1000))
    assert (daemon.shipper(), daemon.holders()) == before


def test_what_was_logged_before_a_shutdown_arrives_when_the_collector_is_up(
    syslog_ng, collector, arrived
):
    daemon = syslog_ng()
    for turn in range(2):
        wait_until(daemon.ignores_sigterm)
        for pid in [*daemon.holders(), *daemon.shippers()]:  # as systemd does to a whole service
            with contextlib.suppress(ProcessLookupError):  # the spool is still in use: exit 73
                os.kill(pid, signal.SIGTERM)
        daemon.log(*numbered(1000 * turn, 1000 * turn + 1000))
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
