"""Several rewards as one: a weighted sum, each part normalised where that is asked for, each logged as it came."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL.Image import Image
from torch import Tensor

from tiller.reward_spec import RewardSpec, Scale
from tiller.rewards.call import Reward, relative, reward_name, workers
from tiller.rewards.contract import score, weighted_sum
from tiller.rewards.gradient import differentiable, scores_with_graph
from tiller.types import Scores


@dataclass(frozen=True)
class Part:
    """One reward of a sum."""

    label: str
    reward: Reward
    weight: float = 1.0  # 0 only logs it
    normalise: bool = False  # by a scale that is measured, where none is given
    scale: Scale | None = None
    max_missing: float | None = None  # the share of an epoch's scores that may be missing; None: the run's

    @property
    def unmeasured(self) -> bool:
        """Whether it is to be normalised by a scale that is not known yet."""
        return self.normalise and self.scale is None

    def scaled(self, values: Any) -> Any:
        """Raw scores, an array or a tensor, in units of the part's scale."""
        return values if self.scale is None else (values - self.scale.mean) / self.scale.std


@dataclass(frozen=True)
class Mix:
    """The sum of weight x score over its parts: missing where the score of any part with a weight is.

    A part is normalised as (score - mean) / std, by its own scale, which never changes once training has begun: a
    moving one would change what is asked for. Parts are called one after the other, each as often at once as it
    allows. Differentiable, if all parts with a weight are.
    """

    parts: tuple[Part, ...]
    _gates: dict[str, threading.Semaphore] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for part in self.parts:
            self._gates[part.label] = threading.Semaphore(workers(part.reward))

    def scores(
        self,
        images: Sequence[Image],
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        groups: Sequence[Hashable] | None = None,
    ) -> Scores:
        """N checked scores: the sum, and every part as it came."""
        raw: dict[str, Scores] = {}
        for part in self.parts:
            with self._gates[part.label]:
                raw[part.label] = score(part.reward, images, prompts, metadata, groups=groups)
        scaled = {
            part.label: replace(found, values=part.scaled(found.values))
            for part, found in zip(self.parts, raw.values(), strict=True)
        }
        total = weighted_sum(scaled, {part.label: part.weight for part in self.parts})
        return replace(total, components=_components(raw))

    def __call__(self, pictures: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """With a graph: each part's (N,) share of the sum, from pictures (N, 3, H, W) in [0, 1]."""
        counted = [part for part in self.parts if part.weight]
        return {
            part.label: part.weight * part.scaled(scores_with_graph(part.reward, pictures, prompts, metadata))
            for part in counted
        }

    @cached_property
    def differentiable(self) -> bool:
        return all(differentiable(part.reward) for part in self.parts if part.weight)

    @property
    def groupwise(self) -> bool:
        return any(relative(part.reward) for part in self.parts)

    @property
    def workers(self) -> int:
        return max(workers(part.reward) for part in self.parts)

    @property
    def __name__(self) -> str:
        return " + ".join(part.label for part in self.parts if part.weight)


def parts_of(reward: Reward) -> tuple[Part, ...]:
    """The rewards a sum is made of; one reward is its own only part."""
    return reward.parts if isinstance(reward, Mix) else (Part(reward_name(reward), reward),)


def mix(specs: Sequence[RewardSpec], rewards: Sequence[Reward]) -> Reward:
    """The rewards of a recipe as one: the only one as it is, where it is neither weighted nor normalised."""
    only = specs[0]
    if len(specs) == 1 and only.weight == 1 and only.normalise is False and only.max_missing is None:
        return rewards[0]
    return Mix(
        tuple(
            Part(
                spec.label,
                reward,
                spec.weight,
                bool(spec.normalise),
                spec.normalise if isinstance(spec.normalise, Scale) else None,
                spec.max_missing,
            )
            for spec, reward in zip(specs, rewards, strict=True)
        )
    )


def _components(raw: Mapping[str, Scores]) -> dict[str, np.ndarray]:
    """Every part by its label; what a part itself is the sum of, by `label/name`."""
    found: dict[str, np.ndarray] = {}
    for label, scores in raw.items():
        found[label] = scores.values
        found |= {f"{label}/{name}": column for name, column in scores.components.items()}
    return found
