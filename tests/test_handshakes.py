"""Peers that do not get together: what each end says, and that delivery begins by itself."""

import contextlib
import os
import signal
import socket
import threading
from pathlib import Path

import pytest
import zmq

import test_curve
from helpers import PATIENCE, ZMQPULL, ZMQPUSH, wait_until, wait_until_ready
from proxy import Proxy
from test_curve import feed, free_endpoint, messages

keys = test_curve.keys
MODES = pytest.mark.parametrize("mode", ["plain", "ack"])
ENCRYPTED = pytest.mark.parametrize("encrypted", [True, False], ids=["curve", "null"])
SECRET = b"the text of a line that nobody may read"
HTTP = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
SSH = b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"
# Of older versions of ZMTP, and of what is none.
GREETINGS = {
    "ZMTP 1": b"\x01\x00",
    "ZMTP 1 with a name": b"\x05\x00name",
    "ZMTP 2": b"\xff" + bytes(8) + b"\x7f\x01\x07\x00\x00",
    "HTTP": HTTP,
    "ssh": SSH,
    "TLS alert": b"\x15\x03\x01\x00\x02\x02\x46",
    "random": os.urandom(100),
    "nothing": b"",
}
# Without keys and acknowledgements a PULL of ZMTP 2 is a receiver.
GREETINGS_SUB = GREETINGS | {"ZMTP 2": b"\xff" + bytes(8) + b"\x7f\x01\x02\x00\x00"}


