"""An epoch's samples out of preference pairs, in the place of drawn and scored ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tiller.algorithms.base import Algorithm
from tiller.collect import Batch
from tiller.distributed import World
from tiller.metrics import Clock
from tiller.pairs import Pairs
from tiller.policy import Policy, Rollout
from tiller.policy.frame import encode, framed
from tiller.prompts import draw
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.types import ConfigError, Prompt, Scores
from tiller.walks import Chunk


class Offline:
    """Deals pairs out, epoch after epoch: each comes once before any comes again, in an order of the seed's.

    Nothing is drawn but one batch, once, in whose frame the pairs' pictures are put.
    """

    def __init__(self, policy: Policy, pairs: Pairs, algorithm: Algorithm, config: TrainConfig, sampling: Mapping):
        if config.group_size != 2:
            raise ConfigError(
                f"a preference pair is a group of two pictures, and train.group_size is {config.group_size}; set it to "
                "2."
            )
        self.policy, self.pairs, self.algorithm, self.config = policy, pairs, algorithm, config
        self.sampling: Mapping[str, Any] = sampling
        self._frame: Rollout | None = None

    def collect(self, state: TrainState, world: World, clock: Clock) -> Batch:
        """An epoch's pairs as a `Batch`: of each group the first picture is the chosen one, with a score of 1."""
        size = self.config.batch_size
        rows = draw(self.pairs.pairs, self.config.seed, state.epoch, self.config.samples_per_epoch, 2)
        chunks = []
        for number in world.share(range(len(rows) // size)):
            dealt = rows[number * size : (number + 1) * size]
            indices = [index for index, _ in dealt[::2]]
            texts = self.pairs.prompts(indices)
            clean = encode(self.policy.pipe, self.pairs.pictures(indices), self.frame.latents[-1])
            rollout = framed(self.frame, clean, texts, [sample for _, sample in dealt])
            groups = np.arange(number * size, (number + 1) * size) // 2
            chunks.append(Chunk(number, rollout, groups, [Prompt(text) for text in texts]))
        clock.lap("time/data")
        preferred = np.tile([1.0, 0.0], len(rows) // 2)
        texts = [self.pairs.pairs[index].prompt for index, _ in rows]
        return Batch(chunks, texts, Scores(preferred), preferred, [])

    @property
    def frame(self) -> Rollout:
        """A recorded call of a batch's size."""
        if self._frame is None:
            texts = [self.pairs.pairs[0].prompt] * self.config.batch_size
            self._frame = self.policy.sample(
                texts, seed=self.config.seed, kernel=self.algorithm.kernel, **self.sampling
            )
        return self._frame
