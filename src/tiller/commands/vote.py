"""`tiller vote`: a page on which people say which of two pictures is better."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from tiller.types import ConfigError
from tiller.vote.booth import Booth
from tiller.vote.contest import find
from tiller.vote.ledger import Ledger, read
from tiller.vote.server import Server, check_host
from tiller.vote.summary import summary
from tiller.vote.tally import Tally


def run(
    source: Path,
    *,
    against: Path | None = None,
    votes: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    allow_remote: bool = False,
    seed: int = 0,
    only_summary: bool = False,
) -> int:
    """Serve the page until Ctrl-C, then say what the votes come to; returns the exit code."""
    file = votes or votes_file(source)
    if only_summary:
        return _say(file)
    warning = check_host(host, allow_remote)
    ledger = Ledger(file, _tell)
    try:
        contests = find(source, against, keep=file.with_suffix(".pictures"), seed=seed)
        booth = Booth(ledger, seed)
        booth.open(contests)
        with Server(booth, host, port) as server:
            if warning:
                _tell(warning)
            print(f"{len(contests)} pairs to vote on, at\n\n    {server.url}\n")
            print(f"votes go to {file}; Ctrl-C ends", flush=True)
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                print()
        _lines(booth.tally)
    finally:
        ledger.close()
    return 0


def votes_file(source: Path) -> Path:
    """Where votes on a folder's or a file's pictures go."""
    if source.is_dir():
        return source / "votes.jsonl"
    return source if source.name.endswith(".votes.jsonl") else source.with_suffix(".votes.jsonl")


def _say(file: Path) -> int:
    if not file.is_file():
        raise ConfigError(f"there are no votes in {file}; vote first, or name the file with --votes.")
    _lines(Tally(read(file)[0]))
    return 0


def _lines(tally: Tally) -> None:
    for line in summary(tally):
        print(line)


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
