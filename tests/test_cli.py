"""The command line: help, flags, environment, TOML, and what goes wrong with them."""

import json
import os
import re
import subprocess
import sys

import pytest
import zmq

from helpers import (
    NOBODY,
    PATIENCE,
    SUMMARY,
    ZMQKEYS,
    ZMQPULL,
    ZMQPUSH,
    push,
    sent,
    wait_until_ready,
    words,
)
from zmqpush.cli import config_file as config

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
        ("--to", "--option", "--dead-letters"),
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
        (["--delimiter", "\\"], r"\xNN"),
        (["--delimiter", r"\q"], r"\xNN"),
        (["--delimiter", r"\x1"], r"\xNN"),
        (["--delimiter", r"\x"], r"\xNN"),
        (["--delimiter", r"\012"], r"\xNN"),
        (["--delimiter", r"\u00e9"], r"\xNN"),
        (["--timeout", "1_0"], "a good one is 2.5"),
        (["--timeout", "1e400"], "a good one is 2.5"),
        (["--spool", ""], "'' is not a path"),
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
        (["--omprog", "--spool-slots", "0"], "from 1 to 64"),
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
    assert done.stderr.startswith(b"zmqpush: ")
    assert (done.stderr.count(b"\n"), done.stderr[-21:]) == (1, b"; see zmqpush --help\n")


@pytest.mark.parametrize(
    ("text", "delimiter"),
    [
        (r"\0", b"\0"),
        (r"\r\n", b"\r\n"),
        (r"\t", b"\t"),
        (r"\x1e\xFF", b"\x1e\xff"),
        (r"\\n", rb"\n"),
        ("é;", "é;".encode()),
        (os.fsdecode(b"\xfe"), b"\xfe"),
    ],
)
def test_a_delimiter_is_text_with_escapes(pull, text, delimiter):
    done = push("-c", pull.last_endpoint, "--delimiter", text, data=b"1" + delimiter + b"2")

    assert (sent(done), [json.loads(pull.recv())["message"] for _ in "12"]) == (2, ["1", "2"])


@pytest.mark.parametrize(
    ("to", "what"),
    [
        ("logs/{foo}", "{foo} is not one of {type}, {host}"),
        ("logs/{}", "{} is not one of {type}, {host}"),
        ("logs/{type", "a { stands alone"),
        ("logs/type}", "a } stands alone"),
        ("logs/%Q", "%Q is no time code; a percent sign is %%"),
        ("logs/100%", "% is no time code; a percent sign is %%"),
    ],
)
def test_what_is_wrong_in_a_template_is_named(to, what):
    done = run(ZMQPULL, "--to", to)

    assert done.returncode == 2
    assert last_words(done).startswith(
        f"zmqpull: {to!r} is not a template for file names: {what}; a good one is /var/log/all/"
    )


@pytest.mark.parametrize("args", [("new",), ("--nope",), ("nope",), ("new", "x", "--name", " ")])
def test_a_wrong_use_of_the_keys_command_is_one_line(args):
    done = run(ZMQKEYS, *args)

    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert re.fullmatch(r"zmqpush-keys: .+; see zmqpush-keys.* --help", last_words(done))


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


