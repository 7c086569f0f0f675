"""
What docs/collectors.md promises of Logstash, Vector, Fluent Bit and Elasticsearch.

None of them is needed here. What they do with what they get is written down in small models, from
their own sources and documentation; where the real program is there, it checks its configuration.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tomllib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import jsonschema
import pytest

from helpers import BIN, PATIENCE, ZMQPULL, ZMQPUSH, push, wait_until

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "collectors.md").read_text()
LOGSTASH = sorted((ROOT / "contrib" / "logstash").glob("*.conf"))
VECTOR = sorted((ROOT / "contrib" / "vector").glob("*.toml"))
FLUENT_BIT = sorted((ROOT / "contrib" / "fluent-bit").glob("*.yaml"))
LINES = [b"ordinary", b"", b"\0\x1b[31mred\t\x7f", b"caf\xe9 \xff", "ü€\u2028".encode(), b'"\\,[{']
DATA = b"\n".join(LINES)
TEXTS = [line.decode("utf-8", "backslashreplace") for line in LINES]


class JsonCodec:
    """
    Logstash's ``json`` codec.

    An object is an event, an array one event for each of its elements, a blank none. What cannot be
    parsed becomes the message of a tagged event. The parser reads one value and no further.
    """

    def decode(self, frame: bytes) -> Iterator[dict]:
        text = frame.decode()
        if not text.strip():
            return
        try:
            value, _ = json.JSONDecoder().raw_decode(text.lstrip())
            events = value if isinstance(value, list) else [value]
            if not all(isinstance(event, dict) for event in events):
                raise ValueError("no object")
        except ValueError:
            events = [{"message": text, "tags": ["_jsonparsefailure"]}]
        yield from events


class JsonLinesCodec:
    """Logstash's ``json_lines`` codec: it waits for the newline, across messages, too."""

    def __init__(self) -> None:
        self._rest = b""

    def decode(self, frame: bytes) -> Iterator[dict]:
        *lines, self._rest = (self._rest + frame).split(b"\n")
        for line in lines:
            yield from JsonCodec().decode(line)


def every_frame(frames):
    """Return which frames logstash-input-zeromq decodes since 2.1."""
    return frames


def every_second_frame(frames):
    """Return which frames it decoded before: the first of two was a topic, and dropped."""
    return frames[1::2] + (frames[-1:] if len(frames) % 2 else [])


def logstash(messages, frames_of, codec) -> list[dict]:
    """Return the events that logstash-input-zeromq makes of some messages."""
    events = [e for frames in messages for f in frames_of(frames) for e in codec.decode(f)]
    return [{"host": "where Logstash runs"} | event for event in events]


def shipped(pull, framing, *args, data=DATA):
    """Return the messages of the real zmqpush."""
    args = ["--format", "logstash", *args]
    done = push("-c", pull.last_endpoint, "--framing", framing, *args, data=data)
    assert done.returncode == 0, done
    messages = []
    while sum(f.count(b'"message":') for frames in messages for f in frames) < len(LINES):
        messages.append(pull.recv_multipart())
    return messages


@pytest.mark.parametrize(
    ("framing", "frames_of", "codec"),
    [
        ("single", every_frame, JsonCodec),
        ("single", every_second_frame, JsonCodec),
        ("frames", every_frame, JsonCodec),
        ("array", every_frame, JsonCodec),
        ("array", every_second_frame, JsonCodec),
        ("lines", every_frame, JsonLinesCodec),
        ("lines", every_second_frame, JsonLinesCodec),
    ],
)
def test_logstash_makes_an_event_of_each_line(pull, framing, frames_of, codec):
    events = logstash(shipped(pull, framing), frames_of, codec())

    assert [event["message"] for event in events] == TEXTS
    for event in events:
        assert event["host"] == socket.gethostname()
        assert event["@version"] == "1"
        assert event["type"] == "syslog"
        assert "tags" not in event


@pytest.mark.parametrize(
    ("framing", "frames_of", "codec"),
    [
        ("frames", every_second_frame, JsonCodec),  # drops every second record
        ("lines", every_frame, JsonCodec),  # parses the first record of each block
        ("single", every_frame, JsonLinesCodec),  # waits for a newline that never comes
        ("array", every_frame, JsonLinesCodec),
    ],
)
def test_logstash_loses_records_with_the_wrong_codec_or_an_old_plugin(
    pull, framing, frames_of, codec
):
    events = logstash(shipped(pull, framing), frames_of, codec())

    assert len(events) < len(LINES)


