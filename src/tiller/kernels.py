"""Transition kernels: from what the model predicts to the Gaussian p(x_{t-1} | x_t) of the next latents.

Everything is written in one notation for every noise process: at a grid point the latents are

    x = α·x0 + σ·ε

so (α, σ) = (√ᾱ, √(1-ᾱ)) for variance-preserving models, (1, σ) for variance-exploding ones and (1-σ, σ) for rectified
flow. A kernel gets x, the model's x̂0 and ε̂ at `now`, and the point `then` to go to. It returns the mean (the shape of
x) and one standard deviation for all elements. A standard deviation of 0 means that the transition has no density.

Every kernel with its noise turned off is the first-order ODE step α'·x̂0 + σ'·ε̂ (DDIM with η = 0, Euler in flow models).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from tiller.types import ConfigError


class Point(NamedTuple):
    """One point of a noise process, x = alpha·x0 + sigma·eps."""

    alpha: float
    sigma: float


class Gaussian(NamedTuple):
    """p(x_{t-1} | x_t): the mean (B, ...) and the standard deviation (a number, or a tensor that broadcasts to it)."""

    mean: Tensor
    std: float | Tensor

    @property
    def has_density(self) -> bool:
        """Whether the transition is random, so that a log-probability exists."""
        return bool((torch.as_tensor(self.std) > 0).all())


class Kernel(Protocol):
    """What a kernel must offer: whether it is random at all, and its transition."""

    @property
    def deterministic(self) -> bool: ...

    def transition(self, x: Tensor, x0: Tensor, eps: Tensor, now: Point, then: Point) -> Gaussian: ...


def _within(name: str, value: float, most: float) -> None:
    if not 0 <= value <= most:
        bound = "0 or more" if math.isinf(most) else f"between 0 and {most}"
        raise ConfigError(f"{name} is {value}; it must be {bound}.")


def posterior_variance(now: Point, then: Point) -> float:
    """Variance of q(x_{t-1} | x_t, x0) for x = αx0 + σε (Kingma et al. 2021, VDM, eq. 25; Ho et al. 2020, eq. 7)."""
    return then.sigma**2 * max(0.0, 1 - (now.alpha * then.sigma / (then.alpha * now.sigma)) ** 2)


@dataclass(frozen=True)
class DDIM:
    """DDIM with noise η (Song et al. 2021, DDIM, eq. 12 and 16); η = 1 is DDPM's ancestral sampling, η = 0 the ODE."""

    eta: float = 1.0

    def __post_init__(self) -> None:
        _within("DDIM's eta", self.eta, 1)

    @property
    def deterministic(self) -> bool:
        return self.eta == 0

    def transition(self, x: Tensor, x0: Tensor, eps: Tensor, now: Point, then: Point) -> Gaussian:
        std = self.eta * math.sqrt(posterior_variance(now, then))
        direction = math.sqrt(max(0.0, then.sigma**2 - std**2))
        return Gaussian(then.alpha * x0 + direction * eps, std)


@dataclass(frozen=True)
class DDPM:
    """Ancestral sampling (Ho et al. 2020, eq. 7): the posterior mean, and its variance or the forward one."""

    variance: Literal["fixed_small", "fixed_large"] = "fixed_small"

    def __post_init__(self) -> None:
        if self.variance not in ("fixed_small", "fixed_large"):
            raise ConfigError(f"DDPM's variance is {self.variance!r}; it must be fixed_small or fixed_large.")

    @property
    def deterministic(self) -> bool:
        return False

    def transition(self, x: Tensor, x0: Tensor, eps: Tensor, now: Point, then: Point) -> Gaussian:
        scale = now.alpha / then.alpha  # x_t = scale·x_{t-1} + √forward·noise
        forward = now.sigma**2 - (scale * then.sigma) ** 2
        mean = (then.alpha * forward * x0 + scale * then.sigma**2 * x) / now.sigma**2
        variance = posterior_variance(now, then) if self.variance == "fixed_small" else max(0.0, forward)
        return Gaussian(mean, math.sqrt(variance))


def _euler_maruyama(x: Tensor, x0: Tensor, eps: Tensor, now: Point, then: Point, diffusion: float) -> Gaussian:
    """One step of dx = [v + g²/(2σ)·(x + (1-σ)v)]dt + g dw in flow coordinates (Liu et al. 2025, Flow-GRPO, eq. 9).

    Latents of any other process are divided by (α + σ), which makes them rectified-flow latents at time σ/(α + σ).
    """
    here, there = now.alpha + now.sigma, then.alpha + then.sigma
    time, step = now.sigma / here, then.sigma / there - now.sigma / here
    velocity = eps - x0
    drift = diffusion**2 / (2 * time)
    mean = x / here * (1 + drift * step) + velocity * (1 + drift * (1 - time)) * step
    return Gaussian(there * mean, there * diffusion * math.sqrt(max(0.0, -step)))


