"""D3PO (Yang et al. 2023, "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor

from tiller import matching
from tiller.advantages import History
from tiller.algorithms.base import Algorithm, require
from tiller.algorithms.pairs import preferences
from tiller.kernels import Gaussian, Kernel, log_prob
from tiller.types import Scores

if TYPE_CHECKING:
    from tiller.policy.rollout import Step


@dataclass(frozen=True)
class D3PO(Algorithm):
    """DPO on every denoising step of the paths to a group's best and worst picture."""

    beta: float = 0.1
    clip_range: float = 0.1  # of π_θ/π_ref; it belongs to log-probabilities averaged over elements
    inner_epochs: int = 1
    timestep_fraction: float = 1.0
    kernel: Kernel | None = None
    min_group: ClassVar[int] = 2
    whole_groups: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, "beta", self.beta, "more than 0")
        require(0 < self.clip_range < 1, "clip_range", self.clip_range, "in (0, 1)")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("reference",)

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        return preferences(scores.values, prompts)

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert step.groups is not None
        mean = step.others["reference"].mean
        assert mean is not None
        best, worst = matching.best_and_worst(advantages, step.groups)
        before = log_prob(step.action, Gaussian(mean, step.std), step.batch_size)
        ratio = step.log_prob - before  # (B,) log π_θ / π_ref of x_{t-1} given x_t
        outside = (ratio.exp() - 1).abs() > self.clip_range
        return matching.d3po(ratio[best], ratio[worst], self.beta, self.clip_range), {
            "policy/preference_accuracy": (ratio[best] > ratio[worst]).float().mean(),
            "policy/margin": (ratio[best] - ratio[worst]).mean(),
            "policy/clip_fraction": outside.float().mean(),
            "policy/reference_log_ratio": ratio.abs().mean(),
        }
