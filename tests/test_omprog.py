"""
rsyslog's dialogue: the installed programs behind a model of rsyslog's ``omprog``.

The model follows rsyslog's contract and none of our code: it starts the program with the
descriptors and signals that rsyslog gives it, hands over a message, waits for its answer
and compares that byte by byte. It is stricter in one point: what is said without a
question would confirm the next message, and here fails the test at once.
"""

import contextlib
import fcntl
import json
import os
import random
import re
import select
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from chaos import (
    DOSE,
    FAILING_SYNC,
    Pipeline,
    compare,
    fault_points,
    fill_disk,
    line,
    lines,
    patched,
    spooled,
    stop,
    written,
)
from helpers import (
    NOBODY,
    PATIENCE,
    SUMMARY,
    ZMQPUSH,
    lines_of,
    push,
    wait_until,
    wait_until_ready,
)

BEGIN, COMMIT = b"BEGIN TRANSACTION", b"COMMIT TRANSACTION"
OK, DEFER_COMMIT = b"OK", b"DEFER_COMMIT"
REFUSED = b"the first transaction may not be whole: once more, please"
ANSWER_BYTES = 4095  # of a line, with its newline
LEVELS = pytest.mark.parametrize("level", ["write", "fsync", "remote"])
WAYS = pytest.mark.parametrize("transactions", [False, True], ids=["messages", "transactions"])


class BeginAnewError(Exception):
    """rsyslog ends the program, begins it anew and hands over again what is not confirmed."""


