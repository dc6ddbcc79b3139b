"""Weighted denoising losses: RWR, its sparse variant, and the best of n."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiller import Policy, advantages
from tiller.algorithms import RWR, SFT, RWRSparse
from tiller.collect import Batch, collect
from tiller.distributed import World
from tiller.metrics import Clock
from tiller.policy.forward import ForwardProcess
from tiller.policy.noise import key
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.types import Prompt, Scores
from tiller.update import update
from toy import brightness, toy

PROMPTS = [Prompt("a cat"), Prompt("a dog")]
SETTINGS = TrainConfig(epochs=1, samples_per_epoch=8, group_size=4, batch_size=4, max_grad_norm=1e9)


def sampled(policy: Policy, algorithm: Any, reward: Any = brightness, settings: TrainConfig = SETTINGS) -> Batch:
    state = TrainState(policy, settings, algorithm)
    return collect(policy, PROMPTS, reward, algorithm, settings, {"num_inference_steps": 4}, state, World(), Clock())


def gradient(policy: Policy, algorithm: Any, batch: Batch, settings: TrainConfig = SETTINGS) -> dict[str, Tensor]:
    state, found = TrainState(policy, settings, algorithm), []

    def look(config: TrainConfig) -> float:
        found.append({name: p.grad.clone() for name, p in state.parameters.items() if p.grad is not None})
        return 1.0

    state.step = look  # type: ignore[method-assign]
    update(policy, batch, algorithm, settings, state, World())
    return found[0]


def by_hand(policy: Policy, batch: Batch, weights: Sequence[Sequence[float]], known: int) -> dict[str, Tensor]:
    """The gradient of Σ w·|ε̂ - ε|²/(known·T), the denoiser called with nothing of tiller around it."""
    for parameter in policy.parameters.values():
        parameter.grad = None
    for chunk, row in zip(batch.chunks, weights, strict=True):
        forward = ForwardProcess(chunk.rollout, key("noised", 0, 0, 0))
        fresh = []
        with torch.no_grad():
            policy.predict(chunk.rollout, fresh.append, forward, [0])
        condition = policy.pipe.encode_prompt(chunk.prompts)
        for index in range(4):
            x = fresh[0].sample if index == 0 else forward(index)
            eps = fresh[0].noise if index == 0 else forward.noise(index)
            output = policy.pipe.denoiser(x, chunk.rollout.timesteps[index], condition)
            errors = (output - eps).square().flatten(1).mean(1)
            ((torch.tensor(row) * errors).sum() / (known * 4)).backward()
    return {name: parameter.grad for name, parameter in policy.parameters.items()}


def test_rwr_is_the_denoising_loss_weighted_by_exponentials() -> None:
    policy, algorithm = Policy(toy(), lora_rank=None), RWR(beta=0.5, inner_epochs=1)
    batch = sampled(policy, algorithm)
    powers = np.exp(0.5 * batch.scores.values)
    weights = (8 * powers / powers.sum()).reshape(2, 4)
    found = gradient(policy, algorithm, batch)
    for name, value in by_hand(policy, batch, weights.tolist(), 8).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-8)


def test_with_one_hot_weights_rwr_is_sft() -> None:
    """T14: the best of each group weighs 1, the rest nothing at all."""
    policy = Policy(toy(), lora_rank=None)
    batch = sampled(policy, SFT())
    best = batch.scores.values.reshape(2, 4).argmax(1)
    assert np.flatnonzero(np.isfinite(batch.advantages)).tolist() == [best[0], 4 + best[1]]
    weights = np.eye(4)[best].tolist()
    found = gradient(policy, SFT(), batch)
    for name, value in by_hand(policy, batch, weights, 2).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-8)


def test_constant_rewards_make_rwr_the_plain_denoising_loss_and_sft_nothing() -> None:
    policy, algorithm = Policy(toy(), lora_rank=None), RWR(inner_epochs=1)
    batch = sampled(policy, algorithm, reward=lambda images, prompts, metadata: [7.0] * len(images))
    found = gradient(policy, algorithm, batch)
    for name, value in by_hand(policy, batch, [[1.0] * 4] * 2, 8).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-8)
    tied = sampled(policy, SFT(), reward=lambda images, prompts, metadata: [7.0] * len(images))
    assert not np.isfinite(tied.advantages).any()


def test_the_gradient_does_not_depend_on_how_the_samples_are_batched() -> None:
    """T19 for the forward process: noise is keyed by sample, so one batch of 8 is two of 4."""
    policy, algorithm = Policy(toy(), lora_rank=None), RWR(inner_epochs=1)
    whole = TrainConfig(epochs=1, samples_per_epoch=8, group_size=4, batch_size=8, max_grad_norm=1e9)
    one = gradient(policy, algorithm, sampled(policy, algorithm, settings=whole), whole)
    for name, value in gradient(policy, algorithm, sampled(policy, algorithm)).items():
        torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-8)


def test_the_weighted_optimum_is_the_weighted_posterior_mean() -> None:
    """T14, golden number: atoms -2, .5, 3 with p .2, .5, .3, rewards .1, .6, .9, flow time .6, x .7, weights exp(2r).

    The minimiser of the weighted loss over one free velocity, found by Newton's step on autograd's derivatives.
    """
    atoms, p, rewards = (torch.tensor(v, dtype=torch.float64) for v in ([-2, 0.5, 3], [0.2, 0.5, 0.3], [0.1, 0.6, 0.9]))
    t, x = 0.6, 0.7
    eps = (x - (1 - t) * atoms) / t
    posterior = p * torch.exp(-(eps**2) / 2)
    posterior = posterior / posterior.sum()
    weights = torch.from_numpy(advantages.softmax_weights(rewards.numpy(), ["a"] * 3, 2.0))
    v = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad((posterior * weights * (v - (eps - atoms)) ** 2).sum(), v, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, v)
    assert (v - slope / curvature).item() == pytest.approx(-1.81522553, abs=1e-7)


def test_softmax_weights_by_hand() -> None:
    values = np.array([0.0, np.log(3), np.nan, 0.0])
    found = advantages.softmax_weights(values, ["a", "a", "a", "b"], 1.0)
    np.testing.assert_allclose(found, [3 / 5, 9 / 5, np.nan, 3 / 5])
    found = advantages.softmax_weights(values, ["a", "a", "a", "b"], 1.0, per_prompt=True)
    np.testing.assert_allclose(found, [0.5, 1.5, np.nan, 1.0])
    wide = advantages.softmax_weights(np.array([0.0, 5000.0]), ["a", "a"], 1.0)
    np.testing.assert_allclose(wide, [0.0, 2.0])
    scaled = advantages.softmax_weights(np.array([0.0, 5000.0]), ["a", "a"], np.log(3) / 2, standardise=True)
    np.testing.assert_allclose(scaled, [0.5, 1.5], rtol=1e-6)


def test_the_best_share_is_among_the_latest_of_its_own_prompt() -> None:
    history: dict[str, list[float]] = {"a": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]}
    values = np.array([9.0, 0.5, np.nan, 3.0, 3.0])
    found = advantages.top_share(values, ["a", "a", "a", "b", "b"], history, 0.1, 10)
    np.testing.assert_array_equal(found, [1.0, np.nan, np.nan, np.nan, np.nan])  # b has no spread, so no best
    assert history["a"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 0.5]
    found = advantages.top_share(np.array([8.5]), ["a"], history, 0.1, 10)
    np.testing.assert_array_equal(found, [np.nan])


def test_the_best_of_a_group_may_be_several_and_a_tied_group_has_none() -> None:
    values = np.array([1.0, 3.0, 3.0, np.nan, 2.0, 2.0])
    found = advantages.best_of_group(values, [0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(found, [np.nan, 1.0, 1.0, np.nan, np.nan, np.nan])


def test_gdpo_golden_numbers_and_its_invariance_to_affine_rewards() -> None:
    """T17: the golden row of [[1, 2, 4], [0, 0, 0]]; scale and shift of a reward change nothing."""
    values, groups = np.array([1.0, 2, 4, 0, 0, 0]), [0, 0, 0, 1, 1, 1]
    found = advantages.gdpo({"r": values}, groups)
    np.testing.assert_allclose(found, [-1.51185789, -0.37796447, 1.88982237, 0, 0, 0], atol=1e-7)
    other = np.array([3.0, 1, 1, 5, 0, 2])
    both = advantages.gdpo({"r": values, "s": other}, groups)
    np.testing.assert_allclose(advantages.gdpo({"r": 100 * values - 7, "s": other}, groups), both, rtol=1e-9)
    assert both.reshape(2, 3).sum(1) == pytest.approx([0, 0], abs=1e-12)
    relative = advantages.group_relative(Scores(values + other, {"r": values, "s": other}), groups, "gdpo", 1.0)
    np.testing.assert_allclose(relative, both.clip(-1, 1))


def test_rwr_sparse_trains_the_kept_ones_only() -> None:
    policy, algorithm = Policy(toy(), lora_rank=None), RWRSparse(share=0.25, inner_epochs=1)
    batch = sampled(policy, algorithm)
    kept = np.isfinite(batch.advantages).reshape(2, 4)
    assert kept.sum(1).tolist() == [1, 1]
    found = gradient(policy, algorithm, batch)
    for name, value in by_hand(policy, batch, kept.astype(float).tolist(), 2).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-8)
