"""Reward-weighted regression (Peters & Schaal 2007; Black et al. 2023, DDPO, section 4.2; Lee et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from torch import Tensor

from tiller.advantages import History, softmax_weights
from tiller.algorithms.base import Algorithm, require
from tiller.kernels import ODE, Kernel
from tiller.types import Scores

if TYPE_CHECKING:
    from tiller.policy.rollout import Step


@dataclass(frozen=True)
class RWR(Algorithm):
    """The denoising loss on the policy's own pictures, each weighted by exp(β·r)/Z.

    Guidance stays on in training as in sampling (the paper's guided prediction): it is the pipeline's own.
    """

    beta: float = 0.2
    standardise: bool = False  # rewards to mean 0 and deviation 1 first, so that β means the same for any reward
    per_prompt: bool = False  # one softmax per prompt, in the place of one over the epoch
    inner_epochs: int = 5
    timestep_fraction: float = 1.0
    kernel: Kernel | None = ODE()
    walk: ClassVar[Literal["recorded", "noised", "live"]] = "noised"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta >= 0, "beta", self.beta, "0 or more")

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        return softmax_weights(scores.values, prompts, self.beta, self.standardise, self.per_prompt)

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        distance = step.distance()
        return advantages * distance, {"policy/denoising_error": distance.mean()}
