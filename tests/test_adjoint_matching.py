"""Adjoint Matching: the adjoint against backpropagation through time, the regression against optimal control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

import tiny
from tiller.adjoint import LeanAdjoint
from tiller.algorithms import AdjointMatching
from tiller.algorithms.adjoint_matching import memoryless
from tiller.collect import Batch, collect
from tiller.distributed import World
from tiller.kernels import CPS, DDIM, DDPM, ODE, DanceSDE, FlowSDE, Kernel, Point, Stock
from tiller.metrics import Clock
from tiller.policy import Policy, Rollout
from tiller.preflight import preflight
from tiller.rewards import jpeg_compressibility
from tiller.rewards.gradient import score_with_graph
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.training import train
from tiller.types import ConfigError, PipelineError, Prompt, RewardError
from tiller.update import update
from toy import ToyPipeline, flow_toy, glow, toy

PROMPTS = [Prompt("a cat"), Prompt("a dog"), Prompt("an owl")]
STEPS = 4
Gradients = dict[str, Tensor]


def curved(pictures: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
    """A reward whose gradient differs from pixel to pixel and from picture to picture."""
    ramp = torch.linspace(-1, 1, pictures[0].numel(), dtype=pictures.dtype).view(pictures[0].shape)
    return (ramp * (3 * pictures).sin()).sum((1, 2, 3))


curved.differentiable = True  # type: ignore[attr-defined]


def config(**changes: Any) -> TrainConfig:
    sizes = {"epochs": 1, "samples_per_epoch": 8, "group_size": 2, "batch_size": 4, "max_grad_norm": 1e9}
    return TrainConfig(**{**sizes, **changes})


def trained(
    policy: Policy, algorithm: AdjointMatching, settings: TrainConfig, reward: Any = curved, moved: float = 0.0
) -> tuple[Batch, Gradients, dict[str, float]]:
    """An epoch's samples, the gradient of its one update, and what was logged; the weights `moved` off the reference.

    No weight is stepped.
    """
    state, found = TrainState(policy, settings, algorithm), list[Gradients]()
    move(policy, moved)
    batch = collect(policy, PROMPTS, reward, algorithm, settings, {}, state, World(), Clock())

    def look(config: TrainConfig) -> float:
        found.append({name: p.grad.clone() for name, p in state.parameters.items() if p.grad is not None})
        return 1.0

    state.step = look  # type: ignore[method-assign]
    numbers = update(policy, batch, algorithm, settings, state, World(), reward)
    for parameter in state.parameters.values():
        parameter.grad = None
    return batch, found[0], numbers


def move(policy: Policy, size: float) -> None:
    """Every weight by a draw of its own."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter += size * torch.randn(parameter.shape, generator=random)


def assert_close(found: Gradients, expected: Gradients, tolerance: float = 1e-4) -> None:
    """Equal within a part of the largest gradient."""
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=0, atol=tolerance * largest, msg=name)


def adjoint_of(policy: Policy, rollout: Rollout, reward: Any = curved) -> LeanAdjoint:
    return LeanAdjoint(policy, reward, rollout, list(rollout.prompts), [{}] * rollout.batch_size)


# ---- the toy's chain, written out once more in float64: DDIM with η = 1 and the decoder ----

TIMES = [751, 501, 251, 1]
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # in float32, as diffusers has them
ALPHAS = [float((1 - BETAS).cumprod(0)[t]) for t in (*TIMES, 0)]
STDS = [sqrt((1 - b) / (1 - a) * (1 - a / b)) for a, b in pairwise(ALPHAS)]


def weights(policy: Policy) -> Gradients:
    return {name: p.detach().double().clone() for name, p in policy.parameters.items()}


def mean_of(w: Gradients, x: Tensor, index: int, condition: Tensor) -> Tensor:
    """The mean of x_{k+1}."""
    time = torch.full_like(condition, TIMES[index] / 1000)
    features = torch.cat([x.flatten(1), time[:, None], condition[:, None]], 1)
    hidden = (features @ w["denoiser.first.weight"].T + w["denoiser.first.bias"]).tanh()
    eps = (hidden @ w["denoiser.second.weight"].T + w["denoiser.second.bias"]).view_as(x)
    x0 = (x - sqrt(1 - ALPHAS[index]) * eps) / sqrt(ALPHAS[index])
    return sqrt(ALPHAS[index + 1]) * x0 + sqrt(1 - ALPHAS[index + 1] - STDS[index] ** 2) * eps


