"""Reward-weighted likelihood (Lee et al. 2023, "Aligning Text-to-Image Models using Human Feedback", 2302.12192)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from torch import Tensor

from tiller.advantages import History
from tiller.algorithms.base import Algorithm
from tiller.kernels import ODE, Kernel
from tiller.types import ConfigError, Scores

if TYPE_CHECKING:
    from tiller.policy.rollout import Step


@dataclass(frozen=True)
class Lee(Algorithm):
    """E_model[-r·log p] + β·E_data[-log p]: own pictures weighted by a reward in [0, 1], beside captioned data.

    -log p is the denoising loss. The paper draws pictures once (`train.epochs: 1`) and goes through them many times.
    """

    data_weight: float = 1.0  # β
    inner_epochs: int = 1
    timestep_fraction: float = 1.0
    kernel: Kernel | None = ODE()
    walk: ClassVar[Literal["recorded", "noised", "live"]] = "noised"

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        """(N,) the rewards, which are the weights.

        Raises:
            ConfigError: one is negative; it would push the model's error up without end.
        """
        least = scores.values[scores.valid].min(initial=0.0)
        if least < 0:
            raise ConfigError(
                f"lee weighs pictures by their reward, and one is {least:.4g}; give a reward that is never negative, "
                "or take rwr, whose weights are exponential."
            )
        return np.where(scores.valid, scores.values, np.nan)

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        distance = step.distance()
        return advantages * distance, {"policy/denoising_error": distance.mean()}
