"""DGPO (Luo et al. 2025, "Reinforcing Diffusion Models by Direct Group Preference Optimization", arXiv 2510.08425)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from tiller import matching
from tiller.advantages import History, group_relative
from tiller.algorithms.base import Algorithm, WeightCopy, require
from tiller.kernels import ODE, Kernel
from tiller.schedules import ramp
from tiller.types import Scores

if TYPE_CHECKING:
    from tiller.policy.rollout import Step


@dataclass(frozen=True)
class DGPO(Algorithm):
    """A preference between the better and the worse part of a group, by their denoising errors under one noise."""

    beta: float = 100.0
    clip_range: float | None = 0.01  # of exp(d_ema - d); None does not clip
    anchor: Literal["reference", "ema"] = "reference"  # whose denoising error d is compared with
    ema_slope: float = 0.001  # decay of the running mean: min(slope·updates, most)
    ema_most: float = 0.3
    kl_coefficient: float = 0.02  # of the mean square difference from the reference's prediction
    advantage_clip: float = 5.0
    advantage_scale: Literal["batch", "group", "none", "gdpo"] = "group"
    train_timesteps: int = 4  # steps per update, of the noisiest ones
    timestep_fraction: float = 0.7  # which share of the schedule these are drawn from
    inner_epochs: int = 1
    kernel: Kernel | None = ODE()
    walk: ClassVar[Literal["recorded", "noised", "live"]] = "noised"
    min_group: ClassVar[int] = 2
    whole_groups: ClassVar[bool] = True
    shared_noise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta >= 0, "beta", self.beta, "0 or more")
        require(self.clip_range is None or self.clip_range > 0, "clip_range", self.clip_range, "more than 0, or null")
        ramp(self.ema_slope, self.ema_most)

    @property
    def needs(self) -> tuple[str, ...]:
        ema = self.anchor == "ema" or self.clip_range is not None
        reference = self.anchor == "reference" or self.kl_coefficient > 0
        return ("ema",) * ema + ("reference",) * reference

    @property
    def copies(self) -> Mapping[str, WeightCopy]:
        return {"ema": WeightCopy(ramp(self.ema_slope, self.ema_most))} if "ema" in self.needs else {}

    def steps(self, eligible: Sequence[int], random: np.random.Generator) -> list[int]:
        """`train_timesteps` of the noisiest `timestep_fraction`, at random."""
        noisy = eligible[: max(1, round(self.timestep_fraction * len(eligible)))]
        return sorted(random.choice(noisy, min(self.train_timesteps, len(noisy)), replace=False).tolist())

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        return group_relative(scores, prompts, self.advantage_scale, self.advantage_clip)

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert step.groups is not None
        distance = step.distance()
        anchor = step.distance(step.others[self.anchor].prediction)
        numbers = {"policy/denoising_error": distance.mean(), "policy/anchor_distance": (distance - anchor).mean()}
        pull = distance
        if self.clip_range is not None:
            kept = matching.trusted(distance, step.distance(step.others["ema"].prediction), advantages, self.clip_range)
            pull = torch.where(kept, distance, distance.detach())
            numbers["policy/clip_fraction"] = 1 - kept.float().mean()
        loss = matching.dgpo(pull, anchor, advantages, step.groups, self.beta)
        numbers["policy/group_weight"] = matching.dgpo_weight(
            distance, anchor, advantages, step.groups, self.beta
        ).mean()
        if self.kl_coefficient:
            kl = step.squared(step.prediction.float() - step.others["reference"].prediction.float())
            numbers["policy/kl_prediction"] = kl.mean()
            loss = loss + self.kl_coefficient * kl
        return loss, numbers