@dataclass(frozen=True)
class FlowSDE:
    """Flow-GRPO's SDE (Liu et al. 2025, Flow-GRPO, eq. 12): g = a·√(σ/(1-σ)).

    At σ = 1, where g has no value, the next point's σ stands in for it in the denominator.
    """

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        _within("FlowSDE's noise_level", self.noise_level, math.inf)

    @property
    def deterministic(self) -> bool:
        return self.noise_level == 0

    def transition(self, x: Tensor, x0: Tensor, eps: Tensor, now: Point, then: Point) -> Gaussian:
        time = now.sigma / (now.alpha + now.sigma)
        following = then.sigma / (then.alpha + then.sigma)
        pole = time if time < 1 else (following or 0.99)  # a single step from 1 to 0 has no next σ to borrow
        diffusion = self.noise_level * math.sqrt(time / (1 - pole))
        return _euler_maruyama(x, x0, eps, now, then, diffusion)


@dataclass(frozen=True)
class DanceSDE:
    """DanceGRPO's SDE (Xue et al. 2025, DanceGRPO, eq. 7): the same drift with a constant g = η."""

    eta: float = 0.3

    def __post_init__(self) -> None:
        _within("DanceSDE's eta", self.eta, math.inf)

    @property
    def deterministic(self) -> bool:
        return self.eta == 0

    def transition(self, x: Tensor, x0: Tensor, eps: Tensor, now: Point, then: Point) -> Gaussian:
        return _euler_maruyama(x, x0, eps, now, then, self.eta)


@dataclass(frozen=True)
class CPS:
    """Coefficients-preserving sampling (Wang & Yu 2025, Flow-CPS): the noise left after a step is exactly σ'."""

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        _within("CPS's noise_level", self.noise_level, 1)

    @property
    def deterministic(self) -> bool:
        return self.noise_level == 0

    def transition(self, x: Tensor, x0: Tensor, eps: Tensor, now: Point, then: Point) -> Gaussian:
        std = then.sigma * math.sin(self.noise_level * math.pi / 2)
        return Gaussian(then.alpha * x0 + math.sqrt(then.sigma**2 - std**2) * eps, std)


@dataclass(frozen=True)
class ODE:
    """No noise: in a pipeline, the pipeline's own solver; here, its first-order step. It has no density."""

    @property
    def deterministic(self) -> bool:
        return True

    def transition(self, x: Tensor, x0: Tensor, eps: Tensor, now: Point, then: Point) -> Gaussian:
        return Gaussian(then.alpha * x0 + then.sigma * eps, 0.0)


@dataclass(frozen=True)
class Window:
    """Noise inside a window of steps only, the pipeline's own solver elsewhere (Li et al. 2025, MixGRPO, section 3).

    Steps `first` to `first + size - 1` are drawn from `inside`; the others have no density.
    """

    inside: Kernel | None  # None leaves it to the policy
    first: int
    size: int

    def __post_init__(self) -> None:
        if self.first < 0 or self.size < 1:
            raise ConfigError(f"a window of {self.size} steps from step {self.first} holds none; start at 0 or later.")
        if self.inside is not None and self.inside.deterministic:
            raise ConfigError(f"{self.inside} draws no noise, so a window of it trains nothing; take one with noise.")

    @property
    def deterministic(self) -> bool:
        return False

    def at(self, index: int) -> Kernel | None:
        """The kernel of step `index`."""
        return self.inside if self.first <= index < self.first + self.size else ODE()

    def transition(self, x: Tensor, x0: Tensor, eps: Tensor, now: Point, then: Point) -> Gaussian:
        raise NotImplementedError("a window's transition depends on the step; ask the kernel that `at` returns.")


@dataclass(frozen=True)
class Stock:
    """The pipeline's own scheduler, untouched; its density is read off by asking it twice (see `policy.transition`)."""

    @property
    def deterministic(self) -> bool:
        return False

    def transition(self, x: Tensor, x0: Tensor, eps: Tensor, now: Point, then: Point) -> Gaussian:
        raise NotImplementedError("Stock's transition is the scheduler's own; it has no formula here.")


def log_prob(
    action: Tensor, gaussian: Gaussian, batch_size: int | None = None, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """log N(action; mean, std²) per sample, shape (B,), in float32 or better.

    `mean` divides by the number of elements, as every reference implementation of DDPO and GRPO does, so that a
    clip range does not depend on the picture's size; `sum` is the papers' formula. The action takes no gradient.
    """
    mean = gaussian.mean.float() if gaussian.mean.dtype in (torch.float16, torch.bfloat16) else gaussian.mean
    std = torch.as_tensor(gaussian.std, dtype=mean.dtype, device=mean.device)
    residual = action.detach().to(mean.dtype) - mean
    elements = -(residual**2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    rows = elements.reshape(batch_size or len(elements), -1)
    return rows.mean(1) if reduction == "mean" else rows.sum(1)
