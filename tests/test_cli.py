"""The command line: help, flags, environment, TOML, and what goes wrong with them."""

import json
import os
import re
import subprocess
import sys

import pytest
import zmq

from helpers import NOBODY, PATIENCE, SUMMARY, ZMQKEYS, ZMQPULL, ZMQPUSH, push, sent, words
from zmqpush import config

# Nothing of the machine's own configuration.
BARE = {name: os.environ[name] for name in ("PATH", "XDG_CONFIG_HOME")}
COMMON = {"--connect", "--bind", "--grace", "--quiet", "--config", "--version", "--help"}.union(
    ("--key", "--server-key", "--allow", "--insecure")
)
OPTIONS = {
    ZMQPUSH: COMMON.union(
        ("--format", "--field", "--framing", "--null", "--delimiter", "--max-line"),
        ("--queue-max", "--when-full", "--timeout", "--ack", "--spread", "--spool"),
        ("--spool-max", "--spool-slots", "--spool-status", "--sync", "--omprog", "--confirm"),
        ("--transactions", "--begin-mark", "--commit-mark"),
    ),
    ZMQPULL: COMMON.union(
        ("--to", "--option", "--nats-unit", "--dead-letters"),
        ("--count", "--ack-bind", "--state", "--memory"),
    ),
    ZMQKEYS: {"--version", "--help"},
}
COMMANDS = pytest.mark.parametrize("command", [ZMQPUSH, ZMQPULL])
ALL_COMMANDS = pytest.mark.parametrize("command", list(OPTIONS))


def run(*command, data=b"", **env):
    """Run a command with these environment variables and few others."""
    return subprocess.run(
        words(*command), input=data, capture_output=True, timeout=PATIENCE, env=BARE | env
    )


def last_words(done):
    """Return the last line of what went wrong; there is no traceback."""
    assert b"Traceback" not in done.stderr
    assert b"internal error" not in done.stderr
    assert done.stdout == b""
    return done.stderr.decode().splitlines()[-1]


@pytest.fixture
def toml(tmp_path):
    """Return a function that writes the user's file and returns the environment for it."""

    def write(text):
        path = tmp_path / "zmqpush" / "zmqpush.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return {"XDG_CONFIG_HOME": str(tmp_path)}

    return write


@ALL_COMMANDS
@pytest.mark.parametrize("columns", ["80", "300"])
def test_help_is_readable_and_names_every_option(command, columns):
    done = run(command, "--help", COLUMNS=columns)
    lines = done.stdout.decode().splitlines()
    options = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", done.stdout.decode(), re.MULTILINE))

    assert (done.returncode, done.stderr) == (0, b"")
    assert lines[0].startswith("Usage: zmqpu")
    assert max(map(len, lines)) <= 100
    assert options == OPTIONS[command]
    assert run(command, "-h", COLUMNS=columns).stdout == done.stdout


@ALL_COMMANDS
def test_help_that_cannot_be_written_is_one_line_and_exit_74(start, command):
    with open("/dev/full", "wb") as full:
        child = start(command, "--help", stdout=full)
    _, err = child.communicate(timeout=PATIENCE)

    assert (child.returncode, err.count(b"\n")) == (74, 1)
    assert b"No space left on device" in err


@ALL_COMMANDS
def test_the_version_is_told(command):
    done = run(command, "--version")

    assert re.fullmatch(rb"zmqpu(sh|ll|sh-keys) \d+\.\d+\.\d+\n", done.stdout)
    assert done.stdout == run(command, "-V").stdout


def test_the_module_is_the_command(pull):
    done = run(sys.executable, "-m", "zmqpush", "-c", pull.last_endpoint, "app", data=b"x\n")

    assert sent(done) == 1
    assert json.loads(pull.recv())["type"] == "app"
    assert run(sys.executable, "-m", "zmqpush", "-h").stdout == run(ZMQPUSH, "-h").stdout


