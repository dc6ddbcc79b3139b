"""A run's page while the run goes on: served on this machine only, to whoever has the token."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tiller.report.html import render
from tiller.types import RunError

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")  # that a request may call this server by: no name can be bent to it
EVERY = 10  # seconds between two looks of the page
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


class Server(ThreadingHTTPServer):
    """Serves one page, which it makes anew when something in the folder has changed. Port 0 takes a free one."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0):
        self.folder, self.token = folder, secrets.token_urlsafe(24)
        self._kept: tuple[Any, bytes, str] | None = None
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise RunError(f"port {port} cannot be had ({error.strerror}); give another --port.") from error

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{HOST}:{self.server_port}/?token={self.token}"

    def page(self) -> tuple[bytes, str]:
        """The page and its tag, which changes with it."""
        state = changes(self.folder)
        if self._kept is None or self._kept[0] != state:
            text = render(self.folder, live=EVERY).encode()
            self._kept = (state, text, f'"{hashlib.sha256(text).hexdigest()[:24]}"')
        return self._kept[1], self._kept[2]


def changes(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of everything that the page is made of."""
    found = [path for place in (folder, folder / "images", folder / "evaluation") for path in place.glob("*")]
    return sorted((str(path), *_stamp(path)) for path in found if path.name != "report.html")


def _stamp(path: Path) -> tuple[int, int]:
    try:
        about = path.stat()
    except OSError:  # gone since it was listed
        return 0, 0
    return about.st_size, about.st_mtime_ns


class Handler(BaseHTTPRequestHandler):
    """GET / with the token and a name of this machine; nothing else."""

    server: Server
    server_version, sys_version = "tiller", ""
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds for a request to come in

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        given = parse_qs(parts.query).get("token", [""])[0]
        if not called_here(self.headers.get("Host", "")):
            self._say(HTTPStatus.FORBIDDEN, "This page is not served under that name.")
        elif not hmac.compare_digest(given.encode(), self.server.token.encode()):
            self._say(HTTPStatus.UNAUTHORIZED, "Open the address that tiller printed; it ends in a token.")
        elif parts.path != "/":
            self._say(HTTPStatus.NOT_FOUND, "There is nothing here.")
        else:
            self._page()

    def _page(self) -> None:
        try:
            text, tag = self.server.page()
        except RunError as error:
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
            return
        if self.headers.get("If-None-Match") == tag:
            self._send(HTTPStatus.NOT_MODIFIED, b"", {"ETag": tag})
        else:
            self._send(HTTPStatus.OK, text, {"Content-Type": "text/html; charset=utf-8", "ETag": tag})

    def _say(self, status: HTTPStatus, sentence: str) -> None:
        self._send(status, sentence.encode(), {"Content-Type": "text/plain; charset=utf-8"})

    def _send(self, status: HTTPStatus, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**SECURITY, **headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing: an address holds the token."""


def called_here(host: str) -> bool:
    """Whether a Host header names this machine, whatever the port (which an SSH tunnel may change)."""
    try:
        parts = urlsplit(f"http://{host}")
        return parts.netloc == host and parts.hostname in NAMES and "@" not in host and (parts.port or 80) > 0
    except ValueError:
        return False


def serve(folder: Path, port: int, tell: Callable[[str], None]) -> None:
    """Serve a run's page until somebody stops it.

    Raises:
        RunError: the folder holds no run, or the port is taken.
    """
    with Server(folder, port) as server:
        server.page()
        tell(f"{folder} is at {server.address} until you press Ctrl-C; from elsewhere, tunnel the port through ssh.")
        server.serve_forever()
