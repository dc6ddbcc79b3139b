"""A server on the loopback that answers as badly as a test asks, and counts what it was asked."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Answer = Callable[["Conversation"], None]


class Conversation:
    """One connection, with its request read."""

    def __init__(self, server: Stub, connection: socket.socket):
        self.server, self.connection = server, connection
        self.sent = 0  # bytes
        head, _, body = self._until_head().partition(b"\r\n\r\n")
        self.lines = head.decode().split("\r\n")
        self.headers = {
            name.lower(): value for name, value in (line.split(": ", 1) for line in self.lines[1:] if ": " in line)
        }
        length = int(self.headers.get("content-length", 0))
        while len(body) < length and (more := connection.recv(65536)):
            body += more
        self.body = body

    def _until_head(self) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            more = self.connection.recv(65536)
            if not more:
                break
            data += more
        return data

    @property
    def path(self) -> str:
        return self.lines[0].split(" ")[1] if " " in self.lines[0] else ""

    @property
    def message(self) -> Any:
        return json.loads(self.body)

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)
        self.sent += len(data)

    def say(self, status: int, body: bytes, **headers: str) -> None:
        extra = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        self.send(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body)

    def give(self, results: Any, schema: Any = 1, **more: Any) -> None:
        self.say(200, json.dumps({"schema": schema, "results": results, **more}).encode())


class Stub:
    """Answers request number n to a path with the n-th of its answers, and with the last one for ever after."""

    def __init__(self, *answers: Answer, health: Answer | None = None, port: int = 0):
        self.answers, self.health = answers, health or (lambda talk: talk.say(200, b"{}"))
        self.talks: list[Conversation] = []
        self.connections = self.looks = 0
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection:
            try:
                talk = Conversation(self, connection)
                with self._lock:
                    if talk.lines[0].startswith("GET"):
                        self.looks += 1
                        answer = self.health
                    else:
                        answer = self.answers[min(len(self.talks), len(self.answers) - 1)]
                        self.talks.append(talk)
                answer(talk)
            except OSError:
                pass

    def close(self) -> None:
        self.stopping.set()
        self._socket.shutdown(socket.SHUT_RDWR)  # or the thread in accept would take one more
        self._socket.close()


@contextmanager
def stub(*answers: Answer, health: Answer | None = None) -> Iterator[Stub]:
    server = Stub(*answers, health=health)
    try:
        yield server
    finally:
        server.close()


def reset(talk: Conversation) -> None:
    """Cut the connection off without a goodbye."""
    talk.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    talk.connection.close()


def hang(talk: Conversation) -> None:
    """Say nothing for as long as the test lasts."""
    talk.server.stopping.wait(30)


def drip(talk: Conversation) -> None:
    """One byte every 50 ms, so that no single read ever times out."""
    talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while not talk.server.stopping.is_set():
        talk.send(b" ")
        time.sleep(0.05)


def gigabyte(talk: Conversation) -> None:
    """A body that does not say how long it is, and goes on to 1 GB."""
    talk.send(b"HTTP/1.1 200 OK\r\n\r\n")
    block = b" " * 65536
    while talk.sent < 10**9:
        talk.send(block)


def announced(talk: Conversation) -> None:
    """The same, announced."""
    talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
    gigabyte(talk)


def status(code: int, body: bytes = b'{"error": "no"}', **headers: str) -> Answer:
    return lambda talk: talk.say(code, body, **headers)


def raw(body: bytes) -> Answer:
    return lambda talk: talk.say(200, body)
