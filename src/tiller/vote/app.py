"""The page's requests: who may ask, what they may send, and what they get. Everything is small, and nothing is guessed.

Every request needs the host's own name (a name that was bent to this address has another), the token, and, to change
anything, to come from the page itself. Pictures are known by ids alone.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import math
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any, cast, get_args
from urllib.parse import urlencode, urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from tiller.types import TillerError
from tiller.vote.booth import Booth, Refused, Side
from tiller.vote.pictures import Shelf

LARGEST_BODY = 4096  # bytes
LONGEST_NAME = 40  # characters of a rater's name
LONGEST_LOOK = 3600.0  # seconds
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}
POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
Handler = Callable[[Request], Awaitable[Response]]


class Denied(Exception):
    """A request that gets no more than a status and a sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


@dataclass(frozen=True)
class Door:
    """Who is let in."""

    token: str
    host: str  # the address that is listened on
    port: int

    @property
    def cookie(self) -> str:
        """Its name; cookies of one host are shared by all of its ports."""
        return f"tiller_vote_{self.port}"

    def check(self, request: Request) -> None:
        """Raises Denied unless the host, the token and, for a change, the origin are right."""
        host = request.headers.get("host", "")
        if not self.knows(host):
            raise Denied(403, "This page is not served under that name.")
        given = request.cookies.get(self.cookie) or request.query_params.get("token") or ""
        header = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not any(hmac.compare_digest(one.encode(), self.token.encode()) for one in (given, header)):
            raise Denied(401, "Open the address that tiller printed; it ends in a token.")
        origin = request.headers.get("origin")
        foreign = origin != f"http://{host}" if origin is not None else not header
        if request.method not in ("GET", "HEAD") and foreign:
            raise Denied(403, "Votes are taken from the page itself only.")

    def knows(self, host: str) -> bool:
        """Whether a Host header names this server: no name but localhost, so that none can be bent to it."""
        try:
            parts = urlsplit(f"http://{host}")
            name, port = parts.hostname or "", parts.port or 80
        except ValueError:
            return False
        if port != self.port or "@" in host or parts.netloc != host:
            return False
        if name in ("localhost", self.host):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Desk:
    """Answers requests out of a booth."""

    booth: Booth
    door: Door
    shelf: Shelf
    live: bool = False  # more contests may come

    def app(self) -> Starlette:
        """The application, whose every answer has the same headers."""
        routes = [
            Route("/", self._guarded(self.page)),
            Route("/ballot", self._guarded(self.ballot)),
            Route("/vote", self._guarded(self.vote), methods=["POST"]),
            Route("/undo", self._guarded(self.undo), methods=["POST"]),
            Route("/picture/{id}", self._guarded(self.picture)),
            Route("/favicon.ico", self._guarded(self.no_icon)),
            Route("/{rest:path}", self._guarded(self.nothing), methods=["GET", "POST", "PUT", "DELETE", "PATCH"]),
        ]
        return Starlette(routes=routes)

    def _guarded(self, handler: Handler) -> Handler:
        async def answer(request: Request) -> Response:
            try:
                self.door.check(request)
                response = await handler(request)
            except Denied as denied:
                response = JSONResponse({"error": denied.sentence}, denied.status)
            except Refused as refused:
                response = JSONResponse({"error": str(refused)}, 409)
            except TillerError as error:
                response = JSONResponse({"error": str(error)}, 500)
            for name, value in SECURITY.items():
                response.headers.setdefault(name, value)
            response.headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
            return response

        return answer

    async def page(self, request: Request) -> Response:
        """The page; a token in the address becomes a cookie, and leaves the address."""
        rater = request.query_params.get("rater", "").strip()
        if "token" in request.query_params:
            answer: Response = RedirectResponse("/?" + urlencode({"rater": rater}) if rater else "/", 303)
            answer.set_cookie(self.door.cookie, self.door.token, httponly=True, samesite="lax")
            return answer
        nonce = secrets.token_urlsafe(16)
        known = rater if _is_name(rater) else ""
        text = resources.files("tiller.vote").joinpath("page.html").read_text(encoding="utf-8")
        text = text.replace("{{nonce}}", nonce).replace("{{rater}}", escape(known, quote=True))
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY.format(nonce)})

    async def ballot(self, request: Request) -> Response:
        """What the rater is asked next."""
        return self._next(_name(request.query_params.get("rater")))

    async def vote(self, request: Request) -> Response:
        """Take a vote; the answer is what comes next."""
        body = await _body(request)
        rater, side, seconds = _name(body.get("rater")), _text(body, "choice"), body.get("seconds")
        if side not in get_args(Side):
            raise Denied(422, "choice is left, right, tie or skip.")
        if seconds is not None:
            number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and math.isfinite(seconds)
            seconds = round(min(max(float(seconds), 0.0), LONGEST_LOOK), 2) if number else None
        self.booth.vote(rater, _text(body, "contest"), _text(body, "ballot"), cast(Side, side), seconds)
        return self._next(rater)

    async def undo(self, request: Request) -> Response:
        """Take the rater's last vote back; the answer is the same contest again."""
        body = await _body(request)
        rater = _name(body.get("rater"))
        self.booth.undo(rater, _text(body, "ballot"))
        return self._next(rater)

    async def picture(self, request: Request) -> Response:
        """A picture by its id, as pixels alone."""
        picture = self.booth.pictures.get(request.path_params["id"])
        if picture is None:
            raise Denied(404, "There is no such picture.")
        data = await run_in_threadpool(self.shelf.png, picture)
        return Response(data, media_type="image/png", headers={"Cache-Control": "private, max-age=86400, immutable"})

    async def no_icon(self, request: Request) -> Response:
        """Browsers ask for one."""
        return Response(status_code=204)

    async def nothing(self, request: Request) -> Response:
        """Any other address."""
        raise Denied(404, "There is nothing here.")

    def _next(self, rater: str) -> Response:
        done, total = self.booth.progress(rater)
        last, tally = self.booth.last(rater), self.booth.tally
        answer: dict[str, Any] = {
            "done": done,
            "total": total,
            "live": self.live,
            "last": last and last.vote,
            "raters": len(tally.raters),
            "shared": tally.agreement.units,
            "alpha": tally.agreement.alpha,
        }
        ballots = self.booth.ballots(rater)
        if ballots:
            first, *later = ballots
            left, right = first.sides
            answer |= {
                "ballot": first.id,
                "contest": first.contest.id,
                "prompt": first.contest.prompt,
                "left": left.id,
                "right": right.id,
                "ahead": [picture.id for ballot in later for picture in ballot.sides],
            }
        return JSONResponse(answer)


async def _body(request: Request) -> dict[str, Any]:
    """The request's JSON object, if it is one and not too large."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > LARGEST_BODY:
            raise Denied(413, f"A request has {LARGEST_BODY} bytes at most.")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Denied(400, "The request is no JSON.") from error
    if not isinstance(body, dict):
        raise Denied(400, "The request is no JSON object.")
    return body


def _text(body: dict[str, Any], name: str) -> str:
    if not isinstance(body.get(name), str):
        raise Denied(422, f"{name} is missing.")
    return body[name]


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _is_name(value.strip()):
        raise Denied(422, f"A rater's name has 1 to {LONGEST_NAME} printable characters.")
    return value.strip()


def _is_name(value: str) -> bool:
    return 0 < len(value) <= LONGEST_NAME and value.isprintable()
