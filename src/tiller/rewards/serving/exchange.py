"""One request over HTTP, bounded in time and in bytes. It follows no redirect and knows no proxy."""

from __future__ import annotations

import http.client
import os
import re
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import SplitResult, urlsplit

from tiller.rewards.serving.timed import TimedSocket
from tiller.types import ConfigError, ServiceError

AWAY = {502, 503, 504}  # what a gateway says of a server that is not there
AGAIN = {408, 425, 429, 500} | AWAY  # worth another try
MEBIBYTE = 2**20


class Fault(Exception):
    """A request that came to nothing, and may come to something when it is made again."""

    def __init__(self, reason: str, answered: bool, wait: float | None = None):
        super().__init__(reason)
        self.reason = reason  # in words, without the address
        self.answered = answered  # the server itself said something; if not, it may be away
        self.wait = wait  # seconds that it asks for


class Refusal(ServiceError):
    """An answer that stays the same however often one asks: a wrong token, a wrong address, another schema."""


@dataclass(frozen=True)
class Times:
    """How long one request may take."""

    connect: float = 10.0  # seconds
    read: float = 300.0  # seconds without a byte, so at least as long as a reward or a model may take
    total: float = 300.0  # seconds

    def __post_init__(self) -> None:
        if min(self.connect, self.read, self.total) <= 0:
            raise ConfigError(f"time-outs are {self.connect}, {self.read}, {self.total}; each must be more than 0 s.")


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def wait(self) -> float | None:
        """Seconds until the server wants to be asked again, if it says so."""
        text = self.headers.get("retry-after", "").strip()
        if re.fullmatch(r"\d{1,9}", text):
            return float(text)
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        except (TypeError, ValueError):
            return None


def check_address(url: str) -> SplitResult:
    """The parts of an http(s) address. Raises ConfigError if it is none, or holds a password."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"config error: {url!r} is no address: {error}.") from None
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise ConfigError(f"config error: {url!r} is no address of a server; write http://127.0.0.1:8700.")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            "config error: the address of a server holds a password, which would be written into the run folder; put "
            "it into an environment variable and name that as token_env."
        )
    return parts


def bearer(token_env: str | None) -> dict[str, str]:
    """The header with the token that an environment variable holds. Raises ConfigError if there is none."""
    if token_env is None:
        return {}
    token = os.environ.get(token_env, "").strip()
    if not token:
        raise ConfigError(f"config error: token_env names the environment variable {token_env}, and it is not set.")
    if not token.isascii() or not token.isprintable():
        raise ConfigError(f"config error: the token in the environment variable {token_env} is not plain ASCII.")
    return {"Authorization": f"Bearer {token}"}


def exchange(
    url: str, body: bytes | None, headers: Mapping[str, str], times: Times, cap: int, deadline: float = float("inf")
) -> Answer:
    """POST `body`, or GET where there is none, and read up to `cap` bytes of the answer.

    Args:
        deadline: of `time.monotonic`; the request's own total time counts too.

    Raises:
        Fault: there was no complete answer.
        Refusal: the server's certificate is not to be trusted.
    """
    deadline = min(deadline, time.monotonic() + times.total)
    try:
        return _exchange(check_address(url), body, headers, times, cap, deadline)
    except ssl.SSLCertVerificationError as error:
        raise Refusal(f"the certificate of {url} cannot be trusted: {error.verify_message}.") from error
    except TimeoutError as error:
        raise Fault("no answer in time", answered=False) from error
    except OSError as error:
        raise Fault(f"no connection: {error.strerror or error}", answered=False) from error
    except http.client.HTTPException as error:
        what = f"{type(error).__name__} {error}".strip()[:200]
        raise Fault(f"the connection broke off: {what}", answered=False) from error


def _exchange(
    parts: SplitResult, body: bytes | None, headers: Mapping[str, str], times: Times, cap: int, deadline: float
) -> Answer:
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    assert parts.hostname is not None  # check_address
    left = max(0.001, min(times.connect, deadline - time.monotonic()))
    connection = kind(parts.hostname, parts.port, timeout=left)
    connection.connect()
    opened = connection.sock
    try:
        connection.sock = TimedSocket(opened, deadline, times.read)
        sent = {"Connection": "close", "Accept": "application/json", **headers}
        with suppress(BrokenPipeError, ConnectionResetError):  # a server may refuse before it has read everything
            connection.request("GET" if body is None else "POST", parts.path or "/", body, sent)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, _read(response, found, cap))
    finally:
        opened.close()


def _read(response: http.client.HTTPResponse, headers: Mapping[str, str], cap: int) -> bytes:
    if headers.get("content-encoding", "identity") != "identity":
        raise Fault(f"the answer is packed as {headers['content-encoding'][:20]}, unasked", answered=True)
    if (response.length or 0) > cap:  # what it announces
        raise Fault(f"the answer is larger than {cap / MEBIBYTE:.1f} MiB", answered=True)
    body = response.read(cap + 1)
    if len(body) > cap:
        raise Fault(f"the answer is larger than {cap / MEBIBYTE:.1f} MiB", answered=True)
    if response.length:
        raise Fault("the connection broke off within the answer", answered=False)
    return body
