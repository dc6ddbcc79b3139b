"""The state of a run: optimiser steps, running mean, and putting everything back bit for bit."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from tiller.algorithms import DDPO
from tiller.policy import Policy
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.training import train
from tiller.types import RunError
from toy import brightness, toy

PROMPTS = ["a cat", "a dog", "a fox"]


def config(**changes: Any) -> TrainConfig:
    sizes = {"epochs": 4, "samples_per_epoch": 8, "group_size": 4, "batch_size": 4, "learning_rate": 1e-2}
    return TrainConfig(**{**sizes, **changes})


def state_of(**changes: Any) -> TrainState:
    return TrainState(Policy(toy(), lora_rank=None), config(**changes))


def set_gradients(state: TrainState, value: float) -> None:
    for parameter in state.parameters.values():
        parameter.grad = torch.full_like(parameter, value)


def weights(state: TrainState) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in state.parameters.items()}


def saved(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As a checkpoint holds it: safetensors and JSON."""
    tensors = {name: value.contiguous() for name, value in state.tensors().items()}
    return load(save(tensors)), json.loads(json.dumps(state.data()))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# ---- one step ----


def test_the_first_step_is_adamw_by_hand() -> None:
    """m̂ = g and v̂ = g² at step 1, so θ' = θ(1 - lr·λ) - lr·g/(|g| + ε)."""
    settings = config(weight_decay=0.1, max_grad_norm=1e9)
    state = TrainState(Policy(toy(), lora_rank=None), settings)
    before = weights(state)
    set_gradients(state, 0.5)
    norm = state.step(settings)
    assert norm == pytest.approx(0.5 * sum(p.numel() for p in before.values()) ** 0.5, rel=1e-5)
    for name, value in before.items():
        torch.testing.assert_close(state.parameters[name].detach(), value * (1 - 1e-3) - 1e-2, rtol=1e-5, atol=1e-7)
    assert (state.updates, state.skipped) == (1, 0)
    assert all(parameter.grad is None for parameter in state.parameters.values())


def test_the_gradient_is_scaled_down_to_the_norm_asked_for() -> None:
    seen = []
    settings = config(max_grad_norm=0.25)
    state = TrainState(Policy(toy(), lora_rank=None), settings)
    state.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in state.parameters.values()]).norm())  # type: ignore[union-attr]
    )
    set_gradients(state, 3.0)
    assert state.step(settings) > 1
    assert float(seen[0]) == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counters(poison: float) -> None:
    settings = config(ema_decay=0.5)
    state = TrainState(Policy(toy(), lora_rank=None), settings)
    set_gradients(state, 0.1)
    state.step(settings)
    before = {name: value.clone() for name, value in state.tensors().items()}  # weights, moments, running mean
    set_gradients(state, 0.1)
    next(iter(state.parameters.values())).grad[0] = poison  # type: ignore[index]
    state.step(settings)
    assert_equal(state.tensors(), before)
    assert (state.updates, state.skipped, state.skipped_in_a_row) == (1, 1, 1)
    assert all(parameter.grad is None for parameter in state.parameters.values())
    set_gradients(state, 0.1)
    state.step(settings)
    assert (state.updates, state.skipped, state.skipped_in_a_row) == (2, 1, 0)


# ---- the running mean ----


def test_the_running_mean_is_its_closed_form() -> None:
    """Π d_j·θ_0 + Σ_k (1 - d_k)·Π_{j>k} d_j·θ_k with d = 1/10, 2/11, 3/12, then the .3 that is asked for."""
    settings = config(ema_decay=0.3)
    state = TrainState(Policy(toy(), lora_rank=None), settings)
    path = [weights(state)]
    for number in range(5):
        set_gradients(state, (-1) ** number * 0.1 * (number + 1))
        state.step(settings)
        path.append(weights(state))
    assert state.ema is not None
    for name, mean in state.ema.items():
        decays = [1 / 10, 2 / 11, 3 / 12, 0.3, 0.3]
        expected = math.prod(decays) * path[0][name]
        for k, decay in enumerate(decays):
            expected = expected + (1 - decay) * math.prod(decays[k + 1 :]) * path[k + 1][name]
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)


def test_averaged_puts_the_running_mean_in_place_and_takes_it_out_again() -> None:
    settings = config(ema_decay=0.9)
    state = TrainState(Policy(toy(), lora_rank=None), settings)
    set_gradients(state, 0.1)
    state.step(settings)
    latest = weights(state)
    assert state.ema is not None
    mean = {name: value.clone() for name, value in state.ema.items()}
    with state.averaged():
        assert_equal(weights(state), mean)
    assert_equal(weights(state), latest)
    assert_equal(state.ema, mean)


def test_averaged_without_a_running_mean_changes_nothing() -> None:
    state = state_of()
    before = weights(state)
    with state.averaged():
        assert_equal(weights(state), before)


# ---- saving and going on ----


@pytest.mark.parametrize("rank", [None, 4])
def test_a_run_that_was_put_back_goes_on_bit_for_bit(rank: int | None) -> None:
    """Weights, moments, running mean, statistics and every metric of the epochs that follow."""
    settings = config(ema_decay=0.9)
    algorithm = DDPO(min_count=4, buffer_size=6, inner_epochs=2)
    whole = Policy(toy(), lora_rank=rank)
    metrics, checkpoint = [], None
    for report in train(whole, PROMPTS, brightness, algorithm, settings):
        metrics.append(report.metrics)
        if report.epoch == 2:
            checkpoint = saved(report.state)
        end = report.state
    assert checkpoint is not None

    policy = Policy(toy(), lora_rank=rank)
    state = TrainState(policy, settings)
    state.load(*checkpoint)
    again = [report.metrics for report in train(policy, PROMPTS, brightness, algorithm, settings, state=state)]
    assert again == metrics[2:]
    assert_equal(state.tensors(), end.tensors())
    assert state.data() == end.data()


def test_what_was_loaded_shares_nothing_with_where_it_came_from() -> None:
    settings = config(ema_decay=0.9)
    one, other = state_of(ema_decay=0.9), state_of(ema_decay=0.9)
    set_gradients(one, 0.1)
    one.step(settings)
    one.history["a cat"] = [1.0]
    other.load(one.tensors(), one.data())
    before, history = {name: value.clone() for name, value in one.tensors().items()}, copy.deepcopy(one.history)
    set_gradients(other, 0.3)
    other.step(settings)
    other.history["a cat"] = [*other.history["a cat"], 2.0]
    assert_equal(one.tensors(), before)
    assert one.history == history


@pytest.mark.parametrize("fault", ["missing", "shape", "running mean"])
def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_loaded(fault: str) -> None:
    state = state_of()
    tensors, data = saved(state)
    name = next(iter(tensors))
    if fault == "missing":
        del tensors[name]
    elif fault == "shape":
        tensors[name] = tensors[name][:1]
    else:
        tensors["ema." + name.removeprefix("weights.")] = tensors[name]
    before = weights(state)
    with pytest.raises(RunError, match="does not fit this model"):
        state.load({key: value + 1 for key, value in tensors.items()}, {**data, "epoch": 7})
    assert_equal(weights(state), before)
    assert state.epoch == 0
