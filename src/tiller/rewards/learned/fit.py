"""Fitting an ensemble of heads on embeddings that are computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tiller.rewards.learned import losses
from tiller.rewards.learned.head import Head, HeadSettings
from tiller.types import ConfigError


@dataclass(frozen=True)
class Comparisons:
    """N pairs of pictures, as embeddings."""

    first: Tensor  # (N, D)
    second: Tensor  # (N, D)
    prompts: Tensor  # (N, D)
    preferred: Tensor  # (N,) 1, 0, or a half
    texts: Sequence[str]  # N

    def take(self, rows: np.ndarray) -> Comparisons:
        """Some of them; a row may come several times."""
        index = torch.from_numpy(rows)
        parts = (self.first[index], self.second[index], self.prompts[index], self.preferred[index])
        return Comparisons(*parts, [self.texts[row] for row in rows])


@dataclass(frozen=True)
class Labels:
    """N pictures, as embeddings, with what somebody said of each."""

    pictures: Tensor  # (N, D)
    prompts: Tensor  # (N, M, D) the true one first, then changed ones
    labels: Tensor  # (N,) in [0, 1]
    texts: Sequence[str]  # N

    def take(self, rows: np.ndarray) -> Labels:
        """Some of them; a row may come several times."""
        index = torch.from_numpy(rows)
        return Labels(self.pictures[index], self.prompts[index], self.labels[index], [self.texts[row] for row in rows])


@dataclass(frozen=True)
class FitSettings:
    """How heads are fitted."""

    members: int = 4  # of the ensemble, each with weights and a bootstrap sample of its own
    steps: int = 100
    batch: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    classification: float = 0.5  # λ of Lee et al.; for labels
    temperature: float = 2.0  # T of Lee et al.
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.members, self.steps, self.batch) < 1 or self.learning_rate <= 0 or self.temperature <= 0:
            raise ConfigError("members, steps and batch must be at least 1, learning_rate and temperature above 0.")


def fit(data: Comparisons | Labels, head: HeadSettings, settings: FitSettings) -> list[Head]:
    """The members of the ensemble, in evaluation mode.

    Raises:
        ConfigError: every label or preference is the same, so that nothing can be learned.
    """
    said = data.preferred if isinstance(data, Comparisons) else data.labels
    if isinstance(data, Labels) and bool((said == said[0]).all()):
        raise ConfigError(f"every label is {float(said[0]):g}; give pictures of both kinds.")
    if isinstance(data, Comparisons) and bool((said == 0.5).all()):
        raise ConfigError("every comparison is a tie; give some that prefer a picture.")
    return [_member(data, head, settings, number) for number in range(settings.members)]


def _member(data: Comparisons | Labels, head: HeadSettings, settings: FitSettings, number: int) -> Head:
    random = np.random.default_rng((settings.seed, number))
    drawn = data.take(random.integers(len(data.texts), size=len(data.texts)) if settings.members > 1 else _all(data))
    width = (data.first if isinstance(data, Comparisons) else data.pictures).shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random.integers(2**31)))
        made = Head(width, head)
        decayed = [p for p in made.parameters() if p.ndim > 1]
        plain = [p for p in made.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
        for _ in range(settings.steps):
            rows = random.integers(len(drawn.texts), size=min(settings.batch, len(drawn.texts)))
            optimizer.zero_grad(set_to_none=True)
            _loss(made, drawn.take(rows), settings).mean().backward()
            optimizer.step()
    return made.eval().requires_grad_(False)


def _all(data: Comparisons | Labels) -> np.ndarray:
    return np.arange(len(data.texts))


def _loss(head: Callable[[Tensor, Tensor], Tensor], data: Comparisons | Labels, settings: FitSettings) -> Tensor:
    """(N,) of one batch."""
    if isinstance(data, Comparisons):
        return losses.bradley_terry(head(data.first, data.prompts), head(data.second, data.prompts), data.preferred)
    count, prompts, width = data.prompts.shape
    pictures = data.pictures[:, None].expand(count, prompts, width)
    scores = head(pictures.reshape(-1, width), data.prompts.reshape(-1, width)).view(count, prompts)
    error = losses.squared_error(scores[:, 0], data.labels)
    return error + settings.classification * losses.prompt_classification(scores, data.labels, settings.temperature)


def split(texts: Sequence[str], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and rows held out: whole prompts where there are at least five, else rows.

    Raises:
        ConfigError: one of the two would be empty.
    """
    random = np.random.default_rng((seed, 1))
    names = sorted(set(texts))
    if len(names) >= 5:
        chosen = set(random.permutation(names)[: max(1, round(share * len(names)))].tolist())
        held = np.array([text in chosen for text in texts])
    else:
        held = np.zeros(len(texts), bool)
        held[random.permutation(len(texts))[: round(share * len(texts))]] = True
    if held.all() or not held.any():
        raise ConfigError(f"{len(texts)} rows cannot be divided into some to fit on and some held out; give more.")
    return np.flatnonzero(~held), np.flatnonzero(held)


def parts(texts: Sequence[str], count: int, seed: int) -> list[np.ndarray]:
    """Rows in `count` parts of about equal size: whole prompts where there are as many, else rows.

    Raises:
        ConfigError: there are fewer rows than parts.
    """
    if len(texts) < count:
        raise ConfigError(f"{len(texts)} held-out rows are too few to judge by; collect more, or raise held_out.")
    random = np.random.default_rng((seed, 3))
    keys: Sequence[object] = texts if len(set(texts)) >= count else range(len(texts))
    names = list(dict.fromkeys(keys))
    place = {names[at]: number % count for number, at in enumerate(random.permutation(len(names)))}
    return [np.flatnonzero([place[key] == number for key in keys]) for number in range(count)]
