"""Losses on forward-noised states: tensors and numbers in, one loss per sample out. All are to be minimised.

They are written in the space of the model's own prediction e (a velocity, ε, v or x0) with the target E that an exact
model of (x0, ε) would predict at x_t. d is the denoising error, the mean over a sample's elements of (e - E)². A group
is the set of samples drawn for one prompt side by side; `groups` holds a number for each sample, equal within a group.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Weighting = Literal["uniform", "t", "t2", "ghuber"]
SMALLEST = 1e-5  # what an absolute error is at least, where one is divided by it


def optimality(advantages: Tensor, most: float) -> Tensor:
    """clip(A/(2·Amax) + ½, 0, 1), shape (B,): the probability that a sample is a good one (DiffusionNFT, CRD)."""
    return (advantages / (2 * most) + 0.5).clamp(0, 1)


def nft(prediction: Tensor, old: Tensor, target: Tensor, good: Tensor, beta: float) -> Tensor:
    """DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117), shape (B,): r·|e⁺ - E|² + (1 - r)·|e⁻ - E|².

    The implicit good policy is e⁺ = (1 - β)·e_old + β·e, the bad one e⁻ = (1 + β)·e_old - β·e; `good` is r (B,). Its
    minimum, where e_old = E[E|x_t], is e_old + (2/β)·Cov(r, E|x_t). Any affine reading of the predictions will do.
    """
    positive, negative = _implicit(prediction, old, beta)
    return good * mean_square(positive - target, len(good)) + (1 - good) * mean_square(negative - target, len(good))


def nft_normalised(prediction: Tensor, old: Tensor, target: Tensor, good: Tensor, beta: float) -> Tensor:
    """`nft` with each square divided by its own mean absolute error, which takes no gradient (reference code), (B,)."""
    positive, negative = _implicit(prediction, old, beta)
    return good * _normalised(positive - target, len(good)) + (1 - good) * _normalised(negative - target, len(good))


def log_likelihood(distance: Tensor, time: float, weighting: Weighting = "uniform", power: float = 0.25) -> Tensor:
    """AWM's stand-in for log π_θ(x0), shape (B,): -w(t)·d (Xue et al. 2025, arXiv 2509.25050).

    `time` is that of the flow, σ/(α + σ) in [0, 1]. w is 1, t or t²; "ghuber" bends the error,
    -t·((d + 1e-10)^p - 1e-10^p)/p, so that a large one pulls less.
    """
    if weighting == "ghuber":
        return -((distance + 1e-10) ** power - 1e-10**power) * time / power
    return -{"uniform": 1.0, "t": time, "t2": time**2}[weighting] * distance


def dgpo(distance: Tensor, anchor: Tensor, advantages: Tensor, groups: Tensor, beta: float) -> Tensor:
    """DGPO (Luo et al. 2025, arXiv 2510.08425), shape (B,): w_g·A·d, w_g = sigmoid(β·Σ_g A·(d - d_ref)/G), detached.

    w_g is the chance, by Bradley and Terry's model of the group's two halves, that they are still ranked wrongly.
    """
    return dgpo_weight(distance, anchor, advantages, groups, beta) * advantages * distance


def dgpo_weight(distance: Tensor, anchor: Tensor, advantages: Tensor, groups: Tensor, beta: float) -> Tensor:
    """(B,) w_g of each sample's group; without a gradient."""
    return torch.sigmoid(beta * group_mean(advantages * (distance - anchor), groups)).detach()


