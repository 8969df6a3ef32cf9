"""Calls over HTTP/2 in clear text, with a traceparent each, on one connection: grpcio's, and h2's.

calls.py PROGRAM PORT TRACEPARENT ...
"""

import socket
import sys
import time
from collections.abc import Callable
from concurrent import futures
from functools import partial

import grpc
import h2.connection
from hpack import HeaderTuple, NeverIndexedHeaderTuple

PAUSE_S = 0.05


def grpcio(port: int, traceparents: list[str]) -> None:
    """Unary calls, one after the other."""
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    server = grpc.server(
        futures.ThreadPoolExecutor(4), handlers=[grpc.method_handlers_generic_handler("example.Echo", {"Say": handler})]
    )
    assert server.add_insecure_port(f"127.0.0.1:{port}") == port
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        say = channel.unary_unary("/example.Echo/Say")
        for traceparent in traceparents:
            assert say(b"hello", metadata=[("traceparent", traceparent)], timeout=20) == b"hello"
            time.sleep(PAUSE_S)
    server.stop(None).wait()


def _requests(port: int, traceparents: list[str], *, huffman: bool, kinds: list[type[HeaderTuple]]) -> None:
    """Requests that nobody answers."""
    with socket.create_server(("127.0.0.1", port)) as listener, socket.create_connection(("127.0.0.1", port)) as client:
        server, _ = listener.accept()
        connection = h2.connection.H2Connection()
        connection.encoder.encode = partial(connection.encoder.encode, huffman=huffman)
        connection.initiate_connection()
        for stream, (traceparent, kind) in enumerate(zip(traceparents, kinds, strict=True)):
            names = {":method": "GET", ":path": "/", ":scheme": "http", ":authority": "example"}
            connection.send_headers(1 + 2 * stream, [*names.items(), kind("traceparent", traceparent)], end_stream=True)
            data = connection.data_to_send()
            client.sendall(data)
            while data:
                data = data[len(server.recv(len(data))) :]
        server.close()


def never_indexed_then_indexed(port: int, traceparents: list[str]) -> None:
    """Two requests without an index, one that adds to the table, and one that uses what it added."""
    kinds = [NeverIndexedHeaderTuple, NeverIndexedHeaderTuple, HeaderTuple, HeaderTuple]
    _requests(port, traceparents, huffman=False, kinds=kinds)


def huffman_coded(port: int, traceparents: list[str]) -> None:
    """As most programs do it."""
    _requests(port, traceparents, huffman=True, kinds=[HeaderTuple] * len(traceparents))


PROGRAMS: list[Callable[[int, list[str]], None]] = [grpcio, never_indexed_then_indexed, huffman_coded]

if __name__ == "__main__":
    {program.__name__: program for program in PROGRAMS}[sys.argv[1]](int(sys.argv[2]), sys.argv[3:])
