"""
A real rsyslogd ships with the configuration of ``contrib/rsyslog``, and things die.

The truth is what was sent: numbered messages, of which none may be missing. How many may
repeat is what the comments in the configuration say.
"""

import json
import os
import random
import re
import subprocess
import time
from pathlib import Path

import pytest

from chaos import DOSE, LONG, kill
from helpers import PATIENCE, ZMQPULL, ZMQPUSH, wait_until
from rsyslogs import CONTRIB, Rsyslogd, needs_module, needs_rsyslogd, numbers, text

pytestmark = needs_rsyslogd

DROP_IN = CONTRIB.parent / "systemd" / "rsyslog-jemalloc.conf"

OPTIONS = {
    "remote": "--omprog",
    "write": "--omprog --spool /var/spool/zmqpush --confirm write",
    "fsync": "--omprog --spool /var/spool/zmqpush --confirm fsync",
}
SAFETY = pytest.mark.parametrize("safety", OPTIONS)
CONFIRMED = pytest.mark.parametrize("config", ["confirm.conf", "transactions.conf"])


def setting(config, name):
    """Return the number that a parameter has in a file of contrib/rsyslog."""
    return int(re.search(rf'(?m)^ *{name}="(\d+)"', (CONTRIB / config).read_text())[1])


# A queue that goes to disk soon, and has room for what the tests send.
SPILLS = {"queue_size": 3000, "queue_highWatermark": 100, "queue_lowWatermark": 50}
BATCH = setting("transactions.conf", "queue.dequeueBatchSize")


def with_options(config, safety):
    """Return a configuration in which zmqpush confirms what is as safe as that."""
    shipped = (CONTRIB / config).read_text()
    return re.sub(
        r"--omprog( --transactions)?( --spool \S+)?", OPTIONS[safety] + r"\1", shipped, count=1
    )


def repeated(found):
    """Return how many messages are there too often."""
    return len(found) - len(set(found))


@pytest.fixture
def rsyslog(start, tmp_path):
    daemon = Rsyslogd(start, tmp_path)
    yield daemon
    daemon.clean_up()


# Nobody confirms.

RFC_5424 = re.compile(r"<13>1 2\d{3}-11-24T20:15:00\S* host app - - -  ?(\d{9}# x*!)")


@pytest.mark.parametrize("where", ["file", "environment"])
def test_the_directives_of_2014_ship_whole_messages(rsyslog, start, where):
    start(ZMQPULL, "--bind", rsyslog.plain_endpoint, "--to", rsyslog.path)
    environment = {}
    if where == "file":
        toml = rsyslog.directory / "config" / "zmqpush" / "zmqpush.toml"
        toml.write_text(f'connect = ["{rsyslog.plain_endpoint}"]\n')
    else:
        environment["ZMQPUSH_CONNECT"] = rsyslog.plain_endpoint
    rsyslog.configure("classic.conf")
    rsyslog.run(**environment)
    rsyslog.send(range(100))

    rsyslog.wait_for(range(100))
    records = [json.loads(line) for line in rsyslog.path.read_bytes().splitlines()]
    messages = [RFC_5424.fullmatch(record["message"]) for record in records]
    assert [match[1] for match in messages if match] == [text(number) for number in range(100)]


def test_todays_form_of_them_does_the_same(rsyslog, start):
    start(ZMQPULL, "--bind", rsyslog.plain_endpoint, "--to", rsyslog.path)
    rsyslog.configure("plain.conf")
    rsyslog.run()
    rsyslog.send(range(100))

    rsyslog.wait_for(range(100))
    assert rsyslog.received() == list(range(100))


def test_it_does_so_with_another_malloc_too(rsyslog, start):
    (preload,) = re.findall(r"^Environment=LD_PRELOAD=(.*)$", DROP_IN.read_text(), re.MULTILINE)
    if subprocess.run(["true"], env={"LD_PRELOAD": preload}, capture_output=True).stderr:
        pytest.skip(f"{preload} is not installed (Debian: libjemalloc2)")
    start(ZMQPULL, "--bind", rsyslog.plain_endpoint, "--to", rsyslog.path)
    rsyslog.configure("plain.conf")
    rsyslog.run(LD_PRELOAD=preload)
    rsyslog.send(range(100))

    rsyslog.wait_for(range(100))
    assert preload in Path(f"/proc/{rsyslog.pid}/maps").read_text()


