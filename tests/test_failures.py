"""What fails inside is one line and exit 70, wherever it happens: no silence, no traceback."""

import contextlib
import json
import os
import signal
import sys

import pytest
import zmq

from helpers import NOBODY, PATIENCE, wait_until, wait_until_ready

# Runs the real command after some of it was broken.
BROKEN = """
import sys, asyncio, contextlib, threading
{breaking}
from zmqpush import __main__
sys.argv[0] = {program!r}
__main__.{function}()
"""
REPORT = "internal error, please report it: {}"
# What to break, of a sender that waits for a receiver, and what then comes to pass.
FAIL = """
def fail(*args, **kwargs):
    raise {error}
"""
SENDER = {
    "connecting": "zmqpush.transport.dialer.Dialer._try_all",
    "what is read": "zmqpush.core.records.lines.LineSplitter.feed",
    "formatting": "zmqpush.core.records.encode.Envelope.format",
    "a value": "zmqpush.sender.plain.PlainOutlet.put",
    "timer of an outage": "zmqpush.runtime.reporting.Outage._check",
    "delivery": "zmqpush.sender.plain.PlainOutlet._pump",
}
ACKED = {
    "turn": "zmqpush.sender.acked.AckedOutlet._turn",
    "syncing": "zmqpush.spool.spool.Spool.begin_sync",
    "job of an executor": "zmqpush.sender.acked._run",
    "state machine": "zmqpush.core.protocol.sender.Sender.tick",
}


@pytest.fixture
def broken(start):
    """Return a function that runs a command after something in it was made to fail."""

    def run(program, target, *args, error="ValueError('of ours')", more="", **kwargs):
        module, _, name = target.rpartition(".")
        owner = module.rpartition(".")[2]
        breaking = FAIL.format(error=error)
        if owner[0].isupper():
            module = module.rpartition(".")[0]
            breaking += f"from {module} import {owner}\n{owner}.{name} = fail\n"
        else:
            breaking += f"import {module}\n{module}.{name} = fail\n"
        code = BROKEN.format(breaking=breaking + more, program=program, function=program[3:])
        return start(sys.executable, "-c", code, *args, **kwargs)

    return run


def lines_of(child, data=None):
    _, err = child.communicate(data, timeout=PATIENCE)
    assert b"Traceback" not in err
    assert b"Exception" not in err
    assert b"never retrieved" not in err
    return child.returncode, err.decode().splitlines()


@pytest.mark.parametrize("error", ["ValueError('of ours')", "TypeError('of ours')"])
@pytest.mark.parametrize("what", SENDER)
def test_a_failure_in_a_sender_is_one_line_and_exit_70(broken, what, error):
    child = broken("zmqpush", SENDER[what], "-c", NOBODY, error=error)
    child.stdin.write(b"x\n")
    child.stdin.flush()
    child.wait(PATIENCE)
    code, lines = lines_of(child)

    assert code == 70
    assert [line for line in lines if "report it" in line] == [f"zmqpush: {REPORT.format(error)}"]
    assert "read, 0 sent, " in "".join(lines)  # what became of the records


@pytest.mark.parametrize("what", ACKED)
def test_a_failure_of_acknowledged_delivery_is_one_line_and_exit_70(broken, tmp_path, what):
    child = broken("zmqpush", ACKED[what], "-c", NOBODY, "--spool", tmp_path / "spool")
    child.stdin.write(b"x\n")
    child.stdin.flush()
    child.wait(PATIENCE)
    code, lines = lines_of(child)

    assert code == 70
    assert f"zmqpush: {REPORT.format(repr(ValueError('of ours')))}" in lines


RECEIVER = {
    "accepting": "zmqpush.transport.listener._highest_connection",
    "decoding": "zmqpush.core.records.decode.RecordDecoder.decode",
    "writing": "zmqpush.receiver.writer.Writer.write",
    "committing": "zmqpush.receiver.writer.Writer.commit",
    "memory": "zmqpush.transport.inbox.Inbox.put",
    "connections": "zmqpush.transport.link.Link.on_ready",
    "timer": "zmqpush.receiver.app.Puller._commit_plain",
}