class Rsyslog:
    """
    One worker of an omprog action, with one program.

    Args:
        start: Starts a process.
        command: The program and its arguments.
        errors: The file that the program's standard error is appended to.
        confirm_timeout: In seconds.
        pipe_bytes: How much the program's standard input holds, when it starts.
        transactions: Whether it uses transactions (and the program is told so).

    Attributes:
        child: The program, while there is one.
        dots: How many signs of life there were while it waited for the last answer.
        restarts: How often it had to begin anew.

    """

    def __init__(
        self, start, command, errors, confirm_timeout=10.0, pipe_bytes=65536, transactions=False
    ):
        self._start = start
        self._command = command
        self._errors = errors
        self.confirm_timeout = confirm_timeout
        self._pipe_bytes = pipe_bytes
        self.transactions = transactions
        self.child = None
        self.restarts = 0

    def begin(self, **env):
        """Start the program, and wait until it is ready."""
        stdin, messages = os.pipe()
        answers, stdout = os.pipe()
        self.messages = os.fdopen(messages, "wb", buffering=0)
        self.answers = os.fdopen(answers, "rb", buffering=0)
        fcntl.fcntl(self.messages, fcntl.F_SETPIPE_SZ, self._pipe_bytes)
        with open(self._errors, "ab") as errors:
            self.child = self._start(
                *self._command,
                stdin=stdin,
                stdout=stdout,
                stderr=errors,
                env=os.environ | env,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
            )
        os.close(stdin)
        os.close(stdout)
        self._heard = b""
        self.refused = False
        if self.answer() != OK:
            raise BeginAnewError
        return self

    def _readable(self, timeout):
        poll = select.poll()
        poll.register(self.answers, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def _hear(self):
        if not self._readable(self.confirm_timeout):
            raise BeginAnewError("no answer in time")
        piece = self.answers.read(ANSWER_BYTES - len(self._heard))
        if not piece:
            raise BeginAnewError("it has gone")
        self._heard += piece
        self.dots = len(self._heard) - len(self._heard.lstrip(b"."))

    def answer(self):
        """Return the answer to what was written."""
        while not self._heard.endswith(b"\n"):
            if len(self._heard) == ANSWER_BYTES:
                raise BeginAnewError("the answer is too long")
            self._hear()
        answer, self._heard = self._heard[self.dots : -1], b""
        assert b"\n" not in answer, "two answers"
        return answer

    def wait_for_dots(self, count):
        """Return once there were so many signs of life since the last answer."""
        while len(self._heard) < count:
            self._hear()
            assert self._heard.strip(b".") == b"", "it was not to be answered"

    def _write(self, *pieces):
        try:
            for piece in pieces:
                while piece:
                    piece = piece[self.messages.write(piece) :]
        except BrokenPipeError as exc:
            raise BeginAnewError from exc

    def _look_that_it_is_silent(self):
        if self._readable(0) and (said := self.answers.read(100)):
            pytest.fail(f"{said!r} was said without a question")

    def give(self, message):
        """Write a message; a newline that it does not end with is written on its own."""
        self._look_that_it_is_silent()
        self._heard, self.dots = b"", 0
        self._write(message, *([] if message.endswith(b"\n") else [b"\n"]))

    def hand_over(self, message):
        """Write a message or a mark, and return its answer."""
        self.give(message)
        return self.answer()

    def commit(self, messages):
        """Hand over a transaction."""
        self.open()
        for message in messages:
            assert self.hand_over(message) in (OK, DEFER_COMMIT)
        assert self.hand_over(COMMIT) == OK

    def open(self):
        """Begin a transaction; the first one of a program may not be whole, and is refused."""
        if not self.refused:
            assert self.hand_over(BEGIN) == OK
            assert self.hand_over(b"the rest of a transaction") == DEFER_COMMIT
            assert self.hand_over(COMMIT) not in (OK, DEFER_COMMIT)
            self.refused = True
        assert self.hand_over(BEGIN) == OK

    def deliver(self, messages):
        """Have some messages confirmed, as one transaction or one by one, whatever dies."""
        units = [messages] if self.transactions else [[message] for message in messages]
        for unit in units:
            for _ in range(100):
                try:
                    if self.child is None:
                        self.begin()
                    if self.transactions:
                        self.commit(unit)
                    else:
                        assert self.hand_over(unit[0]) == OK
                    break
                except BeginAnewError:
                    self.restarts += 1
                    self.leave()
            else:
                pytest.fail("it does not get anywhere")

    def hand_over_until_it_goes(self, number):
        """Hand over the line of a number and those that follow; return the last confirmed one."""
        with contextlib.suppress(BeginAnewError):
            while self.hand_over(line(number)) == OK:
                number += 1
        return number - 1

    def close(self):
        """Close both pipes: first that of the answers."""
        self.answers.close()
        self.messages.close()

    def leave(self, *, terminate=False):
        """End the program as rsyslog does; return its exit code."""
        if terminate:
            self.child.terminate()
        self.close()
        code = self.child.wait(PATIENCE)
        self.child = None
        return code

    def end(self):
        """Close the input; look that nothing more is said; return the exit code."""
        self.messages.close()
        self.child.wait(PATIENCE)
        self._look_that_it_is_silent()
        return self.leave()

    def said(self):
        """Return what the program said on standard error, so far."""
        return self._errors.read_bytes()


@pytest.fixture
def pipeline(start, tmp_path):
    return Pipeline(start, tmp_path)


@pytest.fixture
def make(start, pipeline, tmp_path):
    """Return a function that makes an rsyslog whose program delivers to the pipeline's receiver."""
    made = []

    def make(*options, command=(ZMQPUSH,), level="remote", **kwargs):
        spool = () if level == "remote" else ("--spool", pipeline.spool)
        if kwargs.get("transactions"):
            options = ("--transactions", *options)
        options = ("--omprog", "-c", pipeline.endpoint, "--confirm", level, *spool, *options)
        errors = tmp_path / f"errors{len(made)}"
        made.append(Rsyslog(start, (*command, *options), errors, **kwargs))
        return made[-1]

    yield make
    for rsyslog in made:
        if rsyslog.child:
            rsyslog.close()


def texts(pipeline):
    """Return the messages of the records in the receiver's file."""
    if not pipeline.path.exists():
        return []
    return [json.loads(record)["message"] for record in pipeline.path.read_bytes().splitlines()]


def lines_in(pipeline):
    """Return the raw lines of which the records in the receiver's file were made."""
    return b"".join(line + b"\n" for line in lines_of(pipeline.path.read_bytes().splitlines()))


def verify(pipeline, count, *, repeated=0):
    """Look that of so many numbered messages none is lost, and few are in the file twice."""
    lost, too_often = compare(written(pipeline.path), range(1, count + 1))
    assert not lost
    assert len(too_often) <= repeated


# What is answered, and when.


def test_it_is_ready_before_there_is_a_receiver_and_answers_once_there_is(pipeline, make):
    rsyslog = make(confirm_timeout=3).begin()
    rsyslog.give(b"a\n")
    rsyslog.wait_for_dots(3)
    receiver = pipeline.receive()

    assert rsyslog.answer() == OK
    assert texts(pipeline) == ["a"]
    assert rsyslog.end() == 0
    stop(receiver)


MESSAGES = [
    b"a\n",
    b"",
    b"\n",
    b"without a newline",
    b"two\nlines",
    b"three\n\nlines\n",
    b"\n\n\n",
    b"  spaces \t",
    b"carriage return\r\n",
    b'"quoted" \\ \x01\x1b[31m\x7f',
    b"\xc3\xa4 and \xff\xfe",
    OK,
    b"." * 5000,
    COMMIT,
    BEGIN + b"\n",
    b"x" * 8192,
    b"y\n" * 4096,
    b"z" * 65536,
    b"\n" * 131072,
    b"last\n",
]


@pytest.mark.parametrize("format", ["json", "logstash", "ecs"])
def test_each_message_has_one_answer_and_makes_one_record(pipeline, make, format):
    pipeline.receive()
    rsyslog = make("--format", format).begin()
    for message in MESSAGES:
        assert rsyslog.hand_over(message) == OK

    assert texts(pipeline) == [
        message.removesuffix(b"\n").removesuffix(b"\r").decode(errors="backslashreplace")
        for message in MESSAGES
    ]
    assert rsyslog.end() == 0


def test_without_a_format_each_message_makes_its_lines(pipeline, make):
    pipeline.receive()
    rsyslog = make("--format", "raw").begin()
    for message in [*MESSAGES, b"lines\n" * 4_000_000]:  # more than fits in a block
        assert rsyslog.hand_over(message) == OK

    whole = b"".join(message.removesuffix(b"\n") + b"\n" for message in MESSAGES)
    whole = whole.replace(b"\r\n", b"\n") + b"lines\n" * 4_000_000
    whole = whole.decode(errors="backslashreplace").encode()
    assert lines_in(pipeline) == whole
    assert rsyslog.end() == 0


@pytest.mark.parametrize("text", [b"x" * 3_000_000, b"y\n" * 60_000 + b"\n", b"z" * 4001])
def test_a_message_that_is_too_long_is_split_and_has_one_answer(pipeline, make, text):
    pipeline.receive()
    rsyslog = make("--max-line", 1000).begin()
    assert rsyslog.hand_over(text) == OK
    assert rsyslog.hand_over(b"after it") == OK

    records = [json.loads(record) for record in pipeline.path.read_bytes().splitlines()]
    *pieces, after = (record["message"] for record in records)
    assert "".join(pieces).encode() == text.removesuffix(b"\n")
    assert max(map(len, pieces)) == 1000
    assert [record.get("@partial", False) for record in records[:-1]] == [
        *[True] * (len(pieces) - 1),
        False,
    ]
    assert after == "after it"
    assert rsyslog.end() == 0


@pytest.mark.parametrize("format", ["json", "raw"])
def test_a_carriage_return_is_treated_as_without_answers(pipeline, make, start, format):
    texts = [b"a\r", b"b\r\r", b"\rc", b"\r", b"x" * 10 + b"\r", b"y" * 11 + b"\r", b"z\r" * 99_999]
    options = ("--max-line", 10, "--format", format)
    pipeline.receive()
    rsyslog = make(*options).begin()
    for text in texts:
        assert rsyslog.hand_over(text) == OK
    assert rsyslog.end() == 0
    answered = pipeline.path.read_bytes()
    done = push("--ack", "-c", pipeline.endpoint, *options, data=b"\n".join([*texts, b""]))
    assert done.returncode == 0

    pid = rb',"@pid":\d+'
    whole = pipeline.path.read_bytes().removeprefix(answered)
    assert re.sub(pid, b"", answered) == re.sub(pid, b"", whole)


@pytest.mark.parametrize("way", ["message", "lines", "transaction"])
def test_a_message_takes_no_more_memory_the_longer_it_is(pipeline, make, way):
    pipeline.receive()
    rsyslog = make(transactions=way == "transaction").begin()
    text = b"x" * 99 + (b"\n" if way == "lines" else b"x")
    text *= 1_300_000
    if way == "transaction":
        rsyslog.commit([text])
    else:
        assert rsyslog.hand_over(text) == OK
    status = Path(f"/proc/{rsyslog.child.pid}/status").read_text()

    assert int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10 < len(text)
    records = (json.loads(record) for record in pipeline.path.read_bytes().splitlines())
    *pieces, last = ((record["message"], record.get("@partial", False)) for record in records)
    assert "".join(piece for piece, _ in [*pieces, last]).encode() == text.removesuffix(b"\n")
    assert {partial for _, partial in pieces} == {True}
    assert (len(pieces), last[1]) == ((len(text) - 1) >> 20, False)
    assert rsyslog.end() == 0


def test_of_a_long_message_without_its_end_nothing_is_answered(pipeline, make):
    """What was passed on of it may come twice; what was not is not made a record."""
    receiver = pipeline.receive()
    rsyslog = make("--max-line", 1000).begin()
    rsyslog.deliver([b"a"])
    rsyslog.messages.write(b"x" * 200_000)
    wait_until(lambda: len(texts(pipeline)) > 100)

    assert rsyslog.end() == 0
    stop(receiver)
    records = [json.loads(record) for record in pipeline.path.read_bytes().splitlines()]
    assert records[0]["message"] == "a"
    assert all(record["@partial"] for record in records[1:])


def test_a_nul_that_rsyslog_never_writes_makes_two_records_and_one_answer(pipeline, make):
    pipeline.receive()
    rsyslog = make().begin()

    assert rsyslog.hand_over(b"a\0b\n") == OK
    assert texts(pipeline) == ["a", "b"]
    assert rsyslog.end() == 0


@pytest.mark.parametrize("size", [65536, 100_000, 131_072, 262_144, 1_000_000])
def test_no_part_of_a_message_is_answered(pipeline, make, size):
    """Whatever a read returns ends with a newline here; the pipe holds the whole message."""
    pipeline.receive()
    rsyslog = make("--format", "raw").begin()
    assert fcntl.fcntl(rsyslog.messages, fcntl.F_GETPIPE_SZ) >= 1 << 20
    for _ in range(10):
        assert rsyslog.hand_over(b"\n" * size) == OK

    assert lines_in(pipeline) == b"\n" * 10 * size
    assert rsyslog.end() == 0


@pytest.mark.parametrize("pipe_bytes", [4096, 65536, 1 << 20])
def test_of_a_message_that_does_not_fit_into_the_pipe_the_rest_is_waited_for(
    pipeline, make, pipe_bytes
):
    """It is written when there is room; that may take long, and the wait is longer here."""
    code = """
import fcntl, zmqpush.sender.source
zmqpush.sender.source._REST_DELAY = 1.0
control = fcntl.fcntl
def limited(fd, what, *args):
    if what == fcntl.F_SETPIPE_SZ:
        raise PermissionError
    return control(fd, what, *args)
fcntl.fcntl = limited
"""
    pipeline.receive()
    command = patched("zmqpush", code)
    rsyslog = make("--format", "raw", command=command, pipe_bytes=pipe_bytes).begin()
    messages = []
    for size in (pipe_bytes, pipe_bytes + 1, 3 * pipe_bytes):
        whole, rest = divmod(size, 64)
        messages.append(b"%s\n" % (b"x" * 63) * whole + b"\n" * rest)
        assert rsyslog.hand_over(messages[-1]) == OK

    assert lines_in(pipeline) == b"".join(messages)
    assert rsyslog.end() == 0


def test_it_answers_where_the_pipe_cannot_be_opened_again(pipeline, make):
    """Without ``/proc``, or as rsyslog's AppArmor profile may have it."""
    code = """
opened = os.open
def closed(path, *args, **kwargs):
    if str(path).startswith("/proc"):
        raise PermissionError
    return opened(path, *args, **kwargs)
os.open = closed
"""
    pipeline.receive()
    rsyslog = make(command=patched("zmqpush", code)).begin()
    for message in MESSAGES:
        assert rsyslog.hand_over(message) == OK

    assert len(texts(pipeline)) == len(MESSAGES)
    rsyslog.child.terminate()
    assert rsyslog.hand_over(b"after the signal") == OK
    assert rsyslog.end() == 0


# What is safe.


@WAYS
def test_what_is_written_to_the_spool_survives_the_program(pipeline, make, transactions):
    rsyslog = make("--format", "raw", level="write", transactions=transactions).begin()
    for number in range(1, 21):
        rsyslog.deliver([line(number)])
        if number % 5 == 0:
            rsyslog.child.kill()

            assert rsyslog.leave() == -signal.SIGKILL
            assert sorted(spooled(pipeline.spool)) == list(range(1, number + 1))
            rsyslog.begin()
    receiver = pipeline.receive()
    wait_until(lambda: len(written(pipeline.path)) == 20)

    assert rsyslog.end() == 0
    stop(receiver)
    verify(pipeline, 20)


TRACED = """
trace = os.open(os.environ["TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
write, pwritev, fdatasync = os.write, os.pwritev, os.fdatasync
def note(what):
    write(trace, what)
def traced_write(fd, data):
    note({b"OK\\n": b"a", b"DEFER_COMMIT\\n": b"d"}.get(data, b""))
    return write(fd, data)
def traced_pwritev(*args):
    done = pwritev(*args)
    note(b"w")
    return done
def traced_fdatasync(fd):
    note(b"(")
    fdatasync(fd)
    note(b")")
os.write, os.pwritev, os.fdatasync = traced_write, traced_pwritev, traced_fdatasync
"""


def traced(make, tmp_path, level, *options, **kwargs):
    """Return an rsyslog whose program keeps a trace, and a function that returns the trace."""
    trace = tmp_path / "trace"
    rsyslog = make(*options, command=patched("zmqpush", TRACED), level=level, **kwargs)
    rsyslog.begin(TRACE=str(trace))
    return rsyslog, lambda: trace.read_text()


@pytest.mark.parametrize("sync", ["block", "interval"])
def test_each_message_is_synced_before_its_answer(make, tmp_path, sync):
    rsyslog, trace = traced(make, tmp_path, "fsync", "--sync", sync)
    rsyslog.deliver(MESSAGES)

    # Written, then synced, then answered. The first time there is a directory to sync, too.
    assert re.fullmatch(rf"a(w(\(\))+a){{{len(MESSAGES)}}}", trace())
    rsyslog.leave(terminate=True)


def test_a_transaction_is_synced_once_before_its_end_is_answered(make, tmp_path):
    rsyslog, trace = traced(make, tmp_path, "fsync", transactions=True)
    for _ in range(5):
        rsyslog.deliver([b"a", b"b", b"c"])

    assert re.fullmatch(r"aad(adddw(\(\))+a){5}", trace())
    rsyslog.leave(terminate=True)


@pytest.mark.parametrize("sync", ["block", "interval", "off"])
def test_each_message_is_written_before_its_answer(make, tmp_path, sync):
    rsyslog, trace = traced(make, tmp_path, "write", "--sync", sync)
    rsyslog.deliver(MESSAGES)

    assert re.fullmatch(rf"a(wa){{{len(MESSAGES)}}}", re.sub(r"[()]", "", trace()))
    rsyslog.leave(terminate=True)


@pytest.mark.parametrize("spool", [False, True])
@WAYS
def test_what_is_confirmed_from_afar_is_in_the_receivers_file(pipeline, make, spool, transactions):
    options = ("--spool", pipeline.spool) if spool else ()
    pipeline.receive()
    rsyslog = make("--format", "raw", *options, transactions=transactions).begin()
    for first in range(1, 100, 3):
        rsyslog.deliver([line(n) for n in range(first, first + 3)])

        assert written(pipeline.path) == list(range(1, first + 3))
    assert rsyslog.end() == 0


# Transactions.


@pytest.mark.parametrize("how", ["end", "leave", "terminate", "kill"])
@LEVELS
def test_nothing_of_a_transaction_that_was_not_committed_is_kept(pipeline, make, how, level):
    receiver = pipeline.receive()
    rsyslog = make("--format", "raw", level=level, transactions=True).begin()
    rsyslog.commit([line(1)])
    rsyslog.open()
    for number in (2, 3):
        assert rsyslog.hand_over(line(number)) == DEFER_COMMIT
    if how == "end":
        assert rsyslog.end() == 0
    elif how == "kill":
        rsyslog.child.kill()
        assert rsyslog.leave() == -signal.SIGKILL
    else:
        assert rsyslog.leave(terminate=how == "terminate") == 0

    assert {*spooled(pipeline.spool), *written(pipeline.path)} == {1}
    rsyslog.begin().commit([line(2), line(3)])
    assert rsyslog.end() == 0
    stop(receiver)
    verify(pipeline, 3)


def test_the_end_of_a_transaction_is_answered_when_all_of_it_is_safe(pipeline, make):
    rsyslog = make(transactions=True).begin()
    rsyslog.open()
    for message in (b"a", b"b"):
        assert rsyslog.hand_over(message) == DEFER_COMMIT
    rsyslog.give(COMMIT)
    rsyslog.wait_for_dots(1)
    pipeline.receive()

    assert rsyslog.answer() == OK
    assert texts(pipeline) == ["a", "b"]
    assert rsyslog.end() == 0


@LEVELS
def test_transactions_of_all_sizes_are_delivered_whole_and_in_order(pipeline, make, level):
    receiver = pipeline.receive()
    rsyslog = make("--format", "raw", level=level, transactions=True).begin()
    fed = 0
    for size in (1, 0, 0, 1024, 5000, 2):
        rsyslog.commit([line(n) for n in range(fed + 1, fed + size + 1)])
        fed += size

    assert rsyslog.end() == 0
    stop(receiver)
    assert lines_in(pipeline) == lines(range(1, fed + 1))


def test_a_message_that_looks_like_a_mark_confirms_nothing_that_is_not_safe(pipeline, make):
    pipeline.receive()
    rsyslog = make(transactions=True).begin()
    rsyslog.open()
    assert [rsyslog.hand_over(text) for text in (b"a", COMMIT)] == [DEFER_COMMIT, OK]
    assert texts(pipeline) == ["a"]
    assert rsyslog.hand_over(b"b") == OK
    assert [rsyslog.hand_over(text) for text in (COMMIT, BEGIN, BEGIN)] == [OK, OK, DEFER_COMMIT]
    assert texts(pipeline) == ["a", "b", COMMIT.decode()]
    assert rsyslog.hand_over(COMMIT) == OK

    assert texts(pipeline) == ["a", "b", COMMIT.decode(), BEGIN.decode()]
    assert rsyslog.end() == 0


def test_66_no_message_is_taken_for_a_mark_where_there_are_none(pipeline, make):
    """Whoever gets in the first line of all changes nothing, as long as none are declared."""
    pipeline.receive()
    rsyslog = make().begin()
    messages = [BEGIN, b"one", b"two", COMMIT, BEGIN, BEGIN, b"three"]
    for at, message in enumerate(messages, 1):
        assert rsyslog.hand_over(message) == OK
        assert texts(pipeline) == [text.decode() for text in messages[:at]]

    assert rsyslog.end() == 0
    assert rsyslog.said().count(b"give --transactions") == 1


def test_a_message_that_is_refused_as_a_mark_costs_none_before_it(pipeline, make):
    """With it goes on who does not repeat what was deferred before: rsyslogd before 8.2508."""
    pipeline.receive()
    rsyslog = make(transactions=True).begin()
    messages = [BEGIN, b"a", b"b", COMMIT]
    assert [rsyslog.hand_over(text) for text in messages[:-1]] == [OK, DEFER_COMMIT, DEFER_COMMIT]
    assert rsyslog.hand_over(COMMIT) not in (OK, DEFER_COMMIT)
    messages = [BEGIN, COMMIT, b"c", COMMIT]
    expected = [OK, DEFER_COMMIT, DEFER_COMMIT, OK]
    assert [rsyslog.hand_over(text) for text in messages] == expected

    assert texts(pipeline) == ["a", "b", COMMIT.decode(), "c"]
    assert rsyslog.end() == 0


@pytest.mark.parametrize("how", ["flags", "file"])
def test_the_marks_may_be_others(pipeline, make, tmp_path, how):
    pipeline.receive()
    marks = [b"<begin it>", "Schlu\xdf".encode()]
    options = ("--begin-mark", marks[0].decode(), "--commit-mark", marks[1].decode())
    if how == "file":
        file = tmp_path / "zmqpush.toml"
        file.write_text(f'begin-mark = "{options[1]}"\ncommit-mark = "{options[3]}"\n')
        options = ("--config", file)
    rsyslog = make(*options, transactions=True).begin()
    answers = [OK, DEFER_COMMIT, DEFER_COMMIT]
    for end in (REFUSED, OK):
        given = [rsyslog.hand_over(text) for text in (marks[0], COMMIT, BEGIN)]
        assert given == answers
        assert rsyslog.hand_over(marks[1]) == end

    assert texts(pipeline) == [COMMIT.decode(), BEGIN.decode()]
    assert rsyslog.end() == 0
    assert b"mark" not in rsyslog.said()


def test_marks_that_are_declared_and_do_not_come_are_told_once(pipeline, make):
    pipeline.receive()
    rsyslog = make("--begin-mark", "<", "--commit-mark", ">", transactions=True).begin()
    for message in (BEGIN, b"a", COMMIT):
        assert rsyslog.hand_over(message) == OK

    assert texts(pipeline) == [BEGIN.decode(), "a", COMMIT.decode()]
    assert rsyslog.end() == 0
    assert rsyslog.said().count(b"leave out --transactions") == 1


# Without confirmMessages.


def test_without_answers_too_it_ends_after_its_grace_when_rsyslog_does(start):
    """With no collector, though otherwise it would wait for one at the end of its input."""
    options = ("--omprog", "-c", NOBODY, "--grace", 0.2)
    child = start(ZMQPUSH, *options, stderr=subprocess.STDOUT)
    out, _ = child.communicate(b"a message\n", PATIENCE)

    assert (child.returncode, b"1 lost" in out) == (1, True)


@pytest.mark.parametrize("output", ["pipe", "null", "file"])
@WAYS
def test_where_no_answers_are_wanted_there_are_none(
    start, pipeline, tmp_path, output, transactions
):
    pipeline.receive()
    marks = [BEGIN, COMMIT] if transactions else []
    data = b"".join(
        b"".join(mark + b"\n" for mark in marks[:1])
        + lines(range(first, first + 100))
        + b"".join(mark + b"\n" for mark in marks[1:])
        for first in range(1, 100_001, 100)
    )
    reading, writing = os.pipe()
    if output != "pipe":
        os.close(writing)
        name = os.devnull if output == "null" else tmp_path / "output"
        writing = os.open(name, os.O_WRONLY | os.O_CREAT)
    options = ("--omprog", "-c", pipeline.endpoint, "--format", "raw")
    options += ("--transactions",) if transactions else ()
    child = start(ZMQPUSH, *options, stdout=writing, stderr=writing)
    os.close(writing)
    child.stdin.write(data)
    child.stdin.close()
    with open(reading, "rb") as pipe:
        said = pipe.read()
    assert child.wait(PATIENCE) == 0

    verify(pipeline, 100_000)
    assert len(written(pipeline.path)) == 100_000
    if output == "pipe":
        assert SUMMARY.fullmatch(said)[1] == b"100000"
    elif output == "file":
        assert SUMMARY.fullmatch((tmp_path / "output").read_bytes())[1] == b"100000"


@pytest.mark.parametrize("transactions", [False, True])
def test_without_answers_too_only_declared_marks_are_taken_out(start, pipeline, transactions):
    receiver = pipeline.receive()
    data = [BEGIN, b"a", COMMIT, b"b\r", COMMIT, BEGIN, BEGIN, b"c", COMMIT]
    options = ("--omprog", *(["--transactions"] if transactions else []), "-c", pipeline.endpoint)
    child = start(ZMQPUSH, *options, stderr=subprocess.STDOUT)
    said, _ = child.communicate(b"\n".join(data), PATIENCE)
    stop(receiver)

    kept = [b"a", COMMIT, b"b", BEGIN, b"c"] if transactions else data
    assert texts(pipeline) == [text.decode().removesuffix("\r") for text in kept]
    assert child.returncode == 0
    assert said.count(b"give --transactions") == (0 if transactions else 1)


# How it ends.


def test_when_nothing_is_delivered_for_so_long_it_gives_up_and_rsyslog_has_the_rest(make):
    rsyslog = make("--timeout", 0.5).begin()
    rsyslog.give(b"a")
    with pytest.raises(BeginAnewError, match="gone"):
        rsyslog.answer()

    assert rsyslog.leave() == 75
    told = [b"gave up after 0.5 s without delivery", b"1 not confirmed: rsyslog has them"]
    said = rsyslog.said().splitlines()
    assert [text for text in told if b"zmqpush: " + text in said] == told
    assert b"lost" not in rsyslog.said()


@pytest.mark.parametrize("terminate", [False, True])
@pytest.mark.parametrize("closed", ["both", "answers"])
def test_when_rsyslog_goes_away_while_it_waits_it_ends_at_once(pipeline, make, closed, terminate):
    rsyslog = make("--grace", 10 * PATIENCE).begin()
    rsyslog.give(b"a")
    rsyslog.wait_for_dots(1)
    if terminate:
        rsyslog.child.terminate()
    if closed == "both":
        assert rsyslog.leave() == 75
    else:
        rsyslog.answers.close()
        assert rsyslog.child.wait(PATIENCE) == 75

    told = [text for text in rsyslog.said().splitlines() if b"not confirmed" in text]
    assert told == [b"zmqpush: 1 not confirmed: rsyslog has them"]
    assert b"lost" not in rsyslog.said()
    assert rsyslog.said().count(b"\n") <= 3  # there is no receiver; the summary


def test_when_only_the_input_ends_what_waits_is_still_answered(pipeline, make):
    rsyslog = make().begin()
    rsyslog.give(b"a")
    rsyslog.messages.close()
    rsyslog.wait_for_dots(2)
    pipeline.receive()

    assert rsyslog.answer() == OK
    assert rsyslog.child.wait(PATIENCE) == 0
    assert texts(pipeline) == ["a"]


def test_a_message_without_its_end_is_not_answered(pipeline, make):
    receiver = pipeline.receive()
    rsyslog = make().begin()
    rsyslog.messages.write(b"half a mess")

    assert rsyslog.end() == 0
    stop(receiver)
    assert texts(pipeline) == []


@LEVELS
def test_after_a_signal_it_answers_until_the_input_ends(pipeline, make, level):
    receiver = pipeline.receive()
    rsyslog = make("--format", "raw", "--grace", 10 * PATIENCE, level=level).begin()
    rsyslog.deliver([line(1)])
    rsyslog.child.terminate()
    for number in (2, 3, 4):
        time.sleep(0.5)  # any other input would have been quiet for long enough
        assert rsyslog.hand_over(line(number)) == OK

    assert rsyslog.end() == 0
    stop(receiver)
    verify(pipeline, 4)


@LEVELS
def test_when_the_input_never_ends_the_grace_period_ends_it(pipeline, make, level):
    """As when systemd ends the whole group, and rsyslog has much to say: nothing is lost."""
    receiver = pipeline.receive()
    rsyslog = make("--format", "raw", "--grace", 1, level=level).begin()
    rsyslog.deliver([line(1)])
    rsyslog.child.terminate()
    confirmed = rsyslog.hand_over_until_it_goes(2)

    assert rsyslog.leave() == 0
    assert b"of the input were read" not in rsyslog.said()
    assert confirmed > 1
    stop(receiver)
    verify(pipeline, confirmed, repeated=1)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_while_it_waits_ends_it_within_the_grace_period(make, signals):
    rsyslog = make("--grace", 0.5 if signals == 1 else 10 * PATIENCE).begin()
    rsyslog.give(b"a")
    rsyslog.wait_for_dots(1)
    rsyslog.child.terminate()
    if signals == 2:
        rsyslog.wait_for_dots(3)  # so the first one was taken
        rsyslog.child.terminate()
    with pytest.raises(BeginAnewError):
        rsyslog.answer()

    assert rsyslog.child.wait(PATIENCE) == 75
    assert rsyslog.said().count(b"zmqpush: 1 not confirmed: rsyslog has them\n") == 1


def test_what_is_in_the_spool_waits_for_the_next_start(pipeline, make):
    rsyslog = make("--format", "raw", "--grace", 0.1, level="fsync").begin()
    rsyslog.deliver([line(1), line(2)])

    assert rsyslog.end() == 75
    assert b"2 left in the spool" in rsyslog.said()
    receiver = pipeline.receive()
    rsyslog.deliver([line(3)])
    wait_until(lambda: written(pipeline.path) == [1, 2, 3])

    def is_acknowledged():
        rsyslog.child.send_signal(signal.SIGHUP)
        return b" 0 queued" in rsyslog.said()

    wait_until(is_acknowledged)
    assert rsyslog.end() == 0
    stop(receiver)
    assert written(pipeline.path) == [1, 2, 3]


def test_a_hangup_prints_statistics_and_no_answer(pipeline, make):
    pipeline.receive()
    rsyslog = make().begin()
    rsyslog.deliver([b"a"])
    rsyslog.child.send_signal(signal.SIGHUP)
    wait_until(lambda: b"1 read, 1 acknowledged, 0 queued, 0 dropped" in rsyslog.said())
    rsyslog.deliver([b"b"])

    assert rsyslog.end() == 0
    assert texts(pipeline) == ["a", "b"]


def test_an_interrupt_stays_ignored(pipeline, make):
    pipeline.receive()
    rsyslog = make().begin()
    for _ in range(3):
        rsyslog.child.send_signal(signal.SIGINT)
        rsyslog.deliver([b"a"])

    assert rsyslog.end() == 0
    assert texts(pipeline) == ["a", "a", "a"]
    assert rsyslog.restarts == 0


# What else is printed.

NOISE = """
import ctypes, logging, warnings  # logging asks for the time when it is imported
now, libc = time.time, ctypes.CDLL(None)
def noisy():
    print("OK", flush=True)
    os.write(1, b"OK\\n")
    os.system("echo OK")
    libc.puts(b"OK")
    libc.fflush(None)
    warnings.warn("OK")
    sys.__stdout__.write("OK\\n")
    return now()
time.time = noisy
"""


def test_nothing_but_answers_is_on_standard_output(pipeline, make, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import atexit\nprint('OK')\natexit.register(print)")
    pipeline.receive()
    rsyslog = make(command=patched("zmqpush", NOISE))
    rsyslog.begin(PYTHONPATH=str(tmp_path), PYTHONWARNINGS="always")
    for message in MESSAGES:
        assert rsyslog.hand_over(message) == OK

    assert rsyslog.end() == 0
    assert rsyslog.said().count(b"OK\n") >= 4 * len(MESSAGES)
    assert SUMMARY.search(rsyslog.said())


@pytest.mark.parametrize("args", [("--nope",), ("--confirm", "write"), ("-c", "nowhere")])
def test_a_wrong_usage_is_one_clear_line_and_no_answer(make, args):
    rsyslog = make(*args)
    with pytest.raises(BeginAnewError):
        rsyslog.begin()

    assert rsyslog.end() == 2
    assert re.fullmatch(rb"zmqpush: .+; see zmqpush --help\n", rsyslog.said())


# Who dies.

POINTS = ["message-answered", "message-read", "message-safe"]


def test_the_points_of_the_dialogue_are_those_of_the_sources():
    assert [name for name in fault_points("zmqpush") if name.startswith("message-")] == POINTS


@pytest.mark.parametrize("passage", [1, 2, 5])
@pytest.mark.parametrize("point", POINTS)
@LEVELS
@WAYS
def test_wherever_it_dies_nothing_is_lost(pipeline, make, level, transactions, point, passage):
    """Killed there: lost 0, repeated no more than what was to be confirmed then."""
    receiver = pipeline.receive()
    rsyslog = make("--format", "raw", level=level, transactions=transactions)
    rsyslog.begin(ZMQPUSH_FAULT=f"{point}:{passage}")
    for first in range(1, 30, 3):
        rsyslog.deliver([line(n) for n in range(first, first + 3)])

    assert rsyslog.restarts == 1
    assert rsyslog.end() == 0
    stop(receiver)
    verify(pipeline, 30, repeated=3 if transactions else 1)


@LEVELS
@WAYS
def test_01_senders_and_receivers_that_are_killed_lose_nothing(pipeline, make, level, transactions):
    """Killed at any time: lost 0, repeated one unit at most for each kill of the sender."""
    some = random.Random(f"{level} {transactions}")
    receiver = pipeline.receive()
    rsyslog = make("--format", "raw", level=level, transactions=transactions)
    stopped = threading.Event()
    kills = 0

    def kill():
        nonlocal receiver, kills
        while kills < 2 * DOSE.kills and not stopped.wait(some.uniform(0.1, 0.7)):
            child = rsyslog.child
            if kills % 2:
                receiver.kill()
                receiver.wait()
                receiver = pipeline.receive()
            elif not child or child.poll() is not None:
                continue
            else:
                wait_until_ready(child)
                time.sleep(some.uniform(0, 0.2))
                child.kill()
            kills += 1

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    fed = 0
    try:
        while killer.is_alive():
            numbers = range(fed + 1, fed + some.randrange(2, 50))
            rsyslog.deliver([line(n) for n in numbers])
            fed = numbers[-1]
    finally:
        stopped.set()
        killer.join(PATIENCE)
    rsyslog.deliver([line(fed + 1)])

    assert kills == 2 * DOSE.kills
    assert rsyslog.end() == 0
    stop(receiver)
    verify(pipeline, fed + 1, repeated=DOSE.kills * (50 if transactions else 1))


# When there is no room.


@pytest.mark.parametrize("level", ["write", "fsync"])
def test_a_full_spool_is_waited_for(pipeline, make, level):
    options = ("--spool-max", "1MiB", "--field", f"x={'y' * 50_000}")
    rsyslog = make(*options, level=level, confirm_timeout=3).begin()
    fed = 0
    while b"spool is full" not in rsyslog.said():
        fed += 1
        rsyslog.give(line(fed))
        with contextlib.suppress(AssertionError):  # there is an answer
            rsyslog.wait_for_dots(2)
            break
        assert rsyslog.answer() == OK
    assert fed > 10
    receiver = pipeline.receive()

    assert rsyslog.answer() == OK
    rsyslog.deliver([line(fed + 1)])
    assert rsyslog.end() == 0
    stop(receiver)
    verify(pipeline, fed + 1)


@pytest.fixture
def small_disk(pipeline, tmp_path):
    """Put the spool on a file system of 4 MiB; return the name of a file to fill it with."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "zmqpush", disk]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("a small tmpfs cannot be mounted here: that takes root")
    pipeline.spool = disk / "spool"
    yield disk / "ballast"
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("level", ["write", "fsync"])
@WAYS
def test_a_full_disk_is_waited_for(pipeline, make, small_disk, level, transactions):
    rsyslog = make(
        "--format", "raw", level=level, confirm_timeout=3, transactions=transactions
    ).begin()
    rsyslog.deliver([line(1)])
    fill_disk(small_disk)
    fed = 1
    if transactions:
        rsyslog.open()
        for fed in range(2, 1001):
            assert rsyslog.hand_over(line(fed)) == DEFER_COMMIT
        rsyslog.give(COMMIT)
        rsyslog.wait_for_dots(2)
    else:
        with contextlib.suppress(AssertionError):
            while True:
                fed += 1
                rsyslog.give(line(fed))
                rsyslog.wait_for_dots(2)
                break
    small_disk.unlink()

    assert rsyslog.answer() == OK
    assert rsyslog.restarts == 0
    receiver = pipeline.receive()
    assert rsyslog.end() == 0
    stop(receiver)
    verify(pipeline, fed)


def test_several_workers_use_slots_of_one_spool_and_one_too_many_ends(pipeline, make):
    options = ((), (), ("--spool-slots", 2))
    workers = [make("--format", "raw", *slots, level="fsync") for slots in options]
    for number, worker in enumerate(workers[:2], 1):
        worker.begin().deliver([line(number)])
    with pytest.raises(BeginAnewError):
        workers[2].begin()

    assert workers[2].end() == 73
    assert re.fullmatch(
        rb"zmqpush: the spool \S+ is in use by process \d+, \d+: give .*\n", workers[2].said()
    )
    receiver = pipeline.receive()
    for worker in workers[:2]:
        assert worker.end() == 0
    stop(receiver)
    verify(pipeline, 2)


@WAYS
def test_a_sync_that_fails_is_no_answer(pipeline, make, transactions):
    receiver = pipeline.receive()
    code = FAILING_SYNC.format(n=3, onwards=False)
    rsyslog = make(
        "--format",
        "raw",
        level="fsync",
        command=patched("zmqpush", code),
        transactions=transactions,
    ).begin()
    for number in range(1, 11):
        rsyslog.deliver([line(number)])

    assert b"fails: Input/output error: a new segment" in rsyslog.said()
    assert rsyslog.restarts == 0
    assert rsyslog.end() == 0
    stop(receiver)
    verify(pipeline, 10)


def test_a_disk_that_fails_for_good_ends_it_without_an_answer(pipeline, make):
    receiver = pipeline.receive()
    code = FAILING_SYNC.format(n=5, onwards=True)
    rsyslog = make("--format", "raw", level="fsync", command=patched("zmqpush", code)).begin()
    confirmed = rsyslog.hand_over_until_it_goes(1)

    assert rsyslog.leave() == 74
    assert re.search(rb"zmqpush: cannot write to the spool .* may not be safe\n", rsyslog.said())
    rsyslog = make("--format", "raw", level="fsync").begin()
    rsyslog.deliver([line(n) for n in range(confirmed + 1, 11)])
    assert rsyslog.end() == 0
    stop(receiver)
    verify(pipeline, 10, repeated=1)


# How it waits.


@pytest.mark.parametrize("comes", [False, True])
def test_it_gives_up_before_the_signs_of_life_fill_the_answer(pipeline, make, comes):
    """More of them than rsyslog reads would be an error; the message comes again."""
    code = "import zmqpush.sender.omprog; zmqpush.sender.omprog._KEEP_ALIVE_INTERVAL = 0.001"
    rsyslog = make("--format", "raw", command=patched("zmqpush", code)).begin()
    rsyslog.give(line(1))
    rsyslog.wait_for_dots(3000 if not comes else 500)
    receiver = None
    if comes:
        rsyslog.child.send_signal(signal.SIGSTOP)
        receiver = pipeline.receive()
        rsyslog.child.send_signal(signal.SIGCONT)
    with pytest.raises(BeginAnewError, match="gone") if not comes else contextlib.nullcontext():
        assert rsyslog.answer() == OK
    if not comes:
        assert rsyslog.dots == 4000
        assert rsyslog.leave() == 75
        receiver = pipeline.receive()
        rsyslog.deliver([line(1)])

    assert rsyslog.end() == 0
    stop(receiver)
    verify(pipeline, 1)


@pytest.mark.slow
@pytest.mark.parametrize("away", [False, True])
def test_it_wakes_up_no_more_than_it_must(pipeline, make, away):
    """Once a second for the receiver; while that is away, once for a dot, and to connect again."""
    if not away:
        pipeline.receive()
    rsyslog = make().begin()
    if away:
        rsyslog.give(b"a")
        rsyslog.wait_for_dots(2)
    else:
        rsyslog.deliver([b"a", b"b"])

    def wake_ups():
        tasks = Path(f"/proc/{rsyslog.child.pid}/task").glob("*/status")
        found = (re.search(r"\nvoluntary_ctxt_switches:\s+(\d+)", t.read_text()) for t in tasks)
        return sum(int(match[1]) for match in found)

    before = wake_ups()
    time.sleep(10)
    assert wake_ups() - before <= (60 if away else 10)
