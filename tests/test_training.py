"""The training loop: it learns, and every sample weighs what it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiller.algorithms import DDPO, DDPOSF
from tiller.collect import Batch, collect
from tiller.distributed import World
from tiller.metrics import Clock
from tiller.policy import Policy, Step
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.training import train
from tiller.types import ConfigError, Prompt, TillerError
from tiller.update import GIVE_UP_AFTER, update
from toy import ToyPipeline, brightness, toy

PROMPTS = [Prompt("a cat"), Prompt("a dog"), Prompt("an owl")]


def config(**changes: Any) -> TrainConfig:
    sizes = {"epochs": 1, "samples_per_epoch": 8, "group_size": 4, "batch_size": 4, "max_grad_norm": 1e9}
    return TrainConfig(**{**sizes, **changes})


def sampled(policy: Policy, settings: TrainConfig, algorithm: Any = None, reward: Any = brightness) -> Batch:
    state, world = TrainState(policy, settings), World()
    return collect(policy, PROMPTS, reward, algorithm or DDPO(), settings, {}, state, world, Clock())


def gradients(policy: Policy, batch: Batch, settings: TrainConfig, algorithm: Any = None) -> list[dict[str, Tensor]]:
    """What each optimiser step of one epoch would be given; no weight moves."""
    state, found = TrainState(policy, settings), []

    def look(config: TrainConfig) -> float:
        found.append({name: p.grad.clone() for name, p in state.parameters.items() if p.grad is not None})
        return 1.0

    state.step = look  # type: ignore[method-assign]
    update(policy, batch, algorithm or DDPO(), settings, state, World())
    for parameter in state.parameters.values():
        parameter.grad = None
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Equal within a part of the largest gradient."""
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * largest, msg=name)


# ---- it learns ----


@pytest.mark.parametrize("algorithm", [DDPO(), DDPO(inner_epochs=2, clip_range=1e-2), DDPOSF()])
def test_the_reward_rises(algorithm: Any) -> None:
    """On the same initial noise, drawn from nothing seen in training, by far more than chance."""
    policy = Policy(toy(), lora_rank=None)

    def scores() -> np.ndarray:
        return np.array(brightness(policy.sample(["a cat"] * 32, seed=9).images, [], []))

    before = scores()
    settings = config(epochs=30, samples_per_epoch=64, batch_size=32, learning_rate=0.02, max_grad_norm=1.0)
    for _ in train(policy, ["a cat", "a dog"], brightness, algorithm, settings):
        pass
    gain = scores() - before
    assert gain.mean() > 10
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5


def test_a_learning_rate_of_zero_changes_nothing() -> None:
    policy = Policy(toy(), lora_rank=4)
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    list(train(policy, PROMPTS, brightness, DDPO(), config(epochs=2, learning_rate=0.0)))
    assert all(torch.equal(p, before[name]) for name, p in policy.parameters.items())


# ---- what each sample weighs ----


def test_the_gradient_is_the_mean_over_samples_and_steps_of_the_weighted_score() -> None:
    policy, settings = Policy(toy(), lora_rank=None), config()
    batch = sampled(policy, settings)
    (found,) = gradients(policy, batch, settings)
    for chunk, advantages in zip(batch.chunks, batch.advantages.reshape(2, 4), strict=True):
        weights = torch.tensor(advantages).float()
        policy.replay(chunk.rollout, lambda step, w=weights: step.backward(-(w * step.log_prob).sum() / (8 * 4)))
    assert_close(found, {name: p.grad for name, p in policy.parameters.items() if p.grad is not None})


