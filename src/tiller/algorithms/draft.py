"""DRaFT and DRaFT-K (Clark et al. 2023, "Directly Fine-Tuning Diffusion Models on Differentiable Rewards")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from tiller.algorithms.base import Pass, RewardGradient, require
from tiller.kernels import ODE, Kernel

if TYPE_CHECKING:
    from tiller.walks import Live


@dataclass(frozen=True)
class DRaFT(RewardGradient):
    """The reward's gradient through the last K denoising steps (2309.17400, algorithm 1); of all of them with None."""

    last_steps: int | None = 1  # K; None takes all steps
    inner_epochs: int = 1
    kernel: Kernel | None = ODE()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.last_steps is None or self.last_steps >= 1, "last_steps", self.last_steps, "at least 1, or null")

    def passes(self, steps: int, random: np.random.Generator) -> list[Pass]:
        return [Pass(0 if self.last_steps is None else max(0, steps - self.last_steps))]

    def loss(self, step: Live, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return -advantages * step.rewards, {}
