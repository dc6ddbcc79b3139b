"""`tiller fit-reward DATA`: a reward from preference pairs, votes or labels, and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from tiller import config
from tiller.rewards.learned.calibration import Calibration, calibration, fit_temperature, logistic
from tiller.rewards.learned.data import read
from tiller.rewards.learned.fit import Comparisons, FitSettings, Labels, fit, parts, split
from tiller.rewards.learned.head import Head, HeadSettings
from tiller.rewards.learned.reward import About, clip_digest, write
from tiller.rewards.scorers.clip import Clip
from tiller.types import ConfigError

FEWEST = 20  # rows
FOLDS = 5  # of what is held out, for the temperature


@dataclass(frozen=True)
class Settings:
    """What is fitted, on what."""

    clip: str = "openai/clip-vit-large-patch14"
    revision: str | None = None
    head: HeadSettings = field(default_factory=HeadSettings)
    fit: FitSettings = field(default_factory=FitSettings)
    held_out: float = 0.25  # share of the prompts that the reward is judged by
    changed_prompts: int = 3  # prompts with one word changed, for each label (Lee et al. 2023)
    device: str = "auto"
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1 or self.changed_prompts < 0 or self.batch_size < 1:
            raise ConfigError(
                "held_out must be between 0 and 1, changed_prompts at least 0, and batch_size at least 1."
            )


def run(data: Path, output: Path, overrides: Sequence[str]) -> int:
    """Fit, say how far the reward can be trusted, and write it into `output`."""
    settings = config.load(Settings, None, overrides)
    clip = Clip("fit-reward", settings.clip, settings.revision, settings.device, batch_size=settings.batch_size)
    rows = read(data, clip, settings.changed_prompts, settings.fit.seed)
    if len(rows.texts) < FEWEST:
        raise ConfigError(f"{data} holds {len(rows.texts)} rows, and a reward takes at least {FEWEST}; collect more.")
    labels = isinstance(rows, Labels)
    head = replace(settings.head, bounded=labels if settings.head.bounded is None else settings.head.bounded)
    fitted, held = split(rows.texts, settings.held_out, settings.fit.seed)
    heads = fit(rows.take(fitted), head, settings.fit)
    temperature, found = judged(rows.take(held), heads, settings.fit.seed)
    about = About(
        clip=settings.clip,
        revision=settings.revision,
        clip_sha256=clip_digest(settings.clip, settings.revision),
        width=clip.network.config.projection_dim,
        head=head,
        members=len(heads),
        temperature=temperature,
        kind="labels" if labels else "preferences",
    )
    said = {"fitted_on": len(fitted), "prompts": len(set(rows.texts)), "data": str(data)}
    write(output, about, heads, found.to_data() | said | {"settings": config.to_mapping(settings)})
    _tell(found, len(fitted), about.kind, output)
    return 0


def judged(rows: Comparisons | Labels, heads: Sequence[Head], seed: int) -> tuple[float, Calibration]:
    """The temperature by all of these rows, and what the probabilities are worth.

    So that no answer is judged by a temperature that it took part in, the rows are parted in five (by prompts, where
    there are enough), and each part gets its probabilities by the temperature of the others.

    Raises:
        ConfigError: there are too few.
    """
    scores, answers = _answers(rows, heads)
    probabilities = np.empty(len(scores))
    for part in parts(rows.texts, FOLDS, seed):
        others = np.setdiff1d(np.arange(len(scores)), part)
        probabilities[part] = logistic(scores[part] / fit_temperature(scores[others], answers[others]))
    share = float(answers.mean())
    chance = max(share, 1 - share) if isinstance(rows, Labels) else 0.5  # the order of a comparison is a coin's
    return fit_temperature(scores, answers), calibration(probabilities.tolist(), [int(one) for one in answers], chance)


@torch.no_grad()
def _answers(rows: Comparisons | Labels, heads: Sequence[Head]) -> tuple[np.ndarray, np.ndarray]:
    """(r_1 - r_2, whether the first was preferred) of comparisons; (log-odds of r, whether y > ½) of labels."""

    def mean(pictures: Tensor, prompts: Tensor) -> Tensor:
        return torch.stack([head(pictures, prompts) for head in heads]).mean(0).double()

    if isinstance(rows, Comparisons):
        gaps = mean(rows.first, rows.prompts) - mean(rows.second, rows.prompts)
        return gaps.numpy(), (rows.preferred > 0.5).double().numpy()
    scores = mean(rows.pictures, rows.prompts[:, 0]).clamp(1e-6, 1 - 1e-6)
    return torch.logit(scores).numpy(), (rows.labels > 0.5).double().numpy()


def _tell(found: Calibration, fitted: int, kind: str, output: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"fitted on {fitted} {kind}; on {found.count} of prompts held out: accuracy {found.accuracy:.1%} "
        f"({found.low:.1%}, {found.high:.1%}), log loss {found.log_loss:.3f}, Brier score {found.brier:.3f}, "
        f"expected calibration error {found.error:.3f}"
    )
    for one in found.bins:
        console.print(f"  said {one.said:4.0%}, was {one.was:4.0%} of {one.count}")
    if not found.beats_chance:
        console.print(
            f"warning: no better than always saying the same ({found.chance:.1%}) on what was held out; collect more, "
            "or look at what they prefer"
        )
    console.print(f"use it as reward={{name: learned, path: {output}}}", markup=False)
