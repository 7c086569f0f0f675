"""The units of ``contrib/systemd``: checked by systemd's own tools, and run by a real systemd."""

import itertools
import json
import os
import re
import shutil
import signal
import struct
import subprocess

import pytest

from helpers import BIN, PATIENCE, wait_until
from manager import CONTRIB, MACHINE, manager

PAGE = CONTRIB.parent.parent / "docs" / "integrations.md"
DATAGRAM = CONTRIB / "zmqpush-datagram.conf"
SERVICES = sorted(CONTRIB.glob("*.service"))
REMOTE = "/lib/systemd/systemd-journal-remote"
ODD = b'two\nlines, \xff, \0 and "\x1b'


def needs(program, package):
    reason = f"{program} is not installed: package {package}"
    return pytest.mark.skipif(not shutil.which(program), reason=reason)


needs_systemd = needs("systemd-analyze", "systemd")
needs_journal = needs(REMOTE, "systemd-journal-remote")
needs_logrotate = needs("/usr/sbin/logrotate", "logrotate")


def messages(file):
    """Return the messages of the records in a file."""
    if not file.exists():
        return []
    whole, _, _ = file.read_bytes().rpartition(b"\n")
    return [json.loads(line)["message"] for line in whole.splitlines()]


def exec_start(service):
    """Return the command of a service as a list."""
    (command,) = re.findall(r"^ExecStart=(.*)$", (CONTRIB / service).read_text(), re.MULTILINE)
    return command.split()


@needs_systemd
def test_systemd_finds_nothing_to_complain_about(tmp_path):
    for path in (*SERVICES, *CONTRIB.glob("*.socket")):
        text = path.read_text().replace("/usr/local/bin/zmqpush-journal", "/bin/true")
        (tmp_path / path.name.replace("@", "@app")).write_text(
            text.replace("/usr/local/bin", str(BIN))
        )
    units = sorted(tmp_path.iterdir())
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *units]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)

    assert len(units) == 4
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs("shellcheck", "shellcheck")
@pytest.mark.parametrize("script", ["systemd/zmqpush-journal", "syslog-ng/zmqpush-hold"])
def test_shellcheck_finds_nothing_to_complain_about(script):
    command = ["shellcheck", "--shell=sh", CONTRIB.parent / script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)

    assert (done.returncode, done.stdout) == (0, "")


@needs_systemd
@pytest.mark.parametrize("line", ["", "ListenDatagram=\n"], ids=["as it is", "broken"])
def test_systemd_takes_the_socket_for_datagrams(tmp_path, line):
    drop_in = tmp_path / "zmqpush@app.socket.d"
    drop_in.mkdir()
    (drop_in / DATAGRAM.name).write_text(DATAGRAM.read_text() + line)
    for name in ("zmqpush@.socket", "zmqpush@.service"):
        text = (CONTRIB / name).read_text().replace("/usr/local/bin", str(BIN))
        (tmp_path / name.replace("@", "@app")).write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no"]
    unit = tmp_path / "zmqpush@app.socket"
    done = subprocess.run([*command, unit], capture_output=True, text=True, timeout=PATIENCE)

    assert (done.returncode == 0, done.stdout + done.stderr == "") == (not line, not line)


