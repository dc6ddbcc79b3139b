"""`tiller fit-reward DATA`: a reward from preference pairs, votes or labels, and how far it can be trusted."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from tiller import config
from tiller.pairs import Pair, open_pairs
from tiller.prompts.contrast import by_lists
from tiller.rewards.learned.calibration import Calibration, calibration, fit_temperature
from tiller.rewards.learned.fit import Comparisons, FitSettings, Labels, fit, split
from tiller.rewards.learned.head import Head, HeadSettings
from tiller.rewards.learned.reward import About, clip_digest, write
from tiller.rewards.scorers.clip import Clip
from tiller.types import ConfigError, Prompt

FEWEST = 20  # rows


@dataclass(frozen=True)
class Settings:
    """What is fitted, on what."""

    clip: str = "openai/clip-vit-large-patch14"
    revision: str | None = None
    head: HeadSettings = field(default_factory=HeadSettings)
    fit: FitSettings = field(default_factory=FitSettings)
    held_out: float = 0.25  # share of the prompts; half of it fits the temperature, half is reported
    changed_prompts: int = 3  # prompts with one word changed, for each label (Lee et al. 2023)
    device: str = "auto"
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1 or self.changed_prompts < 0:
            raise ConfigError("held_out must be between 0 and 1, and changed_prompts at least 0.")


def run(data: Path, output: Path, overrides: Sequence[str]) -> int:
    """Fit, say how far the reward can be trusted, and write it into `output`."""
    settings = config.load(Settings, None, overrides)
    clip = Clip("fit-reward", settings.clip, settings.revision, settings.device, batch_size=settings.batch_size)
    rows: Comparisons | Labels = _labels(data, clip, settings) if _is_labels(data) else _pairs(data, clip, settings)
    if len(rows.texts) < FEWEST:
        raise ConfigError(f"{data} holds {len(rows.texts)} rows, and a reward takes at least {FEWEST}; collect more.")
    fitted, held = split(rows.texts, settings.held_out, settings.fit.seed)
    heads = fit(rows.take(fitted), settings.head, settings.fit)
    tuning, testing = np.array_split(np.random.default_rng(settings.fit.seed).permutation(held), 2)
    if not len(testing):
        raise ConfigError(f"{len(held)} held-out rows are too few to judge by; collect more, or raise held_out.")
    temperature = fit_temperature(*_answers(rows.take(tuning), heads))
    scores, answers = _answers(rows.take(testing), heads)
    found = calibration(_probabilities(scores, temperature), [int(answer) for answer in answers])
    kind = "labels" if isinstance(rows, Labels) else "preferences"
    width = clip.network.config.projection_dim
    digest = clip_digest(settings.clip, settings.revision)
    about = About(settings.clip, settings.revision, digest, width, settings.head, len(heads), temperature, kind)
    write(output, about, heads, found.to_data() | {"fitted_on": len(fitted)})
    _tell(found, len(fitted), kind, output)
    return 0


def _is_labels(data: Path) -> bool:
    """Whether the first line of a JSONL file holds a label."""
    if not data.is_file():
        return False
    first = next((line for line in data.read_text(encoding="utf-8").splitlines() if line.strip()), "")
    try:
        entry = json.loads(first)
    except ValueError:
        return False
    return isinstance(entry, dict) and "label" in entry


def _pairs(data: Path, clip: Clip, settings: Settings) -> Comparisons:
    pairs = open_pairs(data, 0).pairs
    better, worse = (_seen(clip, [_opened(pair, side) for pair in pairs], settings) for side in ("chosen", "rejected"))
    texts = [pair.prompt for pair in pairs]
    swapped = np.random.default_rng((settings.fit.seed, 2)).random(len(pairs)) < 0.5  # so that the first is no better
    turn = torch.from_numpy(swapped)[:, None]
    first, second = torch.where(turn, worse, better), torch.where(turn, better, worse)
    return Comparisons(first, second, clip.texts(texts).cpu(), torch.from_numpy(~swapped).float(), texts)


def _labels(data: Path, clip: Clip, settings: Settings) -> Labels:
    files, texts, labels = [], [], []
    for number, line in enumerate(data.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            file, text, label = _label(line, f"{data}, line {number}", data.parent)
            files.append(_file(file))
            texts.append(text)
            labels.append(label)
    chance = random.Random(settings.fit.seed)
    changed = {
        text: [one["prompt"] for one in by_lists(Prompt(text), settings.changed_prompts, chance)] for text in set(texts)
    }
    count = min((len(found) for found in changed.values()), default=0)
    read = clip.texts([one for text in texts for one in (text, *changed[text][:count])]).cpu()
    return Labels(_seen(clip, files, settings), read.view(len(texts), 1 + count, -1), torch.tensor(labels), texts)


def _label(line: str, where: str, folder: Path) -> tuple[Path, str, float]:
    try:
        entry = json.loads(line)
        image, prompt, label = entry["image"], entry["prompt"], entry["label"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: each line needs image, prompt and label ({error}).") from error
    if isinstance(label, bool) or not isinstance(label, (int, float)) or not 0 <= label <= 1:
        raise ConfigError(f"{where}: the label is {label!r}; it must be a number from 0 to 1.")
    if not (folder / str(image)).is_file():
        raise ConfigError(f"{where}: there is no picture {str(folder / str(image))!r}; correct its path.")
    return folder / str(image), str(prompt), float(label)


def _file(path: Path) -> Callable[[], Image.Image]:
    def opened() -> Image.Image:
        try:
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as picture:
                return picture.convert("RGB")
        except (OSError, Image.DecompressionBombError) as error:
            raise ConfigError(f"{path} cannot be read as a picture ({error}); repair or remove it.") from error

    return opened


def _opened(pair: Pair, side: str) -> Callable[[], Image.Image]:
    def opened() -> Image.Image:
        try:
            return getattr(pair, side)().convert("RGB")
        except (OSError, SyntaxError) as error:
            raise ConfigError(f"{pair.where}: a picture cannot be read ({error}); repair or remove it.") from error

    return opened


def _seen(clip: Clip, files: Sequence[Callable[[], Image.Image]], settings: Settings) -> Tensor:
    """(N, D) embeddings, a batch of pictures in memory at a time."""
    size = settings.batch_size
    parts = [
        clip.pictures([one() for one in files[start : start + size]]).cpu() for start in range(0, len(files), size)
    ]
    return torch.cat(parts) if parts else torch.empty(0, 1)


@torch.no_grad()
def _answers(rows: Comparisons | Labels, heads: Sequence[Head]) -> tuple[list[float], list[float]]:
    """(r_1 - r_2, first was preferred) of every comparison that is no tie; (log-odds of r, y > ½) of every label."""

    def mean(pictures: Tensor, prompts: Tensor) -> Tensor:
        return torch.stack([head(pictures, prompts) for head in heads]).mean(0)

    if isinstance(rows, Comparisons):
        gaps = mean(rows.first, rows.prompts) - mean(rows.second, rows.prompts)
        decided = rows.preferred != 0.5
        return gaps[decided].tolist(), rows.preferred[decided].tolist()
    scores = mean(rows.pictures, rows.prompts[:, 0]).clamp(1e-6, 1 - 1e-6)
    return torch.logit(scores).tolist(), (rows.labels > 0.5).float().tolist()


def _probabilities(scores: Sequence[float], temperature: float) -> list[float]:
    return torch.sigmoid(torch.tensor(scores, dtype=torch.float64) / temperature).tolist()


def _tell(found: Calibration, fitted: int, kind: str, output: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"fitted on {fitted} {kind}; on {found.count} of prompts held out: accuracy {found.accuracy:.1%} "
        f"({found.low:.1%}, {found.high:.1%}), log loss {found.log_loss:.3f}, Brier score {found.brier:.3f}, "
        f"expected calibration error {found.error:.3f}"
    )
    if not found.beats_chance:
        console.print("warning: no better than chance on held-out prompts; collect more, or look at what they prefer")
    console.print(f"use it as reward={{name: learned, path: {output}}}")
