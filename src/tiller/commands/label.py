"""`tiller label PICTURES --by REWARD`: preference pairs or labels, with a reward in the place of people."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from tiller import config
from tiller.rewards import Reward, resolve, score
from tiller.rewards.learned import stand_in
from tiller.run.files import replace_file
from tiller.types import ConfigError
from tiller.vote.contest import Drawn, drawn_in, find
from tiller.vote.pictures import FORMATS

BATCH = 64  # prompts' pictures in memory at a time, about


@dataclass(frozen=True)
class Settings:
    """How the reward answers, and what is written."""

    write: Literal["pairs", "labels"] = "pairs"
    pairs_per_prompt: int = 0  # 0 compares every picture with every other one of its prompt
    margin: float = 0.0  # scores that differ by no more are a tie, which is left out
    temperature: float = 0.0  # above 0 it errs as people do: p(first) = σ(difference/temperature)
    threshold: float | None = None  # of labels: 1 from there on; without, the score is the label
    seed: int = 0
    reward: dict[str, Any] = field(default_factory=dict)  # the reward's settings

    def __post_init__(self) -> None:
        if min(self.pairs_per_prompt, self.margin, self.temperature) < 0:
            raise ConfigError("pairs_per_prompt, margin and temperature must be 0 or more.")


def run(pictures: Path, by: str, output: Path, overrides: Sequence[str]) -> int:
    """Score the pictures of a folder that `tiller sample` wrote, and write `output`."""
    settings = config.load(Settings, None, overrides)
    reward = resolve(by, settings.reward)
    output.parent.mkdir(parents=True, exist_ok=True)
    (_pairs if settings.write == "pairs" else _labels)(pictures, reward, output, settings)
    return 0


def _pairs(folder: Path, reward: Reward, output: Path, settings: Settings) -> None:
    contests, met = [], dict[str, int]()
    for contest in find(folder):
        met[contest.prompt] = met.get(contest.prompt, 0) + 1
        if not settings.pairs_per_prompt or met[contest.prompt] <= settings.pairs_per_prompt:
            contests.append(contest)
    shown = {(one.prompt, side.path): Drawn(one.prompt, side) for one in contests for side in (one.first, one.second)}
    scores = dict(zip(shown, _scores(reward, list(shown.values())), strict=True))
    first, second = ([scores[one.prompt, getattr(one, side).path] for one in contests] for side in ("first", "second"))
    random = np.random.default_rng(settings.seed)
    said = stand_in.preferences(first, second, settings.margin, settings.temperature, random)
    entries = []
    for contest, choice in zip(contests, said, strict=True):
        if choice in (0, 1):
            both = (contest.first, contest.second) if choice == 1 else (contest.second, contest.first)
            chosen, rejected = (_path(one.path, output) for one in both)
            entries.append({"prompt": contest.prompt, "chosen": chosen, "rejected": rejected})
    if not entries:
        raise ConfigError(f"no two pictures in {folder} differ in their scores by more than {settings.margin:g}.")
    _write(output, entries)
    ties, missing = int((said == 0.5).sum()), int(np.isnan(said).sum())
    print(
        f"{len(entries)} pairs of {len(shown)} pictures in {output}; left out: {ties} ties, {missing} without a score"
    )


def _labels(folder: Path, reward: Reward, output: Path, settings: Settings) -> None:
    shown = drawn_in(folder)
    random = np.random.default_rng(settings.seed)
    said = stand_in.labels(_scores(reward, shown), settings.threshold, settings.temperature, random)
    entries = [
        {"image": _path(one.picture.path, output), "prompt": one.prompt, "label": float(label)}
        for one, label in zip(shown, said, strict=True)
        if not np.isnan(label)
    ]
    if not entries:
        raise ConfigError(f"no picture in {folder} got a score.")
    _write(output, entries)
    mean = float(np.nanmean(said))
    print(
        f"{len(entries)} labels, {mean:.3f} on average, in {output}; left out: {np.isnan(said).sum()} without a score"
    )


def _scores(reward: Reward, shown: Sequence[Drawn]) -> list[float]:
    """NaN where one is missing. Pictures of a prompt stay together, for a reward that compares them."""
    order = sorted(range(len(shown)), key=lambda row: shown[row].prompt)
    found = [float("nan")] * len(shown)
    for rows in _batches(order, shown):
        images = [_opened(shown[row].picture.path) for row in rows]
        values = score(reward, images, [shown[row].prompt for row in rows], [{} for _ in rows]).values
        for row, value in zip(rows, values, strict=True):
            found[row] = float(value)
    return found


def _batches(order: Iterable[int], shown: Sequence[Drawn]) -> Iterable[list[int]]:
    rows: list[int] = []
    for row in order:
        if len(rows) >= BATCH and shown[row].prompt != shown[rows[-1]].prompt:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=FORMATS) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path} cannot be read as a picture ({error}); repair or remove it.") from error


def _path(picture: Path, output: Path) -> str:
    """From the written file's folder."""
    return Path(os.path.relpath(picture, output.parent)).as_posix()


def _write(output: Path, entries: Sequence[dict[str, Any]]) -> None:
    replace_file(output, "".join(f"{json.dumps(entry)}\n" for entry in entries).encode())
