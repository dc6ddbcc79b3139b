"""The training loop: collect, update, yield a report. Everything else is up to whoever iterates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tiller.algorithms.base import Algorithm
from tiller.collect import Batch, collect, noise_window
from tiller.critic import Paths, prompt_vectors
from tiller.data import Data, check_data, open_data
from tiller.distributed import World
from tiller.geometry import Sizes, advice
from tiller.metrics import Clock, score_metrics
from tiller.offline import Offline
from tiller.pairs import Pairs
from tiller.policy import Policy
from tiller.preflight import preflight
from tiller.rewards import Reward
from tiller.rewards.cache import counts
from tiller.rewards.check import check_gradient, check_groups, too_many_missing
from tiller.rewards.scale import unmeasured
from tiller.settings import AUTO, TrainConfig
from tiller.state import TrainState
from tiller.trial import calibrated
from tiller.types import ConfigError, Prompt, RewardError, Scores
from tiller.update import update


@dataclass(frozen=True)
class Report:
    """What an epoch came to."""

    epoch: int  # epochs done
    metrics: dict[str, float]  # the same numbers whenever the same run is made again
    timings: dict[str, float]  # seconds, and what a cache spared; never the same twice
    pictures: list[Any] = field(repr=False)
    prompts: list[str] = field(repr=False)  # of these pictures
    rewards: list[float] = field(repr=False)  # of these pictures
    state: TrainState = field(repr=False)
    scores: Scores | None = field(default=None, repr=False)  # of all the epoch's pictures; None without a reward
    asked: list[str] = field(default_factory=list, repr=False)  # the prompts of all these
    samples: Sequence[int] = field(default=(), repr=False)  # the number of each among the samples of its prompt


def train(
    policy: Policy,
    prompts: Sequence[Prompt | str],
    reward: Reward | None,
    algorithm: Algorithm,
    config: TrainConfig | None = None,
    *,
    sampling: Mapping[str, Any] | None = None,
    data: Data | None = None,
    state: TrainState | None = None,
    world: World | None = None,
    max_missing: float = 0.5,
) -> Iterator[Report]:
    """Fine-tune `policy` towards `reward`, one report per epoch.

    Args:
        prompts: what to draw from; each epoch draws `samples_per_epoch / group_size` of them.
        reward: `(images, prompts, metadata) -> scores`, one per image; None or NaN means missing. None in its place
            where `data` holds preference pairs.
        sampling: the pipeline's own call arguments (num_inference_steps, guidance_scale ...).
        data: captioned pictures for an algorithm whose loss has a term on them (a folder, or "emoji"), or preference
            pairs for one that takes them (a .jsonl file, or a saved dataset); see `tiller.data`.
        state: to go on with; by default a new one, after a preflight (`tiller.preflight`) that refuses what cannot
            work.
        max_missing: the share of an epoch's scores that may be missing; 1 allows all.
        world: the processes to share the work with; by default those of the launcher, or this one alone.

    Raises:
        ConfigError: the sizes do not fit each other or the number of processes.
        PipelineError: the pipeline cannot be trained; see `tiller.preflight`.
        RewardError: the reward failed, is not one score per image, or left out too many.
    """
    config, world, sampling = config or TrainConfig(), world or World(), sampling or {}
    if isinstance(prompts, str) or not len(prompts):
        raise ConfigError(f"prompts are {prompts!r}; give a list of at least one text.")
    asked = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    check(policy, reward, algorithm, config, sampling, world)
    check_data(algorithm, reward, data)
    source = open_data(data, policy, algorithm, asked, sampling)
    offline = Offline(policy, source, algorithm, config, sampling) if isinstance(source, Pairs) else None
    if state is None:
        seen = preflight(policy, asked, reward, algorithm, sampling, config.seed, source)
        if reward is not None:
            reward, _ = calibrated(policy, asked, reward, algorithm, sampling, config.seed, world, seen)
        state = TrainState(policy, config, algorithm)
    if unmeasured(reward):
        raise ConfigError(
            f"reward {unmeasured(reward)[0]} is to be normalised and has no scale; give it one, or measure it with "
            "tiller.trial.calibrated, or leave out `state`."
        )
    while state.epoch < config.epochs:
        clock = Clock()
        if offline is not None:
            batch, metrics = offline.collect(state, world, clock), {}
        else:
            assert reward is not None
            batch = collect(policy, asked, reward, algorithm, config, sampling, state, world, clock)
            complaint = too_many_missing(batch.scores, reward, max_missing)
            if complaint:
                raise RewardError(f"in epoch {state.epoch + 1}, {complaint}")
            metrics = score_metrics(batch.scores, config.group_size) | _fit_critic(batch, config, state, world)
        captioned = None if isinstance(source, Pairs) else source
        metrics |= update(policy, batch, algorithm, config, state, world, reward, captioned)
        clock.lap("time/update")
        state.end_epoch(batch.history, batch.of_epoch(state.epoch) if algorithm.replay_epochs else None)
        yield _report(batch, metrics | _progress(state), clock.laps | counts(reward), state)


def _fit_critic(batch: Batch, config: TrainConfig, state: TrainState, world: World) -> dict[str, float]:
    """Train the value network on the rewards of the epoch and of the replay buffer, where the algorithm has one."""
    if state.critic is None:
        return {}
    epochs = [(batch.chunks, batch.scores.values)] + [(one.chunks or (), one.scores) for one in state.buffer.epochs]
    paths = [
        Paths(
            place * config.samples_per_epoch + chunk.number * config.batch_size,
            chunk.rollout.latents[:-1],
            prompt_vectors(chunk.rollout),
        )
        for place, (chunks, _) in enumerate(epochs)
        for chunk in chunks
    ]
    return state.critic.fit(paths, np.concatenate([values for _, values in epochs]), state.epoch, world)


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
    known = batch.scores if len(batch.samples) else None
    return Report(
        state.epoch,
        metrics,
        timings,
        batch.pictures,
        batch.prompts[:shown],
        rewards,
        state,
        known,
        batch.prompts,
        batch.samples,
    )


def check(
    policy: Policy,
    reward: Reward | None,
    algorithm: Algorithm,
    config: TrainConfig,
    sampling: Mapping[str, Any],
    world: World,
) -> None:
    """Refuse settings that contradict each other, before anything is drawn."""
    name = type(algorithm).__name__
    if algorithm.on_policy and config.updates_per_epoch > 1:
        raise ConfigError(
            f"{name} is for samples of the policy itself, which an update changes; set train.updates_per_epoch to 1, "
            "or take DDPO, or AWM with off_policy."
        )
    if config.group_size < algorithm.min_group:
        raise ConfigError(
            f"{name} compares pictures of one prompt, and train.group_size is {config.group_size}; make it at least "
            f"{algorithm.min_group}."
        )
    if config.batch_size == AUTO:
        raise ConfigError("train.batch_size is auto, which `tiller train` solves; in Python, give a number.")
    sizes = Sizes(
        config.samples_per_epoch, config.group_size, config.updates_per_epoch, world.size, algorithm.whole_groups
    )
    if algorithm.whole_groups and config.batch_size % config.group_size:
        raise ConfigError(
            f"{name} compares all pictures of one prompt in one batch; make train.batch_size ({config.batch_size}) a "
            f"multiple of train.group_size ({config.group_size}){advice(sizes, config.batch_size)}."
        )
    if reward is not None:
        check_groups(reward, config.batch_size, config.group_size)
        if algorithm.differentiates:
            check_gradient(reward, name)
    chunks = config.samples_per_epoch // (config.batch_size * config.updates_per_epoch)
    if chunks % world.size:
        raise ConfigError(
            f"{chunks} batches per update cannot be shared by {world.size} processes; make train.samples_per_epoch a "
            f"multiple of batch_size × updates_per_epoch × processes "
            f"({config.batch_size * config.updates_per_epoch * world.size}){advice(sizes, config.batch_size)}."
        )
    noise_window(policy, algorithm, sampling, 0, config.seed)
