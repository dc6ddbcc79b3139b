"""DDPO with importance sampling (Black et al. 2023, "Training Diffusion Models with Reinforcement Learning", 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from tiller import losses
from tiller.advantages import History, per_prompt
from tiller.algorithms.base import Algorithm, require
from tiller.kernels import Kernel
from tiller.types import Scores

if TYPE_CHECKING:
    from tiller.policy import Step


@dataclass(frozen=True)
class DDPO(Algorithm):
    """DDPO_IS: PPO on the denoising steps, advantages from per-prompt running statistics.

    The clip range belongs to log-probabilities averaged over elements, as in the reference implementation.
    """

    clip_range: float = 1e-4
    advantage_clip: float = 5.0
    buffer_size: int = 32  # latest rewards kept per prompt
    min_count: int = 16  # rewards a prompt needs before its own statistics count
    inner_epochs: int = 1
    timestep_fraction: float = 1.0
    kernel: Kernel | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        most = f"no more than buffer_size ({self.buffer_size})"
        require(self.min_count <= self.buffer_size, "min_count", self.min_count, most)

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        standardised = per_prompt(scores.values, prompts, history, self.buffer_size, self.min_count)
        return standardised.clip(-self.advantage_clip, self.advantage_clip)

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert step.old_log_prob is not None
        old = step.old_log_prob
        loss = losses.clipped_surrogate(step.log_prob, old, advantages, self.clip_range)
        return loss, {
            "policy/clip_fraction": losses.clip_fraction(step.log_prob, old, self.clip_range),
            "policy/approx_kl": losses.approximate_kl(step.log_prob, old),
        }