SHIPPED = pytest.mark.parametrize("config", ["plain.conf", "confirm.conf", "transactions.conf"])


def begin_to_ship(rsyslog, start, config, **values):
    """Send a hundred messages, to a receiver of the right kind; return once some have arrived."""
    if config == "plain.conf":
        start(ZMQPULL, "--bind", rsyslog.plain_endpoint, "--to", rsyslog.path)
    else:
        rsyslog.receive()
    rsyslog.configure(config, **values)
    rsyslog.run()
    rsyslog.send(range(100))
    wait_until(rsyslog.received)


@SHIPPED
def test_zmqpush_has_delivered_and_ends_when_rsyslogd_does(rsyslog, start, config):
    begin_to_ship(rsyslog, start, config)
    rsyslog.stop()

    assert rsyslog.orphans() == []
    rsyslog.wait_for(range(100))
    assert rsyslog.received() == list(range(100))


@SHIPPED
def test_zmqpush_ends_by_itself_when_rsyslogd_is_killed(rsyslog, start, config):
    begin_to_ship(rsyslog, start, config)
    assert rsyslog.senders()
    rsyslog.kill()

    wait_until(lambda: not rsyslog.orphans())


# Every message is confirmed.


@SAFETY
@CONFIRMED
def test_each_message_arrives_once_and_in_order(rsyslog, config, safety):
    rsyslog.receive()
    rsyslog.configure(with_options(config, safety))
    rsyslog.run()
    rsyslog.send(range(100))

    rsyslog.wait_for(range(100))
    rsyslog.stop()
    assert rsyslog.received() == list(range(100))


def test_the_marks_of_transactions_are_swallowed_where_nobody_confirms(rsyslog):
    rsyslog.receive()
    rsyslog.configure("transactions.conf", confirmMessages="off")
    rsyslog.run()
    rsyslog.send(range(1000))

    rsyslog.wait_for(range(1000))
    assert rsyslog.received() == list(range(1000))
    assert b"TRANSACTION" not in rsyslog.path.read_bytes()


@CONFIRMED
def test_a_message_of_several_lines_is_one_record(rsyslog, config):
    rsyslog.receive()
    rsyslog.configure(
        'template(name="lines" type="string"'
        r' string="%msg:2:$%\nand a line\nCOMMIT TRANSACTION\n")',
        with_options(config, "remote"),
        template="lines",
    )
    rsyslog.run()
    rsyslog.send(range(3))

    rsyslog.wait_for(range(3))
    rsyslog.stop()
    records = [json.loads(line)["message"] for line in rsyslog.path.read_bytes().splitlines()]
    ours = [record for record in records if re.match(r"\d{9}#", record)]
    assert ours == [f"{text(number)}\nand a line\nCOMMIT TRANSACTION" for number in range(3)]


BEGIN, COMMIT = "BEGIN TRANSACTION", "COMMIT TRANSACTION"
BARE = 'template(name="bare" type="string" string="%msg:2:$%\\n")'


def send_texts(rsyslog, wanted):
    """Send texts by TCP."""
    with rsyslog.connect() as connection:
        lines = (f"<13>Nov 24 20:15:00 host app: {line}\n" for line in wanted)
        connection.sendall("".join(lines).encode())


def received_texts(rsyslog):
    """Return the texts that the receiver has written, but for rsyslogd's own."""
    if not rsyslog.path.exists():
        return []
    found = [json.loads(line)["message"] for line in rsyslog.path.read_bytes().splitlines()]
    return [text for text in found if text.startswith((BEGIN, COMMIT, "line "))]


MARKED = [
    pytest.param([BEGIN, "line 1", "line 2"], id="first"),
    pytest.param(["line 1", BEGIN, COMMIT + " ", "line 2", COMMIT], id="within"),
    pytest.param([COMMIT, "line 1", COMMIT, COMMIT, "line 2"], id="closing"),
    pytest.param(["line 1", COMMIT, "line 2", BEGIN, BEGIN, "line 3"], id="both"),
]


