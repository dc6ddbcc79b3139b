"""DPOK: the clamp, the KL to the model before training, and optima that are known in closed form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiller import Policy
from tiller.algorithms import DPOK
from tiller.collect import Batch, collect
from tiller.critic import CriticSettings
from tiller.distributed import World
from tiller.kernels import ODE
from tiller.metrics import Clock
from tiller.policy.rollout import Seen
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.training import train
from tiller.types import ConfigError, Prompt
from tiller.update import update
from toy import brightness, toy

PROMPTS = [Prompt("a cat"), Prompt("a dog")]
SETTINGS = TrainConfig(epochs=1, samples_per_epoch=8, group_size=4, batch_size=4, max_grad_norm=1e9, weight_decay=0)
STEPS = {"num_inference_steps": 4}


def fake(**changes: Any) -> Any:
    """A step of one-element samples, with what DPOK reads of it."""
    made = {"squared": lambda d: d.square().flatten(1).mean(1), "stage": None, "residual": (0.0, 1.0), "value": None}
    return SimpleNamespace(**{**made, **changes})


def test_the_loss_by_hand_on_every_side_of_the_clamp() -> None:
    """w_r 2, V .5, w_k .1, c .1: -2·(r - V)·clip(ρ) + .1·(e - e')², and no gradient of the first part outside."""
    ratio = torch.tensor([1.2, 0.8, 1.05, 1.2, 0.8, 0.95])
    rewards = torch.tensor([1.5, 1.5, 1.5, -0.5, -0.5, -0.5])
    new = ratio.log().requires_grad_()
    prediction = torch.full((6, 1), 0.3, requires_grad=True)
    step = fake(
        log_prob=new,
        old_log_prob=torch.zeros(6),
        value=torch.full((6,), 0.5),
        prediction=prediction,
        others={"reference": Seen(torch.full((6, 1), 0.1), None)},
    )
    found, numbers = DPOK(reward_weight=2.0, clip_range=0.1, kl_coefficient=0.1).loss(step, rewards)
    wanted = torch.tensor([-2.2, -1.8, -2.1, 2.2, 1.8, 1.9]) + 0.1 * 0.04
    torch.testing.assert_close(found, wanted)
    pulled, moved = torch.autograd.grad(found.sum(), [new, prediction])
    torch.testing.assert_close(pulled, torch.tensor([0, 0, -2.1, 0, 0, 1.9]))
    torch.testing.assert_close(moved, torch.full((6, 1), 0.1 * 2 * 0.2))
    assert numbers["policy/kl_prediction"].item() == pytest.approx(0.04)
    assert numbers["policy/clip_fraction"].item() == pytest.approx(4 / 6)


def test_one_gaussian_step_ends_where_reward_and_kl_balance() -> None:
    """r = b·x, x ~ N(μ, s²): the maximum of E[r] - β·KL is at μ - μ_ref = b·s²/β."""
    b, s, beta, start = 2.0, 0.5, 1.0, 0.3
    algorithm = DPOK(reward_weight=1.0, clip_range=0.2, kl_coefficient=beta, kl_estimator="gaussian")
    mean = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    source = torch.Generator().manual_seed(0)
    path = []
    for _ in range(400):
        old = mean.detach()
        action = old + s * torch.randn(4000, 1, generator=source, dtype=torch.float64)

        def log_prob(centre: Tensor, action: Tensor = action) -> Tensor:
            return -((action - centre) ** 2).squeeze(1) / (2 * s**2)

        step = fake(
            log_prob=log_prob(mean),
            old_log_prob=log_prob(old),
            value=(b * old).expand(4000),
            mean=mean.expand(4000, 1),
            std=s,
            others={"reference": Seen(torch.zeros(4000, 1), torch.full((4000, 1), start, dtype=torch.float64))},
        )
        loss, _ = algorithm.loss(step, b * action.squeeze(1))
        (gradient,) = torch.autograd.grad(loss.mean(), mean)
        with torch.no_grad():
            mean -= 0.02 * gradient
        path.append(float(mean.detach()) - start)
    assert np.mean(path[-100:]) == pytest.approx(b * s**2 / beta, rel=0.02)


def sampled(policy: Policy, algorithm: DPOK, state: TrainState) -> Batch:
    return collect(policy, PROMPTS, brightness, algorithm, SETTINGS, STEPS, state, World(), Clock())


def gradient(policy: Policy, algorithm: DPOK, batch: Batch) -> Tensor:
    """Of the one update of an epoch, flattened; the value network says 0."""
    state, found = TrainState(policy, SETTINGS, algorithm), []

    def look(config: TrainConfig) -> float:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in state.parameters.values()]
        found.append(torch.cat([value.flatten().clone() for value in gradients]))
        return 1.0

    state.step = look  # type: ignore[method-assign]
    update(policy, batch, algorithm, SETTINGS, state, World())
    return found[0]


