"""What a recorded pipeline call leaves behind, and what a replayed step shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tiller.kernels import Gaussian, Kernel, log_prob
from tiller.process import Stage


@dataclass(frozen=True)
class Record:
    """One call of `scheduler.step`: the state, the action, and the density the action had when it was drawn."""

    timestep: float
    sample: Tensor  # (B, ...) x_t, as the pipeline handed it over
    action: Tensor  # (B, ...) x_{t-1}, in the storage type the pipeline goes on with
    kernel: Kernel  # what drew it
    log_prob: Tensor | None  # (B,) float32; None where the transition has no density
    std: float | None  # mean standard deviation of the transition, for the log; None where it has no density
    stage: Stage | None = field(default=None, repr=False)  # where on the noise process it stands; None: unknown
    mean: Tensor | None = field(default=None, repr=False)  # (B, ...) of the transition, where it was to be kept
    memory: Any = field(default=None, repr=False)  # what the scheduler knew of earlier steps, where that counts


@dataclass(frozen=True)
class Rollout:
    """A recorded pipeline call: B samples, T denoising steps. Everything needed to walk the same path again."""

    images: Any  # what the pipeline returned first: a list of B pictures, or frames, or audio
    records: tuple[Record, ...]  # T
    prompts: tuple[str | None, ...]  # B
    samples: tuple[int, ...]  # B, the sample index that, with seed and prompt, keys the noise
    seed: int
    kernel: Kernel
    call: Mapping[str, Any]  # the pipeline's own call arguments
    forwards: tuple[tuple[int, str, Any], ...] = ()  # per denoiser call: (step index, name, output template or None)
    asides: frozenset[int] = frozenset()  # which calls of `step` only asked for the denoised prediction (Cosmos)
    guiding: frozenset[int] = frozenset()  # which forwards the pipeline differentiates itself (Attend-and-Excite)
    embeddings: dict[Any, Any] = field(default_factory=dict, repr=False)  # memoised text encodings
    random_state: Any = None  # of generators the caller passed in, as they were before the call
    starts: tuple[int, ...] | None = None  # B, what keys the initial noise in the place of `samples`

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.prompts)

    @property
    def latents(self) -> list[Tensor]:
        """T + 1 tensors (B, ...): x_T first, the clean latents last."""
        return [record.sample for record in self.records] + [self.records[-1].action]

    @property
    def timesteps(self) -> Tensor:
        """(T,) float64: the scheduler's timestep at each step."""
        return torch.tensor([record.timestep for record in self.records], dtype=torch.float64)

    @property
    def has_density(self) -> list[bool]:
        """T flags: whether the transition was random, so that its log-probability exists."""
        return [record.log_prob is not None for record in self.records]

    @property
    def steps(self) -> list[int]:
        """Indices of the steps that have a density: the ones a ratio method can train."""
        return [index for index, dense in enumerate(self.has_density) if dense]

    @property
    def log_probs(self) -> Tensor:
        """(B, T) float32: log p(x_{t-1} | x_t), averaged over elements; NaN where a step has no density."""
        missing = torch.full((self.batch_size,), float("nan"))
        return torch.stack([missing if r.log_prob is None else r.log_prob.cpu() for r in self.records], dim=1)


@dataclass(frozen=True)
class Seen:
    """What one copy of the weights says of a step, without a graph."""

    prediction: Tensor  # (B, ...) the model's output
    mean: Tensor | None  # (B, ...) of the transition, on a recorded path


@dataclass(eq=False)
class Step:
    """One step of a replay: the recorded state and action, and what the model says of them now, with its graph."""

    index: int
    timestep: float
    sample: Tensor  # (B, ...) x_t, float32
    action: Tensor  # (B, ...) recorded x_{t-1}, float32
    prediction: Tensor  # (B, ...) the model's output after guidance, with its graph
    stage: Stage | None  # α, σ and the meaning of the prediction; None where only the scheduler itself knows
    batch_size: int
    old_log_prob: Tensor | None  # (B,) as recorded
    old_mean: Tensor | None  # (B, ...) as recorded, where the recording kept it
    shared: bool  # a later wanted step hangs on the same denoiser call
    _transition: Any  # () -> Gaussian
    clean: Tensor | None = None  # (B, ...) x0 of a forward-noised state
    noise: Tensor | None = None  # (B, ...) ε of a forward-noised state
    groups: Tensor | None = None  # (B,) int64: drawn for the same prompt side by side; -1: left out
    others: Mapping[str, Seen] = field(default_factory=dict)  # what other copies of the weights say here
    value: Tensor | None = None  # (B,) V(x_t, t, prompt), the reward to expect, where the algorithm has a critic
    adjoint: Tensor | None = None  # (B, ...) ã of the state this step leads to, where the algorithm asks for it
    missing: Tensor | None = None  # (B,) bool: no adjoint, as the reward gave no score
    residual: tuple[float, float] = (0.0, 1.0)  # mean and std of reward - value over the epoch

    @cached_property
    def transition(self) -> Gaussian:
        """p_θ(x_{t-1} | x_t), with its graph."""
        return self._transition()

    @property
    def mean(self) -> Tensor:
        """(B, ...) mean of the transition, float32, with its graph."""
        return self.transition.mean

    @property
    def std(self) -> float | Tensor:
        """Standard deviation of the transition; 0 where it has no density."""
        return self.transition.std

    @cached_property
    def log_prob(self) -> Tensor:
        """(B,) float32 log-probability of the recorded action, averaged over elements, with its graph."""
        if not self.transition.has_density:
            raise ValueError(f"step {self.index} is deterministic and has no density; train the steps in rollout.steps")
        return log_prob(self.action, self.transition, self.batch_size)

    @property
    def target(self) -> Tensor:
        """(B, ...) what the model should have said at a forward-noised state, float32."""
        assert self.stage is not None
        assert self.clean is not None
        assert self.noise is not None
        return self.stage.target(self.clean, self.noise)

    def distance(self, prediction: Tensor | None = None) -> Tensor:
        """(B,) mean squared error of a prediction, by default the policy's own, against the target: -ELBO's term."""
        return self.squared((self.prediction if prediction is None else prediction).float() - self.target)

    def squared(self, difference: Tensor) -> Tensor:
        """(B,) mean over a sample's elements of the square of (B, ...)."""
        return difference.float().square().reshape(self.batch_size, -1).mean(1)

    def seen(self) -> Seen:
        """What can be told of this step without a graph, for the loss of another copy of the weights."""
        dense = self.stage is not None or self.old_log_prob is not None
        mean = self.mean.detach() if dense and self.clean is None else None
        return Seen(self.prediction.detach(), mean)

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, keeping the graph where the next wanted step hangs on the same denoiser call."""
        loss.backward(retain_graph=self.shared)