@pytest.mark.parametrize("answers", ["on", "off"])
@pytest.mark.parametrize("messages", MARKED)
@CONFIRMED
def test_66_messages_that_look_like_marks_arrive_and_cost_no_other(
    rsyslog, config, messages, answers
):
    rsyslog.receive()
    rsyslog.configure(
        BARE, with_options(config, "remote"), template="bare", confirmMessages=answers
    )
    rsyslog.run()
    for number in range(3):
        last = f"line {100 + number}"
        send_texts(rsyslog, [*messages, last])
        wait_until(lambda last=last: last in received_texts(rsyslog))
    rsyslog.stop()

    given = [*messages, "line 100", *messages, "line 101", *messages, "line 102"]
    received = received_texts(rsyslog)
    if config == "transactions.conf":  # the closing mark, and what is like it, makes no record
        given, received = (
            [text for text in texts if text != COMMIT] for texts in (given, received)
        )
    assert received == given


def test_67_transactions_that_are_not_declared_cost_records_and_lose_nothing(rsyslog):
    rsyslog.receive()
    undeclared = with_options("transactions.conf", "remote").replace(" --transactions", "")
    rsyslog.configure(BARE, undeclared, template="bare")
    rsyslog.run()
    for first in range(0, 100, 10):
        send_texts(rsyslog, [f"line {number}" for number in range(first, first + 10)])
        wait_until(lambda first=first: f"line {first + 9}" in received_texts(rsyslog))
        rsyslog.kill_senders()
    rsyslog.stop()

    lines = [text for text in received_texts(rsyslog) if text.startswith("line ")]
    assert sorted(set(lines)) == sorted(f"line {number}" for number in range(100))
    assert len(lines) <= 100 + 10
    assert BEGIN in received_texts(rsyslog)
    assert b"give --transactions" in rsyslog.output.read_bytes()


@pytest.mark.parametrize("where", ["flags", "file"])
def test_the_marks_of_rsyslog_may_be_others(rsyslog, where):
    marks = ("<<", ">>")
    if where == "file":  # rsyslog passes no argument with a space
        marks = ("begin it", "it is done")
        toml = rsyslog.directory / "config" / "zmqpush" / "zmqpush.toml"
        toml.write_text(f'begin-mark = "{marks[0]}"\ncommit-mark = "{marks[1]}"\n')
    rsyslog.receive()
    config = with_options("transactions.conf", "remote")
    if where == "flags":
        flags = f"--transactions --begin-mark {marks[0]} --commit-mark {marks[1]}"
        config = config.replace("--transactions", flags)
    values = {"beginTransactionMark": marks[0], "commitTransactionMark": marks[1]}
    rsyslog.configure(BARE, config, template="bare", **values)
    rsyslog.run()
    messages = ["line 1", BEGIN, COMMIT, "line 2"]
    send_texts(rsyslog, messages)
    wait_until(lambda: messages[-1] in received_texts(rsyslog))
    rsyslog.stop()

    assert received_texts(rsyslog) == messages
    assert all(mark not in rsyslog.path.read_text() for mark in marks)


# The collector is down.


def test_what_does_not_fit_into_memory_waits_on_disk_and_arrives_once(rsyslog):
    rsyslog.configure("transactions.conf", **SPILLS)
    rsyslog.run()
    rsyslog.send(range(2000))

    wait_until(lambda: any(rsyslog.directory.glob("zmqpush-transactions.0*")))
    rsyslog.receive()
    rsyslog.wait_for(range(2000))
    rsyslog.stop()
    assert sorted(rsyslog.received()) == list(range(2000))


def test_an_outage_in_the_middle_loses_and_repeats_nothing(rsyslog):
    receiver = rsyslog.receive()
    rsyslog.configure("transactions.conf", **SPILLS)
    rsyslog.run()
    rsyslog.send(range(500))
    rsyslog.wait_for(range(100))
    kill(receiver)
    rsyslog.send(range(500, 2000))
    wait_until(lambda: any(rsyslog.directory.glob("zmqpush-transactions.0*")))

    rsyslog.receive()
    rsyslog.wait_for(range(2000))
    assert sorted(rsyslog.received()) == list(range(2000))


def test_the_recipe_of_the_readme_loses_nothing_of_a_burst_nor_at_a_stop(rsyslog):
    readme = (CONTRIB.parent.parent / "README.md").read_text()
    (recipe,) = re.findall(r"```rsyslog\n(module.*?confirmMessages.*?)```", readme, re.DOTALL)
    rsyslog.configure(recipe)
    rsyslog.receive()
    rsyslog.run()
    rsyslog.send(range(3000))
    rsyslog.stop()
    rsyslog.run()
    rsyslog.send([3000])

    rsyslog.wait_for(range(3001))
    assert sorted(rsyslog.received()) == list(range(3001))