def test_variables_of_an_image_of_kubernetes_and_of_the_other_program_are_no_options(pull):
    names = ("VERSION", "SERVICE_HOST", "SERVICE_PORT_ACK", "PORT", "PORT_5014_TCP_ADDR")
    others = dict.fromkeys((f"ZMQPUSH_{name}" for name in names), "1")
    done = run(ZMQPUSH, "-c", pull.last_endpoint, data=b"x\n", ZMQPULL_BIND="x", **others)

    assert (sent(done), done.stderr) == (1, b"")


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
    ("text", "what"),
    [
        ("when-full =", " is not TOML"),
        ("field = " + 5000 * "[", " is not TOML: it is nested too deeply"),
        ("when-ful = 'block'", ": unknown key 'when-ful'; is it when-full?"),
        ("Spool = 'x'", ": unknown key 'Spool'; is it spool?"),
        ("xyzzy = 1", ": unknown key 'xyzzy'; there are ack, allow,"),
        ("when-full = 'x'", ": when-full: 'x' is not one of 'block'"),
        ("when-full = ['block']", ": when-full: a list is not a text"),
        ("when-full = 1", ": when-full: 1 is not a text"),
        ("ack = 1", ": ack: 1 is not true or false"),
        ("ack = 'yes'", ": ack: 'yes' is not true or false"),
        ("quiet = 'banana'", ": quiet: 'banana' is not true or false"),
        ("quiet = [true]", ": quiet: a list is not true or false"),
        ("insecure = {}", ": insecure: a table is not true or false"),
        ("null = 2024-01-01", ": null: 2024-01-01 is not true or false"),
        ("queue-max = 'x'", ": queue-max: 'x' is not a size; a good one is 64MiB"),
        ("queue-max = 1.5", ": queue-max: '1.5' is not a size"),
        ("queue-max = -1", ": queue-max: '-1' is not a size"),
        ("queue-max = true", ": queue-max: true is not a number"),
        ("queue-max = [1]", ": queue-max: a list is not a number"),
        ("queue-max = 12:00:00", ": queue-max: 12:00:00 is not a number"),
        ("spool-max = 1", ": spool-max: '1' is too small for a spool"),
        ("spool-slots = 1.5", ": spool-slots: '1.5' is not a number of processes"),
        ("spool-slots = true", ": spool-slots: true is not a number"),
        ("timeout = true", ": timeout: true is not a number"),
        ("timeout = nan", ": timeout: 'nan' is not a time in seconds"),
        ("grace = inf", ": grace: 'inf' is not a time in seconds"),
        ("grace = 1979-05-27T07:32:00Z", ": grace: 1979-05-27 07:32:00+00:00 is not a number"),
        ("max-line = 2024-01-01", ": max-line: 2024-01-01 is not a number"),
        ("delimiter = [';']", ": delimiter: a list is not a text"),
        ("delimiter = '\\q'", ": delimiter: "),
        ("logtype = 5", ": logtype: 5 is not a text"),
        ("spool = true", ": spool: true is not a text"),
        ("spool = ''", ": spool: '' is not a path"),
        ('key = "a\\u0000b"', ": key: 'a\\x00b' holds a NUL"),
        ("connect = 5", ": connect: 5 is not a text"),
        ("connect = [1, 2]", ": connect: 1 is not a text"),
        ("connect = [['tcp://a:1']]", ": connect: a list is not a text"),
        ("connect = 'nowhere'", ": connect: 'nowhere' is not an endpoint"),
        ("[connect]\na = 1", ": connect: a table is not a text"),
        ("field = ['x']", ": field: 'x' is not a field; a good one is environment=production"),
        ("field = [1.5]", ": field: 1.5 is not a text"),
        ("field.a.b = 1", ": field: a is a table: a name with dots stands in quotes"),
        ("field.'a=b' = 1", ": field: 'a=b' is no name"),
        ("field.a = 2024-01-01", ": field: a is 2024-01-01"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_file_the_key_and_the_mistake(toml, text, what):
    env = toml(text)
    done = run(ZMQPUSH, **env)

    assert done.stderr.decode().startswith(
        f"zmqpush: {env['XDG_CONFIG_HOME']}/zmqpush/zmqpush.toml{what}"
    )
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (78, b"", 1)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("count = true", "count: true is not a number"),
        ("count = 0", "count: '0' is not a number of records"),
        ("count = 1.5", "count: '1.5' is not a number of records"),
        ("memory = false", "memory: false is not a number"),
        ("to = 1", "to: 1 is not a text"),
        ("state = ['a']", "state: a list is not a text"),
        ("option = {'a.b' = [1]}", "option: a.b is a list"),
        ("option = ['secret']", "option: an option is NAME=VALUE"),
        ("ack-bind = ['tcp://x']", "ack-bind: 'tcp://x' is not an endpoint"),
    ],
)
def test_a_wrong_file_of_the_receiver_is_told_of_in_the_same_way(tmp_path, text, what):
    path = tmp_path / "zmqpull.toml"
    path.write_text(text)
    done = run(ZMQPULL, "--config", path)

    assert done.stderr.decode().startswith(f"zmqpull: {path}: {what}")
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (78, b"", 1)
    assert b"secret" not in done.stderr


def test_numbers_and_truth_in_the_file_are_what_they_say(pull, toml):
    env = toml(f"""
        connect = "{pull.last_endpoint.decode()}"
        queue-max = 67108864
        timeout = 60
        grace = 2.5
        quiet = true
        null = false
        max-line = 4
        [field]
        rack = 7
        load = 0.5
        production = true
    """)
    done = run(ZMQPUSH, data=b"12345", **env)
    record = json.loads(pull.recv())

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert record.items() >= {"message": "1234", "rack": "7", "load": "0.5"}.items()
    assert record["production"] == "true"


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("QUEUE_MAX", "1e6", "'1e6' is not a size"),
        ("ACK", "banana", "'banana' is not a valid boolean"),
        ("CONNECT", "nowhere", "'nowhere' is not an endpoint"),
        ("FIELD", "a=1 b", "'b' is not a field"),
        ("SPOOL_SLOTS", "x", "'x' is not a number of processes"),
        ("FORMAT", "xml", "'xml' is not one of"),
        ("CONFIG", "/nonexistent", "File '/nonexistent' does not exist"),
    ],
)
def test_a_wrong_variable_is_named(name, value, what):
    done = run(ZMQPUSH, **{f"ZMQPUSH_{name}": value})

    assert done.returncode == 2
    assert last_words(done).startswith(f"zmqpush: ZMQPUSH_{name}: {what}")
    assert done.stderr.count(b"\n") == 1


