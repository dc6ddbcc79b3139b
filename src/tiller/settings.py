"""How a policy is trained: the sizes of an epoch, the optimiser, precision. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tiller.choice import Word
from tiller.geometry import Sizes, advice, memory_bytes
from tiller.types import ConfigError

AUTO = 0  # what `batch_size: auto` is in Python


@dataclass(frozen=True)
class TrainConfig:
    """Sizes count over all processes together. How often an epoch's samples are reused is the algorithm's to say.

    The optimiser's numbers are those of Black et al. 2023 (DDPO, arXiv 2305.13301, appendix): AdamW, betas
    .9 and .999, weight decay 1e-4, gradients clipped to norm 1. The learning rate is theirs for LoRA
    (3e-4); for full fine-tuning take 1e-5.
    """

    epochs: int = 20  # rounds of: draw samples, score them, update
    samples_per_epoch: int = 64  # pictures drawn per epoch
    group_size: int = 8  # pictures per prompt drawn
    # pictures that go through the pipeline at once, in sampling and in training alike; auto: what fits into the memory
    batch_size: Annotated[int, Word("auto", AUTO)] = 32
    memory: str | None = None  # that a batch_size of auto may use, such as 8GB; None: nine tenths of the device's
    updates_per_epoch: int = 1  # optimiser steps each time an epoch's samples are gone through
    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0  # the gradient's norm is scaled down to this
    ema_decay: float | None = None  # of a running mean of the weights, once warmed up (schedules.warm_up); None: none
    seed: int = 0  # of prompts, noise and initial adapter weights

    def __post_init__(self) -> None:
        if self.memory is not None:
            memory_bytes(self.memory)
        for name in ("samples_per_epoch", "group_size", "updates_per_epoch"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1.")
        _require(self.batch_size >= AUTO, f"batch_size is {self.batch_size}; it must be at least 1, or auto.")
        for name in ("epochs", "learning_rate", "weight_decay", "seed"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it cannot be negative.")
        for name in ("eps", "max_grad_norm"):
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be more than 0.")
        betas, decay = self.betas, self.ema_decay
        _require(all(0 <= beta < 1 for beta in betas), f"betas are {betas}; each must be in [0, 1).")
        _require(decay is None or 0 <= decay < 1, f"ema_decay is {decay}; it must be in [0, 1), or null.")
        _whole(self.samples_per_epoch, "group_size", self.group_size)
        if self.batch_size == AUTO:
            _whole(self.samples_per_epoch, "updates_per_epoch", self.updates_per_epoch)
            return
        sizes = Sizes(self.samples_per_epoch, self.group_size, self.updates_per_epoch)
        other = advice(sizes, self.batch_size)
        _whole(self.samples_per_epoch, "batch_size", self.batch_size, other)
        _whole(self.samples_per_epoch, "batch_size * updates_per_epoch", self.per_round, other)

    @property
    def per_round(self) -> int:
        """Pictures that give each of an epoch's updates one batch."""
        return self.batch_size * self.updates_per_epoch


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _whole(value: int, unit_name: str, unit: int, other: str = "") -> None:
    """The samples of an epoch must be a whole number of units; else say which number near it is, and `other` cures."""
    if value % unit:
        near = max(1, (value + unit // 2) // unit) * unit
        raise ConfigError(
            f"samples_per_epoch is {value}, which is no multiple of {unit_name} ({unit}); {near} is{other}."
        )


@dataclass(frozen=True)
class MonitorRules:
    """What counts as lost while the reward rises, and what to do then (`tiller.evaluation.monitor`)."""

    action: Literal["warn", "stop", "roll_back", "lower_rate", "off"] = "warn"
    patience: int = 2  # evaluations in a row that must find something before more is done than to warn
    lost: float = 0.0  # a reward that is not trained: by more than this, in its own unit, with 95 % certainty
    diversity: float = 0.5  # the share of the base model's that must be left
    kl: float | None = None  # nats per picture that the paths may move
    edges: float = 0.5  # relative change of the pictures' edges, either way
    blank: float = 0.3  # how much larger the blank share of the pictures may become
    rate_factor: float = 0.5  # what the learning rate is multiplied by, for lower_rate

    def __post_init__(self) -> None:
        if self.patience < 1 or not 0 < self.rate_factor < 1:
            raise ConfigError("patience must be at least 1, and rate_factor between 0 and 1.")
        if min(self.lost, self.diversity, self.edges, self.blank, self.kl or 0.0) < 0:
            raise ConfigError("lost, diversity, kl, edges and blank cannot be negative.")
