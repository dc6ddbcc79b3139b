"""Pictures, contests and a served page for the tests of voting."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from tiller.vote.booth import Booth
from tiller.vote.contest import Contest
from tiller.vote.ledger import Ledger
from tiller.vote.pictures import look_at
from tiller.vote.server import Server

Answer = tuple[int, dict[str, str], bytes]


def paint(path: Path, shade: int, size: tuple[int, int] = (24, 16)) -> Path:
    """A picture of one colour, with a corner of another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size, (shade, 255 - shade, 90))
    picture.paste((255, 255, 255), (0, 0, 4, 4))
    picture.save(path)
    return path


def contests(folder: Path, count: int, prompt: str = "scene {}") -> list[Contest]:
    """Contests of base against tuned pictures."""
    found = []
    for number in range(count):
        first, second = (
            look_at(paint(folder / f"{number}-{name}.png", number + shade), name)
            for name, shade in (("base", 0), ("tuned", 120))
        )
        found.append(Contest(prompt.format(number), first, second))
    return found


class Client:
    """A browser's requests, as bytes on a socket, with every header in the test's hand."""

    def __init__(self, server: Server):
        self.host, self.port = "127.0.0.1", server.port
        self.token = parse_qs(urlsplit(server.url).query)["token"][0]
        self.name = f"127.0.0.1:{server.port}"

    def raw(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        """One request with nothing added but what HTTP itself asks for."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=10)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        """As the page asks, with its cookie."""
        return self.raw("GET", path, None, {"Cookie": f"tiller_vote_{self.port}={self.token}", **headers})

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        """As the page posts: cookie, and the origin that the browser adds."""
        sent = {"Cookie": f"tiller_vote_{self.port}={self.token}", "Origin": f"http://{self.name}", **headers}
        return self.raw("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), sent)

    def ballot(self, rater: str = "ann") -> dict[str, Any]:
        """What is asked next."""
        status, _, body = self.get(f"/ballot?rater={rater}")
        assert status == 200, body
        return json.loads(body)

    def vote(self, choice: str, rater: str = "ann", **changes: Any) -> Answer:
        """A vote on what is asked next."""
        asked = self.ballot(rater)
        sent = {"rater": rater, "contest": asked["contest"], "ballot": asked["ballot"], "choice": choice}
        return self.post("/vote", sent | changes)


class Elsewhere(Client):
    """A client of a page in another process."""

    def __init__(self, url: str):
        self.host, self.token = "127.0.0.1", url.split("token=")[1]
        self.port = int(url.split(":")[2].split("/")[0])
        self.name = f"127.0.0.1:{self.port}"


@contextmanager
def served(folder: Path, asked: list[Contest], **settings: Any) -> Iterator[tuple[Client, Booth]]:
    """A page for these contests, whose votes go to `folder`/votes.jsonl."""
    ledger = Ledger(folder / "votes.jsonl", lambda sentence: None)
    booth = Booth(ledger, settings.pop("seed", 0))
    booth.open(asked)
    try:
        with Server(booth, **settings) as server:
            yield Client(server), booth
    finally:
        ledger.close()
