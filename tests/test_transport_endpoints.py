"""Where sockets of ours bind and connect, and what the system may do to them meanwhile."""

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import stat
import threading

import pytest

from hostile import connect, greeting, ready
from transports import Notes, Peer, bound, guard, messages, opened, run, until
from zmqpush.core.records.encode import Payload
from zmqpush.core.records.framing import Framing
from zmqpush.errors import EndpointError, SettingsError
from zmqpush.settings import Endpoints, check_endpoint
from zmqpush.transport import addresses, dialer, link
from zmqpush.transport.addresses import Address, listen
from zmqpush.transport.pull import PullSocket
from zmqpush.transport.push import PushSocket

MIB = 1 << 20
GOOD = [
    "tcp://*:*",
    "tcp://[::]:5014",
    "tcp://[::]:*",
    "tcp://eth0:5014",
    "tcp://br-lan.7:5014",
    "tcp://[fe80::1%eth0]:5014",
    "tcp://[fe80::1%br-lan.7]:5014",
    "tcp://[::ffff:127.0.0.1]:5014",
    "ipc://*",
    "ipc://@abstract",
]


def dialing(stack, *endpoints, notes=None):
    push = PushSocket(Endpoints(connect=endpoints), guard(notes), Framing.LINES, b"\n")
    return stack.enter_context(opened(push))


def receiver(stack, *endpoints, notes=None):
    return stack.enter_context(opened(PullSocket(bound(*endpoints), guard(notes), 4 * MIB)))


def silent_server(stack):
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    server.setblocking(False)
    return server, f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("endpoint", GOOD)
def test_endpoints_to_bind(endpoint):
    assert check_endpoint(endpoint, bind=True) == endpoint


@pytest.mark.parametrize("endpoint", ["tcp://*:5014", "tcp://host:*", "ipc://*", "tcp://[::1%]:1"])
def test_what_cannot_be_connected_to(endpoint):
    with pytest.raises(SettingsError):
        check_endpoint(endpoint)


@pytest.mark.parametrize("endpoint", ["tcp://*:*", "tcp://lo:*", "tcp://127.0.0.1:*", "ipc://*"])
def test_what_the_system_chose_is_known(endpoint):
    async def test(stack):
        assert bound(endpoint).has_open_port
        pull = receiver(stack, endpoint)
        assert "*" not in pull.address
        push = dialing(stack, pull.address.replace("0.0.0.0", "127.0.0.1"))
        await until(lambda: push.has_room)

    run(test)


def test_a_path_that_the_system_chose_is_gone_afterwards():
    async def test(stack):
        pull = receiver(stack, "ipc://*")
        path = pull.address.removeprefix("ipc://")
        assert stat.S_ISSOCK(os.stat(path).st_mode)
        pull.stop()
        assert not os.path.exists(os.path.dirname(path))

    run(test)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_live_socket_of_any_kind_is_left_alone(tmp_path, kind):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, kind) as live:
        live.bind(str(path))
        if kind is not socket.SOCK_DGRAM:
            live.listen(0)
        inode = path.stat().st_ino
        with pytest.raises(EndpointError, match="in use"):
            listen(f"ipc://{path}")
        if kind is not socket.SOCK_DGRAM:  # nor is it waited for when it is full
            with socket.socket(socket.AF_UNIX, kind) as first:
                first.setblocking(False)
                first.connect_ex(str(path))
                with pytest.raises(EndpointError, match="in use"):
                    listen(f"ipc://{path}")
        assert path.stat().st_ino == inode


@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "link"])
def test_what_is_no_socket_is_left_alone(tmp_path, kind):
    path = tmp_path / "it"
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    {
        "file": lambda: path.write_bytes(b"precious"),
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to(stale),
    }[kind]()
    with pytest.raises(EndpointError, match="no socket"):
        listen(f"ipc://{path}")
    assert path.exists()
    assert stale.exists()