def trusted(distance: Tensor, old: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """(B,) False where ρ = exp(d_old - d) has left 1 ± c in the direction in which A pulls (DGPO, reference code)."""
    ratio = (old - distance).exp()
    return ~(((advantages > 0) & (ratio > 1 + clip_range)) | ((advantages < 0) & (ratio < 1 - clip_range)))


def crd(implicit: Tensor, good: Tensor, groups: Tensor, beta: float, temperature: float | None = None) -> Tensor:
    """Centred reward distillation (arXiv 2603.14128), shape (B,): (β·(r_θ - q·r_θ) - (R - q·R))².

    r_θ = d_old/W_old - d/W is the `implicit` reward, R in [0, 1] the `good` one; q·r_θ takes no gradient. q is uniform
    over the group; with a temperature the mean of two losses is taken, q = softmax(R/T) and q = softmax(-R/T).
    """
    if temperature is None:
        return _centred(implicit, good, groups, torch.ones_like(good), beta)
    tilts = (good / temperature, -good / temperature)
    weights = [(tilt - _group_most(tilt, groups)).exp() for tilt in tilts]
    return torch.stack([_centred(implicit, good, groups, weight, beta) for weight in weights]).mean(0)


def diffusion_dpo(winner: Tensor, loser: Tensor, beta: float) -> Tensor:
    """Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908, eq. 14): -log σ(-β/2·(winner - loser)), one per pair.

    `winner` and `loser` are d - d_ref of the two pictures, both noised to the same t with the same ε. β stands for the
    paper's β·T·ω(λ_t), and d is a mean over elements in the place of a sum.
    """
    return -logsigmoid(-beta / 2 * (winner - loser))


def d3po(winner: Tensor, loser: Tensor, beta: float, clip_range: float) -> Tensor:
    """D3PO (Yang et al. 2023, arXiv 2311.13231), one per pair: -log σ(β·log clip(ρ_w) - β·log clip(ρ_l)).

    `winner` and `loser` are log π_θ - log π_ref of one step of two paths; ρ = exp of it, clipped to 1 ± c (reference
    code): outside of that range there is no gradient.
    """
    least, most = math.log(1 - clip_range), math.log(1 + clip_range)  # ρ itself would overflow far from 1
    kept = [log_ratio.clamp(least, most) for log_ratio in (winner, loser)]
    return -logsigmoid(beta * (kept[0] - kept[1]))


def best_and_worst(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """For each sample the index of its group's best and of its worst, both (B,) int64; the first of several that tie.

    A loss of pairs indexed by these has one value per sample, and its mean over samples is the mean over groups.
    """
    labels, inverse = torch.unique(groups, return_inverse=True)
    inside = groups == labels[:, None]  # (G, B)
    best = values.masked_fill(~inside, -torch.inf).argmax(1)
    worst = values.masked_fill(~inside, torch.inf).argmin(1)
    return best[inverse], worst[inverse]


def group_mean(values: Tensor, groups: Tensor, weights: Tensor | None = None) -> Tensor:
    """(B,) the (weighted) mean over each sample's group, repeated for all of its members."""
    labels, inverse = torch.unique(groups, return_inverse=True)
    weights = torch.ones_like(values) if weights is None else weights
    empty = values.new_zeros(len(labels))
    return (empty.index_add(0, inverse, weights * values) / empty.index_add(0, inverse, weights))[inverse]


def mean_square(difference: Tensor, batch_size: int) -> Tensor:
    """(B,) mean over a sample's elements of the square of (B, ...)."""
    return difference.square().reshape(batch_size, -1).mean(1)


def absolute_error(difference: Tensor, batch_size: int) -> Tensor:
    """(B,) mean over a sample's elements of the absolute value of (B, ...), at least 1e-5; without a gradient."""
    return difference.detach().abs().reshape(batch_size, -1).mean(1).clamp(min=SMALLEST)


def _group_most(values: Tensor, groups: Tensor) -> Tensor:
    best, _ = best_and_worst(values, groups)
    return values[best]


def _implicit(prediction: Tensor, old: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    return (1 - beta) * old + beta * prediction, (1 + beta) * old - beta * prediction


def _normalised(difference: Tensor, batch_size: int) -> Tensor:
    return mean_square(difference, batch_size) / absolute_error(difference, batch_size)


def _centred(implicit: Tensor, good: Tensor, groups: Tensor, weights: Tensor, beta: float) -> Tensor:
    told = implicit - group_mean(implicit, groups, weights).detach()
    return (beta * told - (good - group_mean(good, groups, weights))).square()
