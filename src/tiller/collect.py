"""An epoch's samples: drawn, scored, and weighed against each other."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from tiller.algorithms.base import Algorithm
from tiller.buffer import Earlier
from tiller.distributed import World
from tiller.kernels import Kernel, Window
from tiller.metrics import Clock
from tiller.policy import Policy
from tiller.prompts import draw
from tiller.rewards import Background, Reward
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.types import ConfigError, Prompt, Scores, join_scores
from tiller.walks import Chunk


@dataclass(frozen=True)
class Batch:
    """An epoch's samples: the recorded ones of this process, and the scores of all of them."""

    chunks: list[Chunk]  # of this process, in the order of its share
    prompts: list[str]  # (N,) over all processes
    scores: Scores  # (N,)
    advantages: np.ndarray  # (N,) NaN where a sample is left out, as where its score is missing
    pictures: list[Any]  # of this process's first chunk, for the log
    window: range | None = None  # the only steps that were drawn with noise, where there is such a window
    history: Mapping[str, list[float]] = field(default_factory=dict)  # the state's, once the epoch is done
    weights: Mapping[str, Tensor] = field(default_factory=dict)  # that drew it, where it is to be kept for later epochs
    samples: Sequence[int] = ()  # (N,) the number of each sample among those of its prompt

    def of_epoch(self, epoch: int) -> Earlier:
        """As the replay buffer keeps it."""
        return Earlier(epoch, self.weights, self.scores.values, self.advantages, self.chunks)


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
    recall(policy, prompts, algorithm, config, sampling, state, world)
    pairs = draw(prompts, config.seed, state.epoch, config.samples_per_epoch, config.group_size)
    chunks: list[Chunk] = []
    pending: list[Future[Scores]] = []
    pictures: list[Any] = []
    with Background(reward) as scorer, state.using(algorithm.sampled_with):
        weights = state.weights() if algorithm.replay_epochs else {}
        for chunk, images in drawn(policy, prompts, algorithm, config, sampling, state.epoch, world):
            pending.append(scorer.submit(images, chunk.prompts, chunk.metadata, chunk.groups.tolist()))
            pictures = pictures or list(images)
            chunks.append(chunk)
        clock.lap("time/sample")
        mine = [future.result() for future in pending]
    scores = join_scores(world.gather(mine))
    clock.lap("time/reward")
    texts = [prompts[prompt].text for prompt, _ in pairs]
    state.reward_calls += len(texts)
    history = dict(state.history)
    advantages = algorithm.advantages(scores, texts, history)
    window = noise_window(policy, algorithm, sampling, state.epoch, config.seed)
    samples = [sample for _, sample in pairs]
    return Batch(chunks, texts, scores, advantages, pictures, window, history, weights, samples)


def drawn(
    policy: Policy,
    prompts: Sequence[Prompt],
    algorithm: Algorithm,
    config: TrainConfig,
    sampling: Mapping[str, Any],
    epoch: int,
    world: World,
) -> Iterator[tuple[Chunk, Any]]:
    """This process's share of an epoch's samples and pictures, by batches: a function of seed, epoch and weights."""
    pairs = draw(prompts, config.seed, epoch, config.samples_per_epoch, config.group_size)
    window = noise_window(policy, algorithm, sampling, epoch, config.seed)
    for number in world.share(range(len(pairs) // config.batch_size)):
        rows = range(number * config.batch_size, (number + 1) * config.batch_size)
        groups = np.array([row // config.group_size for row in rows])
        asked = [prompts[pairs[row][0]] for row in rows]
        rollout = policy.sample(
            [prompt.text for prompt in asked],
            seed=config.seed,
            samples=[pairs[row][1] for row in rows],
            starts=[pairs[group * config.group_size][1] for group in groups] if algorithm.shared_start else None,
            kernel=windowed(algorithm.kernel, window),
            keep_means=algorithm.keeps_means,
            **sampling,
        )
        yield Chunk(number, replace(rollout, images=None), groups, asked, epoch), rollout.images


def recall(
    policy: Policy,
    prompts: Sequence[Prompt],
    algorithm: Algorithm,
    config: TrainConfig,
    sampling: Mapping[str, Any],
    state: TrainState,
    world: World,
) -> None:
    """Draw the samples of the replay buffer again, which a checkpoint does not hold."""
    for epoch in state.buffer.epochs:
        if epoch.chunks is None:
            with state.holding(epoch.weights):
                again = drawn(policy, prompts, algorithm, config, sampling, epoch.epoch, world)
                epoch.chunks = [chunk for chunk, _ in again]


def noise_window(
    policy: Policy, algorithm: Algorithm, sampling: Mapping[str, Any], epoch: int, seed: int
) -> range | None:
    """Which steps are drawn with noise in an epoch; None where the algorithm has no window.

    Raises:
        ConfigError: the window does not lie within the schedule, or nobody says how many steps that has.
    """
    parameters = inspect.signature(type(policy.pipe).__call__).parameters
    default = parameters["num_inference_steps"].default if "num_inference_steps" in parameters else None
    steps = sampling.get("num_inference_steps", default)
    if not isinstance(steps, int):
        if type(algorithm).window is not Algorithm.window:
            raise ConfigError(
                f"{type(algorithm).__name__} has a window of steps, and {type(policy.pipe).__name__} does not say how "
                "many it takes; give sampling.num_inference_steps, or take flow_grpo."
            )
        return None
    window = algorithm.window(epoch, steps, seed)
    if window is not None and window.stop > steps:
        raise ConfigError(
            f"the window of steps {window.start} to {window.stop - 1} ends after the last of the {steps} denoising "
            "steps; make window_size or window_last smaller, or num_inference_steps larger."
        )
    return window


def windowed(kernel: Kernel | None, window: range | None) -> Kernel | None:
    """The kernel, inside the window only."""
    return kernel if window is None else Window(kernel, window.start, len(window))