def test_an_unknown_variable_is_told_of_with_the_nearest_name_and_stops_nothing(pull):
    done = run(ZMQPUSH, "-c", pull.last_endpoint, data=b"x\n", ZMQPUSH_QUEUEMAX="1MiB")
    other = run(ZMQPULL, "--to", "%", ZMQPULL_STATES="x", ZMQPUSH_NOPE="of the other program")

    assert sent(done) == 1
    assert done.stderr == (
        b"zmqpush: the variable ZMQPUSH_QUEUEMAX is no option: is it ZMQPUSH_QUEUE_MAX?\n"
    )
    assert other.stderr.splitlines()[0] == (
        b"zmqpull: the variable ZMQPULL_STATES is no option: is it ZMQPULL_STATE?"
    )
    assert other.stderr.count(b"\n") == 2


# Options that have nothing to do: with a value, and what is missing or in the way.
POINTLESS = {
    "--sync off": ("", "--sync is about a --spool"),
    "--spool-max 2MiB": ("", "--spool-max is about a --spool"),
    "--spool-slots 2": ("--ack", "--spool-slots is about a --spool"),
    "--confirm remote": ("--ack", "--confirm says when --omprog answers"),
    "--confirm write": ("--omprog", "--confirm write needs a --spool"),
    "--spread": ("-c tcp://127.0.0.1:8", "--spread orders the receivers of --ack"),
    "--spread ": ("--ack", "--spread orders several receivers"),
    "--insecure": ("", "--insecure is about a --bind"),
    "--queue-max 2MiB": ("--spool {}/spool", "with --spool nothing waits in --queue-max"),
    "--framing lines": ("--spool {}/spool", "not with --ack"),
    "--framing array": ("--format raw", "cannot hold --format raw"),
    "--field a=b": ("--format raw", "no place for fields"),
    "--max-line 2MiB": ("--ack", "--max-line can be 1MiB with --ack"),
    "--when-full drop-oldest": ("--omprog", "--when-full block"),
    "--delimiter ;": ("--omprog", "newlines end its messages"),
    "--null": ("--omprog", "newlines end its messages"),
}


@pytest.mark.parametrize("place", ["flag", "variable", "file"])
@pytest.mark.parametrize("option", POINTLESS)
def test_an_option_with_nothing_to_do_is_an_error_on_the_command_line_only(
    toml, tmp_path, option, place
):
    """The file and the environment are for all that runs on a machine."""
    beside, why = POINTLESS[option]
    name, _, value = option.strip().removeprefix("--").partition(" ")
    env = {}
    if place == "variable":
        env = {f"ZMQPUSH_{name.upper().replace('-', '_')}": value or "1"}
    elif place == "file":
        env = toml(f"{name} = {repr(value) if value else 'true'}")
    args = [*beside.format(tmp_path).split(), *(option.split() if place == "flag" else ())]
    data = b"" if "--omprog" in args else b"x\n"  # which would wait for its confirmation
    done = run(ZMQPUSH, "-c", NOBODY, "--timeout", 0, *args, data=data, **env)

    if place == "flag":
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
        assert why in last_words(done)
    else:
        assert done.returncode in ((69, 75) if data else (0,)), done.stderr


RECEIVER_POINTLESS = {
    "-X a=b": ("--to file", "-X is for what --to SCHEME:// names"),
    "--dead-letters letters": ("", "--dead-letters is for what --to PATH or URL refuses"),
    "--state state": ("", "--state is about what is in --to PATH or URL"),
    "--insecure": ("-c tcp://127.0.0.1:8", "--insecure is about a --bind or an --ack-bind"),
}


@pytest.mark.parametrize("place", ["flag", "variable"])
@pytest.mark.parametrize("option", RECEIVER_POINTLESS)
def test_the_same_of_the_receiver(start, tmp_path, option, place):
    beside, why = RECEIVER_POINTLESS[option]
    name, *value = option.removeprefix("--").removeprefix("-").replace("X ", "option ").split()
    env = BARE
    if place == "variable":
        env = BARE | {f"ZMQPULL_{name.upper().replace('-', '_')}": value[0] if value else "1"}
    args = [*beside.format(f"ipc://{tmp_path}/s").split(), *(option.split() * (place == "flag"))]
    where = [] if "-b" in args or "-c" in args else ["-a", f"ipc://{tmp_path}/s"]
    child = start(ZMQPULL, *where, *args, env=env, cwd=tmp_path)
    if place == "flag":
        _, err = child.communicate(timeout=PATIENCE)
        assert (child.returncode, err.count(b"\n")) == (2, 1)
        assert err.decode().startswith(f"zmqpull: {why}")
    else:
        wait_until_ready(child)
        child.terminate()
        assert child.wait(PATIENCE) == 0
        assert not (tmp_path / "state").exists()