def reward_of(x0: Tensor) -> Tensor:
    return curved((x0[:, :1].clamp(-3, 3) / 6 + 0.5), [], [])


# ---- the adjoint ----


def test_the_adjoint_is_backpropagation_through_time_where_nothing_is_trained_yet() -> None:
    """The chain by hand in float64, on the noise that the recorded states tell."""
    policy = Policy(toy(), lora_rank=None)
    rollout = policy.sample(["a cat", "a dog"], kernel=DDIM(1.0), num_inference_steps=STEPS)
    w, condition = weights(policy), policy.pipe.encode_prompt(rollout.prompts).double()
    states = [x.double() for x in rollout.latents]
    noise = [states[k + 1] - mean_of(w, states[k], k, condition) for k in range(STEPS)]
    adjoint = adjoint_of(policy, rollout)
    adjoint.back_to(1)
    assert sorted(adjoint.states) == [1, 2, 3, 4]
    for start in range(1, STEPS + 1):
        leaf = states[start].clone().requires_grad_()
        x = leaf
        for k in range(start, STEPS):
            x = mean_of(w, x, k, condition) + noise[k]
        (expected,) = torch.autograd.grad(-reward_of(x).sum(), leaf)
        torch.testing.assert_close(adjoint.states[start].double(), expected, rtol=0, atol=1e-5)
        assert float(expected.abs().max()) > 0.05


PIPELINES = [tiny.tiny_sd, tiny.tiny_sdxl, tiny.tiny_sd3, tiny.tiny_flux, tiny.tiny_pixart]
CALL = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 16, "width": 16}


@pytest.mark.parametrize("make", PIPELINES, ids=lambda make: make.__name__)
def test_the_adjoint_of_real_pipelines_is_the_gradient_of_their_own_loops(make: Any) -> None:
    """Guidance and decoder included: the pipeline runs on from the state with one graph through all later steps."""
    policy = Policy(make(), lora_rank=2)
    call = {**CALL, "use_resolution_binning": False} if make is tiny.tiny_pixart else CALL
    rollout = policy.sample(["a cat", "a dog"], kernel=DDIM(1.0), **call)
    adjoint = adjoint_of(policy, rollout)
    adjoint.back_to(1)
    for start in (1, 2, 3):
        leaf = rollout.latents[start].float().clone().requires_grad_()
        rewards = score_with_graph(curved, policy.unroll(rollout, start, state=leaf), [""] * 2, [{}] * 2)
        (expected,) = torch.autograd.grad(-rewards.sum(), leaf)
        largest = float(expected.abs().max())
        assert largest > 0
        torch.testing.assert_close(adjoint.states[start], expected, rtol=0, atol=1e-4 * largest)
    assert all(p.grad is None for p in policy.parameters.values())


def test_the_last_state_decodes_to_the_recorded_picture() -> None:
    policy = Policy(tiny.tiny_sd(), lora_rank=2)
    rollout = policy.sample(["a cat"], kernel=DDIM(1.0), output_type="pt", num_inference_steps=3, height=16, width=16)
    again = policy.unroll(rollout, 3, state=rollout.latents[-1].clone().requires_grad_())
    torch.testing.assert_close(again.detach(), rollout.images.float(), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="no part of the rollout's 3 steps"):
        policy.unroll(rollout, 3)


# ---- the regression ----