class Stranger:
    """
    Greets whoever connects to ``port`` and keeps what it hears, while the context lasts.

    Attributes:
        heard: All that was sent to it.
        connections: How many there were.

    """

    def __init__(self, port: int, greeting: bytes, *, closes: bool = False) -> None:
        self._port, self._greeting, self._closes = port, greeting, closes
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []
        self.heard: list[bytes] = []
        self.connections = 0

    def __enter__(self) -> "Stranger":
        self._server = socket.create_server(("127.0.0.1", self._port))
        self._begin(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        for end in (self._server, *self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in (self._server, *self._open):
            end.close()

    def _begin(self, work, *args):
        self._threads.append(threading.Thread(target=work, args=args))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                end, _ = self._server.accept()
                self._open.append(end)
                self.connections += 1
                self._begin(self.talk, end)

    def talk(self, end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            end.sendall(self._greeting)
            while data := end.recv(1 << 16):
                self.heard.append(data)
                if self._closes:
                    end.shutdown(socket.SHUT_RDWR)


def port_of(endpoint):
    return int(endpoint.rsplit(":", 1)[1])


class Lines:
    """What a program has said on standard error, so far, but that there is no receiver."""

    def __init__(self, child):
        self._child, self.all = child, []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        with contextlib.suppress(ValueError):
            lines = iter(self._child.stderr.readline, b"")
            self.all.extend(line for line in lines if b": no receiver " not in line)

    def that(self, text):
        return [line for line in list(self.all) if text.encode() in line]


@pytest.fixture
def ends(start, tmp_path, keys):
    """Return a function each that starts zmqpush and zmqpull, quiet, at one endpoint."""

    class Ends:
        endpoint = free_endpoint("tcp", tmp_path)
        path = tmp_path / "all"
        mode = "plain"

        def push(self, *options, endpoint=None):
            ack = ["--ack"] if self.mode == "ack" else []
            sender = start(ZMQPUSH, "-q", *ack, "-c", endpoint or self.endpoint, *options)
            feed(sender, SECRET + b"\n")
            return sender, Lines(sender)

        def pull(self, *options):
            flag = "-a" if self.mode == "ack" else "-b"
            child = start(ZMQPULL, "-q", flag, self.endpoint, *options, "--to", self.path)
            return child, Lines(child)

        def delivered(self):
            return SECRET.decode() in messages(self.path)

    return Ends()


def stop(child):
    child.kill()
    child.wait()


# Wrong keys.


@MODES
def test_a_wrong_server_key_is_told_of_at_both_ends_until_the_right_one_comes(ends, keys, mode):
    ends.mode = mode
    wrong, told = ends.pull(*keys.binds("other"))
    _, says = ends.push(*keys.connects())
    wait_until(lambda: says.all and told.all)
    stop(wrong)
    ends.pull(*keys.binds())
    wait_until(ends.delivered)

    (line,) = says.all
    assert b"has another key than --server-key" in line
    (line,) = told.all
    assert b"has a wrong --server-key: it is %s" % keys.public("other").encode() in line


@MODES
def test_a_key_that_is_not_admitted_is_told_of_at_both_ends_until_it_is(ends, keys, mode):
    ends.mode = mode
    keys.admit("somebody")
    receiver, told = ends.pull(*keys.binds())
    _, says = ends.push(*keys.connects())
    wait_until(lambda: says.all and told.all)
    assert not ends.delivered()
    keys.admit("web1")
    receiver.send_signal(signal.SIGHUP)
    wait_until(ends.delivered)

    key = keys.public("web1").encode()
    (line,) = says.all
    assert b"does not admit the key %s" % key in line
    (line,) = told.all
    assert line.startswith(b"zmqpull: not admitted: '%s'" % key)
    assert b"zmqpush-keys allow %s '%s', then SIGHUP" % (bytes(keys.list), key) in line


@MODES
@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_one_end_without_keys_is_told_of_at_both_ends(ends, keys, mode, who):
    ends.mode = mode
    receiver, told = ends.pull(*([] if who == "receiver" else keys.binds()))
    _, says = ends.push(*([] if who == "sender" else keys.connects()))
    wait_until(lambda: says.all and told.all)
    assert not ends.delivered()
    stop(receiver)
    ends.pull(*([] if who == "sender" else keys.binds()))
    wait_until(ends.delivered)

    assert (len(says.all), len(told.all)) == (1, 1)
    assert b"encrypt" in says.all[0]
    assert b"encrypt" in told.all[0]


def test_the_same_when_the_sender_binds(ends, keys, start, tmp_path):
    sender = start(ZMQPUSH, "-q", "-b", ends.endpoint, *keys.binds("web1"))
    told = Lines(sender)
    feed(sender, SECRET + b"\n")
    plain, wrong, unknown = [
        start(ZMQPULL, "-q", "-c", ends.endpoint, "--to", tmp_path / f"no{at}", *options)
        for at, options in enumerate(
            ([], keys.connects("web1", to="other"), keys.connects("other", to="web1"))
        )
    ]
    says = [Lines(child) for child in (plain, wrong, unknown)]
    wait_until(lambda: len(told.all) == 3 and all(lines.all for lines in says))
    keys.admit("collector")
    sender.send_signal(signal.SIGHUP)
    start(
        ZMQPULL, "-q", "-c", ends.endpoint, "--to", ends.path, *keys.connects("collector", "web1")
    )
    wait_until(ends.delivered)

    assert [len(lines.all) for lines in says] == [1, 1, 1]
    assert all(messages(tmp_path / f"no{at}") == [] for at in range(3))
    assert "encrypt" in str(says[0].all)
    assert "another key than --server-key" in str(says[1].all)
    assert "does not admit the key" in str(says[2].all)


def test_a_sender_that_is_refused_is_no_load(ends, keys):
    keys.admit("somebody")
    receiver, told = ends.pull(*keys.binds())
    with Proxy(port_of(ends.endpoint)) as proxy:
        sender, says = ends.push(*keys.connects(), endpoint=f"tcp://127.0.0.1:{proxy.port}")
        wait_until(lambda: says.all and told.all)

        def used():
            fields = [
                Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
                for child in (sender, receiver)
            ]
            return [int(each[11]) + int(each[12]) for each in fields]

        before, tries = used(), proxy.connections
        wait_until(lambda: proxy.connections >= tries + 2)  # each takes five seconds
        spent = [b - a for a, b in zip(before, used(), strict=True)]

    assert max(spent) <= os.sysconf("SC_CLK_TCK") / 5
    assert (len(says.all), len(told.all)) == (1, 1)


@MODES
@ENCRYPTED
def test_a_port_for_the_other_delivery_is_told_of_at_both_ends(ends, keys, mode, encrypted):
    ends.mode = "ack" if mode == "plain" else "plain"
    _, told = ends.pull(*(keys.binds() if encrypted else []))
    ends.mode = mode
    _, says = ends.push(*(keys.connects() if encrypted else []))
    wait_until(lambda: says.all and told.all)

    port, peer = {
        "plain": ("a port for --ack", "a sender without --ack, which belongs at a --bind"),
        "ack": ("a port for senders without --ack", "a sender with --ack, which belongs at an"),
    }[mode]
    assert says.all[0].startswith(f"zmqpush: {ends.endpoint} ".encode())
    assert f" is {port}" in says.all[0].decode()
    assert peer in told.all[0].decode()
    assert len(told.all) == 1


def test_who_connects_and_goes_is_not_told_of_but_a_wrong_sender_after_it_is(ends):
    """As a health check does."""
    receiver, told = ends.pull()
    wait_until_ready(receiver)
    for _ in range(3):
        socket.create_connection(("127.0.0.1", port_of(ends.endpoint))).close()
    ends.push()
    wait_until(ends.delivered)
    ends.mode = "ack"
    ends.push()
    wait_until(lambda: told.all)

    assert len(told.that("a sender with --ack")) == len(told.all) == 1


@MODES
@pytest.mark.parametrize("kind", ["SUB", "PUB", "PUSH", "PAIR"])
def test_another_kind_of_zeromq_socket_is_told_of(ends, mode, kind):
    ends.mode = mode
    with zmq.Context() as context, context.socket(getattr(zmq, kind)) as other:
        other.setsockopt(zmq.LINGER, 0)
        other.bind(ends.endpoint)
        _, says = ends.push()
        wait_until(lambda: says.all)

    line = says.all[0].decode()
    assert "another kind of ZeroMQ socket" in line or "closes the connection" in line


# Nobody there.


@MODES
@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        ("{free}", "{free}: Connection refused: is zmqpull running there?"),
        ("tcp://[::1]:9", "tcp://[::1]:9: "),
        ("tcp://host.invalid:5014", "cannot resolve host.invalid: "),
        ("tcp://host..invalid:5014", "cannot resolve host..invalid: "),
        ("ipc://{path}/none", "ipc://{path}/none: No such file or directory: is zmqpull running"),
    ],
)
def test_why_nobody_is_there_is_said_where_that_is_said(start, tmp_path, mode, endpoint, why):
    free = free_endpoint("tcp", tmp_path)
    endpoint, why = (text.format(free=free, path=tmp_path) for text in (endpoint, why))
    child = start(ZMQPUSH, "-c", endpoint, *(["--ack"] if mode == "ack" else []))
    feed(child, SECRET + b"\n")
    while why.encode() not in (line := child.stderr.readline()):
        assert line, "it has ended"

    assert line.startswith((b"zmqpush: no receiver ", b"zmqpush: cannot resolve "))
    child.terminate()
    assert child.wait(PATIENCE) == 1  # and nothing keeps it from its end


def test_a_receiver_that_connects_says_once_why_nobody_is_there(start, tmp_path):
    endpoint = free_endpoint("tcp", tmp_path)
    child = start(ZMQPULL, "-c", endpoint)

    assert child.stderr.readline().decode() == (
        f"zmqpull: {endpoint}: Connection refused: is zmqpush running there?\n"
    )


# Strangers.


@MODES
@ENCRYPTED
@pytest.mark.parametrize("greeting", ["HTTP", "ssh"])
def test_a_server_of_another_kind_is_told_of_until_the_receiver_comes(
    ends, keys, mode, encrypted, greeting
):
    ends.mode = mode
    endpoint = ends.endpoint.replace("127.0.0.1", "localhost")
    _, says = ends.push(*(keys.connects() if encrypted else []), endpoint=endpoint)
    # At first nobody is there, so that libzmq looks the name up.
    with Stranger(port_of(endpoint), GREETINGS[greeting], closes=True) as stranger:
        wait_until(lambda: says.all and stranger.connections > 2)
    ends.pull(*(keys.binds() if encrypted else []))
    wait_until(ends.delivered)

    assert len(says.that("does not speak ZMTP 3 (is it an HTTP or ssh server?)")) == 1
    assert len(says.all) == 1
    assert SECRET not in b"".join(stranger.heard)


def test_of_two_names_with_one_port_the_one_that_gave_up_is_tried_again(ends, keys, tmp_path):
    port = port_of(ends.endpoint)
    first = f"tcp://ip6-localhost.invalid:{port}"
    second = f"tcp://localhost:{port}"
    options = ["--key", keys.file("web1"), "-c", second, "--server-key", keys.public("other")]
    _, says = ends.push(*options, "--server-key", keys.public("collector"), endpoint=first)
    with Stranger(port, HTTP, closes=True):
        wait_until(lambda: says.all)
    ends.pull(*keys.binds())
    wait_until(ends.delivered)


@MODES
@ENCRYPTED
def test_a_listener_that_says_nothing_is_told_of(ends, keys, mode, encrypted):
    ends.mode = mode
    with Stranger(port_of(ends.endpoint), b"") as stranger:
        _, says = ends.push(*(keys.connects() if encrypted else []))
        wait_until(lambda: says.all)
    ends.pull(*(keys.binds() if encrypted else []))
    wait_until(ends.delivered)

    (line,) = says.all
    assert b"says nothing" in line
    assert SECRET not in b"".join(stranger.heard)


@MODES
@ENCRYPTED
@pytest.mark.parametrize("greeting", GREETINGS)
def test_no_line_is_sent_to_who_does_not_speak_zmtp_3(ends, keys, mode, encrypted, greeting):
    ends.mode = mode
    greetings = GREETINGS if encrypted or mode == "ack" else GREETINGS_SUB
    with Stranger(port_of(ends.endpoint), greetings[greeting]) as stranger:
        _, says = ends.push(*(keys.connects() if encrypted else []))
        wait_until(
            lambda: stranger.connections > 1 or says.all or SECRET in b"".join(stranger.heard)
        )

    assert SECRET not in b"".join(stranger.heard)


@ENCRYPTED
@pytest.mark.parametrize("greeting", GREETINGS)
def test_no_line_is_sent_to_a_stranger_who_connects(ends, keys, start, encrypted, greeting):
    keys.admit("collector")
    sender = start(ZMQPUSH, "-q", "-b", ends.endpoint, *(keys.binds("web1") if encrypted else []))
    told = Lines(sender)
    feed(sender, SECRET + b"\n")
    wait_until_ready(sender)
    stranger = Stranger(0, (GREETINGS if encrypted else GREETINGS_SUB)[greeting])
    with socket.create_connection(("127.0.0.1", port_of(ends.endpoint))) as end:
        end.settimeout(PATIENCE / 4)
        stranger.talk(end)  # until the sender hangs up

    heard = b"".join(stranger.heard)
    assert SECRET not in heard
    if greeting not in ("nothing", "TLS alert"):
        wait_until(lambda: told.all)
        what = "something that does not speak ZMTP 3 connects to"
        if greeting == "ZMTP 2" and not encrypted:
            what = "it is a SUB socket, not a PULL"
        assert len(told.that(what)) == 1
    options = keys.connects("collector", to="web1") if encrypted else []
    start(ZMQPULL, "-q", "-c", ends.endpoint, "--to", ends.path, *options)
    wait_until(ends.delivered)


@MODES
def test_nobody_on_the_way_can_read_a_line(ends, keys, mode):
    ends.mode = mode
    ends.pull(*keys.binds())
    passed = []

    def record(data):
        passed.append(data)
        return data

    with Proxy(port_of(ends.endpoint)) as proxy:
        proxy.change = record
        sender, _ = ends.push(*keys.connects(), endpoint=f"tcp://127.0.0.1:{proxy.port}")
        wait_until(ends.delivered)
        stop(sender)

    assert passed
    assert SECRET not in b"".join(passed)


def test_many_peers_that_fail_are_told_of_in_few_lines(ends, keys):
    keys.admit("somebody")
    receiver, told = ends.pull(*keys.binds())
    wait_until_ready(receiver)
    for at in range(100):
        with socket.create_connection(("127.0.0.1", port_of(ends.endpoint))) as end:
            end.sendall(GREETINGS["ZMTP 2"] if at % 2 else HTTP)
            end.settimeout(PATIENCE)
            with contextlib.suppress(OSError):
                while end.recv(1000):
                    pass
    wait_until(lambda: told.all)
    keys.admit("web1")
    receiver.send_signal(signal.SIGHUP)
    ends.push(*keys.connects())
    wait_until(ends.delivered)

    assert len(told.that("something that does not speak ZMTP 3 connects to")) == 1
    assert len(told.all) <= 2