@CONFIRMED
def test_a_queue_that_is_full_holds_up_neither_writers_nor_local_files(rsyslog, config):
    """With the collector down and no spool; what has no room is dropped for this action only."""
    rsyslog.configure(
        with_options(config, "remote"),
        queue_size=200,
        queue_maxDiskSpace="10k",
        queue_maxFileSize="4k",
    )
    rsyslog.run()
    rsyslog.log(range(2000))

    wait_until(lambda: len(numbers(rsyslog.local)) == 2000)
    assert rsyslog.senders()
    assert not rsyslog.path.exists()
    assert numbers(rsyslog.local) == list(range(2000))


@pytest.mark.parametrize("safety", ["write", "fsync"])
@CONFIRMED
def test_a_stop_while_the_collector_is_down_loses_nothing_with_a_spool(rsyslog, config, safety):
    rsyslog.configure(
        with_options(config, safety),
        signalOnClose="on",
        closeTimeout="100",  # milliseconds; zmqpush is killed then
        killUnresponsive="on",
    )
    rsyslog.run()
    rsyslog.send(range(1000))
    rsyslog.stop()
    assert rsyslog.orphans() == []

    rsyslog.run()
    rsyslog.receive()
    rsyslog.send([1000])
    rsyslog.wait_for(range(1001))
    assert sorted(rsyslog.received()) == list(range(1001))


def test_a_stop_while_the_collector_is_down_loses_one_transaction_without(rsyslog):
    rsyslog.configure(
        "transactions.conf",
        queue_timeoutShutdown="100",  # milliseconds; nobody will confirm it
        signalOnClose="on",
        closeTimeout="100",
    )
    rsyslog.run()
    rsyslog.send(range(1000))
    wait_until(lambda: rsyslog.output.exists() and b"no receiver" in rsyslog.output.read_bytes())
    rsyslog.stop()
    assert rsyslog.orphans() == []

    rsyslog.run()
    rsyslog.receive()
    rsyslog.send([1000])
    wait_until(lambda: 1000 in rsyslog.received() and len(set(rsyslog.received())) >= 1001 - BATCH)
    rsyslog.stop()
    assert len(set(rsyslog.received())) >= 1001 - BATCH
    assert repeated(rsyslog.received()) == 0


# Something is restarted, or dies.


@CONFIRMED
def test_a_restart_of_rsyslogd_loses_and_repeats_nothing(rsyslog, config):
    rsyslog.receive()
    # First there is no time to empty the queue, so it is saved; then it is emptied.
    rsyslog.configure(with_options(config, "remote"), queue_timeoutShutdown=1)
    for first in range(0, 900, 300):
        before = len(rsyslog.received())
        rsyslog.run()
        rsyslog.send(range(first, first + 300))
        wait_until(lambda before=before: len(rsyslog.received()) > before)
        rsyslog.stop()
        assert rsyslog.orphans() == []
        assert first or any(rsyslog.directory.glob("zmqpush-*.qi"))
        rsyslog.configure(with_options(config, "remote"))
    rsyslog.run()
    rsyslog.send([900])

    rsyslog.wait_for(range(901))
    assert repeated(rsyslog.received()) == 0


@SAFETY
@CONFIRMED
def test_zmqpush_that_is_killed_loses_nothing_and_repeats_one_unit(rsyslog, config, safety):
    """The unit is a message or, with transactions, one of them."""
    rsyslog.receive()
    rsyslog.configure(with_options(config, safety))
    rsyslog.run()
    chance = random.Random(1)
    kills = 0
    for first in range(0, DOSE.kills * 60, 60):
        rsyslog.send(range(first, first + 60))
        wait_until(rsyslog.senders)
        if chance.random() < 0.7:  # else while it starts
            wait_until(lambda first=first: len(rsyslog.received()) > first)
        time.sleep(chance.uniform(0, 0.1))  # at any instant
        kills += rsyslog.kill_senders()
    rsyslog.send([DOSE.kills * 60])  # zmqpush is started for a message only

    rsyslog.wait_for(range(DOSE.kills * 60 + 1))
    assert kills == DOSE.kills
    unit = 1 if config == "confirm.conf" else BATCH
    assert repeated(rsyslog.received()) <= kills * unit