@needs_systemd
@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_a_unit_is_as_exposed_as_the_page_says(unit):
    (exposure,) = re.findall(rf"^\| `{unit.name}` \|.*\| (\d\.\d) \|$", PAGE.read_text(), re.M)
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager"]
    threshold = f"--threshold={exposure.replace('.', '')}"
    done = subprocess.run([*command, threshold, unit], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout
    assert f": {exposure} OK" in done.stdout


@pytest.fixture
def collector(start, tmp_path):
    """Return the file of a zmqpull that is started as its unit says, with local names."""
    command = " ".join(exec_start("zmqpull.service")).replace("/usr/local/bin", str(BIN))
    command = re.sub(r"tcp://\*:(\d+)", rf"ipc://{tmp_path}/\1", command)
    start(*re.sub(r"/var/(lib|log)/zmqpull", rf"{tmp_path}/zmqpull-\1", command).split())
    return lambda logtype: tmp_path / "zmqpull-log" / f"{logtype}.ndjson"


def test_what_is_in_the_fifo_survives_zmqpush(start, collector, tmp_path):
    """
    Imitates zmqpush@.socket where no systemd can be run.

    As systemd does, the test opens the FIFO for reading and writing, keeps it open, gives
    it as standard input, and starts the command of the unit again when it was killed.
    """
    os.mkfifo(tmp_path / "fifo")
    fifo = os.open(tmp_path / "fifo", os.O_RDWR)
    words = [word.replace("%i", "app") for word in exec_start("zmqpush@.service")]
    command = " ".join(words).replace("/usr/local/bin", str(BIN))
    command = command.replace("/var/lib", str(tmp_path)).split()
    environment = os.environ | {"ZMQPUSH_CONNECT": f"ipc://{tmp_path}/5015"}
    expected = []
    for turn in range(3):
        child = start(*command, stdin=fifo, env=environment)
        for line in (f"{turn} alone", f"{turn} again"):  # writers come and go
            (tmp_path / "fifo").write_text(f"{line}\n")
            expected.append(line)
            wait_until(lambda lines=[*expected]: messages(collector("app")) == lines)
        child.send_signal(signal.SIGSTOP)
        expected += [f"{turn} waits {n}" for n in range(500)]
        (tmp_path / "fifo").write_text("".join(f"{line}\n" for line in expected[-500:]))
        child.kill()
        child.wait()
    start(*command, stdin=fifo, env=environment)
    os.close(fifo)

    wait_until(lambda: len(messages(collector("app"))) == len(expected))
    assert messages(collector("app")) == expected


@pytest.fixture
def systemd(tmp_path):
    with manager(tmp_path) as started:
        yield started


def write(systemd, *lines):
    """Write lines into the FIFO of the type ``app``, as a program that comes and goes."""
    systemd.run("sh", "-c", 'printf "%s\\n" "$@" >/run/zmqpush/app', "sh", *lines)


def test_systemd_ships_what_is_written_into_the_fifo_whatever_is_killed(systemd):
    arrived = systemd.log / "zmqpull/app.ndjson"
    systemd.run("systemctl", "start", "zmqpull.service", "zmqpush@app.socket")
    write(systemd, "one")
    wait_until(lambda: messages(arrived) == ["one"])
    systemd.signal(signal.SIGSTOP, "zmqpush@app.service")
    write(systemd, "two", "three")
    systemd.signal(signal.SIGKILL, "zmqpush@app.service")
    wait_until(lambda: messages(arrived) == ["one", "two", "three"])
    systemd.signal(signal.SIGKILL, "zmqpull.service")
    write(systemd, "four")

    wait_until(lambda: messages(arrived) == ["one", "two", "three", "four"])
    assert systemd.show("zmqpush@app.service", "NRestarts") == "1"
    assert systemd.show("zmqpull.service", "NRestarts") == "1"
    status = systemd.status("zmqpush@app.service")
    assert "0" not in re.findall(r"Uid:\s+(\d+)", status)
    assert re.search(r"CapBnd:\s+0+$", status, re.MULTILINE)


def test_systemd_stops_zmqpush_in_order_and_what_is_left_arrives_later(systemd):
    arrived = systemd.log / "zmqpull/app.ndjson"
    systemd.run("systemctl", "start", "zmqpush@app.socket")
    write(systemd, "one")
    spool = systemd.lib / "private/zmqpush/app/0"
    wait_until(lambda: any(segment.stat().st_size for segment in spool.glob("*.seg2")))
    systemd.run("systemctl", "stop", "zmqpush@app.service")  # waits for --grace: nobody receives

    assert systemd.show("zmqpush@app.service", "ExecMainStatus") == "75"
    assert systemd.show("zmqpush@app.service", "ActiveState") == "inactive"
    write(systemd, "two")
    systemd.run("systemctl", "start", "zmqpull.service")
    wait_until(lambda: messages(arrived) == ["one", "two"])


def test_systemd_ships_datagrams_whatever_is_killed(systemd, tmp_path):
    drop_in = tmp_path / "units/zmqpush@app.socket.d"
    drop_in.mkdir()
    shutil.copy(DATAGRAM, drop_in)
    systemd.run("systemctl", "daemon-reload")
    systemd.run("systemctl", "start", "zmqpull.service", "zmqpush@app.socket")
    logged = ("logger", "-d", "-u", "/run/zmqpush/app", "-t", "app")
    arrived = systemd.log / "zmqpull/app.ndjson"
    texts = ["one", "two", "three", "four"]
    for number, text in enumerate(texts, 1):
        systemd.run(*logged, text)  # the second and later ones while it is dead
        wait_until(lambda number=number: len(messages(arrived)) == number)
        systemd.signal(signal.SIGKILL, "zmqpush@app.service")

    assert [message.rpartition("app: ")[2] for message in messages(arrived)] == texts
    assert systemd.show("zmqpush@app.service", "NRestarts") != "0"


@needs_logrotate
def test_systemd_has_zmqpull_open_its_files_anew_when_logrotate_has_renamed_them(systemd):
    arrived = systemd.log / "zmqpull/app.ndjson"
    systemd.run("systemctl", "start", "zmqpull.service", "zmqpush@app.socket")
    write(systemd, "one")
    wait_until(lambda: messages(arrived) == ["one"])
    main = systemd.show("zmqpull.service", "MainPID")
    configuration = CONTRIB.parent / "logrotate/zmqpull"
    systemd.run("logrotate", "--force", "--state", "/run/status", str(configuration))
    wait_until(lambda: write(systemd, "more") or arrived.exists())

    assert messages(arrived.with_name("app.ndjson.1"))[0] == "one"
    assert systemd.show("zmqpull.service", "MainPID") == main


def field(name, value):
    """Return a field in the journal's export format."""
    return name + b"\n" + struct.pack("<Q", len(value)) + value + b"\n"


def add_to_journal(path, *values, second=1_700_000_000):
    """Append entries to a journal; each has the next second."""
    second += len(entries(path))
    text = b""
    for number, value in enumerate(values, second):
        text += b"__REALTIME_TIMESTAMP=%d000000\n__MONOTONIC_TIMESTAMP=%d\n" % (number, number)
        text += b"_BOOT_ID=%s\n_MACHINE_ID=%s\n" % (b"ab" * 16, MACHINE.encode())
        text += field(b"MESSAGE", value) + b"\n"
    command = [REMOTE, f"--output={path}", "-"]
    subprocess.run(command, input=text, check=True, capture_output=True, timeout=PATIENCE)


def entries(path):
    if not path.exists():
        return []
    command = ["journalctl", "--quiet", "--all", f"--file={path}", "--output=json"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE)
    return done.stdout.splitlines()


def shipped(file):
    """Return what ``MESSAGE`` was in the records that arrived."""
    if not file.exists():
        return []
    whole, _, _ = file.read_bytes().rpartition(b"\n")
    found = [json.loads(line)["MESSAGE"] for line in whole.splitlines()]
    return [bytes(m) if isinstance(m, list) else m.encode() for m in found]


@needs_journal
def test_systemd_ships_the_journal(systemd):
    journal = systemd.log / "journal" / MACHINE
    journal.mkdir(parents=True)
    add_to_journal(journal / "remote.journal", b"one", ODD)
    shutil.chown(journal / "remote.journal", group="systemd-journal")
    systemd.run("systemctl", "start", "zmqpull.service", "zmqpush-journal.service")
    wait_until(lambda: shipped(systemd.log / "zmqpull/journal.ndjson") == [b"one", ODD])
    systemd.run("systemctl", "stop", "zmqpush-journal.service")

    assert systemd.show("zmqpush-journal.service", "Result") == "success"


@pytest.fixture
def ship_journal(start, tmp_path):
    """Return a function that starts the script of the unit, in a process group of its own."""
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "journalctl"
    wrapper.write_text(
        f'#!/bin/sh\nexec {shutil.which("journalctl")} --file={tmp_path}/a.journal "$@"\n'
    )
    wrapper.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}/bin:{BIN}:{os.environ['PATH']}",
        "STATE_DIRECTORY": str(tmp_path / "journal"),
        "RUNTIME_DIRECTORY": str(tmp_path),
        "ZMQPUSH_CONNECT": f"ipc://{tmp_path}/5015",
    }
    (tmp_path / "journal").mkdir()
    groups = []

    def run():
        (command,) = exec_start("zmqpush-journal.service")
        command = command.replace("/usr/local/bin", str(CONTRIB))
        groups.append(start(command, env=environment, start_new_session=True))
        return groups[-1]

    yield run
    for child in groups:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