@ALL_COMMANDS
def test_the_shell_can_complete(command):
    name = os.path.basename(command)
    begun, completed = ("re", b"revoke") if command == ZMQKEYS else ("--bi", b"--bind")
    name_in_shell = name.replace("-", "_")
    variable = f"_{name_in_shell.upper()}_COMPLETE"
    script = run(command, **{variable: "bash_source"})
    words = run(
        command, **{variable: "bash_complete"}, COMP_WORDS=f"{name} {begun}", COMP_CWORD="1"
    )

    assert f"_{name_in_shell}_completion".encode() in script.stdout
    assert words.stdout == b"plain,%s\n" % completed


@pytest.mark.parametrize(
    ("args", "good"),
    [
        (["-c", "localhost:5014"], "tcp://collector.example.com:5014"),
        (["-c", "tcp://*:5014"], "tcp://collector.example.com:5014"),
        (["-c", "tcp://host:99999"], "tcp://collector.example.com:5014"),
        (["-c", "tcp://-:5014"], "tcp://collector.example.com:5014"),
        (["-b", "tcp://5014"], "tcp://*:5014"),
        (["-b", "ipc://"], "ipc:///run/x"),
        (["-c", os.fsdecode(b"\xff")], "ipc:///run/x"),
        (["--queue-max", "1e6"], "64MiB"),
        (["--queue-max", "9" * 5000], "64MiB"),
        (["--max-line", "-1"], "64MiB"),
        (["--max-line", "3"], "4 bytes"),
        (["--field", "production"], "environment=production"),
        (["--field", "=x"], "environment=production"),
        (["--field", "message=x"], "'message' is part of the format json"),
        (["--format", "ecs", "--field", "host=x"], "'host' is part of the format ecs"),
        (["--format", "raw", "--field", "a=b"], "no place for fields"),
        (["--format", "raw", "--framing", "array"], "cannot hold --format raw"),
        (["--delimiter", ""], r"'\r\n'"),
        (["--delimiter", "\\"], r"'\x1e'"),
        (["--when-full", "drop"], "'drop-oldest'"),
        (["--format", "xml"], "'logstash'"),
        (["--framing", "xml"], "'frames'"),
        (["--timeout", "-1"], "-1"),
        (["--timeout", "nan"], "nan"),
        (["--config", "/nonexistent"], "'/nonexistent' does not exist"),
        (["--confirm", "remote"], "--confirm says when --omprog answers"),
        (["--omprog", "--confirm", "disk"], "'fsync'"),
        (["--omprog", "--confirm", "write"], "--confirm write needs a --spool"),
        (["--omprog", "--confirm", "fsync"], "--confirm fsync needs a --spool"),
        (["--omprog", "--spool", "/nonexistent/x", "--sync", "off"], "--sync off exclude"),
        (["--omprog", "--when-full", "drop-oldest"], "--when-full block"),
        (["--omprog", "--null"], "newlines end its messages"),
        (["--omprog", "--delimiter", ";"], "newlines end its messages"),
        (["--omprog", "--framing", "lines"], "not with --ack"),
        (["--omprog", "--bind", "tcp://127.0.0.1:*"], "--ack needs receivers to connect to"),
        (["--omprog", "--max-line", "2MiB"], "--max-line can be 1MiB"),
        (["--omprog", "--spool-slots", "0"], "1<=x<=64"),
        (["--omprog", "--nope"], "--nope"),
        (["--nope"], "--nope"),
        (["one", "two"], "two"),
        (["--omprog", "one", "two"], "two"),
    ],
)
def test_a_bad_argument_is_a_usage_error_that_shows_a_good_one(args, good):
    done = push("-c", NOBODY, *args)

    assert done.returncode == 2
    assert good in last_words(done)


