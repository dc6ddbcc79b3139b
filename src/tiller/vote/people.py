"""People as the reward: a run puts the pictures of its epoch on a page, and waits for votes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import math
import os
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tiller.rewards.serving.told import LOGGER
from tiller.types import ConfigError, RewardError, Score, Scores
from tiller.vote.booth import Booth
from tiller.vote.contest import Contest, rounds
from tiller.vote.ledger import Ledger
from tiller.vote.pictures import Picture
from tiller.vote.server import Server, check_host


@dataclass(frozen=True)
class People:
    """Each picture's share of wins over others of its prompt, as people vote; a tie is half a win.

    A picture on which nobody voted has no score. The page is there while the run waits, and says when it is to be
    waited for. Votes are kept in the run's folder by what is in the pictures, so a run that goes on after a kill asks
    for none twice. It does not take part in a run's evaluation, where each model's pictures are scored by themselves:
    vote on base against tuned with `tiller vote RUN`.

    Raises (when called):
        RewardError: the pictures are none, as those of video models.
    """

    min_votes: int = 1  # votes (or skips) that each pair gets before the run goes on
    rivals: int = 2  # other pictures of its prompt that each is compared with
    timeout: float | None = None  # seconds until the run goes on with the votes it has; null waits for ever
    pause: float = 3.0  # seconds without a vote until a batch's votes count, so that the last one can be undone
    host: str = "127.0.0.1"
    port: int = 0  # 0 takes a free one
    allow_remote: bool = False  # other machines may reach the page, as `host` says
    seed: int = 0  # of which picture is on the left
    folder: str | None = None  # where votes and pictures go; None is people/ in the run's folder

    groupwise = True
    workers = 16  # batches that are put to the vote at once
    bounds_its_time = True  # by `timeout`
    human = True  # asks people, who are not to be troubled with trial pictures

    _lock: Any = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if min(self.min_votes, self.rivals) < 1:
            raise ConfigError("min_votes and rivals must be at least 1.")
        if self.pause < 0 or (self.timeout is not None and self.timeout <= 0):
            raise ConfigError("pause cannot be negative, and timeout must be more than 0 seconds, or null.")
        check_host(self.host, self.allow_remote)

    def in_run(self, folder: Path) -> People:
        """The same, with its votes in a run's folder, where none was named."""
        return self if self.folder else dataclasses.replace(self, folder=str(folder / "people"))

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Score]:
        """Pictures of one prompt are one group."""
        return self._ask(images, prompts, prompts)

    def scores(
        self,
        images: Sequence[Any],
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        groups: Sequence[Hashable] | None = None,
    ) -> Scores:
        """N scores for all groups of a batch at once, so that nobody waits for the next group of four."""
        found = self._ask(images, prompts, prompts if groups is None else groups)
        values = np.array([math.nan if one.value is None else one.value for one in found])
        return Scores(values, {}, {index: one.reason for index, one in enumerate(found) if one.value is None})

    def _ask(self, images: Sequence[Any], prompts: Sequence[str], members: Sequence[Hashable]) -> list[Score]:
        with self._lock:  # several batches may come at once
            booth, url = self._page
        pictures = [self._keep(image) for image in images]
        groups: dict[tuple[str, Hashable], dict[str, Picture]] = {}
        for prompt, member, picture in zip(prompts, members, pictures, strict=True):
            groups.setdefault((prompt, member), {})[picture.id] = picture
        contests = [
            one for (prompt, _), group in groups.items() for one in self._contests(prompt, list(group.values()))
        ]
        booth.open(contests)
        missing = sum(booth.counts(one).total() < self.min_votes for one in contests)
        if missing:
            _tell(f"people: waiting for votes on {missing} pairs, at {url}")
        booth.wait(contests, self.min_votes, self.timeout, self.pause)
        booth.close(contests)
        return _shares(booth, contests, prompts, pictures)

    def _contests(self, prompt: str, group: list[Picture]) -> list[Contest]:
        """Enough rounds that everyone meets `rivals` others, or all there are."""
        found: list[Contest] = []
        for pairs in rounds(group):
            if 2 * len(found) >= self.rivals * len(group):
                break
            found += [Contest(prompt, first, second) for first, second in pairs]
        return found

    def _keep(self, image: Any) -> Picture:
        """The picture as a file of its content's name."""
        if not isinstance(image, Image.Image):
            raise RewardError(f"people vote on pictures, and this model draws a {type(image).__name__}.")
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "png")
        data = buffer.getvalue()
        picture = Picture(Path(), hashlib.sha256(data).hexdigest())
        path = self._folder / "pictures" / f"{picture.id}.png"
        if not path.exists():
            temporary = path.with_name(f".tmp-{threading.get_ident()}-{path.name}")
            temporary.write_bytes(data)
            os.replace(temporary, path)
        return dataclasses.replace(picture, path=path)

    @property
    def _folder(self) -> Path:
        return Path(self.folder or "people")

    @cached_property
    def _page(self) -> tuple[Booth, str]:
        """The booth and where its page is; it begins with the first pictures, and ends with the process."""
        (self._folder / "pictures").mkdir(parents=True, exist_ok=True)
        warning = check_host(self.host, self.allow_remote)
        if warning:
            _tell(warning)
        ledger = Ledger(self._folder / "votes.jsonl", _tell)
        booth = Booth(ledger, self.seed, enough=self.min_votes)
        server = Server(booth, self.host, self.port, live=True)
        server.start()
        return booth, server.url


_tell = logging.getLogger(f"{LOGGER}.people").warning  # on the run's own terminal


def _shares(
    booth: Booth, contests: Sequence[Contest], prompts: Sequence[str], pictures: Sequence[Picture]
) -> list[Score]:
    wins: dict[tuple[str, str], float] = {}
    votes: dict[tuple[str, str], int] = {}
    for contest in contests:
        counts = booth.counts(contest)
        for side, picture in (("first", contest.first), ("second", contest.second)):
            key = contest.prompt, picture.id
            wins[key] = wins.get(key, 0.0) + counts[side] + counts["tie"] / 2
            votes[key] = votes.get(key, 0) + counts.total() - counts["skip"]
    return [
        Score(wins[key] / votes[key]) if votes.get(key) else Score(None, "nobody voted on it")
        for key in ((prompt, picture.id) for prompt, picture in zip(prompts, pictures, strict=True))
    ]
