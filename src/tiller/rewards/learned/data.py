"""What rewards are fitted on, read from files: comparisons or labels, as embeddings of a CLIP."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tiller.pairs import Pair, open_pairs
from tiller.prompts.contrast import by_lists
from tiller.rewards.cache import picture_hash
from tiller.rewards.learned.fit import Comparisons, Labels
from tiller.rewards.scorers.clip import Clip
from tiller.types import ConfigError, Prompt
from tiller.vote.pictures import FORMATS


def read(data: Path, clip: Clip, changed_prompts: int, seed: int) -> Comparisons | Labels:
    """Labels from a .jsonl of {"image", "prompt", "label"}, else comparisons from what `open_pairs` takes.

    Args:
        changed_prompts: how many prompts with one word changed are wanted for each label. All labels get as many as
            the prompt with the fewest has, since the loss is over a rectangle.

    Raises:
        ConfigError: there is no such file, or something in it is not as it should be.
    """
    return _labels(data, clip, changed_prompts, seed) if is_labels(data) else _comparisons(data, clip, seed)


def is_labels(data: Path) -> bool:
    """Whether the first line of a file holds a label."""
    if not data.is_file():
        return False
    with data.open(encoding="utf-8", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
    try:
        entry = json.loads(first)
    except ValueError:
        return False
    return isinstance(entry, dict) and "label" in entry


def _comparisons(data: Path, clip: Clip, seed: int) -> Comparisons:
    pairs = open_pairs(data, 0).pairs
    sides = [_side(pair, side) for side in ("chosen", "rejected") for pair in pairs]
    better, worse = _seen(clip, sides).split(len(pairs))
    texts = [pair.prompt for pair in pairs]
    swapped = np.random.default_rng((seed, 2)).random(len(pairs)) < 0.5  # so that the first is no better
    turn = torch.from_numpy(swapped)[:, None]
    first, second = torch.where(turn, worse, better), torch.where(turn, better, worse)
    return Comparisons(first, second, clip.texts(texts).cpu(), torch.from_numpy(~swapped).float(), texts)


def _labels(data: Path, clip: Clip, changed_prompts: int, seed: int) -> Labels:
    lines = data.read_text(encoding="utf-8").splitlines()
    rows = [_label(line, f"{data}, line {n}", data.parent) for n, line in enumerate(lines, 1) if line.strip()]
    texts, chance = [text for _, text, _ in rows], random.Random(seed)
    changed = {
        text: [one["prompt"] for one in by_lists(Prompt(text), changed_prompts, chance)] for text in sorted(set(texts))
    }
    count = min(len(found) for found in changed.values())
    prompts = clip.texts([one for text in texts for one in (text, *changed[text][:count])]).cpu()
    pictures = _seen(clip, [_file(path) for path, _, _ in rows])
    labels = torch.tensor([label for _, _, label in rows])
    return Labels(pictures, prompts.view(len(texts), 1 + count, -1), labels, texts)


def _label(line: str, where: str, folder: Path) -> tuple[Path, str, float]:
    try:
        entry = json.loads(line)
        image, prompt, label = str(entry["image"]), str(entry["prompt"]), entry["label"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: each line needs image, prompt and label ({error}).") from error
    if isinstance(label, bool) or not isinstance(label, (int, float)) or not 0 <= label <= 1:
        raise ConfigError(f"{where}: the label is {label!r}; it must be a number from 0 to 1.")
    if not (folder / image).is_file():
        raise ConfigError(f"{where}: there is no picture {str(folder / image)!r}; correct its path.")
    return folder / image, prompt, float(label)


def _file(path: Path) -> Callable[[], Image.Image]:
    def opened() -> Image.Image:
        try:
            with Image.open(path, formats=FORMATS) as picture:
                return picture.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ConfigError(f"{path} cannot be read as a picture ({error}); repair or remove it.") from error

    return opened


def _side(pair: Pair, side: str) -> Callable[[], Image.Image]:
    def opened() -> Image.Image:
        try:
            return getattr(pair, side)().convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ConfigError(f"{pair.where}: a picture cannot be read ({error}); repair or remove it.") from error

    return opened


def _seen(clip: Clip, files: Sequence[Callable[[], Image.Image]]) -> Tensor:
    """(N, D) embeddings, with a batch of pictures in memory at a time; one that comes several times is seen once."""
    places: dict[str, int] = {}  # of a picture's hash among those embedded
    rows: list[int] = []
    waiting: list[Image.Image] = []
    found: list[Tensor] = []
    for file in files:
        picture = file()
        key = picture_hash(picture)
        if key not in places:
            places[key] = len(places)
            waiting.append(picture)
        rows.append(places[key])
        if len(waiting) == clip.batch_size:
            found.append(clip.pictures(waiting).cpu())
            waiting = []
    if waiting:
        found.append(clip.pictures(waiting).cpu())
    return torch.cat(found)[rows]