@pytest.mark.parametrize("what", RECEIVER)
def test_a_failure_in_a_receiver_is_one_line_and_exit_70(broken, tmp_path, what):
    endpoint = f"ipc://{tmp_path}/socket"
    to = tmp_path / "%Y.ndjson"  # which is synced by a timer
    child = broken("zmqpull", RECEIVER[what], "-b", endpoint, "--to", to)
    with zmq.Context() as context, context.socket(zmq.PUSH) as sender:
        sender.setsockopt(zmq.LINGER, 0)
        sender.connect(endpoint)

        def has_failed():
            with contextlib.suppress(zmq.Again):
                sender.send(json.dumps({"message": "1"}).encode(), zmq.NOBLOCK)
            return child.poll() is not None

        wait_until(has_failed)
    code, lines = lines_of(child)

    assert code == 70
    told = f"zmqpull: {REPORT.format(repr(ValueError('of ours')))}"
    assert [line for line in lines if "report it" in line] == [told]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
@pytest.mark.parametrize(
    ("program", "target"),
    [
        ("zmqpush", "zmqpush.runtime.shutdown.Ending._on_signal"),
        ("zmqpull", "zmqpush.receiver.app.Puller._stop"),
    ],
)
def test_a_failure_in_the_handler_of_a_signal_ends_the_run(
    broken, tmp_path, program, target, number
):
    if number == signal.SIGHUP:
        target = "zmqpush.security.admission.Guard.reload"
    where = ["-c", NOBODY] if program == "zmqpush" else ["-b", f"ipc://{tmp_path}/s"]
    child = broken(program, target, *where)
    wait_until_ready(child)
    child.send_signal(number)
    child.wait(PATIENCE)
    code, lines = lines_of(child)

    assert code == 70
    assert f"{program}: {REPORT.format(repr(ValueError('of ours')))}" in lines


def test_a_failure_in_a_thread_ends_the_run(broken, tmp_path):
    more = """
from zmqpush.receiver.app import Puller
def beside(self):
    threading.Thread(target=fail).start()
Puller._hang_up = beside
"""
    child = broken(
        "zmqpull", "zmqpush.runtime.files.nothing", "-b", f"ipc://{tmp_path}/s", more=more
    )
    wait_until_ready(child)
    child.send_signal(signal.SIGHUP)
    child.wait(PATIENCE)
    code, lines = lines_of(child)

    assert (code, lines[-1]) == (70, f"zmqpull: {REPORT.format(repr(ValueError('of ours')))}")


def test_what_a_library_leaves_behind_is_one_line_and_ends_nothing(broken, tmp_path):
    more = """
import gc
from zmqpush.receiver.app import Puller
async def theirs():
    raise KeyError("of theirs")
def leave(self):
    asyncio.create_task(theirs())
    asyncio.get_running_loop().call_later(0.01, gc.collect)
Puller._hang_up = leave
"""
    child = broken(
        "zmqpull", "zmqpush.runtime.files.nothing", "-b", f"ipc://{tmp_path}/s", more=more
    )
    wait_until_ready(child)
    child.send_signal(signal.SIGHUP)
    line = child.stderr.readline()
    child.terminate()
    code, lines = lines_of(child)

    assert line.decode() == f"zmqpull: {REPORT.format(repr(KeyError('of theirs')))}\n"
    assert (code, lines) == (0, ["zmqpull: 0 records written"])


@pytest.mark.parametrize("target", ["zmqpush.cli.config_file.load", "zmqpush.cli.config_file.find"])
def test_a_failure_while_options_are_read_is_one_line(broken, tmp_path, target):
    (tmp_path / "x").touch()
    child = broken("zmqpush", target, env=os.environ | {"ZMQPUSH_CONFIG": ""})
    if target.endswith("load"):
        child = broken("zmqpush", target, "--config", tmp_path / "x")
    code, lines = lines_of(child)

    assert (code, lines) == (70, [f"zmqpush: {REPORT.format(repr(ValueError('of ours')))}"])


def test_both_a_failure_and_the_end_of_the_input_are_an_error(broken, tmp_path):
    """What fails in delivery while nothing waits for delivery is not lost sight of."""
    child = broken("zmqpush", SENDER["delivery"], "-c", NOBODY)
    code, lines = lines_of(child, b"x\n")

    assert code == 70
    assert f"zmqpush: {REPORT.format(repr(ValueError('of ours')))}" in lines