def test_zmqpush_that_dies_within_a_transaction_has_all_of_it_handed_over_again(rsyslog):
    """Also the messages before, which rsyslog thinks are deferred (rsyslog issue 2420)."""
    mortal = rsyslog.directory / "mortal"
    mortal.write_text(
        f'#!/bin/sh\nmkdir "$0.died" && export ZMQPUSH_FAULT=message-answered:40\n'
        f'exec {ZMQPUSH} "$@"\n'
    )
    mortal.chmod(0o755)
    config = (CONTRIB / "transactions.conf").read_text()
    rsyslog.receive()
    rsyslog.configure(config.replace("/usr/local/bin/zmqpush", str(mortal)))
    rsyslog.run()
    rsyslog.send(range(100))

    rsyslog.wait_for(range(100))
    assert (rsyslog.directory / "mortal.died").exists()
    assert repeated(rsyslog.received()) == 0


# Several workers, signals.


@pytest.mark.parametrize("safety", ["remote", "fsync"])
def test_several_workers_have_a_zmqpush_each(rsyslog, safety):
    rsyslog.configure(
        with_options("transactions.conf", safety),
        queue_workerThreads=3,
        queue_workerThreadMinimumMessages=10,
        queue_dequeueBatchSize=8,
        queue_dequeueSlowdown=20_000,  # microseconds: a spool is fast
    )
    rsyslog.run()
    rsyslog.send(range(500))
    wait_until(lambda: len(rsyslog.senders()) == 3)
    rsyslog.receive()

    rsyslog.wait_for(range(500))
    rsyslog.stop()
    assert rsyslog.orphans() == []
    assert sorted(rsyslog.received()) == list(range(500))
    slots = [slot.name for slot in (rsyslog.directory / "zmqpush").glob("*")]
    assert sorted(slots) == ([] if safety == "remote" else ["0", "1", "2"])


def test_a_hangup_of_rsyslogd_is_one_of_zmqpush_which_lives_on(rsyslog):
    rsyslog.receive()
    rsyslog.configure("transactions.conf", hup_signal="HUP")
    rsyslog.run()
    rsyslog.send(range(100))
    rsyslog.wait_for(range(100))
    before = rsyslog.senders()
    rsyslog.hup()
    wait_until(lambda: rsyslog.output.exists() and b" read, " in rsyslog.output.read_bytes())
    rsyslog.send(range(100, 200))

    rsyslog.wait_for(range(200))
    assert rsyslog.senders() == before
    assert rsyslog.received() == list(range(200))


@SHIPPED
def test_a_signal_before_the_end_of_the_input_changes_nothing(rsyslog, start, config):
    begin_to_ship(rsyslog, start, config, signalOnClose="on")
    rsyslog.stop()

    assert rsyslog.orphans() == []
    rsyslog.wait_for(range(100))
    assert rsyslog.received() == list(range(100))


# rsyslog's own ends of ZeroMQ.


@needs_module("imczmq")
@pytest.mark.parametrize("framing", ["single", "frames"])
def test_rsyslog_receives_what_zmqpush_sends(rsyslog, start, framing):
    rsyslog.configure(
        'module(load="imczmq")',
        f'input(type="imczmq" endpoints="@{rsyslog.plain_endpoint}" socktype="PULL" ruleset="in")',
        'template(name="raw" type="string" string="%rawmsg%\n")',
        f'ruleset(name="in") {{ action(type="omfile" file="{rsyslog.path}" template="raw") }}',
    )
    rsyslog.run()
    sender = start(ZMQPUSH, "--framing", framing, "--connect", rsyslog.plain_endpoint, "app")
    lines = "".join(text(number) + "\n" for number in range(1000))
    sender.communicate(lines.encode(), timeout=PATIENCE)

    rsyslog.wait_for(range(1000))
    assert rsyslog.received() == list(range(1000))
    first = json.loads(rsyslog.path.read_bytes().split(b"\n", 1)[0])
    assert first == {"message": text(0), "type": "app", "@pid": sender.pid}


@needs_module("omczmq")
def test_zmqpull_receives_what_rsyslog_sends(rsyslog, start):
    start(ZMQPULL, "--bind", rsyslog.plain_endpoint, "--to", rsyslog.path)
    rsyslog.configure(
        'module(load="omczmq")',
        'template(name="json" type="string" string="{\\"message\\":\\"%msg:::json%\\"}")',
        f'*.* action(type="omczmq" endpoints=">{rsyslog.plain_endpoint}" socktype="PUSH"'
        ' template="json")',
    )
    rsyslog.run()
    rsyslog.send(range(1000))

    rsyslog.wait_for(range(1000))
    records = [json.loads(line)["message"] for line in rsyslog.path.read_bytes().splitlines()]
    assert [record.strip() for record in records if "#" in record] == [text(n) for n in range(1000)]


