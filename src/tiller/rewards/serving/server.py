"""A reward behind HTTP. Needs the Python standard library and Pillow alone; see `protocol` for what it says.

It binds to the loopback unless it has a token. Every request is bounded: in bytes, pictures, pixels, values and time;
there may be so many connections, so many requests and so many calls of the reward at once, and no more.
"""

from __future__ import annotations

import hmac
import io
import ipaddress
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue
from typing import Any

from . import answers, protocol
from .protocol import SCHEMA, Limits, Malformed, plain
from .timed import TimedReader

HEAD_TIME, BODY_TIME, LAST_TIME = 10.0, 60.0, 2.0  # seconds: for the head, for the body, for what is left unread
CONNECTIONS = 64


@dataclass(frozen=True)
class Service:
    """What is served, and to whom."""

    reward: Callable[..., Any]
    name: str
    version: str = ""
    token: str | None = field(default=None, repr=False)
    hosts: Collection[str] = ()  # further names by which the server may be asked
    calls: int = 1  # of the reward at once
    requests: int = 8  # under way at once, waiting ones included; further ones get 503
    timeout: float = 240.0  # seconds for a request to wait and be answered; less than a client waits
    limits: Limits = field(default_factory=Limits)
    tell: Callable[[str], Any] = print

    @property
    def about(self) -> dict[str, Any]:
        """What goes into every answer."""
        flags = {key: True for key in ("groupwise", "deterministic") if getattr(self.reward, key, False)}
        return {"name": self.name, "version": self.version, **flags}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class RewardServer(ThreadingHTTPServer):
    """Bound as soon as it is made (port 0 takes a free one: `server_port`); `serve_forever` serves.

    Raises:
        ValueError: it would be open to others without a token, or serve a reward that compares pairs.
        OSError: the port is taken.
    """

    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def __init__(self, service: Service, host: str = "127.0.0.1", port: int = 0):
        if not is_loopback(host) and not service.token:
            raise ValueError(f"{host} can be reached from other machines, so a token is needed")
        if getattr(service.reward, "pairwise", False):
            raise ValueError(f"{service.name} compares pairs of pictures, which schema {SCHEMA} does not speak of")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.service, self.started = service, time.monotonic()
        self.slots = threading.BoundedSemaphore(service.requests)
        self._room = threading.BoundedSemaphore(CONNECTIONS)
        self._tasks: SimpleQueue[tuple[Future[bytes], Callable[[], bytes]]] = SimpleQueue()
        super().__init__((host, port), Handler)
        for _ in range(service.calls):
            threading.Thread(target=self._work, daemon=True).start()

    def server_bind(self) -> None:
        """As the parent, but without asking a name server who we are."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for a connection, if there is room for one."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """All of a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke off is nobody's fault and needs no traceback."""

    def submit(self, call: Callable[[], bytes]) -> Future[bytes]:
        """Have a thread of the reward's make that call, when it is free."""
        future: Future[bytes] = Future()
        self._tasks.put((future, call))
        return future

    def _work(self) -> None:
        while True:
            future, call = self._tasks.get()
            if not future.set_running_or_notify_cancel():  # whoever asked has given up
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # handed to whoever waits
                future.set_exception(error)


