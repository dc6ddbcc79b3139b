"""Preference pairs: two pictures of a prompt, of which one was chosen, from a JSONL file, votes, or a saved dataset."""

from __future__ import annotations

import filecmp
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tiller.pretrain.data import fit, to_tensor
from tiller.run.files import sha256
from tiller.types import ConfigError
from tiller.vote.ledger import is_votes_file, read
from tiller.vote.tally import Preference, Tally, preferences

COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0")  # of Pick-a-Pic (Kirstain et al. 2023, arXiv 2305.01569)


@dataclass(frozen=True)
class Pair:
    """One comparison."""

    prompt: str
    chosen: Callable[[], Image.Image]
    rejected: Callable[[], Image.Image]
    where: str  # such as "pairs.jsonl, line 3"


class Pairs:
    """Preference pairs, cut to `size` (an edge, or width and height) as they are read."""

    def __init__(self, pairs: list[Pair], size: int | tuple[int, int]):
        self.pairs, self.size = pairs, size

    def __len__(self) -> int:
        return len(self.pairs)

    def pictures(self, indices: list[int]) -> Tensor:
        """(2n, 3, H, W) float32 in [-1, 1]: chosen and rejected of each pair, side by side.

        Raises:
            ConfigError: one is no picture, or the two of a pair are the same.
        """
        return torch.cat([self._read(self.pairs[index]) for index in indices])

    def prompts(self, indices: list[int]) -> list[str]:
        """2n texts."""
        return [self.pairs[index].prompt for index in indices for _ in range(2)]

    def batch(self, rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
        """`count` pictures of random pairs, and their prompts."""
        indices = rng.integers(len(self), size=(count + 1) // 2).tolist()
        return self.pictures(indices)[:count], self.prompts(indices)[:count]

    def _read(self, pair: Pair) -> Tensor:
        try:
            both = to_tensor([fit(one(), self.size) for one in (pair.chosen, pair.rejected)])
        except (OSError, SyntaxError) as error:
            raise ConfigError(
                f"{pair.where}: a picture cannot be read ({error}); repair or remove the pair."
            ) from error
        if torch.equal(both[0], both[1]):
            raise ConfigError(_SAME.format(pair.where))
        return both


_SAME = "{}: chosen and rejected are the same picture, which prefers nothing; remove the pair."


def open_pairs(path: Path, size: int | tuple[int, int]) -> Pairs:
    """Pairs from a JSONL file of {"prompt", "chosen", "rejected"}, a votes file, or a folder that `datasets` saved.

    Picture paths count from the file's folder. Of votes (`tiller vote`) each pair counts once, as the majority of its
    raters says; ties, skips and what was undone are left out. A saved dataset has Pick-a-Pic's columns.

    Raises:
        ConfigError: there is no such file, a line is not as it should be, or there is no pair in it.
    """
    if path.is_dir():
        found = _saved(path)
    elif path.is_file() and is_votes_file(path):
        found = [_voted(one, path) for one in preferences(Tally(read(path)[0])) if one.choice in ("first", "second")]
        if not found:
            raise ConfigError(f"{path} holds no pair on which a majority prefers one picture; vote on more pairs.")
    elif path.is_file():
        found = [
            _line(json_text, path, number)
            for number, json_text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if json_text.strip()
        ]
    else:
        raise ConfigError(f"data is {str(path)!r}, and there is no such file; give a .jsonl of preference pairs.")
    if not found:
        raise ConfigError(f"{path} holds no preference pair; each line needs prompt, chosen and rejected.")
    return Pairs(found, size)


def _line(text: str, path: Path, number: int) -> Pair:
    where = f"{path}, line {number}"
    try:
        entry = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: no JSON ({error}).") from error
    for name in ("prompt", "chosen", "rejected"):
        if not isinstance(entry, dict) or not isinstance(entry.get(name), str):
            raise ConfigError(f"{where}: {name} is missing; each line needs prompt, chosen and rejected.")
    files = [path.parent / entry[name] for name in ("chosen", "rejected")]
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{where}: there is no picture {str(file)!r}; correct its path, or remove the line.")
    if filecmp.cmp(files[0], files[1], shallow=False):
        raise ConfigError(_SAME.format(where))
    return Pair(entry["prompt"], _opener(files[0]), _opener(files[1]), where)


def _voted(preference: Preference, path: Path) -> Pair:
    """The pair of a majority, if its pictures are those that were voted on."""
    vote, where = preference.vote, f"{path}, vote {preference.vote.vote}"
    files = {side: path.parent / file for side, file in (("first", vote.first), ("second", vote.second))}
    for file, digest in zip(files.values(), (vote.first_sha256, vote.second_sha256), strict=True):
        if not file.is_file():
            raise ConfigError(f"{where}: there is no picture {str(file)!r}; put it back beside the votes.")
        if sha256(file) != digest:
            raise ConfigError(f"{where}: {str(file)!r} is not the picture that was voted on; put that one back.")
    other = "second" if preference.choice == "first" else "first"
    return Pair(vote.prompt, _opener(files[preference.choice]), _opener(files[other]), where)


def _saved(path: Path) -> list[Pair]:
    """The pairs of a dataset on disk; ties are left out."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("data is a Hugging Face dataset; install it with pip install 'tiller[datasets]'.") from error
    try:
        rows = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is no dataset that `save_to_disk` wrote; give one, or a .jsonl.") from error
    if hasattr(rows, "keys"):
        rows = rows["train"]
    if lacking := set(COLUMNS) - set(rows.column_names):
        raise ConfigError(f"{path} lacks the columns {', '.join(sorted(lacking))}; it needs {', '.join(COLUMNS)}.")
    labels = rows["label_0"]
    return [
        _row(rows, number, str(rows["caption"][number]), float(label) > 0.5, path)
        for number, label in enumerate(labels)
        if label is not None and float(label) != 0.5
    ]


def _row(rows: Any, number: int, prompt: str, first: bool, path: Path) -> Pair:
    def side(column: str) -> Callable[[], Image.Image]:
        return lambda: _picture(rows[number][column])

    chosen, rejected = (side("jpg_0"), side("jpg_1")) if first else (side("jpg_1"), side("jpg_0"))
    return Pair(prompt, chosen, rejected, f"{path}, row {number}")


def _picture(value: Any) -> Image.Image:
    """A picture as datasets hold them: decoded, bytes, or a mapping with bytes."""
    if isinstance(value, Image.Image):
        return value
    return Image.open(io.BytesIO(value["bytes"] if isinstance(value, dict) else value))


def _opener(file: Path) -> Callable[[], Image.Image]:
    def read() -> Image.Image:
        with Image.open(file) as picture:
            return picture.convert("RGB")

    return read