@needs_journal
def test_every_entry_of_the_journal_arrives_as_json_whatever_its_bytes(
    ship_journal, collector, tmp_path
):
    values = [b"plain", ODD, b"\xc3\xa9 \xe2\x82\xac", b"long " * 20_000, bytes(range(256))]
    add_to_journal(tmp_path / "a.journal", *values)
    ship_journal()
    wait_until(lambda: len(shipped(collector("journal"))) == len(values))
    add_to_journal(tmp_path / "a.journal", b"later")
    values.append(b"later")

    wait_until(lambda: len(shipped(collector("journal"))) == len(values))
    assert shipped(collector("journal")) == values


@needs_journal
def test_a_pass_over_the_journal_that_is_killed_is_repeated(ship_journal, collector, tmp_path):
    arrived = collector("journal")
    add_to_journal(tmp_path / "a.journal", *(b"old %d" % n for n in range(100)))
    cursor = tmp_path / "journal" / "cursor"
    child = ship_journal()
    wait_until(cursor.exists)
    moved = cursor.read_bytes()
    # journalctl stands still in the middle of the next pass, and all is killed.
    wrapper = tmp_path / "bin" / "journalctl"
    text = wrapper.read_text()
    slow = (
        f"case $* in *--all*) {text.split('exec ')[1].strip()} | (head -n 50; sleep 60) ;; esac\n"
    )
    wrapper.with_name("new").write_text(text.replace("exec", f"{slow}exec"))
    wrapper.with_name("new").chmod(0o755)
    wrapper.with_name("new").rename(wrapper)
    new = [b"new %d " % n + bytes(5000) for n in range(100)]  # more than pipes and buffers hold
    add_to_journal(tmp_path / "a.journal", *new)
    wait_until(lambda: len(shipped(arrived)) > 100)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert cursor.read_bytes() == moved
    wrapper.write_text(text)
    ship_journal()

    wait_until(lambda: shipped(arrived)[-1:] == new[-1:])
    found = shipped(arrived)[100:]
    twice = len(found) - len(new)
    assert 0 < twice < 51
    assert found == new[:twice] + new


