"""CRD ("Diffusion Reinforcement Learning via Centered Reward Distillation", arXiv 2603.14128)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from torch import Tensor

from tiller import matching
from tiller.advantages import History, group_relative
from tiller.algorithms.base import Algorithm, WeightCopy, require
from tiller.kernels import ODE, Kernel
from tiller.schedules import ramp
from tiller.types import Scores

if TYPE_CHECKING:
    from tiller.policy.rollout import Step


@dataclass(frozen=True)
class CRD(Algorithm):
    """Within a group, the fall of the denoising error is made to differ as the rewards do.

    Two copies of the weights follow them once per epoch: "old", from which the fall is counted, and "sampling", which
    draws the samples.
    """

    beta: float = 1.0
    adaptive: bool = True  # divide each error by its mean absolute value
    temperature: float | None = None  # of the group's weights exp(±R/T); None weighs all alike
    kl_coefficient: float = 0.1  # of the mean square difference from the reference's prediction
    kl_floor: float = 1.0  # m in the factor m + R·(1 - m) of a sample's penalty; 1 penalises all alike
    advantage_clip: float = 5.0
    advantage_scale: Literal["batch", "group", "none", "gdpo"] = "batch"
    inner_epochs: int = 1
    timestep_fraction: float = 1.0
    kernel: Kernel | None = ODE()
    walk: ClassVar[Literal["recorded", "noised", "live"]] = "noised"
    min_group: ClassVar[int] = 2
    whole_groups: ClassVar[bool] = True
    sampled_with: ClassVar[str] = "sampling"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, "beta", self.beta, "more than 0")
        require(
            self.temperature is None or self.temperature > 0, "temperature", self.temperature, "more than 0, or null"
        )
        require(0 <= self.kl_floor <= 1, "kl_floor", self.kl_floor, "between 0 and 1")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("old", "reference") if self.kl_coefficient else ("old",)

    @property
    def copies(self) -> Mapping[str, WeightCopy]:
        return {
            "old": WeightCopy(ramp(0.005, 0.999, least=0.25), every="epoch"),
            "sampling": WeightCopy(ramp(0.0075, 0.999, 75), every="epoch"),
        }

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        return group_relative(scores, prompts, self.advantage_scale, self.advantage_clip)

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert step.groups is not None
        good = matching.optimality(advantages, self.advantage_clip)
        implicit = self._error(step, step.others["old"].prediction) - self._error(step, step.prediction)
        loss = matching.crd(implicit, good, step.groups, self.beta, self.temperature) * self.advantage_clip / self.beta
        spread = (implicit - matching.group_mean(implicit, step.groups)).square().mean().sqrt()
        numbers = {"policy/denoising_error": step.distance().mean(), "policy/implicit_reward_std": spread}
        if self.kl_coefficient:
            kl = step.squared(step.prediction.float() - step.others["reference"].prediction.float())
            numbers["policy/kl_prediction"] = kl.mean()
            loss = loss + self.kl_coefficient * (self.kl_floor + good * (1 - self.kl_floor)) * kl
        return loss, numbers

    def _error(self, step: Step, prediction: Tensor) -> Tensor:
        distance = step.distance(prediction)
        if not self.adaptive:
            return distance
        return distance / matching.absolute_error(prediction.float() - step.target, step.batch_size)
