"""The vote page's server, in a thread of its own."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from types import TracebackType

import uvicorn

from tiller.types import ConfigError, RunError
from tiller.vote.app import Desk, Door, is_loopback
from tiller.vote.booth import Booth
from tiller.vote.pictures import Shelf

BEGIN, END = 10.0, 5.0  # seconds that starting and stopping may take


def check_host(host: str, allow_remote: bool) -> str:
    """What to warn of, with an address that others can reach; nothing for one that only this machine can.

    Raises:
        ConfigError: others could reach it, and nobody said that they may.
    """
    if is_loopback(host):
        return ""
    if not allow_remote:
        raise ConfigError(
            f"{host} can be reached from other machines; add --allow-remote if that is meant, or leave --host out."
        )
    return (
        "warning: other machines can reach the page. The token keeps strangers out, but the connection is not "
        "encrypted, so use it in a network that you trust."
    )


class Server:
    """Serves a booth's page while the block lasts.

        with Server(booth) as server:
            print(server.url)
            ...

    Args:
        port: 0 takes one that is free.
        live: more contests may come, so that the page waits for them.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(self, booth: Booth, host: str = "127.0.0.1", port: int = 0, live: bool = False):
        self._socket = _listen(host, port)
        self.port = self._socket.getsockname()[1]
        self.host, self.token = host, secrets.token_urlsafe(24)
        desk = Desk(booth, Door(self.token, host, self.port), Shelf(), live)
        config = uvicorn.Config(
            desk.app(),
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
            limit_concurrency=128,
            h11_max_incomplete_event_size=16384,
            http="h11",
            loop="asyncio",
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    @property
    def url(self) -> str:
        """Where the page is, with the token."""
        name = {"0.0.0.0": _own_address(), "::": "localhost"}.get(self.host, self.host)
        return f"http://{f'[{name}]' if ':' in name else name}:{self.port}/?token={self.token}"

    def start(self) -> None:
        """Begin to serve; returns when it does."""
        self._thread.start()
        end = time.monotonic() + BEGIN
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > end:
                raise RunError("the vote page's server did not start; name another port.")
            time.sleep(0.005)

    def stop(self) -> None:
        """Serve no more."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(END)
        self._socket.close()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle on
    except OSError as error:
        raise ConfigError(f"there is no address {host!r} here ({error.strerror}); leave --host out.") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {host}, port {port}: {reason}; name another port, or 0.") from error
    return listening


def _own_address() -> str:
    """The address under which others see this machine; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
