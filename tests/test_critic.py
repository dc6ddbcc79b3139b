"""The value network: what it converges to, whose rewards it is told, what it knows of a prompt, and going on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

import tiny
from tiller import Policy
from tiller.algorithms import DDPO, DPOK
from tiller.critic import Critic, CriticSettings, Paths, prompt_vectors
from tiller.distributed import World
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.training import train
from tiller.types import ConfigError, PipelineError, RunError
from toy import brightness, toy

FACTORS, SHIFTS, STDS, AIM = (0.9, 0.95, 1.0, 0.8), (0.1, -0.2, 0.3, 0.0), (0.5, 0.4, 0.3, 0.2), 1.0
FAST = CriticSettings(learning_rate=3e-3, updates=400, batch_size=256, width=64)


def critic(settings: CriticSettings = FAST) -> Critic:
    return Critic(settings, 0, torch.device("cpu"))


def chain(count: int, seed: int) -> tuple[list[Tensor], np.ndarray]:
    """States before each step of x' = a·x + θ + s·z from x ~ N(0, 1), and r = -(x_T - c)²."""
    source = torch.Generator().manual_seed(seed)
    states = [torch.randn(count, 1, generator=source)]
    for a, theta, s in zip(FACTORS, SHIFTS, STDS, strict=True):
        states.append(a * states[-1] + theta + s * torch.randn(count, 1, generator=source))
    return states[:-1], -((states[-1][:, 0].double() - AIM).numpy() ** 2)


def expected_reward(x: Tensor, step: int) -> Tensor:
    """E[r | x_step] = -((m - c)² + v), with the mean m and the variance v of x_T."""
    mean, variance = x.double(), 0.0
    for a, theta, s in list(zip(FACTORS, SHIFTS, STDS, strict=True))[step:]:
        mean, variance = a * mean + theta, a**2 * variance + s**2
    return -((mean - AIM) ** 2 + variance)


def test_it_converges_to_the_expected_reward_of_a_state() -> None:
    """On a linear-Gaussian chain that is known; the reward itself differs from it by its own noise."""
    states, rewards = chain(8192, 0)
    learner = critic()
    for epoch in range(4):
        numbers = learner.fit([Paths(0, states, torch.zeros(8192, 1))], rewards, epoch, World())
    x = torch.linspace(-1.5, 1.5, 31)
    for step in range(4):
        wanted = expected_reward(x, step)
        found = learner.value(x[:, None], step, torch.zeros(31, 1)).double()
        assert (found - wanted).abs().mean() < 0.1 * wanted.std(), step
    noise = np.mean(
        [((torch.from_numpy(rewards) - expected_reward(x[:, 0], k)) ** 2).mean() for k, x in enumerate(states)]
    )
    assert numbers["value/loss"] == pytest.approx(noise, rel=0.1)
    assert numbers["value/explained"] == pytest.approx(1 - noise / rewards.var(), abs=0.02)
    assert learner.residual == pytest.approx((0, noise**0.5), abs=0.1)


def test_it_tells_prompts_apart() -> None:
    prompts = torch.eye(2).repeat(64, 1)
    rewards = np.tile([3.0, -1.0], 64)
    learner = critic()
    learner.fit([Paths(0, [torch.randn(128, 1)], prompts)], rewards, 0, World())
    found = learner.value(torch.zeros(2, 1), 0, torch.eye(2))
    assert found.tolist() == pytest.approx([3, -1], abs=0.3)