@pytest.fixture
def move_journal(tmp_path):
    """Return a function that replaces the journal, as journald does when it removes old entries."""
    seconds = itertools.count(1_700_001_000, 1000)

    def move(*values):
        add_to_journal(tmp_path / "b.journal", *values, second=next(seconds))
        (tmp_path / "b.journal").rename(tmp_path / "a.journal")

    return move


@needs_journal
def test_no_entry_is_skipped_when_that_of_the_cursor_is_gone(
    ship_journal, collector, move_journal, tmp_path
):
    """It was vacuumed, or the journal is in memory and the machine was started again."""
    add_to_journal(tmp_path / "a.journal", b"one", b"two")
    child = ship_journal()
    wait_until(lambda: shipped(collector("journal")) == [b"one", b"two"])
    move_journal(b"three", b"four")  # while it runs
    wait_until(lambda: shipped(collector("journal"))[2:] == [b"three", b"four"])
    child.terminate()
    assert child.wait(PATIENCE) == 0
    move_journal(b"five")
    child = ship_journal()
    wait_until(lambda: shipped(collector("journal"))[4:] == [b"five"])
    add_to_journal(tmp_path / "a.journal", b"six", second=1_700_009_000)
    wait_until(lambda: shipped(collector("journal"))[5:] == [b"six"])
    child.terminate()

    assert (child.wait(PATIENCE), child.stderr.read()) == (0, b"")
    assert shipped(collector("journal"))[4:] == [b"five", b"six"]


