"""ReFL (Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from tiller.algorithms.base import Pass, RewardGradient, require
from tiller.kernels import DDIM, Kernel

if TYPE_CHECKING:
    from tiller.walks import Live


@dataclass(frozen=True)
class ReFL(RewardGradient):
    """The reward's gradient through x̂0 of one late step, drawn anew for every update (2304.05977, algorithm 1).

    loss = coefficient·max(0, target - r)
    """

    earliest: float = 0.75  # of T steps, the one taken is uniform on {earliest·T ... T - 1}
    target: float | None = 2.0  # in units of the reward (here ImageReward's); None knows no end
    coefficient: float = 1e-3
    inner_epochs: int = 1
    kernel: Kernel | None = DDIM(1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.earliest < 1, "earliest", self.earliest, "at least 0 and less than 1, a share of the steps")

    def passes(self, steps: int, random: np.random.Generator) -> list[Pass]:
        chosen = int(random.integers(int(self.earliest * steps), steps))
        return [Pass(chosen, chosen + 1)]

    def loss(self, step: Live, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.target is None:
            return -self.coefficient * advantages * step.rewards, {}
        short = (self.target - step.rewards).relu()
        return self.coefficient * advantages * short, {"policy/below_target": (short > 0).float().mean()}
