"""The training loop: collect, update, yield a report. Everything else is up to whoever iterates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from tiller.algorithms.base import Algorithm
from tiller.distributed import World
from tiller.metrics import Clock, Log, score_metrics
from tiller.policy import Policy, Rollout, Step
from tiller.preflight import preflight
from tiller.prompts import draw
from tiller.rewards import Background, Reward
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.types import ConfigError, Prompt, Scores, TillerError

GIVE_UP_AFTER = 5  # updates in a row whose gradient is not finite


@dataclass(frozen=True)
class Batch:
    """An epoch's samples: the rollouts of this process, and the scores of all of them."""

    rollouts: list[Rollout]  # of this process, in the order of its share of the chunks
    prompts: list[str]  # (N,) over all processes
    scores: Scores  # (N,)
    advantages: np.ndarray  # (N,) NaN where the score is missing
    pictures: list[Any]  # of this process's first rollout, for the log


@dataclass(frozen=True)
class Report:
    """What an epoch came to."""

    epoch: int  # epochs done
    metrics: dict[str, float]  # the same numbers whenever the same run is made again
    timings: dict[str, float]  # seconds; never the same twice
    pictures: list[Any] = field(repr=False)
    prompts: list[str] = field(repr=False)  # of these pictures
    rewards: list[float] = field(repr=False)  # of these pictures
    state: TrainState = field(repr=False)


def train(
    policy: Policy,
    prompts: Sequence[Prompt | str],
    reward: Reward,
    algorithm: Algorithm,
    config: TrainConfig | None = None,
    *,
    sampling: Mapping[str, Any] | None = None,
    state: TrainState | None = None,
    world: World | None = None,
) -> Iterator[Report]:
    """Fine-tune `policy` towards `reward`, one report per epoch.

    Args:
        prompts: what to draw from; each epoch draws `samples_per_epoch / group_size` of them.
        reward: `(images, prompts, metadata) -> scores`, one per image; None or NaN means missing.
        sampling: the pipeline's own call arguments (num_inference_steps, guidance_scale ...).
        state: to go on with; by default a new one, after a preflight (`tiller.preflight`) that refuses what cannot
            work.
        world: the processes to share the work with; by default those of the launcher, or this one alone.

    Raises:
        ConfigError: the sizes do not fit each other or the number of processes.
        PipelineError: the pipeline cannot be trained; see `tiller.preflight`.
        RewardError: the reward failed, or is not one score per image.
    """
    config, world, sampling = config or TrainConfig(), world or World(), sampling or {}
    if isinstance(prompts, str) or not len(prompts):
        raise ConfigError(f"prompts are {prompts!r}; give a list of at least one text.")
    asked = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    _check_sizes(algorithm, config, world)
    if state is None:
        preflight(policy, asked, reward, algorithm, sampling, config.seed)
        state = TrainState(policy, config)
    while state.epoch < config.epochs:
        clock = Clock()
        batch = collect(policy, asked, reward, algorithm, config, sampling, state, world, clock)
        metrics = score_metrics(batch.scores, config.group_size) | update(
            policy, batch, algorithm, config, state, world
        )
        clock.lap("time/update")
        state.epoch += 1
        yield _report(batch, metrics | _progress(state), clock.laps, state)


def collect(
    policy: Policy,
    prompts: Sequence[Prompt],
    reward: Reward,
    algorithm: Algorithm,
    config: TrainConfig,
    sampling: Mapping[str, Any],
    state: TrainState,
    world: World,
    clock: Clock,
) -> Batch:
    """Draw an epoch's samples, scoring each batch while the next one is drawn."""
    pairs = draw(prompts, config.seed, state.epoch, config.samples_per_epoch, config.group_size)
    chunks = [pairs[start : start + config.batch_size] for start in range(0, len(pairs), config.batch_size)]
    rollouts: list[Rollout] = []
    pending: list[Future[Scores]] = []
    pictures: list[Any] = []
    with Background(reward) as scorer:
        for chunk in world.share(chunks):
            asked = [prompts[prompt] for prompt, _ in chunk]
            rollout = policy.sample(
                [prompt.text for prompt in asked],
                seed=config.seed,
                samples=[sample for _, sample in chunk],
                kernel=algorithm.kernel,
                **sampling,
            )
            pending.append(
                scorer.submit(rollout.images, [prompt.text for prompt in asked], [prompt.metadata for prompt in asked])
            )
            pictures = pictures or list(rollout.images)
            rollouts.append(replace(rollout, images=None))
        clock.lap("time/sample")
        mine = [future.result() for future in pending]
    scores = _joined(world.gather(mine), config.batch_size)
    clock.lap("time/reward")
    texts = [prompts[prompt].text for prompt, _ in pairs]
    state.reward_calls += len(texts)
    return Batch(rollouts, texts, scores, algorithm.advantages(scores.values, texts, state.history), pictures)