@pytest.mark.parametrize("moved", [0.0, 0.1])
def test_the_gradient_by_hand(moved: float) -> None:
    """|(mean - mean_ref)/std + std·λ·ã|² in float64; ã goes through the reference, wherever the policy is by now."""
    policy = Policy(toy(), lora_rank=None)
    reference = weights(policy)
    batch, found, numbers = trained(policy, AdjointMatching(reward_weight=2.0), config(), moved=moved)
    w = {name: value.requires_grad_() for name, value in weights(policy).items()}
    losses = []
    for chunk in batch.chunks:
        condition = policy.pipe.encode_prompt(chunk.rollout.prompts).double()
        states = [x.double().requires_grad_() for x in chunk.rollout.latents]
        (adjoint,) = torch.autograd.grad(-reward_of(states[-1]).sum(), states[-1])
        for k in reversed(range(STEPS)):
            base = mean_of(reference, states[k], k, condition)
            control = (mean_of(w, states[k].detach(), k, condition) - base.detach()) / STDS[k]
            weight = min(1.0, STDS[k] / 0.1) ** 2
            assert (weight < 0.05) == (k == STEPS - 1)
            losses.append(weight * (control + STDS[k] * 2.0 * adjoint).square().flatten(1).mean(1))
            (adjoint,) = torch.autograd.grad(base, states[k], adjoint)
    torch.cat(losses).mean().backward()
    assert_close(found, {name: value.grad for name, value in w.items() if value.grad is not None}, 1e-3)
    assert numbers["policy/loss"] == pytest.approx(float(torch.cat(losses).mean().detach()), rel=1e-3)
    assert (numbers["policy/control"] > 0) == (moved > 0)


@pytest.mark.parametrize("rank", [None, 2])
def test_without_a_reward_the_reference_is_the_optimum(rank: int | None) -> None:
    """λ = 0: no loss and no gradient, bit for bit; with λ = 1 there are both."""
    policy = Policy(toy(), lora_rank=rank)
    _, still, numbers = trained(policy, AdjointMatching(reward_weight=0.0), config())
    assert numbers["policy/loss"] == 0
    assert all(not bool(gradient.any()) for gradient in still.values())
    _, found, numbers = trained(policy, AdjointMatching(reward_weight=1.0), config())
    assert numbers["policy/loss"] > 0
    assert any(bool(gradient.any()) for gradient in found.values())


def test_the_gradient_does_not_depend_on_the_batch_size() -> None:
    policy = Policy(toy(), lora_rank=None)
    whole, halves = (trained(policy, AdjointMatching(reward_weight=1.0), config(batch_size=size))[1] for size in (8, 2))
    assert_close(whole, halves)