def test_missing_rewards_weigh_nothing() -> None:
    """The same gradient as the mean over the samples that have a score, and theirs alone."""

    def partly(images: Any, prompts: Any, metadata: Any) -> list[float | None]:
        return [None if index in (1, 2) else value for index, value in enumerate(brightness(images, prompts, metadata))]

    policy, settings = Policy(toy(), lora_rank=None), config()
    batch = sampled(policy, settings, reward=partly)
    known = np.isfinite(batch.advantages)
    assert known.tolist() == [True, False, False, True] * 2
    (found,) = gradients(policy, batch, settings)
    for chunk, advantages in zip(batch.chunks, batch.advantages.reshape(2, 4), strict=True):
        rows = torch.tensor([0, 3])
        weights = torch.tensor(advantages).float()[rows]
        policy.replay(
            chunk.rollout, lambda step, w=weights, r=rows: step.backward(-(w * step.log_prob[r]).sum() / (4 * 4))
        )
    assert_close(found, {name: p.grad for name, p in policy.parameters.items() if p.grad is not None})


def test_the_logged_loss_is_that_of_the_samples_with_a_score() -> None:
    """On policy the loss is -A, so its mean over the samples that count is known."""

    @dataclass(frozen=True)
    class Infinite(DDPO):
        def loss(self, step: Step, advantages: Tensor) -> Any:
            loss, numbers = super().loss(step, advantages)
            return torch.where(torch.arange(4) == 1, torch.inf, loss), numbers

    policy, settings = Policy(toy(), lora_rank=None), config()
    batch = sampled(policy, settings)
    gaps = batch.advantages.copy()
    gaps[[1, 5]] = np.nan
    state = TrainState(policy, settings)
    metrics = update(policy, replace(batch, advantages=gaps), Infinite(), settings, state, World())
    assert metrics["policy/loss"] == pytest.approx(-np.nanmean(gaps), rel=1e-5)
    assert state.updates == 1


def test_an_update_without_any_score_is_left_out() -> None:
    policy, settings = Policy(toy(), lora_rank=None), config(updates_per_epoch=2)
    batch = sampled(policy, settings)
    gaps = batch.advantages.copy()
    gaps[:4] = np.nan
    assert len(gradients(policy, batch, settings)) == 2
    assert len(gradients(policy, replace(batch, advantages=gaps), settings)) == 1


def test_the_gradient_does_not_depend_on_the_batch_size() -> None:
    found = []
    for batch_size in (2, 4, 8):
        policy, settings = Policy(toy(), lora_rank=None), config(batch_size=batch_size)
        found.append(gradients(policy, sampled(policy, settings), settings)[0])
    assert_close(found[0], found[2])
    assert_close(found[1], found[2])


def test_the_gradients_of_two_processes_add_up_to_that_of_one() -> None:
    class Half(World):
        """One of two processes, without the other; its gradients are not added up yet."""

        def __init__(self, rank: int):
            super().__init__()
            self._rank = rank

        rank = property(lambda self: self._rank)
        size = property(lambda self: 2)

        def gather(self, mine: list[Any]) -> list[Any]:
            return mine

        def sum_gradients(self, parameters: Any) -> None: ...

    policy, settings = Policy(toy(), lora_rank=None), config(batch_size=2, updates_per_epoch=2)
    batch = sampled(policy, settings)
    whole = gradients(policy, batch, settings)
    parts: list[list[dict[str, Tensor]]] = []
    for rank in (0, 1):
        state, found = TrainState(policy, settings), []

        def look(_: TrainConfig, state: TrainState = state, found: list[Any] = found) -> float:
            found.append({name: p.grad.clone() for name, p in state.parameters.items() if p.grad is not None})
            return 1.0

        state.step = look  # type: ignore[method-assign]
        mine = replace(batch, chunks=batch.chunks[rank::2])
        update(policy, mine, DDPO(), settings, state, Half(rank))
        parts.append(found)
    for first, second, expected in zip(*parts, whole, strict=True):
        assert_close({name: first[name] + second[name] for name in first}, expected)


