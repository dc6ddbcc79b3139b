"""AlignProp (Prabhudesai et al. 2023, "Aligning Text-to-Image Diffusion Models with Reward Backpropagation")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

from tiller.algorithms.base import Pass, RewardGradient, require
from tiller.kernels import ODE, Kernel

if TYPE_CHECKING:
    from tiller.walks import Live


@dataclass(frozen=True)
class AlignProp(RewardGradient):
    """The reward's gradient through the last K denoising steps, K drawn anew for every update (2310.03739, section 4).

    Of T steps, "uniform" draws K from {1 ... T}; "normal" rounds N(mean·T, std·T) into that range.
    """

    truncation: Literal["uniform", "normal"] = "uniform"
    mean: float = 0.16  # of K / T, for "normal"
    std: float = 0.1  # of K / T, for "normal"
    target: float | None = None  # no reward counts beyond it: the loss is the distance to it; None knows no end
    coefficient: float = 0.01
    inner_epochs: int = 1
    kernel: Kernel | None = ODE()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.truncation in ("uniform", "normal"), "truncation", self.truncation, "uniform or normal")
        require(0 <= self.mean <= 1, "mean", self.mean, "between 0 and 1, a share of the steps")
        require(self.std >= 0, "std", self.std, "0 or more, a share of the steps")

    def passes(self, steps: int, random: np.random.Generator) -> list[Pass]:
        if self.truncation == "uniform":
            last = int(random.integers(1, steps + 1))
        else:
            last = int(np.clip(np.rint(random.normal(self.mean * steps, self.std * steps)), 1, steps))
        return [Pass(steps - last)]

    def loss(self, step: Live, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        short = -step.rewards if self.target is None else (self.target - step.rewards).abs()
        return self.coefficient * advantages * short, {}
