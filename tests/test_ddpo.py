"""DDPO on real rollouts: the ratio, its gradient, and the two estimators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from tiller.algorithms import DDPO, DDPOSF
from tiller.kernels import CPS, DDIM, DDPM, DanceSDE, FlowSDE
from tiller.policy import Policy, Rollout, Step
from tiller.types import ConfigError, Scores
from toy import toy

PROMPTS = ["a cat", "a dog", "a cat", "a fox"]
ADVANTAGES = torch.tensor([1.5, -0.5, 0.25, -2.0])
KERNELS = [None, DDIM(1.0), DDIM(0.3), DDPM(), FlowSDE(0.7), DanceSDE(0.3), CPS(0.5)]


def gradients(policy: Policy, rollout: Rollout, loss: Any) -> dict[str, Tensor]:
    """The gradient of Σ_t Σ_i loss over all trainable steps."""
    policy.replay(rollout, lambda step: step.backward(loss(step).sum()))
    found = {name: p.grad.clone() for name, p in policy.parameters.items() if p.grad is not None}
    for parameter in policy.parameters.values():
        parameter.grad = None
    return found


# ---- T6: before any update the ratio is exactly one ----


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: type(k).__name__)
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_the_ratio_is_one_bit_for_bit_before_any_update(kernel: Any, precision: Any, storage: torch.dtype) -> None:
    policy = Policy(toy().to(storage), lora_rank=4, mixed_precision=precision)
    rollout = policy.sample(PROMPTS, kernel=kernel)
    assert len(rollout.steps) >= 3
    ratios = []

    def look(step: Step) -> None:
        assert step.old_log_prob is not None
        ratios.append((step.log_prob - step.old_log_prob).exp())

    policy.replay(rollout, look)
    assert all(torch.equal(ratio, torch.ones(4)) for ratio in ratios)
    assert len(ratios) == len(rollout.steps)


@pytest.mark.parametrize("steps", [[1], [0, 2], [2]])
def test_the_ratio_is_one_when_only_some_steps_are_walked(steps: list[int]) -> None:
    policy = Policy(toy(), lora_rank=4)
    rollout, seen = policy.sample(PROMPTS), []
    policy.replay(rollout, lambda step: seen.append((step.index, torch.equal(step.log_prob, step.old_log_prob))), steps)
    assert seen == [(index, True) for index in steps]


# ---- T8 on the policy itself ----


@pytest.mark.parametrize("build", [toy, tiny.tiny_sd], ids=["toy", "stable_diffusion"])
def test_on_policy_both_estimators_have_the_exact_gradient_of_the_weighted_log_probability(build: Any) -> None:
    policy = Policy(build(), lora_rank=None)
    small = {} if build is toy else {"num_inference_steps": 2, "height": 16, "width": 16, "guidance_scale": 3.0}
    rollout = policy.sample(PROMPTS, **small)
    exact = gradients(policy, rollout, lambda step: -ADVANTAGES * step.log_prob)
    sampled = gradients(policy, rollout, lambda step: DDPO().loss(step, ADVANTAGES)[0])
    scored = gradients(policy, rollout, lambda step: DDPOSF().loss(step, ADVANTAGES)[0])
    largest = max(float(value.abs().max()) for value in exact.values())
    assert largest > 1e-4
    for name, value in exact.items():
        torch.testing.assert_close(sampled[name], value, rtol=0, atol=1e-6 * largest, msg=name)
        assert torch.equal(scored[name], value), name


def test_the_gradient_of_a_replay_is_its_finite_difference() -> None:
    """d Σ log π / dθ of the recorded path, in one direction in weight space."""
    policy = Policy(toy(), lora_rank=None)
    rollout = policy.sample(PROMPTS)
    exact = gradients(policy, rollout, lambda step: ADVANTAGES * step.log_prob)
    source = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(value.shape, generator=source) for name, value in exact.items()}

    def total(shift: float) -> float:
        before = {name: p.detach().clone() for name, p in policy.parameters.items()}
        found: list[Tensor] = []
        with torch.no_grad():
            for name, parameter in policy.parameters.items():
                parameter.add_(shift * direction[name])
        policy.replay(rollout, lambda step: found.append((ADVANTAGES * step.log_prob).detach().double().sum()))
        with torch.no_grad():
            for name, parameter in policy.parameters.items():
                parameter.copy_(before[name])
        return float(torch.stack(found).sum())

    slope = sum(float((exact[name] * direction[name]).double().sum()) for name in exact)
    assert (total(1e-3) - total(-1e-3)) / 2e-3 == pytest.approx(slope, rel=1e-2)


# ---- advantages and settings ----


@pytest.mark.parametrize("algorithm", [DDPO(advantage_clip=1.0), DDPOSF(advantage_clip=1.0)])
def test_advantages_are_clipped_and_missing_ones_stay_missing(algorithm: Any) -> None:
    rewards = np.array([0.0] * 9 + [100.0, float("nan"), float("inf")])
    found = algorithm.advantages(Scores(rewards), ["a"] * 12, {})
    assert found[9] == 1.0
    assert -1 < found[0] < 0
    assert np.isnan(found[10:]).all()


@pytest.mark.parametrize(
    "settings",
    [{"timestep_fraction": 0.0}, {"timestep_fraction": 1.5}, {"advantage_clip": -1.0}, {"buffer_size": 0}],
)
@pytest.mark.parametrize("kind", [DDPO, DDPOSF])
def test_settings_that_cannot_train_are_refused(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} is .*; it must be"):
        kind(**settings)


@pytest.mark.parametrize("settings", [{"inner_epochs": 0}, {"clip_range": -0.1}, {"buffer_size": 8, "min_count": 16}])
def test_settings_of_importance_sampling_that_cannot_train_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="it must be"):
        DDPO(**settings)
