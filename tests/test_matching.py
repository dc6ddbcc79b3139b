"""Losses on forward-noised states: golden numbers, minima in closed form, and what they have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tiller import matching
from tiller.kernels import Point
from tiller.losses import clipped_surrogate
from tiller.process import Stage

SEVENTH = {"rel": 0, "abs": 1e-7}


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradient(loss: Tensor, *inputs: Tensor) -> Any:
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return found[0] if len(inputs) == 1 else found


# ---- golden numbers, from an independent calculation ----


def test_nft_golden_in_the_space_of_velocities() -> None:
    found = matching.nft(vector(0.5), vector(0.2), vector(1.0), vector(0.8), beta=0.7)
    assert float(found) == pytest.approx(0.4825, **SEVENTH)


def test_nft_golden_of_the_reference_code() -> None:
    """p± = x_t - t·v± against x0, normalised, times 5/β."""
    time, clean, target = 0.4, -0.3, 1.0
    noised = (1 - time) * clean + time * (target + clean)
    new, old = (vector(noised - time * velocity) for velocity in (0.5, 0.2))
    found = matching.nft_normalised(new, old, vector(clean), vector(0.8), beta=0.7) * 5 / 0.7
    assert float(found) == pytest.approx(1.92571429, **SEVENTH)


@pytest.mark.parametrize(
    ("weighting", "expected"), [("ghuber", -1.86422014), ("uniform", -0.37), ("t", -0.222), ("t2", -0.1332)]
)
def test_awm_golden(weighting: Any, expected: float) -> None:
    assert float(matching.log_likelihood(vector(0.37), 0.6, weighting, 0.25)) == pytest.approx(expected, **SEVENTH)


def test_dgpo_golden() -> None:
    advantages, groups = vector(1.2, -0.2, -1), torch.zeros(3, dtype=torch.int64)
    distance, anchor = vector(0.5, 0.4, 0.6), vector(0.45, 0.42, 0.55)
    weight = matching.dgpo_weight(distance, anchor, advantages, groups, 100)
    assert weight.tolist() == pytest.approx([0.61459450] * 3, **SEVENTH)
    found = matching.dgpo(distance, anchor, advantages, groups, 100).mean()
    assert float(found) == pytest.approx(-0.01638919, **SEVENTH)


def test_diffusion_dpo_golden() -> None:
    found = matching.diffusion_dpo(vector(0.30 - 0.32), vector(0.41 - 0.40), beta=5)
    assert float(found) == pytest.approx(0.65635014, **SEVENTH)


def test_crd_golden() -> None:
    found = matching.crd(vector(0.1, -0.05, 0.02), vector(0.9, 0.3, 0.6), torch.zeros(3), beta=0.5) * 5 / 0.5
    assert float(found.mean()) == pytest.approx(0.45938889, **SEVENTH)


@pytest.mark.parametrize(("advantage", "expected"), [(-9.0, 0.0), (-5.0, 0.0), (-1.0, 0.4), (0.0, 0.5), (2.5, 0.75)])
def test_optimality(advantage: float, expected: float) -> None:
    assert float(matching.optimality(vector(advantage), 5)) == pytest.approx(expected, abs=1e-12)


# ---- T11: three atoms, whose posterior given x_t is known ----

ATOMS, MASSES, REWARDS = vector(-2, 0.5, 3), vector(0.2, 0.5, 0.3), vector(0.1, 0.6, 0.9)
STATE = 0.7


def posterior(point: Point) -> tuple[Tensor, Tensor]:
    """Probabilities of the atoms given x_t = 0.7 = αx0 + σε, and the ε that each takes."""
    noise = (STATE - point.alpha * ATOMS) / point.sigma
    weights = MASSES * (-(noise**2) / 2).exp()
    return weights / weights.sum(), noise


def argmin(loss: Callable[[Tensor], Tensor]) -> float:
    """By Newton's method, which one step would do for a quadratic."""
    at = vector(0.0).requires_grad_()
    for _ in range(3):
        (slope,) = torch.autograd.grad(loss(at), at, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), at)
        at = (at - slope / bend).detach().requires_grad_()
    return float(at.detach())


def nft_optimum(stage: Stage, beta: float) -> tuple[float, float]:
    """The old prediction E[E|x_t], and what minimises NFT's loss in the space of this prediction."""
    weights, noise = posterior(stage.now)
    targets = stage.target(ATOMS, noise)
    old = (weights * targets).sum()
    rows = old.expand(3)
    return float(old), argmin(lambda at: (weights * matching.nft(at.expand(3), rows, targets, REWARDS, beta)).sum())


