"""How far a step is from the model before training: the estimators that papers and their code call KL.

A coefficient means nothing without the name of its estimator: the same 0.04 weighs ten times more or less under
another one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from tiller import losses
from tiller.types import ConfigError

if TYPE_CHECKING:
    from tiller.policy.rollout import Step

Estimator = Literal["gaussian", "flow_grpo", "unscaled", "prediction"]
ESTIMATORS = ("gaussian", "flow_grpo", "unscaled", "prediction")


def divergence(step: Step, estimator: Estimator, name: str = "reference") -> Tensor:
    """(B,) the divergence of a recorded step from another copy of the weights, averaged over elements, with its graph.

    gaussian    |μ-μ'|²/(2S²), the KL of the two transitions (DPOK, eq. 8)
    flow_grpo   |μ-μ'|²/(2g²), which leaves out the step's length |Δt| (Flow-GRPO's code), S = g·√|Δt|
    unscaled    |μ-μ'|² (Flow-CPS' code, where S is no scale)
    prediction  |e-e'|² of the model's outputs (DPOK's code)
    """
    other = step.others[name]
    if estimator == "prediction":
        return step.squared(step.prediction.float() - other.prediction.float())
    assert other.mean is not None
    shift = step.squared(step.mean - other.mean)
    if estimator == "unscaled":
        return shift
    kl = losses.gaussian_kl(shift, step.std)
    if estimator == "gaussian":
        return kl
    if step.stage is None:
        raise ConfigError("kl_estimator flow_grpo needs a scheduler whose times are known; take gaussian.")
    now, then = (point.sigma / (point.alpha + point.sigma) for point in (step.stage.now, step.stage.then))
    return kl * abs(now - then)