def test_scores_go_to_the_pictures_they_were_given_for() -> None:
    def letters(images: Any, prompts: Any, metadata: Any) -> list[float]:
        return [len(prompt) + 10 * entry["n"] for prompt, entry in zip(prompts, metadata, strict=True)]

    asked = [Prompt("a" * length, {"n": length}) for length in (1, 2, 3)]
    policy, settings = Policy(toy(), lora_rank=4), config(samples_per_epoch=12, group_size=2, batch_size=3)
    state, world = TrainState(policy, settings), World()
    batch = collect(policy, asked, letters, DDPO(), settings, {}, state, world, Clock())
    assert batch.scores.values.tolist() == [11 * len(prompt) for prompt in batch.prompts]
    assert [text for chunk in batch.chunks for text in chunk.prompts] == batch.prompts
    assert state.reward_calls == 12


# ---- inner epochs, timesteps ----


@dataclass(frozen=True)
class Watched(DDPO):
    """DDPO that writes down the steps it is shown and the ratios it finds there."""

    seen: list[tuple[int, float]] = field(default_factory=list)

    def loss(self, step: Step, advantages: Tensor) -> Any:
        assert step.old_log_prob is not None
        self.seen.append((step.index, float((step.log_prob.detach() - step.old_log_prob).abs().max())))
        return super().loss(step, advantages)


def test_the_ratio_is_one_in_the_first_inner_epoch_and_leaves_it_in_the_second() -> None:
    policy, algorithm = Policy(toy(), lora_rank=None), Watched(inner_epochs=2)
    (report,) = train(policy, PROMPTS, brightness, algorithm, config(learning_rate=1e-3))
    first, second = algorithm.seen[:8], algorithm.seen[8:]  # 2 batches of 4 steps each time
    assert len(second) == 8
    assert all(error == 0 for _, error in first)
    assert all(error > 0 for _, error in second)
    assert report.metrics["policy/log_ratio_max"] == max(error for _, error in second)


@pytest.mark.parametrize(("fraction", "count"), [(1.0, 4), (0.5, 2), (0.25, 1), (0.01, 1)])
def test_only_the_asked_share_of_the_steps_is_trained(fraction: float, count: int) -> None:
    policy, settings = Policy(toy(), lora_rank=None), config(updates_per_epoch=2, batch_size=2)
    algorithm = Watched(timestep_fraction=fraction, inner_epochs=4)
    batch = sampled(policy, settings, algorithm)
    gradients(policy, batch, settings, algorithm)
    steps = np.array([index for index, _ in algorithm.seen]).reshape(8, 2, count)  # updates, batches, steps
    assert all(len(set(row)) == count for update in steps.tolist() for row in update)
    assert (steps[:, 0] == steps[:, 1]).all()  # the batches of one update share their steps
    assert set(steps.ravel()) == {0, 1, 2, 3}  # and every step has its turn
    again = Watched(timestep_fraction=fraction, inner_epochs=4)
    gradients(policy, batch, settings, again)
    assert again.seen == algorithm.seen


def test_part_of_the_steps_has_their_mean_gradient() -> None:
    """The share trained is averaged over itself: leaving steps out does not shrink the update."""
    policy, settings = Policy(toy(), lora_rank=None), config()
    batch, algorithm = sampled(policy, settings), Watched(timestep_fraction=0.5)
    (found,) = gradients(policy, batch, settings, algorithm)
    steps = sorted({index for index, _ in algorithm.seen})
    for chunk, advantages in zip(batch.chunks, batch.advantages.reshape(2, 4), strict=True):
        weights = torch.tensor(advantages).float()
        policy.replay(chunk.rollout, lambda step, w=weights: step.backward(-(w * step.log_prob).sum() / (8 * 2)), steps)
    assert_close(found, {name: p.grad for name, p in policy.parameters.items() if p.grad is not None})


# ---- gradients that are not finite ----