def test_the_environment_alone_configures_a_run_as_omprog_needs_it(pull):
    with zmq.Context() as context, context.socket(zmq.PULL) as other:
        other.bind("tcp://127.0.0.1:*")
        both = (pull.last_endpoint + b" " + other.last_endpoint).decode()
        fields = {"ZMQPUSH_FIELD": "a=1 b=2", "ZMQPUSH_WHEN_FULL": "drop-oldest"}
        env = {"ZMQPUSH_CONNECT": both, "ZMQPUSH_LOGTYPE": "rsyslog", "ZMQPUSH_QUIET": "1"}
        done = run(ZMQPUSH, data=b"x\n", **env, **fields, ZMQPUSH_TIMEOUT="60")
        poller = zmq.Poller()
        for receiver in (pull, other):
            poller.register(receiver, zmq.POLLIN)
        ((receiver, _),) = poller.poll(PATIENCE * 1000)
        record = json.loads(receiver.recv())
    bad = run(ZMQPUSH, ZMQPUSH_WHEN_FULL="drop")

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert record.items() >= {"type": "rsyslog", "a": "1", "b": "2"}.items()
    assert (bad.returncode, "'drop-oldest'" in last_words(bad)) == (2, True)


def test_an_empty_type_is_none_at_all(pull):
    # rsyslog makes an empty argument of two spaces in a row.
    types = []
    for args, env in ((["", "-q"], {}), (["", "-q"], {"ZMQPUSH_LOGTYPE": "env"})):
        run(ZMQPUSH, *args, "-c", pull.last_endpoint, data=b"x\n", **env)
        types.append(json.loads(pull.recv())["type"])

    assert types == ["syslog", "env"]


def test_the_state_of_a_spool_that_rsyslog_uses_is_told_on_standard_output(tmp_path):
    done = run(ZMQPUSH, "--spool", tmp_path, "--timeout", 0, "-c", NOBODY, data=b"x\n")
    told = run(ZMQPUSH, "--spool", tmp_path, "--spool-status", ZMQPUSH_OMPROG="1")

    assert done.returncode == 75
    assert told.stdout.startswith(f"{tmp_path}/0: 1 records to be acknowledged".encode())
    assert (told.returncode, told.stderr) == (0, b"")


def test_an_environment_variable_of_an_image_is_no_option(pull):
    done = run(ZMQPUSH, "-c", pull.last_endpoint, data=b"x\n", ZMQPUSH_VERSION="0.1.0")

    assert sent(done) == 1


def test_the_file_yields_to_the_environment_and_that_to_flags(pull, toml):
    env = toml(f"""
        connect = ["{pull.last_endpoint.decode()}"]
        logtype = "file"
        max-line = 4
        delimiter = ';'
        [field]
        environment = "file"
        rack = 7
    """)
    records = []
    for args, variables in (
        ([], {}),
        ([], {"ZMQPUSH_LOGTYPE": "env", "ZMQPUSH_MAX_LINE": "9"}),
        (["flag", "--field", "a=b"], {"ZMQPUSH_LOGTYPE": "env"}),
    ):
        done = run(ZMQPUSH, *args, data=b"12345;", **env, **variables)
        records.append([json.loads(pull.recv()) for _ in range(sent(done))])
    texts = [[record["message"] for record in pieces] for pieces in records]

    assert texts == [["1234", "5"], ["12345"], ["1234", "5"]]
    assert [pieces[0]["type"] for pieces in records] == ["file", "env", "flag"]
    assert records[0][0].items() >= {"environment": "file", "rack": "7"}.items()
    assert records[2][0]["a"] == "b"


def test_the_file_is_named_by_config_or_lies_in_the_home_directory(pull, tmp_path):
    text = f'connect = "{pull.last_endpoint.decode()}"\nfield = ["a=1", "b=2"]\n'
    (tmp_path / ".config/zmqpush").mkdir(parents=True)
    path = tmp_path / ".config/zmqpush/zmqpush.toml"
    path.write_text(text)
    done = [
        run(ZMQPUSH, data=b"x", HOME=str(tmp_path), XDG_CONFIG_HOME=""),
        run(ZMQPUSH, "--config", path, data=b"x"),
        run(ZMQPUSH, data=b"x", ZMQPUSH_CONFIG=str(path)),
    ]

    assert list(map(sent, done)) == [1, 1, 1]
    for _ in done:
        assert json.loads(pull.recv()).items() >= {"a": "1", "b": "2"}.items()


