"""Everything a run is besides its settings: weights, optimiser, running mean, statistics, and how far it has come.

There is no random state in it: prompts and noise are functions of (seed, epoch, prompt, sample).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tiller.policy import Policy
from tiller.settings import TrainConfig
from tiller.types import RunError


class TrainState:
    """The mutable state of a training run, as tensors and plain data: `tensors()` and `data()`, back by `load`."""

    def __init__(self, policy: Policy, config: TrainConfig):
        self.epoch = 0  # epochs done
        self.updates = 0  # optimiser steps taken
        self.skipped = 0  # optimiser steps left out because a gradient was not finite
        self.skipped_in_a_row = 0
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
        self.ema: dict[str, Tensor] | None = None
        if config.ema_decay is not None:
            self.ema = {name: _exact(p).clone() for name, p in self.parameters.items()}

    def step(self, config: TrainConfig) -> float:
        """One optimiser step on the gradients at hand, clipped; returns their norm.

        A gradient that is not finite changes nothing but the counters.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm))
        if norm != norm or norm == float("inf"):
            self.skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0
            self.optimizer.step()
            self.updates += 1
            self._average(config.ema_decay)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The running mean of the weights in the place of the weights, for the length of the block, if one is kept."""
        if self.ema is None:
            yield
            return
        latest = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._put(self.ema)
        try:
            yield
        finally:
            self._put(latest)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, optimiser moments and running mean, by name."""
        found = {f"weights.{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                found[f"optimizer.{key}.{name}"] = value
        for name, value in (self.ema or {}).items():
            found[f"ema.{name}"] = value
        return found

    def data(self) -> dict[str, Any]:
        """Counters and statistics, as plain data."""
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
        for key in self.data():
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

    def _check_names(self, tensors: Mapping[str, Tensor]) -> None:
        wanted = {f"weights.{name}": tuple(p.shape) for name, p in self.parameters.items()}
        wanted |= {f"ema.{name}": tuple(value.shape) for name, value in (self.ema or {}).items()}
        given = {name: tuple(value.shape) for name, value in tensors.items() if not name.startswith("optimizer.")}
        if wanted != given:
            odd = sorted(set(wanted.items()) ^ set(given.items()))[0][0]
            raise RunError(
                f"the checkpoint does not fit this model and its settings (first at {odd}); start a new run."
            )

    @torch.no_grad()
    def _average(self, decay: float | None) -> None:
        if self.ema is None or decay is None:
            return
        for name, parameter in self.parameters.items():
            self.ema[name].lerp_(_exact(parameter), 1 - decay)

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
