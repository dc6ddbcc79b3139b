"""Walks: what an algorithm's loss is shown of one rollout. One function for each value of `Algorithm.walk`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiller.adjoint import LeanAdjoint
from tiller.algorithms.base import Algorithm, Pass
from tiller.critic import prompt_vectors
from tiller.policy import Policy, Rollout, Step
from tiller.policy.forward import ForwardProcess
from tiller.policy.noise import key
from tiller.policy.rollout import Seen
from tiller.rewards.gradient import score_with_graph
from tiller.state import TrainState
from tiller.types import Prompt

Shown = Callable[[Any], None]
"""Gets a `Step`, or in a live walk a `Live`, one after the other."""


@dataclass(frozen=True)
class Chunk:
    """One recorded batch of an epoch, and what was asked for in it."""

    number: int  # among the epoch's batches, over all processes
    rollout: Rollout
    groups: np.ndarray  # (B,) int64: which samples were drawn for the same prompt side by side
    asked: Sequence[Prompt]  # B
    epoch: int = 0  # in which it was drawn

    @property
    def place(self) -> tuple[int, int]:
        """What tells it from every other chunk of the run."""
        return self.epoch, self.number

    @property
    def prompts(self) -> list[str]:
        """B texts."""
        return [prompt.text for prompt in self.asked]

    @property
    def metadata(self) -> list[Mapping[str, Any]]:
        """B mappings."""
        return [prompt.metadata for prompt in self.asked]

    def shared(self) -> list[int]:
        """(B,) each sample's index replaced by that of its group's first."""
        first = {int(group): self.rollout.samples[row] for row, group in reversed(list(enumerate(self.groups)))}
        return [first[int(group)] for group in self.groups]


@dataclass(frozen=True)
class Live:
    """What a live walk shows: the pictures as they come out now, and their rewards, with the graph of both."""

    index: int  # the first live step
    pictures: Tensor  # (B, C, H, W) in [0, 1]
    rewards: Tensor  # (B,) NaN where one is missing

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, as a step has it."""
        loss.backward()


@dataclass
class Walker:
    """Shows one chunk after the other to a loss, and remembers what other copies of the weights said of it."""

    policy: Policy
    algorithm: Algorithm
    state: TrainState
    seed: int
    reward: Any = None  # of pictures with a graph, where the algorithm differentiates it
    _seen: dict[tuple[str, tuple[int, int], int], Seen] = field(default_factory=dict)  # by copy, chunk and step
    _adjoints: dict[tuple[int, int], LeanAdjoint] = field(default_factory=dict)  # by chunk

    def walk(self, chunk: Chunk, steps: Sequence[Any], inner: int, show: Shown) -> None:
        """Show the chosen steps (in a live walk: passes) of one chunk, in the inner epoch of that number."""
        kinds: Mapping[str, Callable[..., None]] = {
            "recorded": self._recorded,
            "noised": self._noised,
            "live": self._live,
        }
        kinds[self.algorithm.walk](chunk, steps, inner, show)

    def _recorded(self, chunk: Chunk, steps: Sequence[int], inner: int, show: Shown) -> None:
        """The path as it was sampled. What frozen copies say of it is found out once per epoch."""
        if self.algorithm.differentiates:
            self._carry_back(chunk, min(steps) + 1)
        for name in self.algorithm.needs:
            missing = [index for index in steps if (name, chunk.place, index) not in self._seen]
            with torch.no_grad(), self.state.using(name):
                self.policy.replay(chunk.rollout, self._remember(name, chunk), missing)
        self.policy.replay(chunk.rollout, self._with_others(chunk, show), steps)
        if self.algorithm.inner_epochs == 1 or any(name != "reference" for name in self.algorithm.needs):
            self._seen.clear()  # nobody will ask again, or a copy that follows the weights will have moved
        if self.algorithm.inner_epochs == 1:
            self._adjoints.clear()

    def _noised(self, chunk: Chunk, steps: Sequence[int], inner: int, show: Shown) -> None:
        """The clean latents, noised again: fresh noise for every step of every inner epoch."""
        fresh = key("noised", self.seed, self.state.epoch, inner)
        samples = chunk.shared() if self.algorithm.shared_noise else None
        path = ForwardProcess(chunk.rollout, fresh, samples)
        rollout = chunk.rollout if samples is None else replace(chunk.rollout, starts=tuple(samples))
        for name in self.algorithm.needs:
            with torch.no_grad(), self.state.using(name):
                self.policy.predict(rollout, self._remember(name, chunk), path, steps)
        self.policy.predict(rollout, self._with_others(chunk, show), path, steps)
        self._seen.clear()

    def _live(self, chunk: Chunk, passes: Sequence[Pass], inner: int, show: Shown) -> None:
        """The last steps taken again with a graph, which the reward carries on."""
        keys = (self.seed, self.state.epoch, inner)
        for step in live(self.policy, self.reward, chunk.rollout, passes, chunk.prompts, chunk.metadata, keys):
            show(step)

    def _carry_back(self, chunk: Chunk, index: int) -> None:
        """The lean adjoint of the chunk's states, from the clean latents back to state `index`."""
        if chunk.place not in self._adjoints:
            place = (self.policy, self.reward, chunk.rollout, chunk.prompts, chunk.metadata)
            self._adjoints[chunk.place] = LeanAdjoint(*place)
        with self.state.using("reference"):
            self._adjoints[chunk.place].back_to(index, self._remember("reference", chunk))

    def _remember(self, name: str, chunk: Chunk) -> Callable[[Step], None]:
        def on_step(step: Step) -> None:
            self._seen[name, chunk.place, step.index] = step.seen()

        return on_step

    def _with_others(self, chunk: Chunk, show: Shown) -> Callable[[Step], None]:
        critic = self.state.critic
        prompts = None if critic is None else prompt_vectors(chunk.rollout)

        def on_step(step: Step) -> None:
            if critic is not None and prompts is not None:
                step.value, step.residual = critic.value(step.sample, step.index, prompts), critic.residual
            step.groups = torch.from_numpy(chunk.groups).to(step.prediction.device)
            if chunk.place in self._adjoints:
                known = self._adjoints[chunk.place]
                step.adjoint, step.missing = known.states[step.index + 1], known.missing
            step.others = {name: self._seen[name, chunk.place, step.index] for name in self.algorithm.needs}
            show(step)

        return on_step


def live(
    policy: Policy,
    reward: Any,
    rollout: Rollout,
    passes: Sequence[Pass],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    keys: tuple[int, ...] = (),
) -> Iterator[Live]:
    """Each pass's pictures and rewards, one after the other, so that the graph of one only need be held.

    `keys` say what the noise of renoised passes is for.
    """
    for number, one in enumerate(passes):
        noised = ForwardProcess(rollout, key("live", *keys, number))
        pictures = policy.unroll(rollout, one.start, one.stop, noised(one.start) if one.renoised else None)
        yield Live(one.start, pictures, score_with_graph(reward, pictures, prompts, metadata))


def scored(step: Any, known: Tensor) -> Tensor:
    """Of the indices `known`, those whose loss at this step exists: a picture with a graph may have no score."""
    if isinstance(step, Live):
        return known[step.rewards.detach()[known].isfinite()]
    missing = getattr(step, "missing", None)
    return known if missing is None else known[~missing[known]]


def as_rows(values: np.ndarray, like: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) advantages with 0 for the missing, and the indices of those that are known, where `like` lies."""
    known = torch.from_numpy(np.flatnonzero(np.isfinite(values))).to(like.device)
    return torch.from_numpy(np.nan_to_num(values)).float().to(like.device), known
