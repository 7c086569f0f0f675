"""
A peer that is another implementation of ZeroMQ, as a program: pyzmq, pyomq or czmq.

Usage: peer.py LIBRARY TYPE bind|connect ENDPOINT OPTIONS

A PUSH sends each message of standard input; a PULL writes each that comes to standard output:
4 bytes, how many parts it has, and of each part 4 bytes, how long it is, and its bytes. What is
of another type does nothing. OPTIONS are in JSON: a ``public`` and a ``secret`` key, and the
``file`` that both are in; the key of the ``server``, if it is not this end; others as pyzmq
calls them.
"""

import ctypes
import importlib
import json
import struct
import sys
import time

_NUMBER = struct.Struct(">I")
_CURVE = {"public", "secret", "file", "server"}


class Czmq:
    """A socket of czmq, which reads the file with the keys itself."""

    def __init__(self, kind: int, how: str, endpoint: str, options: dict) -> None:
        self._czmq = czmq = ctypes.CDLL("libczmq.so.4")
        for name in ("zsock_new", "zcert_load", "zmsg_new", "zmsg_recv", "zmsg_pop", "zframe_data"):
            getattr(czmq, name).restype = ctypes.c_void_p
        czmq.zframe_size.restype = ctypes.c_size_t
        self._socket = ctypes.c_void_p(czmq.zsock_new(kind))
        if "file" in options:
            certificate = ctypes.c_void_p(czmq.zcert_load(options["file"].encode()))
            assert certificate, "czmq cannot read the keys"
            czmq.zcert_apply(certificate, self._socket)
            if "server" in options:
                czmq.zsock_set_curve_serverkey(self._socket, options["server"].encode())
            else:
                czmq.zsock_set_curve_server(self._socket, 1)
        begin = getattr(czmq, f"zsock_{how}")
        assert begin(self._socket, b"%s", endpoint.encode()) >= 0, "czmq cannot use the endpoint"

    def send_multipart(self, parts: list[bytes]) -> None:
        message = ctypes.c_void_p(self._czmq.zmsg_new())
        for part in parts:
            self._czmq.zmsg_addmem(message, part, ctypes.c_size_t(len(part)))
        assert self._czmq.zmsg_send(ctypes.byref(message), self._socket) == 0

    def recv_multipart(self) -> list[bytes]:
        message = ctypes.c_void_p(self._czmq.zmsg_recv(self._socket))
        parts = []
        while frame := ctypes.c_void_p(self._czmq.zmsg_pop(message)):
            data = self._czmq.zframe_data(frame)
            parts.append(ctypes.string_at(data, self._czmq.zframe_size(frame)))
            self._czmq.zframe_destroy(ctypes.byref(frame))
        self._czmq.zmsg_destroy(ctypes.byref(message))
        return parts


def open_socket(library: str, kind: str, how: str, endpoint: str, options: dict):
    """Return a socket with the methods of pyzmq."""
    if library == "czmq":
        zmq = importlib.import_module("zmq")
        return Czmq(int(getattr(zmq, kind)), how, endpoint, options)
    zmq = importlib.import_module({"pyzmq": "zmq", "pyomq": "pyomq"}[library])
    socket = zmq.Context().socket(getattr(zmq, kind))
    if "secret" in options:
        socket.curve_publickey = options["public"].encode()
        socket.curve_secretkey = options["secret"].encode()
        if "server" in options:
            socket.curve_serverkey = options["server"].encode()
        else:
            socket.curve_server = True
    for name in options.keys() - _CURVE:
        socket.setsockopt(getattr(zmq, name), options[name])
    getattr(socket, how)(endpoint)
    return socket


def read_messages(stream):
    """Yield the messages of a stream."""
    while count := stream.read(_NUMBER.size):
        sizes = range(_NUMBER.unpack(count)[0])
        yield [stream.read(_NUMBER.unpack(stream.read(_NUMBER.size))[0]) for _ in sizes]


def encode_message(parts: list[bytes]) -> bytes:
    """Return a message as it stands in a stream."""
    return _NUMBER.pack(len(parts)) + b"".join(_NUMBER.pack(len(p)) + p for p in parts)


def main(library: str, kind: str, how: str, endpoint: str, options: str) -> None:
    """Be the peer."""
    socket = open_socket(library, kind, how, endpoint, json.loads(options))
    if kind == "PUSH":
        for message in read_messages(sys.stdin.buffer):
            socket.send_multipart(message)
    while kind == "PULL":
        sys.stdout.buffer.write(encode_message(socket.recv_multipart()))
        sys.stdout.buffer.flush()
    while kind not in ("PUSH", "PULL"):
        time.sleep(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
