"""DPOK (Fan et al. 2023, "DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models", 2305.16381)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from tiller import losses
from tiller.advantages import History
from tiller.algorithms.base import Algorithm, require
from tiller.algorithms.kl import Estimator, divergence
from tiller.critic import DPOK_VALUE, CriticSettings
from tiller.kernels import Kernel
from tiller.types import Scores

if TYPE_CHECKING:
    from tiller.policy import Step


@dataclass(frozen=True)
class DPOK(Algorithm):
    """The reward above what the value network expected of the state, a clamped ratio, and a KL to the base model.

    The numbers are those of the reference code for one prompt: five updates per round, each on a tenth of its
    transitions. For many prompts it has `reward_weight` 1000 and `kl_coefficient` 0.1.
    """

    reward_weight: float = 10.0  # w_r
    clip_range: float = 1e-4
    kl_coefficient: float = 0.01  # w_k
    kl_estimator: Estimator = "prediction"  # the code's; the paper's is gaussian
    critic: CriticSettings | None = DPOK_VALUE
    replay_epochs: int = 1  # a buffer of 1000 transitions is two rounds of the reference code
    inner_epochs: int = 5
    timestep_fraction: float = 0.1
    kernel: Kernel | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.reward_weight >= 0, "reward_weight", self.reward_weight, "0 or more")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("reference",) if self.kl_coefficient else ()

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        """(N,) the rewards: what they are worth is only known at each state."""
        return np.where(scores.valid, scores.values, np.nan)

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert step.old_log_prob is not None
        old = step.old_log_prob
        surprise = advantages if step.value is None else advantages - step.value  # (B,) r - V(x_t, t, c)
        loss = losses.clamped_ratio(step.log_prob, old, self.reward_weight * surprise, self.clip_range)
        numbers = {
            "policy/clip_fraction": losses.clip_fraction(step.log_prob, old, self.clip_range),
            "policy/approx_kl": losses.approximate_kl(step.log_prob, old),
        }
        if self.kl_coefficient:
            kl = divergence(step, self.kl_estimator)
            numbers[f"policy/kl_{self.kl_estimator}"] = kl.mean()
            loss = loss + self.kl_coefficient * kl
        return loss, numbers
