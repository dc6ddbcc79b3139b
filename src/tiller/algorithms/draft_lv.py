"""DRaFT-LV (Clark et al. 2023, "Directly Fine-Tuning Diffusion Models on Differentiable Rewards")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from tiller.algorithms.base import Pass, RewardGradient, require
from tiller.kernels import ODE, Kernel
from tiller.types import ConfigError

if TYPE_CHECKING:
    from tiller.walks import Live


@dataclass(frozen=True)
class DRaFTLV(RewardGradient):
    """DRaFT-1 with less variance: the last step is also taken from the picture noised again, n times (2309.17400)."""

    noised: int = 2  # n; 0 is DRaFT-1
    inner_epochs: int = 1
    kernel: Kernel | None = ODE()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.noised >= 0, "noised", self.noised, "0 or more")

    def passes(self, steps: int, random: np.random.Generator) -> list[Pass]:
        if self.noised and steps < 2:
            raise ConfigError(
                "DRaFTLV noises a picture again to where its last step began, which with one step is noise alone; "
                "take num_inference_steps of 2 or more, or DRaFT."
            )
        return [Pass(steps - 1), *[Pass(steps - 1, renoised=True)] * self.noised]

    def loss(self, step: Live, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return -advantages * step.rewards, {}