# Everything dies.


def lines_that_may_repeat(kills):
    """Return how many lines may, as the configuration says, after so many kills."""
    batch = setting("never-lose.conf", "queue.dequeueBatchSize")
    unsaved = setting("never-lose.conf", "persistStateInterval")
    return kills["rsyslogd"] * (batch + unsaved) + kills["zmqpush"] * batch


def test_nothing_is_lost_whatever_is_killed_at_any_instant(rsyslog):
    """
    rsyslogd, zmqpush and zmqpull are killed in turns, in random order.

    Four times each, or in the long form for two minutes.
    """
    seed = int(os.environ.get("ZMQPUSH_SEED", time.time()))
    chance = random.Random(seed)
    rsyslog.configure("never-lose.conf")
    rsyslog.run()
    receiver = rsyslog.receive()
    kills = dict.fromkeys(("rsyslogd", "zmqpush", "zmqpull"), 0)
    fed = again = 0
    end = time.monotonic() + 120
    victims = []
    while time.monotonic() < end if DOSE is LONG else min(kills.values()) < 4:
        victims = victims or chance.sample(list(kills), k=len(kills))
        until = time.monotonic() + chance.uniform(0.1, 2)
        while time.monotonic() < until:
            count = int(10 ** chance.uniform(0, 1))
            rsyslog.append(range(fed, fed + count))
            fed += count
            time.sleep(0.01)
        match victims.pop():
            case "rsyslogd":
                rsyslog.kill()
                kills["rsyslogd"] += 1
                if any(state.stat().st_size == 0 for state in rsyslog.imfile_states()):
                    again += fed  # it begins again with the first line
                rsyslog.run()
            case "zmqpush":
                wait_until(rsyslog.senders)
                kills["zmqpush"] += rsyslog.kill_senders()
            case "zmqpull":
                kill(receiver)
                kills["zmqpull"] += 1
                time.sleep(chance.choice([0, 0.5]))
                receiver = rsyslog.receive()
    wait_until(lambda: len(set(rsyslog.received())) == fed)
    rsyslog.stop()

    received = rsyslog.received()
    lost = sorted(set(range(fed)) - set(received))
    said = f"seed {seed}: of {fed} lines {len(lost)} lost, {repeated(received)} repeated, {kills}"
    if again:
        said += f", {again} read again"
    print(said)
    assert not lost, said
    assert repeated(received) <= lines_that_may_repeat(kills) + again, said


def test_nothing_is_lost_when_rsyslogd_is_killed_while_its_queue_is_full(rsyslog):
    rsyslog.configure("never-lose.conf", queue_fullDelayMark=950, queue_size=1000)
    rsyslog.append(range(3000))
    rsyslog.run()
    # Then imfile waits, with a line in its hands, and does not write its state.
    queue = rsyslog.directory / "never-lose.qi"
    wait_until(lambda: queue.exists() and "iQueueSize:2:3:950:" in queue.read_text())
    rsyslog.kill()
    rsyslog.receive()
    rsyslog.run()

    rsyslog.wait_for(range(3000))
    assert repeated(rsyslog.received()) <= lines_that_may_repeat({"rsyslogd": 1, "zmqpush": 0})


@pytest.mark.parametrize("how", ["it is killed", "the collector comes back"])
def test_nothing_is_lost_when_rsyslogd_is_to_stop_while_the_collector_is_down(rsyslog, how):
    rsyslog.configure("never-lose.conf")
    rsyslog.append(range(1000))
    rsyslog.run()
    wait_until(lambda: rsyslog.output.exists() and b"no receiver" in rsyslog.output.read_bytes())
    rsyslog.begin_to_stop()
    rsyslog.append(range(1000, 1100))
    time.sleep(4)  # by default it would have given up, and forgotten a transaction
    if how == "it is killed":
        rsyslog.kill()
        rsyslog.receive()
    else:
        rsyslog.receive()
        rsyslog.wait()
    rsyslog.run()

    rsyslog.wait_for(range(1100))
    assert repeated(rsyslog.received()) <= lines_that_may_repeat({"rsyslogd": 1, "zmqpush": 0})