JOURNALCTL = {
    # What it prints before it fails is shipped once, and not again.
    "in the end": ('{real} "$@"; exit 1', b"journalctl fails (exit code 1)", 2),
    "at once": ("echo disk on fire >&2; exit 1", b"disk on fire", 0),
    # Half an entry was printed: the next run repeats the pass.
    "killed": ('{real} "$@" | head -c 2000; kill -9 $$', b"journalctl fails (exit code 137)", None),
}


@needs_journal
@pytest.mark.parametrize("fault", JOURNALCTL)
def test_a_journalctl_that_fails_is_reported_and_loses_nothing(
    ship_journal, collector, tmp_path, fault
):
    arrived = collector("journal")
    script, line, count = JOURNALCTL[fault]
    old = [b"one", b"two " + bytes(3000)]
    add_to_journal(tmp_path / "a.journal", *old)
    wrapper = tmp_path / "bin" / "journalctl"
    text = wrapper.read_text()
    real = text.split("exec ")[1].removesuffix(' "$@"\n')
    fails = script.replace("{real}", real)
    wrapper.write_text(text.replace("exec", f"case $* in *--all*) {fails} ;; esac\nexec"))
    for _ in range(2):  # systemd starts it again
        child = ship_journal()
        assert child.wait(PATIENCE) == 74
        said = child.stderr.read()
        assert line in said
        assert said.count(b"what is not shipped stays in the journal") == 1
    if count is not None:
        assert shipped(arrived) == old[:count]
    assert (tmp_path / "journal" / "cursor").exists() == bool(count)
    wrapper.write_text(text)
    add_to_journal(tmp_path / "a.journal", b"three")
    ship_journal()

    wait_until(lambda: arrived.exists() and b"three" in arrived.read_bytes())
    if count is not None:
        assert shipped(arrived) == [*old, b"three"]
    else:
        assert arrived.read_bytes().count(b'"one"') == 3


@needs_journal
def test_a_cursor_is_on_the_disk_before_it_counts(ship_journal, collector, start, tmp_path):
    """A file that was renamed and not synced may be empty after a power cut."""
    add_to_journal(tmp_path / "a.journal", b"one")
    calls = tmp_path / "calls"
    for name in ("sync", "mv"):
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/sh\necho {name} "$@" >>{calls}\nexec {shutil.which(name)} "$@"\n')
        path.chmod(0o755)
    ship_journal()
    wait_until(lambda: calls.exists() and calls.read_text().count("\n") >= 3)

    assert calls.read_text().splitlines()[:3] == ["sync next", "mv next cursor", "sync ."]


@needs_journal
def test_the_journal_waits_in_the_spool_while_there_is_no_collector(
    ship_journal, start, request, tmp_path
):
    add_to_journal(tmp_path / "a.journal", b"one", b"two")
    child = ship_journal()
    wait_until((tmp_path / "journal" / "cursor").exists)
    child.terminate()

    assert child.wait(PATIENCE) == 0
    assert child.stderr.read() == b""
    (tmp_path / "a.journal").unlink()
    add_to_journal(tmp_path / "a.journal", b"three")
    collector = request.getfixturevalue("collector")
    ship_journal()
    wait_until(lambda: shipped(collector("journal"))[:2] == [b"one", b"two"])