def test_of_many_that_find_a_stale_socket_one_gets_it(tmp_path):
    for _ in range(20):
        path = tmp_path / "socket"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        listeners, barrier = [], threading.Barrier(8)

        def race(path=path, listeners=listeners, barrier=barrier):
            barrier.wait()
            with contextlib.suppress(EndpointError):
                listeners.append(listen(f"ipc://{path}")[0])

        threads = [threading.Thread(target=race) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with contextlib.ExitStack() as stack:
            for listener in listeners:
                stack.enter_context(listener)
            assert len(listeners) == 1
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(path))


def test_a_lock_that_somebody_keeps_does_not_keep_us(tmp_path, monkeypatch):
    monkeypatch.setattr(addresses, "_LOCK_TIMEOUT", 0.05)
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    listener, _ = listen(f"ipc://{tmp_path}/socket")
    listener.close()
    os.close(holder)


def test_a_file_that_has_replaced_the_socket_is_left_alone(tmp_path):
    async def test(stack):
        path = tmp_path / "socket"
        pull = receiver(stack, f"ipc://{path}")
        path.unlink()
        path.write_bytes(b"precious")
        pull.stop()
        assert path.read_bytes() == b"precious"

    run(test)


def test_a_connection_that_is_gone_when_it_is_looked_at_is_made_again(monkeypatch):
    class Gone(socket.socket):
        def getpeername(self):
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    async def test(stack):
        pull = receiver(stack)
        with monkeypatch.context() as patch:
            patch.setattr(dialer.socket, "socket", Gone)
            push = dialing(stack, pull.address)
            await until(lambda: push._guard.reasons)
        assert "not connected" in push._guard.why()
        await until(lambda: push.has_room)

    run(test)


@pytest.mark.parametrize(
    "number", [errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.EMFILE, errno.EPERM]
)
def test_what_connect_says_is_reported_and_tried_again(monkeypatch, number):
    class Failing(socket.socket):
        def __init__(self, *args, **kwargs):
            if number == errno.EMFILE and "fileno" not in kwargs:
                raise OSError(number, os.strerror(number))
            super().__init__(*args, **kwargs)

        def connect(self, _):
            raise OSError(number, os.strerror(number))

    async def test(stack):
        pull = receiver(stack)
        with monkeypatch.context() as patch:
            patch.setattr(dialer.socket, "socket", Failing)
            push = dialing(stack, pull.address)
            await until(lambda: push._guard.reasons)
        assert os.strerror(number) in push._guard.why()
        await until(lambda: push.has_room)

    run(test)


def test_all_addresses_of_a_name_are_tried_also_if_the_first_is_no_receiver(monkeypatch):
    async def test(stack):
        server, wrong = silent_server(stack)
        pull = receiver(stack)
        found = [
            Address(socket.AF_INET, ("127.0.0.1", int(endpoint.rpartition(":")[2])))
            for endpoint in (wrong, pull.address)
        ]
        monkeypatch.setattr(dialer, "is_literal", lambda _: False)
        monkeypatch.setattr(dialer, "resolve", lambda _: list(found))
        push = dialing(stack, "tcp://two-addresses:1")
        peer, _ = await asyncio.get_running_loop().sock_accept(server)
        with peer:
            peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            await until(lambda: push.has_room)

    run(test)


def test_nothing_is_left_of_a_dialer_that_is_closed_at_any_time(monkeypatch):
    """While a name is looked up, a connection is made, or the next try is waited for."""
    looking, found = threading.Event(), threading.Event()

    def resolve(_):
        looking.set()
        found.wait(10)
        return [Address(socket.AF_INET, ("127.0.0.1", 9))]

    async def test(stack):
        monkeypatch.setattr(dialer, "is_literal", lambda _: False)
        monkeypatch.setattr(dialer, "resolve", resolve)
        push = dialing(stack, "tcp://slow-name:1")
        await until(looking.is_set)
        push.stop()
        found.set()
        await asyncio.sleep(0.05)
        monkeypatch.undo()
        assert not push._dialers["tcp://slow-name:1"]._sock

        push = dialing(stack, "tcp://10.255.255.1:9")  # nobody answers, or it is unreachable
        await until(lambda: push._dialers["tcp://10.255.255.1:9"]._timer)
        push.stop()
        _, endpoint = silent_server(stack)
        push = dialing(stack, endpoint)
        await until(lambda: push._channels)
        await push.close()
        assert not push._channels
        timers = [it for it in asyncio.get_running_loop()._scheduled if not it.cancelled()]
        assert not [it for it in timers if "transport" in repr(it)]

    run(test)