def update(
    policy: Policy, batch: Batch, algorithm: Algorithm, config: TrainConfig, state: TrainState, world: World
) -> dict[str, float]:
    """Go through an epoch's samples, `inner_epochs` times, with `updates_per_epoch` optimiser steps each time."""
    log = Log()
    per_update = config.samples_per_epoch // config.updates_per_epoch // config.batch_size
    for inner in range(algorithm.inner_epochs):
        random = np.random.default_rng((config.seed, state.epoch, inner))
        for part in random.permutation(config.updates_per_epoch):
            chunks = range(part * per_update, (part + 1) * per_update)
            mine = [(batch.rollouts[c // world.size], c) for c in chunks if c % world.size == world.rank]
            steps = _steps(mine[0][0], algorithm.timestep_fraction, random)
            known = np.isfinite(batch.advantages[chunks.start * config.batch_size : chunks.stop * config.batch_size])
            if not known.any():
                continue
            state.optimizer.zero_grad(set_to_none=True)  # an update that was broken off may have left something
            for rollout, chunk in mine:
                rows = slice(chunk * config.batch_size, (chunk + 1) * config.batch_size)
                _accumulate(
                    policy, rollout, algorithm, batch.advantages[rows], steps, 1 / (known.sum() * len(steps)), log
                )
            world.sum_gradients(state.parameters.values())
            norm = state.step(config)
            if np.isfinite(norm):
                log.add({"optim/grad_norm": norm})
            if state.skipped_in_a_row >= GIVE_UP_AFTER:
                raise TillerError(
                    f"the gradient was not finite {GIVE_UP_AFTER} times in a row; lower train.learning_rate, or train "
                    "in float32 (model.mixed_precision=no)."
                )
    return log.means(world)


def _accumulate(
    policy: Policy,
    rollout: Rollout,
    algorithm: Algorithm,
    advantages: np.ndarray,
    steps: Sequence[int],
    scale: float,
    log: Log,
) -> None:
    """Add one rollout's gradient; `scale` makes the sum a mean over an update's known samples and trained steps."""
    known = torch.from_numpy(np.flatnonzero(np.isfinite(advantages)))
    values = torch.from_numpy(np.nan_to_num(advantages)).float()

    def on_step(step: Step) -> None:
        device = step.prediction.device
        losses, numbers = algorithm.loss(step, values.to(device))
        losses = losses[known.to(device)]
        step.backward(losses.sum() * scale)
        with torch.no_grad():
            if len(losses):
                numbers["policy/loss"] = losses.mean()
            if step.old_log_prob is not None:
                numbers["policy/log_ratio_max"] = (step.log_prob - step.old_log_prob).abs().max()
        log.add({name: float(number.detach()) for name, number in numbers.items()})

    policy.replay(rollout, on_step, steps)


def _steps(rollout: Rollout, fraction: float, random: np.random.Generator) -> list[int]:
    """The steps to train: all that have a density, or a random part of them, the same in every process."""
    dense = rollout.steps
    count = max(1, round(fraction * len(dense)))
    return sorted(random.choice(dense, count, replace=False).tolist()) if count < len(dense) else dense


def _joined(parts: Sequence[Scores], size: int) -> Scores:
    names = dict.fromkeys(name for part in parts for name in part.components)
    return Scores(
        np.concatenate([part.values for part in parts]),
        {name: np.concatenate([part.components.get(name, np.full(size, np.nan)) for part in parts]) for name in names},
        {number * size + index: why for number, part in enumerate(parts) for index, why in part.reasons.items()},
    )


def _progress(state: TrainState) -> dict[str, float]:
    return {
        "epoch": state.epoch,
        "reward_calls": state.reward_calls,
        "optim/updates": state.updates,
        "optim/skipped": state.skipped,
    }


def _report(batch: Batch, metrics: dict[str, float], timings: dict[str, float], state: TrainState) -> Report:
    shown = len(batch.pictures)
    rewards = batch.scores.values[:shown].tolist()
    return Report(state.epoch, metrics, timings, batch.pictures, batch.prompts[:shown], rewards, state)


def _check_sizes(algorithm: Algorithm, config: TrainConfig, world: World) -> None:
    if getattr(algorithm, "on_policy", False) and config.updates_per_epoch > 1:
        raise ConfigError(
            f"{type(algorithm).__name__} is for samples of the policy itself, which an update changes; set "
            "train.updates_per_epoch to 1, or take DDPO."
        )
    chunks = config.samples_per_epoch // (config.batch_size * config.updates_per_epoch)
    if chunks % world.size:
        raise ConfigError(
            f"{chunks} batches per update cannot be shared by {world.size} processes; make train.samples_per_epoch a "
            f"multiple of batch_size × updates_per_epoch × processes "
            f"({config.batch_size * config.updates_per_epoch * world.size})."
        )