def test_the_first_step_is_adam_by_hand_on_the_rows_of_both_batches() -> None:
    """From the same first weights: m̂/√v̂ is the sign of the gradient of the mean squared error, by autograd."""
    settings = CriticSettings(learning_rate=1e-2, updates=1, batch_size=4000, width=8)
    states, rewards = chain(6, 1)
    paths = [Paths(0, [x[:2] for x in states], torch.ones(2, 3)), Paths(2, [x[2:] for x in states], torch.ones(4, 3))]
    before, after = critic(settings), critic(settings)
    before._begin(paths[0], rewards)
    after.fit(paths, rewards, 0, World())
    assert before.network is not None
    assert after.network is not None
    error = torch.zeros(())
    for step, x in enumerate(states):  # 4000 draws of 24 states: the mean over all of them, nearly
        told = before.network(torch.cat([x, torch.ones(6, 3)], 1), torch.full((6,), step))
        error = error + (told - torch.from_numpy((rewards - rewards.mean()) / rewards.std()).float()).square().mean()
    error.backward()
    pairs = list(zip(before.network.parameters(), after.network.parameters(), strict=True))
    strong = torch.cat([(p.grad.abs() > 0.1 * p.grad.abs().max()).flatten() for p, _ in pairs])
    moved = torch.cat([((q - p) / 1e-2).flatten() for p, q in pairs])
    signs = torch.cat([p.grad.sign().flatten() for p, _ in pairs])
    torch.testing.assert_close(moved[strong], -signs[strong], rtol=1e-3, atol=1e-3)
    assert strong.sum() > 30


def test_a_missing_reward_is_not_learnt_from_and_none_at_all_makes_no_network() -> None:
    states, rewards = chain(64, 2)
    learner, poisoned = (critic(CriticSettings(updates=5, width=16)) for _ in range(2))
    nothing = np.full(64, np.nan)
    assert learner.fit([Paths(0, states, torch.zeros(64, 1))], nothing, 0, World()) == {}
    assert learner.tensors() == {}
    assert learner.value(states[0], 0, torch.zeros(64, 1)).tolist() == [0.0] * 64
    rewards[1::2] = np.nan
    numbers = learner.fit([Paths(0, states, torch.zeros(64, 1))], rewards, 0, World())
    for x in states:
        x[1::2] = float("nan")  # a row that lacks a score is never looked at
    assert poisoned.fit([Paths(0, states, torch.zeros(64, 1))], rewards, 0, World()) == numbers


def test_values_follow_the_unit_of_the_reward() -> None:
    """r' = 50·r - 7 gives V' = 50·V - 7: nothing depends on how a reward is scaled."""
    states, rewards = chain(256, 3)
    one, other = (critic(CriticSettings(learning_rate=1e-2, updates=20, width=16)) for _ in range(2))
    one.fit([Paths(0, states, torch.zeros(256, 1))], rewards, 0, World())
    other.fit([Paths(0, states, torch.zeros(256, 1))], 50 * rewards - 7, 0, World())
    values = [learner.value(states[2], 2, torch.zeros(256, 1)) for learner in (one, other)]
    torch.testing.assert_close(values[1], 50 * values[0] - 7, rtol=1e-3, atol=0.05)


class Twin(World):
    """One of two processes, as two threads play them."""

    size = 2  # type: ignore[assignment]

    def __init__(self, shared: dict[str, Any]):
        self.shared = shared

    def _exchange(self, mine: Any) -> list[Any]:
        self.shared[threading.current_thread().name] = mine
        self.shared["barrier"].wait()
        both = [self.shared[name] for name in ("0", "1")]
        self.shared["barrier"].wait()
        return both

    def gather(self, mine: list[Any]) -> list[Any]:
        return [item for part in self._exchange(mine) for item in part]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        known = list(parameters)
        mine = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in known]
        for parameter, *parts in zip(known, *self._exchange(mine), strict=True):
            parameter.grad = sum(parts)


def test_two_processes_learn_what_one_learns_and_hold_the_same_network() -> None:
    settings = CriticSettings(updates=3, width=16, learning_rate=1e-3)
    states, rewards = chain(8, 4)
    whole = [Paths(start, [x[start : start + 4] for x in states], torch.ones(4, 2)) for start in (0, 4)]
    alone, twins = critic(settings), [critic(settings), critic(settings)]
    numbers = alone.fit(whole, rewards, 0, World())
    for twin in twins:
        twin._begin(whole[0], rewards)
    found: dict[str, Any] = {}
    shared = {"barrier": threading.Barrier(2, timeout=60)}

    def work(rank: int) -> None:
        found[str(rank)] = twins[rank].fit([whole[rank]], rewards, 0, Twin(shared))

    threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found["0"] == found["1"]
    assert found["0"] == pytest.approx(numbers, rel=1e-4)
    for name, value in twins[0].tensors().items():
        assert torch.equal(value, twins[1].tensors()[name]), name
        torch.testing.assert_close(value, alone.tensors()[name], rtol=1e-4, atol=1e-5)