def test_of_two_places_the_more_explicit_one_says_what_ends_a_line(pull, toml):
    env = toml("delimiter = ';'")
    c = ("-c", pull.last_endpoint)
    assert sent(run(ZMQPUSH, *c, "--null", data=b"a;b\0c", **env)) == 2
    env = toml("null = true")
    assert sent(run(ZMQPUSH, *c, "--delimiter", ";", data=b"a;b\0c;d", **env)) == 3
    both = run(ZMQPUSH, *c, **toml("null = true\ndelimiter = ';'"))
    assert (both.returncode, "exclude each other" in last_words(both)) == (78, True)


def test_a_contradiction_names_the_places_that_it_comes_from(toml):
    env = toml("bind = ['tcp://127.0.0.1:*']")
    done = run(ZMQPUSH, "--ack", ZMQPUSH_NULL="1", **env)
    path = f"{env['XDG_CONFIG_HOME']}/zmqpush/zmqpush.toml"

    assert last_words(done) == (
        "zmqpush: --ack needs receivers to connect to, not --bind "
        f"({path}: bind); see zmqpush --help"
    )


def test_the_name_of_a_file_is_answered_with_how_to_read_it(tmp_path):
    path = tmp_path / "access log"
    path.touch()
    done = run(ZMQPUSH, "nginx", path)
    many = run(ZMQPUSH, "nginx", "access")

    assert (done.returncode, many.returncode) == (2, 2)
    assert last_words(done).startswith(
        f"zmqpush: zmqpush reads standard input: zmqpush nginx < '{path}'; see"
    )
    assert last_words(many).startswith("zmqpush: 'access' is one word too many")


def test_the_name_of_a_file_for_a_type_is_answered_at_a_terminal(start, tmp_path):
    path = tmp_path / "app.log"
    path.touch()
    leader, follower = os.openpty()
    child = start(ZMQPUSH, path, "-c", NOBODY, stdin=follower)
    _, err = child.communicate(timeout=PATIENCE)
    os.close(leader)
    os.close(follower)

    assert child.returncode == 2
    assert err.decode().startswith(f"zmqpush: zmqpush reads standard input: zmqpush TYPE < {path}")


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
    assert last_words(done).endswith(
        f"{size!r} is too little for senders to share; they need 1MiB; see zmqpull --help"
    )


@pytest.mark.parametrize("option", ["--allow", "--begin-mark", "--commit-mark"])
def test_an_empty_text_is_no_place_and_no_mark(option):
    """As that of a variable that is not set: it must not mean the current directory."""
    done = push("-b", "ipc:///nowhere", "--omprog", "--transactions", option, "")

    assert done.returncode == 2
    assert done.stderr.startswith(b"zmqpush: %s: '' is not a " % option.encode())


def test_a_key_that_is_in_the_file_twice_is_refused(tmp_path):
    (tmp_path / "it.toml").write_text('when-full = "block"\nwhen_full = "drop-oldest"\n')
    done = push("--config", tmp_path / "it.toml")

    assert (done.returncode, done.stderr.endswith(b" is there twice\n")) == (78, True)


def test_one_file_may_hold_the_keys_of_programs_that_bind_and_that_connect(tmp_path):
    """What has nothing to do is not looked at, as with other options of a file."""
    for name in ("bind", "connect"):
        (tmp_path / "it.toml").write_text('key = "none"\nserver-key = "x"\nallow = "any"\n')
        done = push("--config", tmp_path / "it.toml", f"--{name}", "tcp://127.0.0.1:9")
        assert b"nothing is" not in done.stderr
    done = run(ZMQPULL, "--config", tmp_path / "it.toml")  # binds by default
    assert b"cannot read none: " in done.stderr


@pytest.mark.parametrize("option", ["--help", "--version"])
@pytest.mark.parametrize("program", ["push", "pull"])
def test_help_and_version_load_no_event_loop_and_no_cryptography(program, option):
    code = f"""
import sys
from zmqpush.__main__ import {program}
sys.argv = ["zmq{program}", "{option}"]
try:
    {program}()
finally:
    loaded = {{name.partition(".")[0] for name in sys.modules}}
    print("loaded:", *loaded & {{"asyncio", "logging", "nacl", "socket", "tomllib", "zmq"}})
"""
    done = run(sys.executable, "-c", code)

    assert done.stdout.decode().splitlines()[-1] == "loaded:"
