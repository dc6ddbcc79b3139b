"""Adjoint Matching (Domingo-Enrich et al. 2024, "Adjoint Matching: Fine-tuning Flow and Diffusion Generative Models
with Memoryless Stochastic Optimal Control", 2409.08861)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from tiller.advantages import History
from tiller.algorithms.base import Algorithm, require
from tiller.kernels import DDIM, DDPM, FlowSDE, Kernel
from tiller.types import ConfigError, Scores

if TYPE_CHECKING:
    from tiller.policy import Step

EARLY = 0.6  # the share of the path, from noise on, that half of the trained steps are drawn from


@dataclass(frozen=True)
class AdjointMatching(Algorithm):
    """Regression of the control onto the reward's gradient, carried back through the model before training.

    loss = w·|u + std_k·λ·ã_{k+1}|²,  u = (mean_θ(x_k) - mean_ref(x_k)) / std_k,  w = min(1, std_k/least_std)²

    Its minimum is p_ref(x)·exp(λ·r(x))/Z, where noise and picture are independent: hence the kernels it takes.
    """

    reward_weight: float = 100.0  # λ, for rewards of the size of ImageReward's
    train_timesteps: int = 4  # steps per update, half of them from the first 60 % of the path
    target_limit: float | None = 1.0  # a path's term is left out where std·λ·ã is larger, root mean square; None: never
    least_std: float = 0.1  # a step with less noise weighs (std/least_std)² as much: its u is nearly a division by 0
    inner_epochs: int = 1
    kernel: Kernel | None = DDIM(1.0)
    differentiates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.reward_weight >= 0, "reward_weight", self.reward_weight, "0 or more")
        require(self.target_limit is None or self.target_limit > 0, "target_limit", self.target_limit, "more than 0")
        require(self.least_std >= 0, "least_std", self.least_std, "0 or more")
        if not memoryless(self.kernel):
            raise ConfigError(
                f"AdjointMatching needs paths whose end does not depend on their initial noise, and {self.kernel} does "
                "not draw such; take the kernel ddim with eta 1."
            )
        super().__post_init__()

    @property
    def needs(self) -> tuple[str, ...]:
        return ("reference",)

    def steps(self, eligible: Sequence[int], random: np.random.Generator) -> list[int]:
        """`train_timesteps` of the steps, half of them early; an odd one falls to either part."""
        count, border = min(self.train_timesteps, len(eligible)), math.ceil(EARLY * len(eligible))
        late = min((count + int(random.integers(2))) // 2, len(eligible) - border)
        early = min(count - late, border)
        parts = ((early, eligible[:border]), (count - early, eligible[border:]))
        return sorted(int(step) for size, part in parts if size for step in random.choice(part, size, replace=False))

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        """1 for every picture that has a score: its weight is in the adjoint."""
        return np.where(scores.valid, 1.0, np.nan)

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        reference = step.others["reference"].mean
        assert reference is not None
        assert step.adjoint is not None
        control = (step.mean - reference) / step.std  # (B, ...) u
        wanted = -self.reward_weight * step.std * step.adjoint  # (B, ...) u*, one sample of it
        size = step.squared(wanted)  # (B,)
        kept = size.isfinite() if self.target_limit is None else size <= self.target_limit**2
        wanted = torch.where(kept[:, None], wanted.reshape(len(kept), -1), 0).view_as(wanted)
        std = torch.as_tensor(step.std, device=control.device)
        weight = std / std.clamp(min=self.least_std)  # its root
        numbers = {
            "policy/control": step.squared(weight * control).mean(),
            "policy/target": step.squared(weight * wanted).mean(),
            "policy/dropped": 1 - kept.float().mean(),
        }
        return advantages * kept * step.squared(weight * (control - wanted)), numbers


def memoryless(kernel: Kernel | None) -> bool:
    """Whether a kernel's noise is the paper's memoryless schedule, σ(t)² = 2η_t: g² = 2σ/(1-σ) in flow models."""
    if isinstance(kernel, FlowSDE):
        return abs(kernel.noise_level**2 - 2) < 1e-3
    return kernel == DDIM(1.0) or isinstance(kernel, DDPM)