def test_what_is_no_record_harms_no_other(pull):
    messages = shipped(pull, "single")
    events = logstash([messages[0], [b"no json"], [b""], messages[1]], every_frame, JsonCodec())

    assert [e.get("tags") for e in events] == [None, ["_jsonparsefailure"], None]


# The schemas.

dates = jsonschema.FormatChecker(formats=())


@dates.checks("date-time", raises=ValueError)
def is_date_time(value):
    """Return whether it is of RFC 3339, with a time zone."""
    shape = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)"
    return bool(re.fullmatch(shape, value) and datetime.fromisoformat(value).tzinfo)


def schema(name):
    contents = json.loads((ROOT / "tests" / "schemas" / name).read_text())
    jsonschema.Draft202012Validator.check_schema(contents)
    return jsonschema.Draft202012Validator(contents, format_checker=dates)


SCHEMAS = {"logstash": schema("logstash-v1.json"), "ecs": schema("ecs.json")}
FIELDS = [
    [],
    ["environment=production", "@x=1", "é=\udcff"],
    ["labels.x=1", "labels.y=", "service.name=shop", "host.os.type=linux", "log.level=warn"],
]


def records(pull, format, fields):
    """Return records of every kind of line that the real zmqpush makes."""
    args = [word for field in fields for word in ("--field", field)]
    args += ["--format", format, "--max-line", "64"]
    data = b"\n".join([*LINES, b"x" * 150])
    messages = shipped(pull, "frames", *args, data=data)
    made = [json.loads(frame) for frames in messages for frame in frames]
    while "".join(record["message"] for record in made)[-150:] != "x" * 150:
        made += map(json.loads, pull.recv_multipart())
    return made


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("format", SCHEMAS)
def test_every_record_is_what_the_schema_of_its_format_says(pull, format, fields):
    made = records(pull, format, fields)

    for record in made:
        SCHEMAS[format].validate(record)
    pieces = [r for r in made if r.get("@partial") or r.get("tags") == ["partial"]]
    assert [len(piece["message"]) for piece in pieces] == [64, 64]


GOOD = {
    "logstash": {
        "@timestamp": "2026-01-02T03:04:05.678Z",
        "@version": "1",
        "message": "",
        "type": "syslog",
        "host": "web1",
        "@pid": 1,
    },
    "ecs": {
        "@timestamp": "2026-01-02T03:04:05.678Z",
        "message": "",
        "ecs": {"version": "8.11.0"},
        "event": {"dataset": "syslog"},
        "host": {"name": "web1"},
        "process": {"pid": 1},
    },
}


@pytest.mark.parametrize(
    ("format", "wrong"),
    [
        ("logstash", {"@version": 1}),
        ("logstash", {"@version": "2"}),
        ("logstash", {"host": {"name": "web1"}}),
        ("logstash", {"message": None}),
        ("logstash", {"tags": [1]}),
        ("logstash", {"@timestamp": "2026-01-02 03:04:05"}),
        ("logstash", {"@timestamp": "2026-13-02T03:04:05Z"}),
        ("ecs", {"@timestamp": 1.5}),
        ("ecs", {"host": "web1"}),
        ("ecs", {"process": {"pid": "1"}}),
        ("ecs", {"ecs": {}}),
        ("ecs", {"@partial": True}),
        ("ecs", {"@pid": 1}),
        ("ecs", {"tags": "partial"}),
        ("ecs", {"labels": {"a": {"b": "c"}}}),
        ("ecs", {"labels.a": "c"}),
        ("ecs", {"service": "shop"}),
    ],
)
def test_a_schema_refuses_what_is_wrong(format, wrong):
    SCHEMAS[format].validate(GOOD[format])

    assert not SCHEMAS[format].is_valid(GOOD[format] | wrong)


@pytest.fixture(scope="module")
def elastic():
    """Return the fields of ECS 8.11 as Elastic publishes them: name to type and whether a list."""
    script = 'const {EcsFlat} = require("@elastic/ecs"); console.log(JSON.stringify(EcsFlat))'
    path = "/usr/local/lib/node_modules:/usr/lib/node_modules"
    node = shutil.which("node")
    done = node and subprocess.run(
        [node, "-e", script], env=os.environ | {"NODE_PATH": path}, capture_output=True
    )
    if not done or done.returncode:
        pytest.skip("needs nodejs, and npm install --global @elastic/ecs@8.11.1")
    return {
        name: (f["type"], "array" in f["normalize"]) for name, f in json.loads(done.stdout).items()
    }