def test_a_gradient_that_is_not_finite_is_skipped_counted_and_at_last_given_up_on() -> None:
    policy, settings = Policy(toy(), lora_rank=None), config(epochs=20, ema_decay=0.9)
    state, poison = TrainState(policy, settings), [1.0]
    next(iter(policy.parameters.values())).register_hook(lambda gradient: gradient * poison[0])
    reports = train(policy, PROMPTS, brightness, DDPO(), settings, state=state)
    next(reports)
    before = {name: value.clone() for name, value in state.tensors().items()}
    poison[0] = float("nan")
    for number in range(1, GIVE_UP_AFTER):
        metrics = next(reports).metrics
        assert metrics["optim/skipped"] == number
        assert metrics["optim/updates"] == 1
        assert all(np.isfinite(value) for value in metrics.values())
    assert all(torch.equal(value, before[name]) for name, value in state.tensors().items())
    with pytest.raises(TillerError, match=f"not finite {GIVE_UP_AFTER} times in a row; lower train.learning_rate"):
        next(reports)


def test_a_finite_gradient_in_between_starts_the_count_anew() -> None:
    policy, settings = Policy(toy(), lora_rank=None), config(epochs=2 * GIVE_UP_AFTER)
    state, poison = TrainState(policy, settings), [float("nan")]
    next(iter(policy.parameters.values())).register_hook(lambda gradient: gradient * poison[0])
    for report in train(policy, PROMPTS, brightness, DDPO(), settings, state=state):
        poison[0] = 1.0 if report.epoch % 2 else float("nan")
    assert (state.updates, state.skipped) == (GIVE_UP_AFTER, GIVE_UP_AFTER)


def test_what_a_broken_off_update_left_behind_is_not_added_to_the_next() -> None:
    policy, settings = Policy(toy(), lora_rank=None), config()
    batch = sampled(policy, settings)
    (clean,) = gradients(policy, batch, settings)
    for parameter in policy.parameters.values():
        parameter.grad = torch.full_like(parameter, 1e3)
    (found,) = gradients(policy, batch, settings)
    assert all(torch.equal(found[name], value) for name, value in clean.items())


# ---- bad input ----


class Unused(ToyPipeline):
    def denoise(self, latents: Any, t: Any, condition: Any) -> Any:
        raise AssertionError("a size that does not fit must be seen before anything is drawn")


@pytest.mark.parametrize("prompts", [[], "a cat"])
def test_prompts_that_are_none_are_refused(prompts: Sequence[str]) -> None:
    with pytest.raises(ConfigError, match="give a list of at least one text"):
        next(train(Policy(toy(Unused)), prompts, brightness, DDPO(), config()))


def test_batches_that_cannot_be_shared_are_refused() -> None:
    class Three(World):
        size = property(lambda self: 3)

    with pytest.raises(ConfigError, match=r"2 batches per update cannot be shared by 3 processes; .* \(12\)\."):
        next(train(Policy(toy(Unused)), PROMPTS, brightness, DDPO(), config(), world=Three()))


def test_the_score_function_takes_one_update_per_rollout() -> None:
    with pytest.raises(ConfigError, match="or take DDPO"):
        next(train(Policy(toy(Unused)), PROMPTS, brightness, DDPOSF(), config(updates_per_epoch=2)))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"samples_per_epoch": 10}, "no multiple of group_size (4); 12 is"),
        ({"samples_per_epoch": 12, "batch_size": 8}, "no multiple of batch_size (8)"),
        ({"updates_per_epoch": 4}, "no multiple of batch_size * updates_per_epoch (16)"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**sizes)
    assert says in str(caught.value)


def test_an_epoch_that_was_broken_off_does_not_count_its_rewards_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a notebook's cell is interrupted and run again."""
    policy, settings, algorithm = Policy(toy(), lora_rank=None), config(epochs=2), DDPO()
    state = TrainState(policy, settings, algorithm)
    next(iter(train(policy, PROMPTS, brightness, algorithm, settings, state=state)))
    after_one = {prompt: list(rewards) for prompt, rewards in state.history.items()}
    with monkeypatch.context() as patch:
        patch.setattr("tiller.training.update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            list(train(policy, PROMPTS, brightness, algorithm, settings, state=state))
    assert state.history == after_one
    list(train(policy, PROMPTS, brightness, algorithm, settings, state=state))
    assert sum(len(rewards) for rewards in state.history.values()) == 16