def test_nft_has_its_minimum_where_theory_puts_it() -> None:
    stage = Stage(Point(0.4, 0.6), Point(0.5, 0.5), "flow")
    old, best = nft_optimum(stage, 0.7)
    assert old == pytest.approx(-1.14147484, **SEVENTH)
    assert best == pytest.approx(-2.11682809, **SEVENTH)
    weights, noise = posterior(stage.now)
    velocity = noise - ATOMS
    covariance = (weights * REWARDS * velocity).sum() - (weights * REWARDS).sum() * (weights * velocity).sum()
    assert best == pytest.approx(old + 2 / 0.7 * float(covariance), abs=1e-9)


@pytest.mark.parametrize(("kind", "sign"), [("epsilon", 1), ("v_prediction", 1), ("sample", 1), ("flow", -1)])
def test_nfts_minimum_is_the_same_picture_whatever_the_model_predicts(kind: str, sign: float) -> None:
    """The loss is written in the space of the prediction; the x̂0 that is best must not depend on that space."""
    now = Point(0.4, 0.6) if kind == "flow" else Point(0.6, 0.8)
    plain = Stage(now, now, "sample")
    stage = Stage(now, now, kind, sign=sign)
    _, wanted = nft_optimum(plain, 0.7)
    _, best = nft_optimum(stage, 0.7)
    assert float(stage.split(vector(STATE), vector(best))[0]) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(
    ("kind", "sign"), [("epsilon", 1), ("v_prediction", 1), ("sample", 1), ("flow", 1), ("flow", -1)]
)
def test_reading_x0_off_before_mixing_is_mixing_before_reading(kind: str, sign: float) -> None:
    """NFT's code forms v± first and p± = x_t - t·v± after; here x̂0 is read first. α and σ of the state do the rest."""
    now = Point(0.4, 0.6) if kind == "flow" else Point(0.6, 0.8)
    stage, x = Stage(now, now, kind, sign=sign), vector(0.7, -0.4)
    new, old, beta = vector(0.5, 1.5), vector(0.2, -0.3), 0.7
    first = (1 - beta) * stage.split(x, old)[0] + beta * stage.split(x, new)[0]
    torch.testing.assert_close(stage.split(x, (1 - beta) * old + beta * new)[0], first)
    if kind == "flow":
        torch.testing.assert_close(first, x - sign * now.sigma * ((1 - beta) * old + beta * new))


def test_nft_learns_nothing_from_even_chances_and_has_two_equal_halves_at_the_start() -> None:
    old, target = vector(0.2, -0.7), vector(1.0, 0.3)
    new = old.clone().requires_grad_()
    even = vector(0.5, 0.5)
    for loss in (matching.nft, matching.nft_normalised):
        assert float(gradient(loss(new, old, target, even, 0.7).sum(), new).abs().max()) < 1e-15
        assert float(gradient(loss(new, old, target, vector(0.6, 0.6), 0.7).sum(), new).abs().max()) > 0.05
    found = [matching.nft_normalised(old, old, target, vector(r, r), 0.7) for r in (0.0, 1.0)]
    torch.testing.assert_close(*found, rtol=1e-14, atol=0)


# ---- T12: one gradient at the start ----


def test_at_the_start_awm_nft_crd_and_twice_dgpo_have_one_gradient() -> None:
    """grad Σ_i A_i·d_i, one group, ΣA = 0, without normalisation; to 1e-10 in float64."""
    source = torch.Generator().manual_seed(0)
    states, targets = torch.randn(2, 6, 5, dtype=torch.float64, generator=source)
    weight = torch.randn(5, 5, dtype=torch.float64, generator=source).requires_grad_()
    advantages = vector(1.5, -0.5, 0.7, -2.0, 0.1, 0.2)
    groups, most, beta = torch.zeros(6, dtype=torch.int64), 5.0, 0.7
    good = matching.optimality(advantages, most)
    prediction = states @ weight
    old = prediction.detach()
    distance = matching.mean_square(prediction - targets, 6)
    likelihood = matching.log_likelihood(distance, 0.6, "uniform")
    losses = {
        "awm": clipped_surrogate(likelihood, likelihood.detach(), advantages, 1.0),
        "nft": matching.nft(prediction, old, targets, good, beta) * most / beta,
        "crd": matching.crd(distance.detach() - distance, good, groups, beta) * most / beta,
        "dgpo": 2 * matching.dgpo(distance, distance.detach(), advantages, groups, 100.0),
    }
    (expected,) = torch.autograd.grad((advantages * distance).mean(), weight, retain_graph=True)
    assert float(expected.abs().max()) > 0.1
    for name, loss in losses.items():
        (found,) = torch.autograd.grad(loss.mean(), weight, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10, msg=name)


