"""PPO: the advantage over the value network, in and out of the clip range."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tiller import Policy
from tiller.algorithms import PPO
from tiller.critic import CriticSettings
from tiller.policy.rollout import Seen
from tiller.settings import TrainConfig
from tiller.training import train
from toy import brightness, toy

STEPS = {"num_inference_steps": 4}


def fake(**changes: Any) -> Any:
    made = {"squared": lambda d: d.square().flatten(1).mean(1), "stage": None, "residual": (0.0, 1.0), "value": None}
    return SimpleNamespace(**{**made, **changes})


def test_the_loss_by_hand() -> None:
    """r - V = ±1, ε = .1: PPO's truth table, T9; standardised by mean .5 and std 2 the advantages are .25 and -.75."""
    ratio, old = torch.tensor([1.2, 0.8, 1.2, 0.8]), torch.zeros(4)
    new, value = ratio.log().requires_grad_(), torch.full((4,), 7.0)
    rewards = torch.tensor([8.0, 8, 6, 6])
    step = fake(log_prob=new, old_log_prob=old, value=value, residual=(0.5, 2.0))
    plain = PPO(clip_range=0.1, kl_coefficient=0, standardise=False)
    found, _ = plain.loss(step, rewards)
    torch.testing.assert_close(found, torch.tensor([-1.1, -0.8, 1.2, 0.9]))
    (gradient,) = torch.autograd.grad(found.sum(), new)
    assert (gradient != 0).tolist() == [False, True, True, False]
    found, _ = PPO(clip_range=0.1, kl_coefficient=0).loss(step, rewards)
    torch.testing.assert_close(found, torch.tensor([-0.25 * 1.1, -0.25 * 0.8, 0.75 * 1.2, 0.75 * 0.9]))
    found, _ = PPO(clip_range=0.1, kl_coefficient=0, advantage_clip=0.5).loss(step, rewards)
    torch.testing.assert_close(found[2:], torch.tensor([0.5 * 1.2, 0.5 * 0.9]))


def test_the_kl_is_added_by_its_name() -> None:
    """|μ - μ'|²/(2S²) = .04/.5; weighed with β = 3."""
    step = fake(
        log_prob=torch.zeros(1),
        old_log_prob=torch.zeros(1),
        value=torch.zeros(1),
        mean=torch.tensor([[0.2]]),
        std=0.5,
        others={"reference": Seen(torch.zeros(1, 1), torch.zeros(1, 1))},
    )
    found, numbers = PPO(kl_coefficient=3.0).loss(step, torch.zeros(1))
    assert found.item() == pytest.approx(3 * 0.08)
    assert numbers["policy/kl_gaussian"].item() == pytest.approx(0.08)
    assert PPO(kl_coefficient=0).needs == ()


def test_the_reward_rises() -> None:
    """On the same initial noise, drawn from nothing seen in training, by far more than chance."""
    policy = Policy(toy(), lora_rank=None)

    def scores() -> np.ndarray:
        return np.array(brightness(policy.sample(["a cat"] * 32, seed=9, **STEPS).images, [], []))

    before = scores()
    algorithm = PPO(critic=CriticSettings(width=32, learning_rate=1e-3))
    settings = TrainConfig(epochs=30, samples_per_epoch=64, group_size=4, batch_size=32, learning_rate=0.02)
    for _ in train(policy, ["a cat", "a dog"], brightness, algorithm, settings, sampling=STEPS):
        pass
    gain = scores() - before
    assert gain.mean() > 10
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5