def leaves(value, path=""):
    """Yield the dotted names and the values of a record."""
    if not isinstance(value, dict):
        yield path, value
        return
    for name, inner in value.items():
        yield from leaves(inner, f"{path}.{name}" if path else name)


TYPES = {"keyword": str, "match_only_text": str, "wildcard": str, "date": str, "long": int}


@pytest.mark.parametrize("fields", FIELDS)
def test_every_field_is_in_ecs_as_elastic_publishes_it(pull, elastic, fields):
    for record in records(pull, "ecs", fields):
        for name, value in leaves(record):
            if name.startswith("labels."):
                assert elastic["labels"] == ("object", False)
                assert isinstance(value, str)
                continue
            kind, is_list = elastic[name]
            assert isinstance(value, list) == is_list, name
            assert all(isinstance(v, TYPES[kind]) for v in (value if is_list else [value])), name


# Files that are followed.


class Follower:
    """
    Reads whole lines of a file from a position that it keeps, as all three collectors do.

    Args:
        rewinds: Whether it begins anew at a file that is shorter than it was, as Logstash and
            Fluent Bit do; Vector does not look.

    """

    def __init__(self, *, rewinds: bool) -> None:
        self._rewinds = rewinds
        self._position = 0
        self.messages: list[str] = []

    def read(self, path: Path) -> None:
        with path.open("rb") as file:
            if self._rewinds and os.fstat(file.fileno()).st_size < self._position:
                self._position = 0
            file.seek(self._position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        self.messages += [json.loads(line)["message"] for line in whole.splitlines()]


def test_a_follower_loses_nothing_when_zmqpull_is_killed(start, tmp_path):
    endpoint, spool = f"ipc://{tmp_path}/acked", tmp_path / "spool"
    receive = [ZMQPULL, "--ack-bind", endpoint, "--state", tmp_path / "state", "--to"]
    receive.append(tmp_path / "{host}-{type}-%Y.ndjson")
    ship = [ZMQPUSH, "--spool", spool, "--format", "ecs", "-c", endpoint, "app"]
    killed = start(*receive, env=os.environ | {"ZMQPUSH_FAULT": "output-written:2"})
    first, second = ["1", "2", "3"], ["4", "5", "6"]

    assert push(*ship[1:], data=b"1\n2\n3\n").returncode == 0
    (path,) = tmp_path.glob("*.ndjson")
    committed = path.stat().st_size
    sender = start(*ship)
    sender.stdin.write(b"4\n5\n6\n")
    sender.stdin.close()
    assert killed.wait(PATIENCE) == -signal.SIGKILL
    sender.kill()
    followers = [Follower(rewinds=False), Follower(rewinds=True)]
    for follower in followers:
        follower.read(path)
        assert follower.messages == first + second

    start(*receive)
    wait_until(lambda: path.stat().st_size == committed)
    for follower in followers:
        follower.read(path)
    assert push(*ship[1:], data=b"7\n").returncode == 0
    for follower in followers:
        follower.read(path)
    steady, rewinding = followers
    assert steady.messages == [*first, *second, "7"]
    assert rewinding.messages == [*first, *second, *first, *second, "7"]


# The configurations.


def test_the_page_tells_of_every_configuration():
    for path in (*LOGSTASH, *VECTOR, *FLUENT_BIT):
        assert f"../{path.relative_to(ROOT)}" in PAGE


@pytest.mark.parametrize("path", LOGSTASH, ids=lambda path: path.name)
def test_a_pipeline_of_logstash_is_one(path):
    parser = pytest.importorskip("logstash_pipeline_parser", reason="needs it from PyPI")
    sections = [section for section, _ in parser.Pipeline(path.read_text()).parse()]

    assert sections == ["input", "output"]


@pytest.mark.parametrize("path", VECTOR, ids=lambda path: path.name)
def test_a_configuration_of_vector_joins_its_parts(path):
    config = tomllib.loads(path.read_text())
    parts = config["sources"] | config.get("transforms", {})

    for part in (config.get("transforms", {}) | config["sinks"]).values():
        assert set(part["inputs"]) <= set(parts)


def test_the_program_in_the_configuration_of_vector_makes_records_of_lines(pull):
    vrl = pytest.importorskip("pyvrl", reason="needs pyVRL from PyPI")
    config = tomllib.loads((ROOT / "contrib" / "vector" / "files.toml").read_text())
    program = vrl.Transform(config["transforms"]["records"]["source"] + "\n.")
    about = {"file": "/var/log/all/x.ndjson", "host": "where Vector runs", "source_type": "file"}

    for record in records(pull, "ecs", ["service.name=shop"]):
        assert program.remap(about | {"message": json.dumps(record)}) == record
    for other in ("no json", "[1]", '{"torn":'):
        assert program.remap(about | {"message": other}) == about | {"message": other}


@pytest.mark.parametrize("path", FLUENT_BIT, ids=lambda path: path.name)
def test_a_configuration_of_fluent_bit_names_what_there_is(path):
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    config = yaml.safe_load(path.read_text())
    parsers = {parser["name"]: parser for parser in config.get("parsers", [])}
    inputs, outputs = config["pipeline"]["inputs"], config["pipeline"]["outputs"]

    assert {*config} <= {"service", "parsers", "pipeline"}
    assert {*config["pipeline"]} == {"inputs", "outputs"}
    for section in (config.get("service", {}), *parsers.values(), *inputs, *outputs):
        assert all(isinstance(value, str | int) for value in section.values())
        assert all(name == name.lower() for name in section)
    assert [part["name"] for part in inputs] in (["stdin"], ["tail"])
    assert {part["parser"] for part in inputs if "parser" in part} == {*parsers}
    assert all(part["match"] == "*" for part in outputs)
    for parser in parsers.values():
        stamp = GOOD["ecs"][parser["time_key"]]
        datetime.strptime(stamp, parser["time_format"].replace("%L", "%f"))


CHECKS = [
    *(["vector", "validate", "--no-environment", path] for path in VECTOR),
    *(["fluent-bit", "--dry-run", "-c", path] for path in FLUENT_BIT),
    *(["logstash", "--config.test_and_exit", "-f", path] for path in LOGSTASH),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: f"{check[0]} {check[-1].name}")
def test_the_real_program_takes_its_configuration(check):
    if not shutil.which(check[0]):
        pytest.skip(f"{check[0]} is not installed, and not in Debian")
    if check[-1].stem == "zeromq":
        pytest.skip("the plugin cannot be installed in a current Logstash")
    done = subprocess.run(check, capture_output=True, timeout=5 * PATIENCE)

    assert done.returncode == 0, done


# The commands of the page in ``console`` blocks; tests/test_docs.py runs those in ``sh`` blocks.

COMMANDS = re.findall(r"^\$ (.*)", PAGE, re.MULTILINE)
RECEIVES = [command for command in COMMANDS if command.startswith("zmqpull")]
SHIPS = [command for command in COMMANDS if command.startswith("app | zmqpush")]


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("command", RECEIVES)
def test_a_command_that_receives_hands_records_on(command, start, tmp_path):
    program(tmp_path / "app", "echo probe")
    for name in ("logstash", "vector", "fluent-bit"):
        program(tmp_path / name, 'test -r "$2" && exec cat')
    ship = "app | zmqpush --connect tcp://logs.example.com:5014"
    if "--ack-bind" in command:
        (ship,) = SHIPS

    def bash(command):
        command = re.sub(r"tcp://(\*|logs\.example\.com):\d+", f"ipc://{tmp_path}/socket", command)
        return ["bash", "-c", re.sub(r"/var/(log|lib|spool)", str(tmp_path), command)]

    local = {"cwd": ROOT, "env": os.environ | {"PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}"}}
    with (tmp_path / "out").open("wb") as out:
        receiver = start(*bash(command), stdout=out, start_new_session=True, **local)

    def arrived():
        written = [tmp_path / "out", *(tmp_path / "all").glob(f"{socket.gethostname()}-app-*")]
        return any(b'"message":"probe"' in path.read_bytes() for path in written)

    try:
        subprocess.run(bash(ship), check=True, capture_output=True, timeout=PATIENCE, **local)
        wait_until(arrived)
    finally:
        os.killpg(receiver.pid, signal.SIGTERM)


def test_every_command_is_one_of_those():
    assert sorted(COMMANDS) == sorted(RECEIVES + SHIPS)


def test_the_page_shows_a_pipe_for_each_collector():
    piped = sorted(re.search(r"\| (\S+)", c)[1] for c in RECEIVES if "|" in c)

    assert piped == ["fluent-bit", "logstash", "vector"]