# ---- T13: pairs ----


def test_diffusion_dpo_starts_at_log_two_with_a_quarter_of_beta() -> None:
    winner, loser = vector(0.0).requires_grad_(), vector(0.0).requires_grad_()
    loss = matching.diffusion_dpo(winner, loser, 5.0).sum()
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-12)
    up, down = gradient(loss, winner, loser)
    assert (float(up), float(down)) == (1.25, -1.25)


def test_the_gradient_of_dpo_is_beta_times_that_of_dgpo_for_a_pair() -> None:
    """For G = 2 and A = ±1, at every θ."""
    beta, advantages, groups = 30.0, vector(1, -1), torch.zeros(2, dtype=torch.int64)
    anchor = vector(0.4, 0.45)
    for values in ([0.4, 0.45], [0.35, 0.5], [0.6, 0.2], [0.41, 0.47]):
        distance = vector(*values).requires_grad_()
        change = distance - anchor
        pair = gradient(matching.diffusion_dpo(change[:1], change[1:], beta).mean(), distance)
        group = gradient(matching.dgpo(distance, anchor, advantages, groups, beta).mean(), distance)
        torch.testing.assert_close(pair, beta * group, rtol=0, atol=1e-12)


def test_swapping_a_pair_flips_it_and_equal_pictures_teach_nothing() -> None:
    one, other = vector(0.1, -0.2, 0.05), vector(-0.03, 0.4, 0.05)
    there, back = (matching.diffusion_dpo(*pair, 7.0) for pair in ((one, other), (other, one)))
    torch.testing.assert_close((-there).exp() + (-back).exp(), torch.ones(3, dtype=torch.float64))
    same = one.clone().requires_grad_()
    loss = matching.diffusion_dpo(same, same, 7.0)
    assert loss.tolist() == pytest.approx([math.log(2)] * 3)
    assert torch.equal(gradient(loss.sum(), same), torch.zeros(3))


@pytest.mark.parametrize(("log_ratio", "slope"), [(0.0, -0.05), (0.09, None), (0.2, 0.0), (-0.2, 0.0), (200.0, 0.0)])
def test_d3po_has_no_gradient_outside_its_range(log_ratio: float, slope: float | None) -> None:
    """At the start -β/2; clipped to 0 beyond; log 1.1 = 0.0953 and log 0.9 = -0.1054 are the ends."""
    winner = vector(log_ratio).requires_grad_()
    found = float(gradient(matching.d3po(winner, vector(0.0), 0.1, 0.1).sum(), winner))
    expected = -0.1 / (1 + math.exp(0.1 * log_ratio)) if slope is None else slope
    assert found == pytest.approx(expected, abs=1e-12)


def test_best_and_worst_of_interleaved_groups() -> None:
    groups = torch.tensor([4, 9, 4, 9, 4, -1])
    best, worst = matching.best_and_worst(vector(1, 5, 3, 5, 2, 99), groups)
    assert best.tolist() == [2, 1, 2, 1, 2, 5]  # of 1 and 3, which tie, the first
    assert worst.tolist() == [0, 1, 0, 1, 0, 5]


# ---- AWM ----


def test_a_constant_advantage_moves_awm_unless_the_model_is_exact() -> None:
    """The denoising loss itself has its minimum at E[V|x_t], and nowhere else."""
    weights, noise = posterior(Point(0.4, 0.6))
    velocity = noise - ATOMS
    exact = (weights * velocity).sum()

    def slope(at: Tensor) -> float:
        at = at.detach().requires_grad_()
        likelihood = matching.log_likelihood((at - velocity) ** 2, 0.6)
        loss = clipped_surrogate(likelihood, likelihood.detach(), torch.ones(3, dtype=torch.float64), 1.0)
        return float(gradient((weights * loss).sum(), at))

    assert slope(exact) == pytest.approx(0, abs=1e-12)
    assert abs(slope(exact + 0.1)) == pytest.approx(0.2, abs=1e-9)


def test_the_bent_error_pulls_less_where_it_is_large() -> None:
    """d/dd of -t·((d + 1e-10)^p - 1e-10^p)/p is -t·(d + 1e-10)^(p - 1)."""
    distance = vector(0.01, 1.0, 100.0).requires_grad_()
    found = gradient(matching.log_likelihood(distance, 0.5, "ghuber", 0.25).sum(), distance)
    assert found.tolist() == pytest.approx([-0.5 * d**-0.75 for d in (0.01, 1.0, 100.0)], rel=1e-6)