# ---- what it knows of a prompt ----


def test_a_prompt_is_the_mean_of_its_tokens_embeddings() -> None:
    policy = Policy(tiny.tiny_sd(), lora_rank=2)
    rollout = policy.sample(["a cat", "a dog"], num_inference_steps=2, height=16, width=16)
    found = prompt_vectors(rollout)
    wanted, _ = policy.pipe.encode_prompt(["a cat", "a dog"], "cpu", 1, False)
    torch.testing.assert_close(found, wanted.mean(1))
    assert not torch.equal(found[0], found[1])


def test_without_embeddings_it_is_noise_of_the_text() -> None:
    policy = Policy(toy(), lora_rank=None)
    rollout = policy.sample(["a cat", "a dog", "a cat"])
    rollout.embeddings.clear()
    found = prompt_vectors(rollout)
    assert found.shape == (3, 64)
    assert torch.equal(found[0], found[2])
    assert (found[0] - found[1]).norm() > 5


# ---- in a run ----


def config(**changes: Any) -> TrainConfig:
    sizes = {"epochs": 4, "samples_per_epoch": 8, "group_size": 4, "batch_size": 4, "learning_rate": 1e-2}
    return TrainConfig(**{**sizes, **changes})


def test_a_run_with_a_critic_goes_on_bit_for_bit() -> None:
    algorithm = DPOK(critic=CriticSettings(width=16, batch_size=16), timestep_fraction=1.0)
    metrics, checkpoint = [], None
    for report in train(
        Policy(toy(), lora_rank=4, target_modules=["first"]), ["a cat"], brightness, algorithm, config()
    ):
        metrics.append(report.metrics)
        if report.epoch == 2:
            tensors = {name: value.contiguous() for name, value in report.state.tensors().items()}
            checkpoint = load(save(tensors)), json.loads(json.dumps(report.state.data()))
        end = report.state
    assert checkpoint is not None
    assert any(name.startswith("critic.optimizer.exp_avg_sq") for name in checkpoint[0])
    policy = Policy(toy(), lora_rank=4, target_modules=["first"])
    state = TrainState(policy, config(), algorithm)
    state.load(*checkpoint)
    again = [r.metrics for r in train(policy, ["a cat"], brightness, algorithm, config(), state=state)]
    assert again == metrics[2:]
    assert state.tensors().keys() == end.tensors().keys()
    for name, value in end.tensors().items():
        assert torch.equal(state.tensors()[name], value), name
    without = TrainState(policy, config(), DDPO())
    with pytest.raises(RunError, match=r"first at (buffer|critic)"):
        without.load(*checkpoint)


def test_the_loss_reads_the_value_of_the_state_it_is_shown() -> None:
    """r - V at each (sample, step), and V is there before the first update."""
    seen: list[tuple[int, Tensor, Tensor]] = []

    class Look(DPOK):
        def loss(self, step: Any, advantages: Tensor) -> Any:
            seen.append((step.index, step.sample, step.value))
            assert step.value.requires_grad is False
            assert step.residual[1] > 0
            return super().loss(step, advantages)

    policy, algorithm = Policy(toy(), lora_rank=None), Look(timestep_fraction=1.0, inner_epochs=1)
    (report,) = train(policy, ["a cat"], brightness, algorithm, config(epochs=1))
    critic = report.state.critic
    assert critic is not None
    assert sorted({index for index, *_ in seen}) == [0, 1, 2, 3]
    condition = policy.pipe.encode_prompt(["a cat"] * 4)[:, None]
    for index, sample, value in seen:
        torch.testing.assert_close(critic.value(sample, index, condition), value)
    assert report.metrics["value/loss"] > 0


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="width is 0; it must be at least 1"):
        CriticSettings(width=0)
    paths = [Paths(0, [torch.zeros(2, 3), torch.zeros(2, 4)], torch.zeros(2, 1))]
    with pytest.raises(PipelineError, match="the latents change their size along the path"):
        critic().fit(paths, np.array([1.0, 2.0]), 0, World())
