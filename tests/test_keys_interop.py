"""CURVE with peers that are not ours: rsyslog's modules, and bare sockets with their own ZAP."""

import contextlib
import json
import re
import signal
import subprocess
import threading

import pytest
import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from helpers import PATIENCE, ZMQKEYS, ZMQPULL, ZMQPUSH, wait_until
from rsyslogs import Rsyslogd, needs_module, needs_rsyslogd, text
from zmqpush.security.keyfile import read_pair


@pytest.fixture
def pairs(tmp_path):
    """Return the files of two key pairs: of who binds, and of who connects."""
    for name in ("server", "client"):
        command = [ZMQKEYS, "new", tmp_path / name]
        subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    return tmp_path / "server", tmp_path / "client"


@pytest.fixture
def rsyslog(start, tmp_path):
    daemon = Rsyslogd(start, tmp_path)
    yield daemon
    daemon.clean_up()


@needs_rsyslogd
@needs_module("imczmq")
def test_rsyslog_receives_what_zmqpush_encrypts(rsyslog, start, pairs, tmp_path):
    server, client = pairs
    (tmp_path / "clients").mkdir()
    rsyslog.configure(
        f'module(load="imczmq" authtype="CURVESERVER" authenticator="on" servercertpath="{server}"'
        f' clientcertpath="{tmp_path}/clients")',
        f'input(type="imczmq" endpoints="@{rsyslog.plain_endpoint}" socktype="PULL" ruleset="in")',
        'template(name="raw" type="string" string="%rawmsg%\n")',
        f'ruleset(name="in") {{ action(type="omfile" file="{rsyslog.path}" template="raw") }}',
    )
    rsyslog.run()
    keys = ("--key", client, "--server-key", server)
    sender = start(ZMQPUSH, *keys, "--connect", rsyslog.plain_endpoint, "app")
    sender.stdin.write("".join(text(number) + "\n" for number in range(100)).encode())
    sender.stdin.close()
    wait_until(lambda: b"does not admit the key" in sender.stderr.readline())
    allow = [ZMQKEYS, "allow", tmp_path / "clients", client]
    subprocess.run(allow, check=True, capture_output=True, timeout=PATIENCE)

    rsyslog.wait_for(range(100))
    assert sender.wait(PATIENCE) == 0
    assert rsyslog.received() == list(range(100))


@needs_rsyslogd
@needs_module("omczmq")
def test_zmqpull_receives_what_rsyslog_encrypts(rsyslog, start, pairs, tmp_path):
    server, client = pairs
    allow = [ZMQKEYS, "allow", tmp_path / "allowed", client]
    subprocess.run(allow, check=True, capture_output=True, timeout=PATIENCE)
    keys = ("--key", server, "--allow", tmp_path / "allowed")
    start(ZMQPULL, *keys, "--bind", rsyslog.plain_endpoint, "--to", rsyslog.path)
    rsyslog.configure(
        f'module(load="omczmq" authtype="CURVECLIENT" servercertpath="{server}"'
        f' clientcertpath="{client}")',
        'template(name="json" type="string" string="{\\"message\\":\\"%msg:::json%\\"}")',
        f'*.* action(type="omczmq" endpoints=">{rsyslog.plain_endpoint}" socktype="PUSH"'
        ' template="json")',
    )
    rsyslog.run()
    rsyslog.send(range(100))

    rsyslog.wait_for(range(100))
    records = [json.loads(line)["message"] for line in rsyslog.path.read_bytes().splitlines()]
    assert [record.strip() for record in records if "#" in record] == [text(n) for n in range(100)]


class Provider:
    """Whom a bare peer admits; pyzmq's own ZAP answers 400 to all others."""

    def __init__(self):
        self.admitted = set()
        self.refused = threading.Event()

    def callback(self, _domain, key):
        if key.decode() not in self.admitted:
            self.refused.set()
        return key.decode() in self.admitted


@contextlib.contextmanager
def bare_server(pair, provider):
    """Return a bound PULL socket that encrypts, and asks ``provider``."""
    with zmq.Context() as context:
        authenticator = ThreadAuthenticator(context)
        authenticator.start()
        authenticator.configure_curve_callback(domain="*", credentials_provider=provider)
        with context.socket(zmq.PULL) as socket:
            socket.setsockopt(zmq.RCVTIMEO, int(PATIENCE * 1000))
            socket.setsockopt(zmq.LINGER, 0)
            socket.curve_server = True
            socket.curve_publickey = pair.public.encode()
            socket.curve_secretkey = pair.secret.encode()
            socket.bind("tcp://127.0.0.1:*")
            yield socket
        authenticator.stop()


def test_zmqpush_gets_in_once_another_server_admits_it(start, pairs):
    server, client = pairs
    provider = Provider()
    with bare_server(read_pair(server), provider) as pull:
        keys = ("--key", client, "--server-key", server)
        sender = start(ZMQPUSH, "--connect", pull.last_endpoint, *keys)
        sender.stdin.write(b"secret line\n")
        sender.stdin.close()
        assert provider.refused.wait(PATIENCE)
        wait_until(lambda: b"does not admit the key" in sender.stderr.readline())
        provider.admitted.add(read_pair(client).public)

        assert json.loads(pull.recv())["message"] == "secret line"
        assert sender.wait(PATIENCE) == 0


def test_a_bare_sender_gets_in_once_zmqpull_admits_it(start, pairs, tmp_path):
    server, client = read_pair(pairs[0]), read_pair(pairs[1])
    keys = ("--key", pairs[0], "--allow", tmp_path / "allowed")
    (tmp_path / "allowed").touch()
    receiver = start(ZMQPULL, "--bind", "tcp://127.0.0.1:*", *keys)
    endpoint = re.search(rb"tcp://\S+:\d+", receiver.stderr.readline())[0]
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.curve_serverkey = server.public.encode()
        socket.curve_publickey = client.public.encode()
        socket.curve_secretkey = client.secret.encode()
        socket.connect(endpoint)
        socket.send(b'{"message":"from a bare socket"}')
        refusal = next(line for line in receiver.stderr if b"not admitted" in line).decode()
        command = re.search(r"(zmqpush-keys allow .*), then SIGHUP", refusal)[1]
        shell = ["bash", "-c", command.replace("zmqpush-keys", ZMQKEYS)]
        subprocess.run(shell, check=True, capture_output=True, timeout=PATIENCE)
        receiver.send_signal(signal.SIGHUP)

        assert b"from a bare socket" in receiver.stdout.readline()
