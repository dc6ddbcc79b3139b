"""Everything a run is besides its settings: weights, optimiser, running mean, statistics, and how far it has come.

There is no random state in it: prompts and noise are functions of (seed, epoch, prompt, sample).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from tiller.algorithms.base import Algorithm
from tiller.buffer import Earlier, ReplayBuffer
from tiller.critic import Critic
from tiller.policy import Policy
from tiller.schedules import warm_up
from tiller.settings import TrainConfig
from tiller.types import RunError


class TrainState:
    """The mutable state of a training run, as tensors and plain data: `tensors()` and `data()`, back by `load`."""

    def __init__(self, policy: Policy, config: TrainConfig, algorithm: Algorithm | None = None):
        self.epoch = 0  # epochs done
        self.updates = 0  # optimiser steps taken
        self.skipped = 0  # optimiser steps left out because a gradient was not finite
        self.skipped_in_a_row = 0
        self.not_finite: list[str] = []  # the parameters that the last one left out was left out for
        self.reward_calls = 0  # pictures scored
        self.history: dict[str, list[float]] = {}  # per prompt, its latest rewards
        self.parameters = policy.parameters
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self.ema = self._snapshot() if config.ema_decay is not None else None
        self.followers = dict(algorithm.copies) if algorithm else {}
        self.copies = {name: self._snapshot() for name in self.followers}
        device = next(iter(self.parameters.values())).device
        self.buffer = ReplayBuffer(algorithm.replay_epochs if algorithm else 0)
        self.critic = Critic(algorithm.critic, config.seed, device) if algorithm and algorithm.critic else None
        self._base = policy.base
        if algorithm and "reference" in algorithm.needs and policy.lora_rank is None:
            self.copies["reference"] = self._snapshot()  # full fine-tuning changes the model's own weights

    def step(self, config: TrainConfig) -> float:
        """One optimiser step on the gradients at hand, clipped; returns their norm.

        A gradient that is not finite changes nothing but the counters.
        """
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        total = torch.nn.utils.get_total_norm(list(gradients.values()))
        norm = float(total)
        if norm != norm or norm == float("inf"):
            self.skipped += 1
            self.skipped_in_a_row += 1
            self.not_finite = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
        else:
            self.skipped_in_a_row = 0
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), config.max_grad_norm, total)
            self.optimizer.step()
            self.updates += 1
            if self.ema is not None and config.ema_decay is not None:
                self._move(self.ema, warm_up(config.ema_decay)(self.updates - 1))
            self._follow("update", self.updates - 1)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def end_epoch(self, history: Mapping[str, list[float]], samples: Earlier | None = None) -> None:
        """Count an epoch, keep its statistics and samples, and let the copies follow that do so once per epoch.

        An epoch that is broken off half-way leaves the statistics and the replay buffer as they were.
        """
        self.history = dict(history)
        if samples is not None:
            self.buffer.add(samples)
        self._follow("epoch", self.epoch)
        self.epoch += 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The running mean of the weights in the place of the weights, for the length of the block, if one is kept."""
        with self.holding(self.ema):
            yield

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """A copy of the weights in their place, for the length of the block.

        "" is the weights themselves, "reference" the model before training.
        """
        if name == "reference" and name not in self.copies:
            with self._base():
                yield
            return
        with self.holding(self.copies[name] if name else None):
            yield

    def replace_weights(self, values: Mapping[str, Tensor]) -> None:
        """Go on from other values, also of the running mean; the optimiser's moments stay."""
        self._put(values)
        if self.ema is not None:
            self.ema = self._snapshot()

    def weights(self) -> dict[str, Tensor]:
        """A copy of the trained parameters as they are."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @contextmanager
    def holding(self, values: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Other values in the place of the weights, for the length of the block; None leaves them as they are."""
        if values is None:
            yield
            return
        latest = self.weights()
        self._put(values)
        try:
            yield
        finally:
            self._put(latest)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, optimiser moments, running mean, copies and value network, by name."""
        found = {f"weights.{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                found[f"optimizer.{key}.{name}"] = value
        critic = {} if self.critic is None else self.critic.tensors()
        return found | self._means() | critic | self.buffer.tensors()

    def _means(self) -> dict[str, Tensor]:
        """The running mean and the copies, by the names they are saved under."""
        kept = {"ema": self.ema or {}, **{f"copy.{name}": values for name, values in self.copies.items()}}
        return {f"{kind}.{name}": value for kind, values in kept.items() for name, value in values.items()}

    def data(self) -> dict[str, Any]:
        """Counters and statistics, as plain data."""
        return self._counters() | ({"buffer": self.buffer.data()} if self.buffer.size else {})

    def _counters(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "updates": self.updates,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "reward_calls": self.reward_calls,
            "history": {prompt: list(rewards) for prompt, rewards in self.history.items()},
        }

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Put back what `tensors` and `data` gave.

        Raises:
            RunError: they belong to another model or to other settings.
        """
        self._check_names(tensors)
        for key in self._counters():
            setattr(self, key, data[key])
        self._put({name: tensors[f"weights.{name}"] for name in self.parameters})
        for name, parameter in self.parameters.items():
            found = {key: tensors.get(f"optimizer.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {
                key: value.clone() if key == "step" else _like(parameter, value)
                for key, value in found.items()
                if value is not None
            }
            if not self.optimizer.state[parameter]:
                del self.optimizer.state[parameter]
        if self.ema is not None:
            self.ema = {name: _like(self.parameters[name], tensors[f"ema.{name}"]) for name in self.ema}
        for kind, values in self.copies.items():
            for name in values:
                values[name] = _like(self.parameters[name], tensors[f"copy.{kind}.{name}"])
        if self.critic is not None:
            self.critic.load(tensors)
        self.buffer.load(tensors, data.get("buffer", []))

    def _check_names(self, tensors: Mapping[str, Tensor]) -> None:
        wanted = {f"weights.{name}": tuple(p.shape) for name, p in self.parameters.items()}
        wanted |= {name: tuple(value.shape) for name, value in self._means().items()}
        own = (
            "optimizer.",
            *(() if self.critic is None else ("critic.",)),
            *(("buffer.",) if self.buffer.size else ()),
        )
        given = {name: tuple(value.shape) for name, value in tensors.items() if not name.startswith(own)}
        if wanted != given:
            odd = sorted(set(wanted.items()) ^ set(given.items()))[0][0]
            raise RunError(
                f"the checkpoint does not fit this model and its settings (first at {odd}); start a new run."
            )

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: _exact(p).clone() for name, p in self.parameters.items()}

    def _follow(self, moment: Literal["update", "epoch"], count: int) -> None:
        for name, copy in self.followers.items():
            if copy.every == moment:
                self._move(self.copies[name], copy.decay(count))

    @torch.no_grad()
    def _move(self, mean: dict[str, Tensor], decay: float) -> None:
        for name, parameter in self.parameters.items():
            mean[name].lerp_(_exact(parameter), 1 - decay)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """The same numbers where the parameter lies and in its memory layout, so that sums come out the same."""
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _exact(parameter: Tensor) -> Tensor:
    """The weights in float32 or better: a running mean in bfloat16 would stand still."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
