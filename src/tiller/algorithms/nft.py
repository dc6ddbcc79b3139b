"""DiffusionNFT (Zheng et al. 2025, "Online Diffusion Reinforcement with Forward Process", arXiv 2509.16117)."""

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
class NFT(Algorithm):
    """A contrast of two implicit policies, one on either side of an old copy of the weights, that samples are drawn of.

    The copy follows the weights once per epoch, decay min(slope·(epoch - start), most).
    """

    beta: float = 1.0  # how far the implicit policies lie from the old one, in multiples of the step taken so far
    form: Literal["x0", "prediction"] = "x0"  # errors of x̂0, self-normalised (reference code); or of the prediction
    kl_coefficient: float = 1e-4  # of the mean square difference from the reference's prediction
    advantage_clip: float = 5.0
    advantage_scale: Literal["batch", "group", "none", "gdpo"] = "batch"
    decay_slope: float = 0.001
    decay_most: float = 0.5
    decay_start: int = 0
    inner_epochs: int = 1
    timestep_fraction: float = 1.0
    kernel: Kernel | None = ODE()
    walk: ClassVar[Literal["recorded", "noised", "live"]] = "noised"
    min_group: ClassVar[int] = 2
    sampled_with: ClassVar[str] = "old"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, "beta", self.beta, "more than 0")
        ramp(self.decay_slope, self.decay_most, self.decay_start)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("old", "reference") if self.kl_coefficient else ("old",)

    @property
    def copies(self) -> Mapping[str, WeightCopy]:
        return {"old": WeightCopy(ramp(self.decay_slope, self.decay_most, self.decay_start), every="epoch")}

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        return group_relative(scores, prompts, self.advantage_scale, self.advantage_clip)

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        new, old = step.prediction.float(), step.others["old"].prediction.float()
        good = matching.optimality(advantages, self.advantage_clip)
        if self.form == "x0":
            assert step.stage is not None
            assert step.clean is not None
            shown, before = (step.stage.split(step.sample, output)[0] for output in (new, old))
            loss = matching.nft_normalised(shown, before, step.clean, good, self.beta)
        else:
            loss = matching.nft(new, old, step.target, good, self.beta)
        loss = loss * self.advantage_clip / self.beta
        numbers = {"policy/old_distance": step.squared(new - old).mean()}
        if self.kl_coefficient:
            kl = step.squared(new - step.others["reference"].prediction.float())
            numbers["policy/kl_prediction"] = kl.mean()
            loss = loss + self.kl_coefficient * kl
        return loss, numbers
