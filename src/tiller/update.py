"""An epoch's updates: walk through its samples, add up gradients, step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tiller.algorithms.base import Algorithm, RewardGradient
from tiller.buffer import Earlier
from tiller.collect import Batch
from tiller.data import add_gradient
from tiller.distributed import World
from tiller.metrics import Log
from tiller.policy import Policy, Rollout, Step
from tiller.policy.noise import key
from tiller.pretrain.data import Source
from tiller.rewards import Reward
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.types import ConfigError, TillerError
from tiller.walks import Chunk, Walker, as_rows, scored

GIVE_UP_AFTER = 5  # updates in a row whose gradient is not finite


@dataclass(frozen=True)
class Attempt:
    """An update that was tried: enough to try it again and look."""

    epoch: int  # epochs done before it
    inner: int  # which time the epoch's samples were gone through
    seed: int
    chunks: list[Chunk]  # of this process
    scores: list[np.ndarray]  # per chunk (B,), NaN where missing
    advantages: list[np.ndarray]  # per chunk (B,), NaN where left out
    steps: list[Any]  # trained of each chunk
    not_finite: list[str]  # the parameters whose gradient, summed over processes, was not finite
    weights: Mapping[str, torch.Tensor]  # trained parameters, as they were and still are


@dataclass(frozen=True)
class Part:
    """What an update learns from: one batch of this epoch, or of one that the replay buffer holds."""

    epoch: Earlier
    number: int  # of the batch in its epoch
    size: int

    @property
    def chunk(self) -> Chunk | None:
        """Its paths, if this process drew them."""
        return next((chunk for chunk in self.epoch.chunks or () if chunk.number == self.number), None)

    @property
    def scores(self) -> np.ndarray:
        """(B,) NaN where one is missing."""
        return self.epoch.scores[self.number * self.size : (self.number + 1) * self.size]

    @property
    def advantages(self) -> np.ndarray:
        """(B,) NaN where a sample is left out."""
        return self.epoch.advantages[self.number * self.size : (self.number + 1) * self.size]


class NotFinite(TillerError):
    """The gradient was not finite too often in a row; `attempt` is the last update that was tried."""

    def __init__(self, message: str, attempt: Attempt):
        super().__init__(message)
        self.attempt = attempt


def update(
    policy: Policy,
    batch: Batch,
    algorithm: Algorithm,
    config: TrainConfig,
    state: TrainState,
    world: World,
    reward: Reward | None = None,
    data: Source | None = None,
) -> dict[str, float]:
    """Go through an epoch's samples, `inner_epochs` times, with `updates_per_epoch` optimiser steps each time.

    `reward` is for algorithms that differentiate it, `data` for those whose loss has a term on it. Returns means of
    what the losses had to tell.
    """
    log = Log()
    walker = Walker(policy, algorithm, state, config.seed, reward)
    per_update = config.samples_per_epoch // config.updates_per_epoch // config.batch_size
    epochs = [batch.of_epoch(state.epoch), *state.buffer.epochs]
    for inner in range(algorithm.inner_epochs):
        random = np.random.default_rng((config.seed, state.epoch, inner))
        for turn in random.permutation(config.updates_per_epoch):
            numbers = range(turn * per_update, (turn + 1) * per_update)
            drawn = random.integers(len(epochs), size=per_update) if len(epochs) > 1 else np.zeros(per_update, int)
            parts = [
                Part(epochs[epoch], number, config.batch_size) for epoch, number in zip(drawn, numbers, strict=True)
            ]
            mine = [part for part in parts if part.chunk is not None]
            assert mine[0].chunk is not None
            steps = _steps(mine[0].chunk.rollout, algorithm, batch.window, random)
            known = sum(int(np.isfinite(part.advantages).sum()) for part in parts)
            if not known:
                continue
            state.optimizer.zero_grad(set_to_none=True)  # an update that was broken off may have left something
            for part in mine:
                assert part.chunk is not None
                _accumulate(walker, part.chunk, part.advantages, steps, inner, 1 / (known * len(steps)), log)
                if data is not None and algorithm.data_weight:
                    place = (config.seed, state.epoch, inner, int(turn))
                    log.add(_on_data(policy, data, algorithm, part.chunk, per_update, place))
            world.sum_gradients(state.parameters.values())
            norm = state.step(config)
            if np.isfinite(norm):
                log.add({"optim/grad_norm": norm})
            if state.skipped_in_a_row >= GIVE_UP_AFTER:
                raise _sick(mine, steps, inner, config, state)
    return log.means(world)


def _steps(rollout: Rollout, algorithm: Algorithm, window: range | None, random: np.random.Generator) -> list[Any]:
    """What an update trains of each rollout: steps, or the passes of an algorithm that differentiates the reward."""
    total = len(rollout.records)
    if isinstance(algorithm, RewardGradient):
        return list(algorithm.passes(total, random))
    eligible = rollout.steps if algorithm.walk == "recorded" else range(total)
    inside = [index for index in eligible if window is None or index in window]
    if not inside:
        raise ConfigError(
            f"no step of the {total} denoising steps can be trained: the window is {window}, and {len(eligible)} steps "
            "have a density; move the window, or take a kernel with noise."
        )
    return algorithm.steps(inside, random)


def _accumulate(
    walker: Walker, chunk: Chunk, advantages: np.ndarray, steps: Sequence[Any], inner: int, scale: float, log: Log
) -> None:
    """Add one chunk's gradient; `scale` makes the sum a mean over an update's known samples and trained steps."""
    values, known = as_rows(advantages, chunk.rollout.latents[-1])
    if not len(known):
        return
    left_out = torch.ones(len(values), dtype=torch.bool, device=values.device).index_fill(0, known, False)

    def on_step(step: Any) -> None:
        if isinstance(step, Step) and step.groups is not None:
            step.groups = step.groups.masked_fill(left_out, -1)
        losses, numbers = walker.algorithm.loss(step, values)
        rows = scored(step, known)
        if not len(rows):
            return
        losses = losses[rows]
        step.backward(losses.sum() * scale)
        with torch.no_grad():
            numbers["policy/loss"] = losses.mean()
            if getattr(step, "old_log_prob", None) is not None and walker.algorithm.walk == "recorded":
                numbers["policy/log_ratio_max"] = (step.log_prob - step.old_log_prob).abs().max()
        log.add({name: float(number.detach()) for name, number in numbers.items()})

    walker.walk(chunk, steps, inner, on_step)


def _on_data(
    policy: Policy, data: Source, algorithm: Algorithm, chunk: Chunk, chunks: int, place: tuple[int, ...]
) -> dict[str, float]:
    """Add the term on data: a batch of it for every batch of samples, its steps the same in every process."""
    random = np.random.default_rng(key("steps on data", *place))
    steps = algorithm.steps(range(len(chunk.rollout.records)), random)
    scale = algorithm.data_weight / (chunks * chunk.rollout.batch_size * len(steps))
    return add_gradient(policy, data, chunk.rollout, steps, scale, *place, chunk.number)


def _sick(mine: list[Part], steps: list[Any], inner: int, config: TrainConfig, state: TrainState) -> NotFinite:
    attempt = Attempt(
        epoch=state.epoch,
        inner=inner,
        seed=config.seed,
        chunks=[part.chunk for part in mine if part.chunk is not None],
        scores=[part.scores for part in mine],
        advantages=[part.advantages for part in mine],
        steps=steps,
        not_finite=state.not_finite,
        weights={name: parameter.detach() for name, parameter in state.parameters.items()},
    )
    return NotFinite(
        f"the gradient was not finite {GIVE_UP_AFTER} times in a row; lower train.learning_rate, or train in float32 "
        "(model.mixed_precision=no).",
        attempt,
    )
