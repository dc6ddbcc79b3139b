"""PPO with a value network (Schulman et al. 2017, arXiv 1707.06347), and the pre-training mix of InstructGPT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from tiller import losses
from tiller.advantages import History
from tiller.algorithms.base import Algorithm
from tiller.algorithms.kl import Estimator, divergence
from tiller.critic import DPOK_VALUE, CriticSettings
from tiller.kernels import Kernel
from tiller.types import Scores

if TYPE_CHECKING:
    from tiller.policy import Step


@dataclass(frozen=True)
class PPO(Algorithm):
    """E[r] - β·KL + γ·E_data[log p] (Ouyang et al. 2022, arXiv 2203.02155, eq. 2), over denoising steps.

    E[r] is PPO's clipped surrogate with the advantage r - V(x_t, t, c); γ's term is the denoising loss on captioned
    data, which the run must be given where `data_weight` is not 0.
    """

    clip_range: float = 1e-4
    standardise: bool = True  # r - V by its mean and standard deviation over the epoch's states
    advantage_clip: float = 5.0
    kl_coefficient: float = 0.01  # β
    kl_estimator: Estimator = "gaussian"
    data_weight: float = 0.0  # γ
    critic: CriticSettings | None = DPOK_VALUE
    inner_epochs: int = 1
    timestep_fraction: float = 1.0
    kernel: Kernel | None = None

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
        if self.standardise:
            mean, std = step.residual
            surprise = (surprise - mean) / (std + 1e-8)
        surprise = surprise.clamp(-self.advantage_clip, self.advantage_clip)
        loss = losses.clipped_surrogate(step.log_prob, old, surprise, self.clip_range)
        numbers = {
            "policy/clip_fraction": losses.clip_fraction(step.log_prob, old, self.clip_range),
            "policy/approx_kl": losses.approximate_kl(step.log_prob, old),
        }
        if self.kl_coefficient:
            kl = divergence(step, self.kl_estimator)
            numbers[f"policy/kl_{self.kl_estimator}"] = kl.mean()
            loss = loss + self.kl_coefficient * kl
        return loss, numbers