# ---- DGPO ----


def test_dgpo_starts_with_a_weight_of_one_half_without_a_gradient_of_its_own() -> None:
    advantages, groups = vector(1, -2, 0.5, 0.5), torch.tensor([0, 0, 1, 1])
    distance = vector(0.3, 0.4, 0.2, 0.9).requires_grad_()
    loss = matching.dgpo(distance, distance.detach(), advantages, groups, 100.0)
    torch.testing.assert_close(gradient(loss.sum(), distance), advantages / 2)


def test_a_groups_loss_depends_on_its_members_alone_and_not_on_their_order() -> None:
    advantages, distance = vector(1, -1.5, 0.5, 2, -2), vector(0.3, 0.4, 0.2, 0.9, 0.7)
    anchor, groups = distance + vector(0.01, -0.02, 0.03, 0.01, 0.02), torch.tensor([0, 0, 0, 1, 1])
    whole = matching.dgpo(distance, anchor, advantages, groups, 40.0)
    order = torch.tensor([4, 1, 3, 0, 2])
    mixed = matching.dgpo(distance[order], anchor[order], advantages[order], groups[order], 40.0)
    torch.testing.assert_close(mixed, whole[order], rtol=1e-12, atol=0)
    alone = matching.dgpo(distance[3:], anchor[3:], advantages[3:], groups[3:], 40.0)
    torch.testing.assert_close(alone, whole[3:], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("advantage", "ratio", "kept"),
    [(1, 1.2, False), (1, 0.8, True), (-1, 1.2, True), (-1, 0.8, False), (1, 1.05, True)],
)
def test_dgpo_trusts_moves_that_lead_back(advantage: float, ratio: float, kept: bool) -> None:
    distance = vector(0.5) - math.log(ratio)
    assert bool(matching.trusted(distance, vector(0.5), vector(advantage), 0.1)) is kept


# ---- CRD ----

GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
GOOD = vector(0.9, 0.3, 0.6, 0.2, 0.8, 0.5)


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_crd_is_at_rest_exactly_where_the_implicit_rewards_differ_as_the_rewards_do(temperature: float | None) -> None:
    beta = 0.5
    constant = vector(0.4, 0.4, 0.4, -2.0, -2.0, -2.0)  # of each group its own
    fitting = (GOOD / beta + constant).requires_grad_()
    loss = matching.crd(fitting, GOOD, GROUPS, beta, temperature)
    assert float(loss.detach().abs().max()) < 1e-20
    assert float(gradient(loss.sum(), fitting).abs().max()) < 1e-10
    for index in range(6):
        other = fitting.detach().clone()
        other[index] += 0.1
        other.requires_grad_()
        moved = gradient(matching.crd(other, GOOD, GROUPS, beta, temperature).sum(), other)
        assert float(moved[index]) > 1e-3
        assert float(moved[GROUPS[index] != GROUPS].abs().max()) < 1e-10


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_crd_does_not_see_what_a_groups_rewards_have_in_common(temperature: float | None) -> None:
    implicit = vector(0.1, -0.05, 0.02, 0.3, 0.0, -0.1)
    shifted = GOOD + vector(0.1, 0.1, 0.1, -0.2, -0.2, -0.2)
    torch.testing.assert_close(
        matching.crd(implicit, shifted, GROUPS, 0.5, temperature),
        matching.crd(implicit, GOOD, GROUPS, 0.5, temperature),
        rtol=1e-9,
        atol=1e-12,
    )


def test_crd_with_a_temperature_by_hand() -> None:
    implicit, good, beta, temperature = [0.1, -0.05, 0.02], [0.9, 0.3, 0.6], 0.5, 0.01
    expected = [0.0] * 3
    for sign in (1, -1):
        top = max(sign * r for r in good)
        powers = [math.exp((sign * r - top) / temperature) for r in good]
        centre = [
            sum(p * value for p, value in zip(powers, values, strict=True)) / sum(powers) for values in (implicit, good)
        ]
        for index in range(3):
            term = beta * (implicit[index] - centre[0]) - (good[index] - centre[1])
            expected[index] += term**2 / 2
    found = matching.crd(vector(*implicit), vector(*good), torch.zeros(3), beta, temperature)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_the_mean_of_a_group_with_weights() -> None:
    found = matching.group_mean(vector(1, 10, 3, 30), torch.tensor([5, 2, 5, 2]), vector(1, 1, 3, 0))
    assert found.tolist() == [2.5, 10, 2.5, 10]
