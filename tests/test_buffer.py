"""The replay buffer: updates that also go through earlier epochs' samples, and runs that go on with them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from tiller import Policy
from tiller.algorithms import DPOK
from tiller.buffer import Earlier, ReplayBuffer
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.training import Report, train
from tiller.types import ConfigError
from toy import brightness, toy

PROMPTS = ["a cat", "a dog", "a fox"]
SETTINGS = {"critic": None, "inner_epochs": 1, "timestep_fraction": 1.0, "clip_range": 0.1}


def config(**changes: Any) -> TrainConfig:
    sizes = {"epochs": 4, "samples_per_epoch": 16, "group_size": 4, "batch_size": 4, "learning_rate": 1e-2}
    return TrainConfig(**{**sizes, **changes})


def policy() -> Policy:
    return Policy(toy(), lora_rank=4, target_modules=["first"])


def run(algorithm: DPOK, **given: Any) -> list[Report]:
    return list(train(given.pop("policy", None) or policy(), PROMPTS, brightness, algorithm, config(), **given))


def test_it_holds_the_latest_epochs_and_no_others() -> None:
    buffer = ReplayBuffer(2)
    for epoch in range(5):
        buffer.add(Earlier(epoch, {}, np.zeros(1), np.zeros(1), ()))
    assert [one.epoch for one in buffer.epochs] == [3, 4]
    without = ReplayBuffer(0)
    without.add(buffer.epochs[0])
    assert without.epochs == []


def test_a_missing_score_stays_missing_in_a_checkpoint() -> None:
    buffer = ReplayBuffer(1)
    buffer.add(Earlier(7, {"a": torch.ones(2)}, np.array([0.5, np.nan]), np.array([1.5, np.nan]), ()))
    again = ReplayBuffer(1)
    again.load(buffer.tensors(), json.loads(json.dumps(buffer.data(), allow_nan=False)))
    assert (again.epochs[0].epoch, again.epochs[0].chunks) == (7, None)
    np.testing.assert_array_equal(again.epochs[0].scores, [0.5, np.nan])
    np.testing.assert_array_equal(again.epochs[0].advantages, [1.5, np.nan])
    torch.testing.assert_close(again.epochs[0].weights["a"], torch.ones(2))


def test_the_first_update_of_an_epoch_is_on_policy_only_without_a_buffer() -> None:
    """One update per epoch: its own samples have a ratio of 1, and only those of earlier epochs have another one."""
    without, buffered = (
        [r.metrics["policy/log_ratio_max"] for r in run(DPOK(replay_epochs=n, **SETTINGS))]  # type: ignore[arg-type]
        for n in (0, 2)
    )
    assert max(without) < 1e-6
    assert buffered[0] < 1e-6
    assert max(buffered[1:]) > 1e-4


def test_a_run_goes_on_bit_for_bit_with_paths_that_are_drawn_again() -> None:
    algorithm = DPOK(replay_epochs=2, **SETTINGS)  # type: ignore[arg-type]
    checkpoint, metrics = None, []
    for report in train(policy(), PROMPTS, brightness, algorithm, config()):
        metrics.append(report.metrics)
        if report.epoch == 2:
            tensors = {name: value.contiguous() for name, value in report.state.tensors().items()}
            checkpoint = load(save(tensors)), json.loads(json.dumps(report.state.data()))
        end = report.state
    assert checkpoint is not None
    fresh = policy()
    state = TrainState(fresh, config(), algorithm)
    state.load(*checkpoint)
    assert [one.chunks for one in state.buffer.epochs] == [None, None]
    again = run(algorithm, policy=fresh, state=state)
    assert [r.metrics for r in again] == metrics[2:]
    for name, value in end.tensors().items():
        assert torch.equal(state.tensors()[name], value), name
    for found, wanted in zip(state.buffer.epochs, end.buffer.epochs, strict=True):
        for one, other in zip(found.chunks or (), wanted.chunks or (), strict=True):
            assert all(map(torch.equal, one.rollout.latents, other.rollout.latents))


def test_a_buffer_of_less_than_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="replay_epochs is -1; it must be 0 or more"):
        DPOK(replay_epochs=-1)