@pytest.mark.parametrize(
    ("text", "code", "what"),
    [
        ("when-full =", 78, "is not TOML"),
        ("when-ful = 'block'", 78, "'when-ful'"),
        ("when-full = 'x'", 2, "'drop-oldest'"),
        ("when-full = ['block']", 2, "when-full"),
        ("queue-max = 'x'", 2, "64MiB"),
        ("queue-max = 1.5", 2, "queue-max"),
        ("queue-max = [1]", 2, "queue-max"),
        ("max-line = 2024-01-01", 2, "max-line"),
        ("delimiter = [';']", 2, "delimiter"),
        ("connect = 5", 2, "connect"),
        ("connect = [1.5]", 2, "connect"),
        ("field = ['x']", 2, "environment=production"),
        ("field = [1.5]", 2, "field"),
        ("quiet = 'banana'", 2, "'banana'"),
        ("quiet = [1]", 2, "quiet"),
    ],
)
def test_a_wrong_file_is_one_clear_line(toml, text, code, what):
    done = run(ZMQPUSH, data=b"x", ZMQPUSH_TIMEOUT="0", **toml(text))

    assert what in last_words(done)
    assert done.returncode in (code, 78)


def test_a_file_for_plain_delivery_does_not_hinder_acknowledged_delivery(toml, tmp_path):
    """One file is for all that runs on a machine; in so many words it is refused."""
    options = (ZMQPUSH, "--spool", tmp_path / "spool", "-c", NOBODY)
    env = toml('framing = "lines"\ntimeout = 0')

    assert run(*options, data=b"x\n", **env).returncode == 75
    assert "not with --ack" in last_words(run(*options, "--framing", "lines", **env))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_exit_78(toml, tmp_path):
    env = toml("")
    (tmp_path / "zmqpush/zmqpush.toml").chmod(0)
    done = run(ZMQPUSH, **env)

    assert (done.returncode, "cannot read" in last_words(done)) == (78, True)


def test_a_home_that_cannot_be_looked_into_holds_no_file(monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "/" + 300 * "x")

    assert config.find("nobody.toml") is None


def test_an_endpoint_in_use_is_exit_69(pull):
    done = push("-b", pull.last_endpoint, data=b"x\n")

    assert done.returncode == 69
    assert last_words(done).startswith(f"zmqpush: cannot bind {pull.last_endpoint.decode()}: ")
    assert done.stderr.count(b"\n") == 1


def test_a_host_that_cannot_be_resolved_is_an_absent_receiver():
    done = push("-c", "tcp://host.invalid:5014", "--timeout", "0.5", data=b"x\n")

    assert (done.returncode, sent(done)) == (69, 0)
    assert done.stderr.endswith(b"zmqpush: 0 dropped, 1 lost\n")


def test_localhost_is_resolved_and_the_summary_is_one_exact_line(pull, start):
    endpoint = pull.last_endpoint.replace(b"127.0.0.1", b"localhost")
    child = start(ZMQPUSH, "-c", endpoint)
    out, err = child.communicate(b"x\n", timeout=PATIENCE)

    assert SUMMARY.fullmatch(out).groups() == (b"1", b"%d" % child.pid)
    assert (json.loads(pull.recv())["@pid"], err) == (child.pid, b"")
    assert push("-q", "-c", endpoint, data=b"y\n").stdout == b""


@pytest.mark.parametrize("size", ["1", "1023KiB"])
def test_a_memory_in_which_no_sender_makes_progress_is_refused(size):
    done = run(ZMQPULL, "--memory", size)

    assert done.returncode == 2
    assert last_words(done).endswith(f"{size!r} is too little for senders to share; they need 1MiB")