@pytest.mark.parametrize("estimator", ["prediction", "gaussian"])
def test_the_kl_and_its_gradient_are_zero_before_training(estimator: Any) -> None:
    policy = Policy(toy(), lora_rank=4, target_modules=["first"])
    alone = DPOK(reward_weight=0, kl_coefficient=1e6, kl_estimator=estimator, inner_epochs=1, timestep_fraction=1.0)
    batch = sampled(policy, alone, TrainState(policy, SETTINGS, alone))
    assert not gradient(policy, alone, batch).any()
    with torch.no_grad():
        for name, parameter in policy.parameters.items():
            parameter += 0.05 if "lora_B" in name else 0
    assert gradient(policy, alone, batch).norm() > 1


def test_without_a_reward_the_weights_stay_at_the_base_or_go_back_to_it() -> None:
    """w_r = 0."""
    policy = Policy(toy(), lora_rank=None)
    base = {name: p.detach().clone() for name, p in policy.parameters.items()}
    algorithm = DPOK(reward_weight=0, kl_coefficient=1.0, timestep_fraction=1.0)
    settings = TrainConfig(
        epochs=2, samples_per_epoch=8, group_size=4, batch_size=4, weight_decay=0, learning_rate=3e-3
    )
    for _ in train(policy, PROMPTS, brightness, algorithm, settings):
        pass
    for name, parameter in policy.parameters.items():
        assert torch.equal(parameter, base[name])
    state = TrainState(policy, settings, algorithm)
    with torch.no_grad():
        policy.parameters["denoiser.second.bias"] += 0.3
    kl = [
        report.metrics["policy/kl_prediction"]
        for report in train(
            policy, PROMPTS, brightness, algorithm, TrainConfig(**{**vars(settings), "epochs": 12}), state=state
        )
    ]
    assert kl[-1] < 0.3 * kl[0]


def test_the_reward_rises() -> None:
    """On the same initial noise, drawn from nothing seen in training, by far more than chance."""
    policy = Policy(toy(), lora_rank=None)

    def scores() -> np.ndarray:
        return np.array(brightness(policy.sample(["a cat"] * 32, seed=9, **STEPS).images, [], []))

    before = scores()
    algorithm = DPOK(inner_epochs=2, timestep_fraction=1.0, critic=CriticSettings(width=32, learning_rate=1e-3))
    settings = TrainConfig(epochs=30, samples_per_epoch=64, group_size=4, batch_size=32, learning_rate=0.02)
    for _ in train(policy, ["a cat", "a dog"], brightness, algorithm, settings, sampling=STEPS):
        pass
    gain = scores() - before
    assert gain.mean() > 10
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs log-probabilities, and ODE"):
        DPOK(kernel=ODE())
    with pytest.raises(ConfigError, match=r"reward_weight is -1; it must be 0 or more"):
        DPOK(reward_weight=-1)