class Handler(BaseHTTPRequestHandler):
    """One request; the connection is closed after it."""

    server: RewardServer
    protocol_version, server_version, sys_version = "HTTP/1.1", "tiller", ""

    def setup(self) -> None:
        """Read with a deadline, so that a request that drips in does not hold a thread for ever."""
        super().setup()
        self._timed = TimedReader(self.connection, time.monotonic() + HEAD_TIME, HEAD_TIME)
        self.rfile = io.BufferedReader(self._timed)
        self._unread = 0

    def do_GET(self) -> None:
        """/health says that it is there, to anybody; /v1/info what it serves."""
        service = self.server.service
        if self.path == "/health":
            if self._known_host():
                self._say(200, {"status": "ok", "seconds": round(time.monotonic() - self.server.started, 1)})
        elif self._allowed():
            if self.path == "/v1/info":
                self._say(200, {"schemas": [SCHEMA], "reward": service.about, "limits": vars(service.limits)})
            else:
                self._refuse(404, f"there is no {plain(self.path, 60)} here; there are /v1/score, /v1/info and /health")

    def do_POST(self) -> None:
        """/v1/score."""
        length = self.headers.get_all("Content-Length") or []
        self._unread = int(length[0]) if len(length) == 1 and re.fullmatch(r"\d{1,15}", length[0]) else -1
        if not self._allowed():
            return
        if self.path != "/v1/score":
            self._refuse(404, f"there is no {plain(self.path, 60)} here; post to /v1/score")
        elif self.headers.get_content_type() != "application/json":
            self._refuse(415, "the request must be application/json")
        elif self._unread < 0 or "Transfer-Encoding" in self.headers:
            self._refuse(411, "the request must say its Content-Length")
        elif self._unread > self.server.service.limits.body:
            self._refuse(413, f"the request is larger than {self.server.service.limits.body} bytes")
        elif not self.server.slots.acquire(blocking=False):
            self._refuse(503, "too many requests at once", wait=1)
        else:
            try:
                self._score()
            finally:
                self.server.slots.release()

    def _score(self) -> None:
        service, began = self.server.service, time.monotonic()
        try:
            self._timed.deadline = began + BODY_TIME
            body = self.rfile.read(self._unread)
            if len(body) < self._unread:
                return self._refuse(400, "the request ended early")
            self._unread = 0
            request = protocol.read_request(body, service.limits)
        except TimeoutError:
            return self._refuse(408, "the request took too long to arrive")
        except Malformed as error:
            return self._refuse(400, str(error))
        del body
        alone = not getattr(service.reward, "groupwise", False)
        future = self.server.submit(
            lambda: protocol.write_answer(answers.answer(service.reward, request, alone), service.about)
        )
        try:
            answered = future.result(max(0.0, began + service.timeout - time.monotonic()))
        except (NotYet, CancelledError):
            future.cancel()
            return self._refuse(504, f"{service.name} did not answer within {service.timeout:g} s")
        except answers.Wrong as error:
            service.tell(f"{service.name}: {error}")
            return self._refuse(422, str(error))
        except Exception as error:
            service.tell(f"{service.name} failed: {type(error).__name__}: {plain(str(error), 300)}")
            return self._refuse(500, f"{service.name} failed: {type(error).__name__}: {plain(str(error), 300)}")
        self._send(200, answered)

    def _allowed(self) -> bool:
        """Whether this request may ask: by its host, from no web page, with the token; if not, it has been told."""
        token = self.server.service.token
        if not self._known_host():
            return False
        if "Origin" in self.headers:
            return self._refuse(403, "web pages may not ask")
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and not hmac.compare_digest(given.encode(), token.encode()):
            return self._refuse(401, "the token is missing or wrong")
        return True

    def _known_host(self) -> bool:
        """Refuse a name that a foreign name server may point here (DNS rebinding); an address is no such name."""
        hosts = self.headers.get_all("Host") or []
        name = re.sub(r":\d+$", "", hosts[0]).strip("[]").lower() if len(hosts) == 1 else ""
        if name == "localhost" or name in self.server.service.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return self._refuse(403, f"this server is not known as {plain(name, 60) or 'nothing'}")
        return True

    def _refuse(self, status: int, text: str, wait: int | None = None) -> Any:
        """An error in words; false, for those who ask whether to go on."""
        self._say(status, {"schema": SCHEMA, "error": text}, wait)
        return False

    def _say(self, status: int, message: dict[str, Any], wait: int | None = None) -> None:
        self._send(status, json.dumps(message).encode(), wait)

    def _send(self, status: int, body: bytes, wait: int | None = None) -> None:
        self.close_connection = True
        self.connection.settimeout(BODY_TIME)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Connection", "close")
        if wait is not None:
            self.send_header("Retry-After", str(wait))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if self._unread:
            self._read_the_rest()

    def _read_the_rest(self) -> None:
        """Closing with bytes unread would reset the connection, and the answer with it."""
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            self._timed.deadline = time.monotonic() + LAST_TIME
            while self.rfile.read1(2**16):
                pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the parent refuses (a malformed head, an unknown method), in our words."""
        self._refuse(code, plain(message or "the request is malformed", 200))

    def handle_expect_100(self) -> bool:
        """No request is asked to go on before it has been looked at."""
        return True

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not written down."""
