"""What the training loop asks of an algorithm: two methods, and a few facts about what they need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from tiller.advantages import History
from tiller.algorithms.kl import ESTIMATORS
from tiller.critic import CriticSettings
from tiller.kernels import Kernel
from tiller.schedules import Decay
from tiller.types import ConfigError, Scores

if TYPE_CHECKING:
    from tiller.walks import Live


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """A setting's rule; `ConfigError` where it is broken."""
    if not holds:
        raise ConfigError(f"{name} is {value!r}; it must be {rule}.")


RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "inner_epochs": (lambda value: value >= 1, "at least 1"),
    "replay_epochs": (lambda value: value >= 0, "0 or more"),
    "timestep_fraction": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "advantage_clip": (lambda value: value > 0, "more than 0"),
    "clip_range": (lambda value: value is None or value >= 0, "0 or more"),
    "trust_region": (lambda value: value in ("clip", "guard", "dppo"), "clip, guard or dppo"),
    "kl_coefficient": (lambda value: value >= 0, "0 or more"),
    "kl_estimator": (lambda value: value in ESTIMATORS, f"one of {', '.join(ESTIMATORS)}"),
    "buffer_size": (lambda value: value >= 1, "at least 1"),
    "window_size": (lambda value: value >= 1, "at least 1"),
    "train_timesteps": (lambda value: value >= 1, "at least 1"),
    "data_weight": (lambda value: value >= 0, "0 or more"),
    "coefficient": (lambda value: value > 0, "more than 0"),
}
"""What settings that several algorithms have must be, by name: a name means the same in all of them."""


@dataclass(frozen=True)
class WeightCopy:
    """A second set of the trained weights, that follows them: copy ← decay·copy + (1 - decay)·weights."""

    decay: Decay  # of the number of updates, or of epochs, done so far
    every: Literal["update", "epoch"] = "update"


class Algorithm(ABC):
    """A frozen dataclass of an algorithm's own settings; their defaults are a vetted run.

    Its states come from one of three walks through the pipeline. "recorded": the path that was sampled, step by step
    (ratio methods). "noised": the clean latents, noised again to each step (likelihood by denoising error). "live":
    the last steps are taken again with a graph that runs into the reward's gradient.

    One that differentiates the reward on a "recorded" walk gets its lean adjoint in `step.adjoint`.
    """

    walk: ClassVar[Literal["recorded", "noised", "live"]] = "recorded"
    differentiates: ClassVar[bool] = False  # the reward's gradient is asked for
    on_policy: ClassVar[bool] = False  # only the policy's own samples will do: one update per epoch
    min_group: ClassVar[int] = 1  # samples per prompt drawn that it cannot do without
    whole_groups: ClassVar[bool] = False  # the loss compares a group's members, so a batch must hold whole groups
    shared_noise: ClassVar[bool] = False  # a "noised" walk gives all members of a group the same noise
    shared_start: ClassVar[bool] = False  # all members of a group start from the same initial noise
    takes_pairs: ClassVar[bool] = False  # given preference pairs as data, it trains on these and draws nothing
    sampled_with: ClassVar[str] = ""  # the copy of the weights that draws the samples; "" is the weights themselves

    kernel: Kernel | None = None  # how transitions are drawn; None leaves it to the policy (`Policy.sample`)
    inner_epochs: int = 1  # how often an epoch's samples are gone through
    timestep_fraction: float = 1.0  # the share of the trainable steps that is trained, drawn anew for every update
    replay_epochs: int = 0  # of the latest epochs' samples, how many an update may draw from beside its own
    critic: CriticSettings | None = None  # the value network whose word the loss reads in `step.value`
    data_weight: float = 0.0  # of the denoising loss on captioned data, added to every update

    def __post_init__(self) -> None:
        for name, (holds, rule) in RULES.items():
            if hasattr(self, name):
                require(holds(getattr(self, name)), name, getattr(self, name), rule)
        if self.walk == "recorded" and self.kernel is not None and self.kernel.deterministic:
            raise ConfigError(
                f"{type(self).__name__} needs log-probabilities, and {self.kernel} has none; take a kernel with noise "
                "(ddim, flow_sde), or an algorithm that needs none (nft, awm)."
            )

    @property
    def keeps_means(self) -> bool:
        """Whether the loss reads `step.old_mean`."""
        return False

    @property
    def needs(self) -> tuple[str, ...]:
        """Copies whose predictions the loss reads in `step.others`; "reference" is the model before training."""
        return ()

    @property
    def copies(self) -> Mapping[str, WeightCopy]:
        """The copies of the weights to keep, by name."""
        return {}

    def window(self, epoch: int, steps: int, seed: int) -> range | None:
        """Which of a rollout's `steps` are drawn with noise and trained in this epoch; None for all of them."""
        return None

    def steps(self, eligible: Sequence[int], random: np.random.Generator) -> list[int]:
        """Which steps one update trains, of those that can be: a random share of them, the same in every process."""
        count = max(1, round(self.timestep_fraction * len(eligible)))
        whole = count >= len(eligible)
        return list(eligible) if whole else sorted(random.choice(eligible, count, replace=False).tolist())

    @abstractmethod
    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        """(N,) what each of an epoch's N samples weighs in the loss; NaN leaves it out, as where a score is missing."""

    @abstractmethod
    def loss(self, step: Any, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) losses of one `Step`, or `Live`, to be averaged over samples and steps, and numbers for the log."""


@dataclass(frozen=True)
class Pass:
    """One backward pass of a "live" walk: steps `start` to `stop - 1` are taken with a graph."""

    start: int
    stop: int | None = None  # decode x̂0 of step `stop - 1`; None takes all steps
    renoised: bool = False  # the state at `start` is the clean latents with fresh noise, not the recorded state


class RewardGradient(Algorithm):
    """An algorithm that differentiates the reward: its loss reads `step.rewards`, which have a graph (`walks.Live`)."""

    walk: ClassVar[Literal["recorded", "noised", "live"]] = "live"
    differentiates: ClassVar[bool] = True

    @abstractmethod
    def passes(self, steps: int, random: np.random.Generator) -> list[Pass]:
        """The backward passes of one update through rollouts of `steps` steps."""

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        """1 for every picture that has a score: its weight is in the reward's gradient."""
        return np.where(scores.valid, 1.0, np.nan)

    @abstractmethod
    def loss(self, step: Live, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) losses of one pass, from `step.rewards` (B,), to be averaged over samples and passes."""
