"""Flow-GRPO-Fast: Flow-GRPO with noise in two steps only, which begin at random (Flow-GRPO's repository, 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from torch import Tensor

from tiller.advantages import History, group_relative
from tiller.algorithms.base import Algorithm
from tiller.algorithms.grpo import GroupLoss, TrustRegion
from tiller.algorithms.kl import Estimator
from tiller.kernels import Kernel
from tiller.schedules import random_window
from tiller.types import Scores

if TYPE_CHECKING:
    from tiller.policy.rollout import Step


@dataclass(frozen=True)
class FlowGRPOFast(Algorithm):
    """A group shares its initial noise and takes the ODE to a random step; `window_size` noisy steps set it apart.

    Only these are trained, so an update costs `window_size` of T training calls.
    """

    window_size: int = 2
    window_first: int = 0  # where the window may begin
    window_last: int | None = None  # None: in the first half of the steps
    clip_range: float = 1e-5
    advantage_clip: float = 5.0
    advantage_scale: Literal["batch", "group", "none", "gdpo"] = "batch"
    kl_coefficient: float = 0.0
    kl_estimator: Estimator = "flow_grpo"
    trust_region: TrustRegion = "clip"
    inner_epochs: int = 1
    kernel: Kernel | None = None
    min_group: ClassVar[int] = 2
    shared_start: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("reference",) if self.kl_coefficient else ()

    @property
    def keeps_means(self) -> bool:
        return self.trust_region != "clip"

    @property
    def _loss(self) -> GroupLoss:
        return GroupLoss(self.clip_range, self.trust_region, self.kl_coefficient, self.kl_estimator)

    def window(self, epoch: int, steps: int, seed: int) -> range:
        latest = steps // 2 if self.window_last is None else self.window_last
        return random_window(self.window_size, self.window_first, min(latest, steps - 1), (seed, epoch))

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        return group_relative(scores, prompts, self.advantage_scale, self.advantage_clip)

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self._loss(step, advantages)
