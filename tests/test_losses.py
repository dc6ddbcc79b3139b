"""Policy losses: truth tables, gradients by hand, and the policy gradient of a Gaussian chain in closed form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tiller.kernels import Gaussian, log_prob
from tiller.losses import approximate_kl, clip_fraction, clipped_surrogate, score_function


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- PPO ----


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss"), [(1, 1.2, -1.1), (1, 0.8, -0.8), (-1, 1.2, 1.2), (-1, 0.8, 0.9)]
)
def test_clipped_surrogate_truth_table(advantage: float, ratio: float, loss: float) -> None:
    old = vector(-1.3)
    found = clipped_surrogate(old + vector(ratio).log(), old, vector(advantage), 0.1)
    assert float(found) == pytest.approx(loss, abs=1e-7)


@pytest.mark.parametrize(
    ("advantage", "ratio", "slope"),
    [(1, 1.2, 0.0), (1, 0.8, -0.8), (-1, 1.2, 1.2), (-1, 0.8, 0.0), (2, 1.05, -2.1), (-2, 0.95, 1.9)],
)
def test_clipping_stops_the_gradient_only_where_the_ratio_has_gone_far_enough(
    advantage: float, ratio: float, slope: float
) -> None:
    """d loss / d log π = -A·ρ where the surrogate is active, 0 where it is clipped."""
    new = vector(ratio).log().requires_grad_()
    clipped_surrogate(new, vector(0.0), vector(advantage), 0.1).sum().backward()
    assert new.grad is not None
    assert float(new.grad) == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("clip_range", [0.0, 1e-4, 0.2])
def test_at_ratio_one_importance_sampling_and_score_function_have_the_same_gradient(clip_range: float) -> None:
    """T8: and it is autograd's own of -A·log π, also at the kink between the two branches of the maximum."""
    advantages = vector(1.5, -0.3, 0.0, -2.0)
    gradients = []
    losses: list[Callable[[Tensor], Tensor]] = [
        lambda lp: clipped_surrogate(lp, lp.detach(), advantages, clip_range),
        lambda lp: score_function(lp, advantages),
        lambda lp: -advantages * lp,
    ]
    for loss in losses:
        new = vector(-1.0, 2.0, 0.5, -0.2).requires_grad_()
        loss(new).sum().backward()
        gradients.append(new.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[1], gradients[2])


def test_at_ratio_one_the_surrogate_is_minus_the_advantage() -> None:
    advantages, new = vector(1.5, -0.3), vector(-1.0, 2.0)
    assert torch.equal(clipped_surrogate(new, new, advantages, 1e-4), -advantages)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        clipped_surrogate(torch.zeros(4), torch.zeros(4), torch.zeros(4, 1), 0.1)
    with pytest.raises(ValueError, match="shapes differ"):
        score_function(torch.zeros(4), torch.zeros(1))


def test_numbers_for_the_log() -> None:
    new, old = vector(0.0, 0.3, -0.3, 0.05), vector(0.0, 0.0, 0.0, 0.0)
    assert float(clip_fraction(new, old, 0.1)) == 0.5
    assert float(approximate_kl(new, old)) == pytest.approx(0.5 * (0.09 + 0.09 + 0.0025) / 4, rel=1e-12)


# ---- T5: x_{k+1} = a_k x_k + θ_k + s_k z, reward -(x_T - c)², whose policy gradient is known exactly ----

A, THETA, S = vector(0.9, 0.95, 1, 0.8, 0.85), vector(0.1, -0.2, 0.3, 0, 0.05), vector(0.5, 0.4, 0.3, 0.5, 0.4)
START, GOAL = 1.0, 1.0


def exact_gradient() -> Tensor:
    """dE[r]/dθ_k = -2(m_T - c)·∏_{j>k} a_j."""
    mean = START
    for a, theta in zip(A, THETA, strict=True):
        mean = float(a) * mean + float(theta)
    assert mean == pytest.approx(0.764, abs=1e-9)
    return torch.stack([-2 * (mean - GOAL) * A[k + 1 :].prod() for k in range(len(A))])


def estimates(loss: Callable[[Tensor, Tensor], Tensor], samples: int, constant: float = 0.0) -> Tensor:
    """(samples, T): each sample's own estimate of dE[r]/dθ, through `tiller`'s log-probability and the given loss."""
    source = torch.Generator().manual_seed(0)
    theta = THETA.expand(samples, -1).clone().requires_grad_()  # its own θ for each sample keeps the estimates apart
    x = torch.full((samples, 1), START, dtype=torch.float64)
    scores = []
    for k in range(len(A)):
        gaussian = Gaussian(A[k] * x + theta[:, k : k + 1], float(S[k]))
        z = torch.randn(samples, 1, dtype=torch.float64, generator=source)
        action = (gaussian.mean + gaussian.std * z).detach()
        scores.append(log_prob(action, gaussian, reduction="sum"))
        x = action
    reward = -((x[:, 0] - GOAL) ** 2) + constant
    total = torch.stack([loss(score, reward) for score in scores]).sum()
    (gradient,) = torch.autograd.grad(-total, theta)
    return gradient


LOSSES = {
    "score_function": score_function,
    "clipped_surrogate": lambda lp, advantages: clipped_surrogate(lp, lp.detach(), advantages, 1e-4),
}


def test_the_policy_gradient_of_the_chain_golden() -> None:
    golden = vector(0.304912, 0.32096, 0.32096, 0.4012, 0.472)
    torch.testing.assert_close(exact_gradient(), golden, rtol=0, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_estimator_is_the_exact_policy_gradient_within_three_standard_errors(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    found = estimates(loss, 200_000)
    error = found.std(0) / len(found) ** 0.5
    z = (found.mean(0) - exact_gradient()) / error
    assert float(z.abs().max()) < 3, z
    assert float(error.max()) < 0.01  # the estimate is sharp enough to tell 0.30 from 0.32


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_constant_added_to_the_reward_leaves_the_expected_gradient(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """E[∇ log π] = 0: the same samples with reward + 3 differ by noise about zero only."""
    difference = estimates(loss, 200_000, constant=3.0) - estimates(loss, 200_000)
    z = difference.mean(0) / (difference.std(0) / len(difference) ** 0.5)
    assert float(z.abs().max()) < 3, z