def test_the_adjoint_is_found_once_for_all_inner_epochs() -> None:
    """The reference runs at each step once per epoch: three times for the adjoint, once more at the first step."""
    policy, ran, scored = Policy(toy(), lora_rank=None), list[bool](), list[bool]()

    def counted(pictures: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
        scored.append(torch.is_grad_enabled())
        return curved(pictures, prompts, metadata)

    counted.differentiable = True  # type: ignore[attr-defined]
    settings, algorithm = config(samples_per_epoch=4), AdjointMatching(inner_epochs=3)
    state = TrainState(policy, settings, algorithm)
    batch = collect(policy, PROMPTS, counted, algorithm, settings, {}, state, World(), Clock())
    policy.pipe.denoiser.second.register_forward_hook(lambda *_: ran.append(True))
    update(policy, batch, algorithm, settings, state, World(), counted)
    assert len(ran) == 4 + 3 * 4
    assert scored.count(True) == 1


def test_a_decoded_picture_may_lack_the_score_that_the_recorded_one_had() -> None:
    """The second of four: the gradient is that of a run in which it never had one."""

    def lacking(live: bool) -> Callable[..., Tensor]:
        def reward(pictures: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
            values = curved(pictures, prompts, metadata)
            here = torch.is_grad_enabled() or not live
            return values.masked_fill((torch.arange(len(values)) == 1) & here, torch.nan)

        reward.differentiable = True  # type: ignore[attr-defined]
        return reward

    settings = config(samples_per_epoch=4)
    (first, found, _), (never, expected, _) = (
        trained(Policy(toy(), lora_rank=None), AdjointMatching(reward_weight=1.0), settings, lacking(live))
        for live in (True, False)
    )
    assert first.scores.valid.all()
    assert never.scores.valid.sum() == 3
    assert_close(found, {name: value * 3 / 4 for name, value in expected.items()})  # a mean over 4 and over 3


@pytest.mark.parametrize("steepness", [1e4, 1e30])
def test_a_path_that_asks_for_too_much_is_left_out(steepness: float) -> None:
    """The second of four has a steep reward, at 1e30 one that overflows: the gradient is as if it were not there."""

    def steeper(factor: float) -> Callable[..., Tensor]:
        def reward(pictures: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
            factors = torch.where(torch.arange(len(pictures)) == 1, factor, 1.0)
            return curved(pictures, prompts, metadata) * (factors if torch.is_grad_enabled() else 1)

        reward.differentiable = True  # type: ignore[attr-defined]
        return reward

    settings, algorithm = config(samples_per_epoch=4), AdjointMatching(reward_weight=1.0)
    _, found, numbers = trained(Policy(toy(), lora_rank=None), algorithm, settings, steeper(steepness))
    assert numbers["policy/dropped"] == 0.25
    _, expected, numbers = trained(Policy(toy(), lora_rank=None), algorithm, settings, steeper(torch.nan))
    assert numbers["policy/dropped"] == 0
    assert_close(found, expected)
    unlimited = AdjointMatching(reward_weight=1.0, target_limit=None)
    _, wild, _ = trained(Policy(toy(), lora_rank=None), unlimited, settings, steeper(1e4))
    assert float(wild["denoiser.second.bias"].norm()) > 10 * float(found["denoiser.second.bias"].norm())


def test_half_of_the_steps_are_early() -> None:
    """Of 50: 2 from the first 30, 2 from the last 20, each equally often; within five standard errors."""
    random, algorithm = np.random.default_rng(0), AdjointMatching()
    drawn = [algorithm.steps(range(50), random) for _ in range(4000)]
    assert all(len(set(steps)) == 4 and steps == sorted(steps) for steps in drawn)
    assert all(sum(step < 30 for step in steps) == 2 for steps in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=50)
    for part, share in ((counts[:30], 2 / 30), (counts[30:], 2 / 20)):
        assert np.abs(part - 4000 * share).max() < 5 * sqrt(4000 * share * (1 - share))
    odd = [AdjointMatching(train_timesteps=1).steps(range(50), random)[0] < 30 for _ in range(1000)]
    assert abs(np.mean(odd) - 0.5) < 5 * sqrt(0.25 / 1000)
    for total in range(1, 6):
        assert AdjointMatching(train_timesteps=5).steps(range(total), random) == list(range(total))


# ---- optimal control: a Gaussian model of Gaussian pictures, as a flow ----

SPREAD, CENTRE, COUNT = 0.5, 0.4, 8  # of the pictures' latents, and denoising steps


class AffineDenoiser(ModelMixin, ConfigMixin):
    """velocity = gain_k·x + offset_k at step k; at first that of pictures N(CENTRE, SPREAD²)."""

    @register_to_config
    def __init__(self, count: int = COUNT):
        super().__init__()
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(count)
        sigma = scheduler.sigmas.double()
        slope = (sigma - (1 - sigma) * SPREAD**2) / ((1 - sigma) ** 2 * SPREAD**2 + sigma**2)
        self.times = scheduler.timesteps
        self.gain = nn.Parameter(slope[:-1].float())
        self.offset = nn.Parameter((-CENTRE - slope * (1 - sigma) * CENTRE)[:-1].float())

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        at = int((self.times - timestep).abs().argmin())
        return self.gain[at] * sample + self.offset[at]


def affine() -> Policy:
    pipe = flow_toy()
    pipe.register_modules(denoiser=AffineDenoiser())
    return Policy(pipe, lora_rank=None)


def chain(policy: Policy) -> list[tuple[float, float, float]]:
    """(J, c, s) of each step, x_{k+1} = J·x_k + c + s·z: two points through the kernel."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(COUNT)
    sigmas, found = scheduler.sigmas.double().tolist(), []
    denoiser = policy.pipe.denoiser
    for k, (now, then) in enumerate(pairwise(sigmas)):
        x = torch.tensor([0.0, 1.0], dtype=torch.float64)
        v = float(denoiser.gain[k].detach()) * x + float(denoiser.offset[k].detach())
        mean, std = DDIM(1.0).transition(x, x - now * v, x + (1 - now) * v, Point(1 - now, now), Point(1 - then, then))
        found.append((float(mean[1] - mean[0]), float(mean[0]), float(std)))
    return found


def law(steps: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Mean and variance of x_T, from x_0 of N(0, 1)."""
    mean, variance = 0.0, 1.0
    for slope, shift, std in steps:
        mean, variance = slope * mean + shift, slope**2 * variance + std**2
    return mean, variance


def latents(pictures: Tensor) -> Tensor:
    """What the toy decoded, where it clipped nothing."""
    return 6 * (pictures - 0.5)


def linear(pictures: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
    """The sum of the latents."""
    return latents(pictures).sum((1, 2, 3))


def quadratic(pictures: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
    """-½·Σ(x - 1)²."""
    return -0.5 * (latents(pictures) - 1).square().sum((1, 2, 3))


for one in (linear, quadratic):
    one.differentiable = True  # type: ignore[attr-defined]


def test_the_memoryless_chain_forgets_its_noise() -> None:
    """∂x_T/∂x_0 is 0 under η = 1, and far from it without noise."""
    slopes = [slope for slope, _, _ in chain(affine())]
    assert abs(np.prod(slopes)) < 1e-12
    assert all(std > 0 for _, _, std in chain(affine())[:-1])


def test_the_loss_is_zero_on_the_optimal_control_and_that_tilts_the_pictures() -> None:
    """r linear: u* = -std·λ·ã is known, and p_ref·exp(λr)/Z is p_ref moved by λ·variance, exactly and at any T."""
    policy, weight = affine(), 0.8
    before, steps = law(chain(policy)), chain(policy)
    adjoint = [-1.0]  # of x_T, x_{T-1} ...: linear dynamics, so it is the same on every path
    for slope, _, _ in reversed(steps[1:]):
        adjoint.append(slope * adjoint[-1])
    algorithm = AdjointMatching(reward_weight=weight, train_timesteps=COUNT)
    settings = config(batch_size=8, learning_rate=0.0)
    state = TrainState(policy, settings, algorithm)
    with torch.no_grad():
        for k, (_, _, std) in enumerate(steps):
            one = affine()
            one.pipe.denoiser.offset[k] += 1
            effect = chain(one)[k][1] - steps[k][1]  # of the offset on the mean
            policy.pipe.denoiser.offset[k] += -(std**2) * weight * adjoint[COUNT - 1 - k] / effect
    call = {"num_inference_steps": COUNT}
    batch = collect(policy, PROMPTS, linear, algorithm, settings, call, state, World(), Clock())
    numbers = update(policy, batch, algorithm, settings, state, World(), linear)
    assert numbers["policy/target"] > 1e-3
    assert numbers["policy/loss"] < 1e-6 * numbers["policy/target"]
    after = law(chain(policy))
    assert after[0] - before[0] == pytest.approx(weight * before[1], rel=1e-5)
    assert after[1] == pytest.approx(before[1], rel=1e-6)


def riccati(steps: Sequence[tuple[float, float, float]], weight: float) -> list[tuple[float, float, float]]:
    """The chain under the best control of the means for -½(x - 1)²: backwards, E[ã_k | x_k] = P·x_k + p."""
    slope_of, offset_of, best = 1.0, -1.0, []
    for slope, shift, std in reversed(steps):
        shrink = 1 + std**2 * weight * slope_of
        best.append((slope / shrink, (shift - std**2 * weight * offset_of) / shrink, std))
        offset_of = slope * (slope_of * shift + offset_of) / shrink
        slope_of = slope**2 * slope_of / shrink
    return best[::-1]


def test_training_ends_at_the_tilted_distribution() -> None:
    """r quadratic, so that p_ref·exp(λr)/Z is Gaussian: from the law of the trained chain, not from samples of it.

    A chain of few steps can move its means only, so it comes near the tilted variance, and exactly to that of Riccati's
    equation.
    """
    policy, weight = affine(), 6.0
    steps = chain(policy)
    mean, variance = law(steps)
    tilted = 1 / (1 / variance + weight)
    goal = tilted * (mean / variance + weight)
    best = law(riccati(steps, weight))
    algorithm = AdjointMatching(reward_weight=weight, train_timesteps=COUNT, target_limit=None)
    settings = TrainConfig(
        epochs=80,
        samples_per_epoch=64,
        batch_size=64,
        group_size=64,
        learning_rate=0.05,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        max_grad_norm=1e9,
    )
    for _ in train(policy, ["a cat"], quadratic, algorithm, settings, sampling={"num_inference_steps": COUNT}):
        pass
    found = law(chain(policy))
    assert (mean, variance) == pytest.approx((0.4, 0.126), abs=1e-3)
    assert (goal, tilted) == pytest.approx((0.659, 0.072), abs=1e-3)
    assert found == pytest.approx(best, rel=0.03)
    assert found[0] == pytest.approx(goal, abs=0.02)
    assert found[1] == pytest.approx(tilted, abs=0.015)


# ---- what is refused, and when ----


class Unused(ToyPipeline):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing may be drawn")


def test_a_reward_without_a_gradient_is_refused_before_anything_is_drawn() -> None:
    with pytest.raises(ConfigError, match="differentiates the reward, and jpeg_compressibility is not differentiable;"):
        next(train(Policy(toy(Unused)), PROMPTS, jpeg_compressibility, AdjointMatching(), config()))


def test_only_memoryless_kernels_are_taken() -> None:
    """By the noise per time of a small step: it must be 2·σ²·d log(α/σ), the paper's 2η_t, in flow and VP models."""
    others: list[Kernel | None] = [None, ODE(), DDIM(0.5), FlowSDE(0.7), DanceSDE(1.0), CPS(1.0), Stock()]
    for kernel in others:
        assert not memoryless(kernel)
        with pytest.raises(ConfigError, match=r"end does not depend on their initial noise.*take the kernel ddim with"):
            AdjointMatching(kernel=kernel)
    x = torch.zeros(1)
    taken: list[Kernel] = [DDIM(1.0), DDPM(), DDPM("fixed_large")]
    for now, then in (
        (Point(0.4, 0.6), Point(0.4 + 1e-6, 0.6 - 1e-6)),
        (Point(0.6, 0.8), Point(0.6 + 4e-6, 0.8 - 3e-6)),
    ):
        gained = np.log(then.alpha / then.sigma) - np.log(now.alpha / now.sigma)
        flows = [FlowSDE(sqrt(2))] if now.alpha + now.sigma == 1 else []
        for one in (*taken, *flows):
            assert AdjointMatching(kernel=one).kernel == one
            std = float(one.transition(x, x, x, now, then).std)
            assert std**2 == pytest.approx(2 * now.sigma**2 * gained, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"reward_weight": -1.0}, "reward_weight is -1.0; it must be 0 or more"),
        ({"least_std": -0.1}, "least_std is -0.1; it must be 0 or more"),
        ({"target_limit": 0.0}, "target_limit is 0.0; it must be more than 0"),
        ({"train_timesteps": 0}, "train_timesteps is 0; it must be at least 1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        AdjointMatching(**settings)


def flat(pictures: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return (pictures * 255).round().mean((1, 2, 3))


def steep(pictures: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return (pictures - pictures.detach()).sqrt().mean((1, 2, 3))


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (flat, "the gradient of reward flat is 0 in every pixel of 4 picture"),
        (steep, "the gradient of reward steep is not finite; mend it"),
    ],
)
def test_preflight_refuses_a_reward_that_has_no_use(reward: Any, says: str) -> None:
    reward.differentiable = True
    with pytest.raises(RewardError, match=says):
        preflight(Policy(toy(), lora_rank=None), PROMPTS, reward, AdjointMatching(), {})


def test_preflight_refuses_a_graph_that_ends() -> None:
    class Undecoded(ToyPipeline):
        def decode(self, latents: Tensor) -> Tensor:
            return super().decode(latents).detach()

    with pytest.raises(PipelineError, match="returns no pictures that a gradient can flow through"):
        preflight(Policy(toy(Undecoded), lora_rank=None), PROMPTS, glow, AdjointMatching(), {})

    class Unfelt(ToyPipeline):
        def denoise(self, latents: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return super().denoise(latents.detach(), t, condition)

    with pytest.raises(PipelineError, match="of Unfelt does not reach the latents that its denoiser gets"):
        preflight(Policy(toy(Unfelt), lora_rank=None), PROMPTS, glow, AdjointMatching(), {})


@pytest.mark.parametrize("rank", [None, 2])
def test_preflight_passes_what_is_sound_and_leaves_no_trace(rank: int | None) -> None:
    policy = Policy(toy(), lora_rank=rank)
    before = {name: value.clone() for name, value in policy.pipe.denoiser.state_dict().items()}
    preflight(policy, PROMPTS, glow, AdjointMatching(), {})
    assert all(torch.equal(value, before[name]) for name, value in policy.pipe.denoiser.state_dict().items())
    assert all(p.grad is None for p in policy.pipe.denoiser.parameters())