def test_handshakes_that_wait_for_their_turn_are_not_forgotten(monkeypatch):
    """Also if all that would come before them have ended meanwhile."""

    async def test(stack):
        pull = receiver(stack)
        peers = [stack.enter_context(Peer(pull, b"PUSH")) for _ in range(200)]
        await until(lambda: pull._resting)
        for channel in list(pull._resting)[: 3 * link._STEPS_PER_TURN]:
            channel.close()
        await until(lambda: not pull._greeting)
        assert len(pull._channels) == len(peers) - 3 * link._STEPS_PER_TURN

    run(test)


def test_no_descriptors_are_left_and_nothing_spins(monkeypatch):
    """Connections are turned away with the last one; without that they wait."""

    async def test(stack):
        notes = Notes()
        pull = receiver(stack, notes=notes)
        port = int(pull.address.rpartition(":")[2])
        listener = pull._listeners[0]
        looks = 0
        accept = listener._accept

        class Full(socket.socket):
            def accept(self):
                nonlocal looks
                looks += 1
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        asyncio.get_running_loop().remove_reader(listener._sock)
        listener._sock = Full(fileno=listener._sock.detach())
        asyncio.get_running_loop().add_reader(listener._sock, accept)
        stack.enter_context(connect(port))
        await until(lambda: looks)
        await asyncio.sleep(0.2)
        assert looks <= 2
        assert "limit on open descriptors" in notes
        listener._sock = socket.socket(fileno=listener._sock.detach())
        await until(lambda: pull._channels)

    run(test)


def test_an_error_of_accept_that_is_no_want_of_descriptors_is_not_called_one():
    async def test(stack):
        notes = Notes()
        pull = receiver(stack, notes=notes)
        listener = pull._listeners[0]
        looked = False

        class Failing(socket.socket):
            def accept(self):
                nonlocal looked
                looked = True
                raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))

        asyncio.get_running_loop().remove_reader(listener._sock)
        listener._sock = Failing(fileno=listener._sock.detach())
        asyncio.get_running_loop().add_reader(listener._sock, listener._accept)
        with connect(int(pull.address.rpartition(":")[2])):
            await until(lambda: looked)
        assert not notes.lines

    run(test)


def test_records_cross_each_kind_of_endpoint(tmp_path):
    async def test(stack):
        for endpoint in (f"ipc://{tmp_path}/x", f"ipc://@{tmp_path}", "tcp://[::1]:*"):
            pull = receiver(stack, endpoint)
            push = dialing(stack, pull.address)
            await until(lambda push=push: push.has_room)
            push.send(Payload(b"a\nb\n", 2))
            await until(lambda pull=pull: pull._inbox)
            assert pull.receive() == [b"a\nb\n"]
            await push.close()

    run(test)


def test_who_is_gone_over_ipc_leaves_in_doubt_what_it_has_not_read(tmp_path):
    async def test(stack):
        notes = Notes()
        push = stack.enter_context(
            opened(PushSocket(bound(f"ipc://{tmp_path}/x"), guard(notes), Framing.LINES, b"\n"))
        )
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(f"{tmp_path}/x")
            peer.sendall(greeting() + ready(b"PULL"))
            await until(lambda: push.has_room)
            for _ in range(3):
                push.send(Payload(b"a\nb\n", 2))
            assert push.accepted == 6
        await until(lambda: not push._channels)
        assert push.doubtful == 6
        assert "up to 6 records" in notes

        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(f"{tmp_path}/x")
            peer.sendall(greeting() + ready(b"PULL"))
            await until(lambda: push.has_room)
            push.send(Payload(b"a\nb\n", 2))
            peer.setblocking(False)
            came = b""
            while not list(messages(came[len(greeting()) + len(ready(b"PUSH")) :])):
                with contextlib.suppress(BlockingIOError):
                    came += peer.recv(4096)
        await until(lambda: not push._channels)
        assert push.doubtful == 6  # all of the last was read

    run(test)
