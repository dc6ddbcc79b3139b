"""Noise processes: where on x = α·x0 + σ·ε a scheduler stands, and what a model's output says about x0 and ε.

`read` is the only place that knows diffusers' scheduler families. What it says is checked against the scheduler's own
arithmetic at the first step of every recording (`policy.transition`), so a wrong reading cannot pass unseen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiller.kernels import Point


@dataclass(frozen=True)
class Stage:
    """One denoising step of one scheduler: from `now` to `then`, and how the model's output is to be understood."""

    now: Point
    then: Point
    prediction: str  # epsilon | v_prediction | sample | flow
    sign: float = 1.0  # -1 where the model's velocity points from noise to data
    clip: float | None = None  # x̂0 is clamped to ±clip, as the scheduler's `clip_sample` asks
    threshold: Callable[[Tensor], Tensor] | None = None  # x̂0 is limited by this, as `thresholding` asks

    def split(self, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """x̂0 and ε̂, both (B, ...), from the latents x and the model's output at `now`."""
        (alpha, sigma), output = self.now, self.sign * output
        if self.prediction == "epsilon":
            x0, eps = (x - sigma * output) / alpha, output
        elif self.prediction == "sample":
            x0, eps = output, (x - alpha * output) / sigma
        elif self.prediction == "flow":
            x0, eps = x - sigma * output, x + alpha * output
        elif self.prediction == "v_prediction":
            norm = math.hypot(alpha, sigma)
            x0, eps = (alpha * x / norm - sigma * output) / norm, (sigma * x / norm + alpha * output) / norm
        else:
            raise ValueError(f"prediction type {self.prediction!r} has no rule in tiller.process")
        x0 = x0 if self.clip is None else x0.clamp(-self.clip, self.clip)
        return (x0 if self.threshold is None else self.threshold(x0)), eps

    def noised(self, x0: Tensor, eps: Tensor) -> Tensor:
        """Forward process: the latents at `now` for clean latents x0 and noise ε."""
        return self.now.alpha * x0 + self.now.sigma * eps

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        """What the model should output at `noised(x0, eps)`: ε, x0, v = αε - σx0, or the velocity ε - x0."""
        alpha, sigma = self.now
        norm = math.hypot(alpha, sigma)
        targets = {
            "epsilon": eps,
            "sample": x0,
            "flow": eps - x0,
            "v_prediction": (alpha * eps - sigma * x0) / norm,
        }
        return self.sign * targets[self.prediction]


class Preconditioned(Stage):
    """EDM (Karras et al. 2022, eq. 7): x̂0 is given by the scheduler's own skip and output scalings."""

    def __init__(self, now: Point, then: Point, scheduler: Any, x0: Tensor | None):
        super().__init__(now, then, "edm")
        object.__setattr__(self, "_scheduler", scheduler)
        object.__setattr__(self, "_x0", x0)

    def split(self, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        given = self._x0  # type: ignore[attr-defined]
        scheduler = self._scheduler  # type: ignore[attr-defined]
        x0 = given if given is not None else scheduler.precondition_outputs(x, output, torch.tensor(self.now.sigma))
        return x0, (x - x0) / self.now.sigma

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        raise NotImplementedError("the training target of a preconditioned (EDM) model is its denoised output")


def variance_preserving(alpha_bar: float) -> Point:
    """The point with cumulative product ᾱ (Ho et al. 2020, eq. 4)."""
    return Point(math.sqrt(alpha_bar), math.sqrt(max(0.0, 1 - alpha_bar)))


def read(scheduler: Any, timestep: float, x0: Tensor | None = None, per_token: Tensor | None = None) -> Stage | None:
    """The stage `scheduler` has just stepped through at `timestep`; None where no rule is known.

    Call it after the scheduler's own `step`. `x0` is the denoised prediction, where the pipeline hands one over itself.
    `per_token` are times of their own for each token (LTX's conditioning); the tokens in motion are at their maximum.
    """
    config = scheduler.config
    if per_token is not None:
        here = float(per_token.max()) / config.num_train_timesteps
        there = max((float(s) for s in scheduler.sigmas if float(s) < here - 1e-6), default=0.0)
        return Stage(Point(1 - here, here), Point(1 - there, there), "flow", sign=-1.0)
    if hasattr(scheduler, "ets") and hasattr(scheduler, "betas") and not hasattr(scheduler, "alphas_cumprod"):  # IPNDM
        at = scheduler._step_index - 1
        now, then = (Point(max(float(scheduler.alphas[i]), 1e-8), float(scheduler.betas[i])) for i in (at, at + 1))
        return Stage(now, then, "epsilon")
    if hasattr(scheduler, "sigmas") and getattr(scheduler, "_step_index", None) is not None:
        index = scheduler._step_index - 1
        here, there = float(scheduler.sigmas[index]), float(scheduler.sigmas[index + 1])
        return _by_sigma(scheduler, config, here, there, x0)
    if hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "sigmas"):
        return _by_alpha(scheduler, config, int(timestep))
    return None


def _by_sigma(scheduler: Any, config: Any, here: float, there: float, x0: Tensor | None) -> Stage | None:
    name = type(scheduler).__name__
    prediction = config.get("prediction_type", "flow")
    if hasattr(scheduler, "precondition_outputs"):
        return Preconditioned(Point(1.0, here), Point(1.0, there), scheduler, x0)
    if prediction == "flow":
        if config.get("invert_sigmas"):  # time runs from 0 (noise) to 1 (data)
            return Stage(Point(here, 1 - here), Point(there, 1 - there), "flow", sign=-1.0)
        if name.startswith("MiniMax"):  # its velocity points to the data
            return Stage(Point(1 - here, here), Point(1 - there, there), "flow", sign=-1.0)
        if float(scheduler.sigmas.max()) > 1.001:  # variance-exploding sigmas: dx/dσ is ε
            return Stage(Point(1.0, here), Point(1.0, there), "epsilon")
        return Stage(Point(1 - here, here), Point(1 - there, there), "flow")
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        now, then = (
            Point(*(float(v) for v in scheduler._sigma_to_alpha_sigma_t(torch.tensor(s, dtype=torch.float64))))
            for s in (here, there)
        )
        limit = scheduler._threshold_sample if config.get("thresholding") else None
        return Stage(now, then, prediction.replace("flow_prediction", "flow"), threshold=limit)
    if prediction in ("epsilon", "v_prediction", "sample"):
        return Stage(Point(1.0, here), Point(1.0, there), prediction)
    return None


def _by_alpha(scheduler: Any, config: Any, timestep: int) -> Stage | None:
    table = scheduler.alphas_cumprod
    if getattr(scheduler, "_step_index", None) is not None:  # LCM and TCD go from one chosen timestep to the next
        following = scheduler.timesteps[scheduler._step_index :]
        previous = int(following[0]) if len(following) else -1
    elif hasattr(scheduler, "previous_timestep"):  # DDPM goes through its list of timesteps, whatever their spacing
        previous = int(scheduler.previous_timestep(timestep))
    else:
        previous = timestep - config.num_train_timesteps // scheduler.num_inference_steps
    final = getattr(scheduler, "final_alpha_cumprod", getattr(scheduler, "one", torch.tensor(1.0)))
    then = table[previous] if previous >= 0 else final
    clips = config.get("clip_sample") and not type(scheduler).__name__.startswith("CogVideoX")  # has it, ignores it
    clip = config.get("clip_sample_range", 1.0) if clips else None
    limit = scheduler._threshold_sample if config.get("thresholding") else None
    now, after = variance_preserving(float(table[timestep])), variance_preserving(float(then))
    return Stage(now, after, config.get("prediction_type", "epsilon"), clip=None if limit else clip, threshold=limit)
