"""How long the vote page takes to answer, with many votes on file: real requests to a real server, one after the other.

    python bench/vote_page.py --votes 10000

Prints, for each kind of request, the median and the 95th percentile in milliseconds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import tempfile
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

from tiller.vote.booth import Booth
from tiller.vote.contest import Contest
from tiller.vote.ledger import Ledger, Vote, encode
from tiller.vote.pictures import Picture, look_at
from tiller.vote.server import Server
from tiller.vote.tally import ballot_id


def pictures(folder: Path, count: int, edge: int) -> list[Picture]:
    """Noise, which compresses worst."""
    random = np.random.default_rng(0)
    found = []
    for number in range(count):
        path = folder / f"{number}.png"
        Image.fromarray(random.integers(0, 256, (edge, edge, 3), dtype=np.uint8)).save(path, compress_level=1)
        found.append(look_at(path))
    return found


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--votes", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=300, help="of each kind")
    parser.add_argument("--edge", type=int, default=512, help="pixels of a picture's edge")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shown = pictures(folder, 64, arguments.edge)
        contests = [
            Contest(f"prompt {number}", shown[number % 64], shown[(number * 7 + 1) % 64])
            for number in range(arguments.votes // 2 + 2 * arguments.requests + 10)
        ]
        contests = [one for one in contests if one.first is not one.second]
        old = [
            Vote(ballot_id(rater, one.id, 0), one.id, rater, choice, one.prompt, "a", "b", "0", "1")
            for number, one in enumerate(contests[: arguments.votes // 2])
            for rater, choice in (("ann", "first"), ("bob", "first" if number % 3 else "second"))
        ]
        (folder / "votes.jsonl").write_bytes(b"".join(map(encode, old)))  # type: ignore[arg-type]
        began = time.perf_counter()
        booth = Booth(Ledger(folder / "votes.jsonl"))
        booth.open(contests)
        print(f"{len(old)} votes on file; read in {time.perf_counter() - began:.2f} s")
        with Server(booth) as server:
            measure(server, arguments.requests, [picture.id for picture in shown])


def measure(server: Server, count: int, shown: list[str]) -> None:
    """Ask as the page does."""
    token = parse_qs(urlsplit(server.url).query)["token"][0]
    host = f"127.0.0.1:{server.port}"
    headers = {"Cookie": f"tiller_vote_{server.port}={token}", "Origin": f"http://{host}"}
    connection = http.client.HTTPConnection("127.0.0.1", server.port)

    def ask(method: str, path: str, body: object = None) -> tuple[float, bytes]:
        began = time.perf_counter()
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        data = response.read()
        took = (time.perf_counter() - began) * 1000
        assert response.status == 200, data
        return took, data

    times: dict[str, list[float]] = {}
    for _ in range(count):
        times.setdefault("GET /", []).append(ask("GET", "/?rater=ann")[0])
        took, data = ask("GET", "/ballot?rater=ann")
        times.setdefault("GET /ballot", []).append(took)
        asked = json.loads(data)
        vote = {"rater": "ann", "contest": asked["contest"], "ballot": asked["ballot"], "choice": "left"}
        times.setdefault("POST /vote (with fsync)", []).append(ask("POST", "/vote", vote)[0])
    for name in ("first", "again"):
        for picture in shown[:32]:
            times.setdefault(f"GET /picture, {name}", []).append(ask("GET", f"/picture/{picture}")[0])
    for _ in range(count):
        _, data = ask("GET", "/ballot?rater=ann")
        undo = {"rater": "ann", "ballot": json.loads(data)["last"]}
        times.setdefault("POST /undo (with fsync)", []).append(ask("POST", "/undo", undo)[0])
    for name, values in times.items():
        print(f"{name:26} p50 {statistics.median(values):7.2f} ms   p95 {np.percentile(values, 95):7.2f} ms")


if __name__ == "__main__":
    main()
