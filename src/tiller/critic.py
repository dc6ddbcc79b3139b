"""A value network V(x_t, t, prompt): the reward to expect of a state, the baseline of DPOK and PPO.

All processes hold the same network: each adds up the gradient of the states that it drew itself, the gradients are
summed, and every process takes the same step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tiller.distributed import World
from tiller.policy.noise import key
from tiller.types import ConfigError, PipelineError

if TYPE_CHECKING:
    from tiller.policy import Rollout

WIDTH_OF_TEXT = 64  # of the stand-in for a prompt's embedding


@dataclass(frozen=True)
class CriticSettings:
    """The value network's size and training; the numbers of Fan et al. 2023 (DPOK, arXiv 2305.16381), reference code.

    Its optimiser is Adam.
    """

    learning_rate: float = 1e-4
    batch_size: int = 256  # states per optimiser step, over all processes
    updates: int = 5  # optimiser steps per epoch, all of them before those of the policy
    width: int = 256  # of its three hidden layers

    def __post_init__(self) -> None:
        for name in ("batch_size", "updates", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be more than 0.")


DPOK_VALUE = CriticSettings()


@dataclass(frozen=True)
class Paths:
    """The states that one recorded batch went through."""

    first: int  # the number of its first sample among the epoch's N
    latents: Sequence[Tensor]  # T tensors (B, ...): x_t before each step
    prompts: Tensor  # (B, E)

    def states(self, rows: np.ndarray, steps: np.ndarray) -> Tensor:
        """(n, F + E) float32: flattened latents and prompt of n pairs of a row of this batch and a step."""
        size, found = len(self.prompts), self.prompts.new_empty(0)
        for step in np.unique(steps).tolist():
            here = torch.from_numpy(np.flatnonzero(steps == step)).to(self.prompts.device)
            wanted = torch.from_numpy(rows[steps == step]).to(self.prompts.device)
            flat = self.latents[step].reshape(size, -1)[wanted].float()
            found = found if len(found) else flat.new_empty(len(rows), flat.shape[1] + self.prompts.shape[1])
            found[here] = torch.cat([flat, self.prompts[wanted]], 1)
        return found


class ValueNetwork(nn.Module):
    """Three hidden layers, each with a gain of its own for every step, and one number out (DPOK's ValueMulti)."""

    def __init__(self, inputs: int, steps: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(size, width) for size in (inputs, width, width)])
        self.gains = nn.ParameterList([nn.Parameter(torch.rand(steps, width)) for _ in self.layers])
        self.out = nn.Linear(width, 1)

    def forward(self, states: Tensor, steps: Tensor) -> Tensor:
        """(n,) from states (n, inputs) and the numbers of their steps (n,) int64."""
        hidden = states
        for layer, gain in zip(self.layers, self.gains, strict=True):
            hidden = (gain[steps] * layer(hidden)).relu()
        return self.out(hidden).squeeze(1)


class Critic:
    """The value network with its optimiser. It is made in the first epoch that has a score, for only then is the size
    of a state known, and it predicts rewards in units of that epoch's: (r - mean)/std.
    """

    def __init__(self, settings: CriticSettings, seed: int, device: torch.device):
        self.settings, self.seed, self.device = settings, seed, device
        self.network: ValueNetwork | None = None
        self.shift = self.scale = torch.zeros((), dtype=torch.float64)
        self.residual = (0.0, 1.0)  # mean and std of r - V over the latest epoch's states

    @torch.no_grad()
    def value(self, latents: Tensor, step: int, prompts: Tensor) -> Tensor:
        """(B,) float32 V of latents (B, ...) before step `step`, in units of the reward."""
        if self.network is None:
            return torch.zeros(len(prompts), device=latents.device)
        states = torch.cat([latents.reshape(len(prompts), -1).float(), prompts.to(latents.device)], 1)
        return self._values(states, torch.full((len(prompts),), step)).to(latents.device)

    def fit(self, paths: Sequence[Paths], rewards: np.ndarray, epoch: int, world: World) -> dict[str, float]:
        """Some optimiser steps on the squared error of this epoch's rewards; what it came to, for the log.

        Args:
            paths: of this process.
            rewards: (N,) of all of the epoch's samples, NaN where one is missing.
        """
        known = np.flatnonzero(np.isfinite(rewards))
        if not len(known):
            return {}
        steps = len(paths[0].latents)
        if self.network is None:
            self._begin(paths[0], rewards[known])
        losses = []
        for number in range(self.settings.updates):
            random = np.random.default_rng(key("critic", self.seed, epoch, number))
            rows = random.choice(known, self.settings.batch_size)
            losses.append(self._step(paths, rewards, rows, random.integers(steps, size=len(rows)), world))
        numbers = {"value/loss": float(np.mean(losses))}
        error = self._survey(paths, rewards, world)
        if rewards[known].std() > 0:
            numbers["value/explained"] = 1 - error / float(rewards[known].var())
        return numbers

    def _begin(self, path: Paths, rewards: np.ndarray) -> None:
        sizes = {latents.reshape(len(path.prompts), -1).shape[1] for latents in path.latents}
        if len(sizes) > 1:
            raise PipelineError(
                f"the latents change their size along the path ({', '.join(map(str, sorted(sizes)))} numbers), and a "
                "value network takes one; use an algorithm without one, such as ddpo."
            )
        self._build(sizes.pop() + path.prompts.shape[1], len(path.latents))
        self.shift, self.scale = torch.tensor([rewards.mean(), rewards.std() or 1.0], dtype=torch.float64)

    def _build(self, inputs: int, steps: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key("critic", self.seed))
            self.network = ValueNetwork(inputs, steps, self.settings.width).to(self.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.settings.learning_rate)

    def _values(self, states: Tensor, steps: Tensor) -> Tensor:
        """(n,) in units of the reward. Never under autocast, which may be on where a policy's step is seen."""
        assert self.network is not None
        with torch.autocast(self.device.type, enabled=False):
            told = self.network(states.to(self.device), steps.to(self.device))
        return told * float(self.scale) + float(self.shift)

    def _step(
        self, paths: Sequence[Paths], rewards: np.ndarray, rows: np.ndarray, steps: np.ndarray, world: World
    ) -> float:
        """One optimiser step on the states (rows, steps) of all processes; the mean squared error before it."""
        assert self.network is not None
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for path in paths:
            here = (rows >= path.first) & (rows < path.first + len(path.prompts))
            if here.any():
                states = path.states(rows[here] - path.first, steps[here])
                targets = torch.from_numpy(rewards[rows[here]]).float().to(self.device)
                error = (self._values(states, torch.from_numpy(steps[here])) - targets).square().sum() / len(rows)
                (error / float(self.scale) ** 2).backward()
                total += error.item()
        world.sum_gradients(self.network.parameters())
        if all(bool(p.grad.isfinite().all()) for p in self.network.parameters() if p.grad is not None):
            self.optimizer.step()
        return sum(world.gather([total]))

    @torch.no_grad()
    def _survey(self, paths: Sequence[Paths], rewards: np.ndarray, world: World) -> float:
        """The mean of (r - V)² over all of the epoch's scored states; sets `residual`."""
        sums = np.zeros(3)  # number, Σ(r - V), Σ(r - V)²
        for path in paths:
            wanted = rewards[path.first : path.first + len(path.prompts)]
            for step, latents in enumerate(path.latents):
                rest = wanted - self.value(latents, step, path.prompts).double().cpu().numpy()
                rest = rest[np.isfinite(rest)]
                sums += (len(rest), rest.sum(), (rest**2).sum())
        count, first, second = np.sum(world.gather([sums]), 0).tolist()
        mean = first / max(count, 1)
        self.residual = (mean, max(second / max(count, 1) - mean**2, 0.0) ** 0.5)
        return second / max(count, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, optimiser moments and the units, by name; nothing before the first epoch with a score."""
        if self.network is None:
            return {}
        found = {"critic.shift": self.shift.view(1), "critic.scale": self.scale.view(1)}
        for name, parameter in self.network.named_parameters():
            found[f"critic.weights.{name}"] = parameter.detach()
            for kind, value in self.optimizer.state[parameter].items():
                found[f"critic.optimizer.{kind}.{name}"] = value
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        if "critic.shift" not in tensors:
            self.network = None
            return
        self.shift, self.scale = tensors["critic.shift"].squeeze(), tensors["critic.scale"].squeeze()
        self._build(tensors["critic.weights.layers.0.weight"].shape[1], len(tensors["critic.weights.gains.0"]))
        assert self.network is not None
        for name, parameter in self.network.named_parameters():
            with torch.no_grad():
                parameter.copy_(tensors[f"critic.weights.{name}"])
            found: dict[str, Any] = {}
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"critic.optimizer.{kind}.{name}")
                if value is not None:
                    found[kind] = value.clone() if kind == "step" else value.to(self.device, copy=True)
            if found:
                self.optimizer.state[parameter] = found


def prompt_vectors(rollout: Rollout) -> Tensor:
    """(B, E) float32, one vector per sample for its prompt.

    It is the first floating-point tensor with B rows that the pipeline's text encoding returned, averaged over tokens.
    Where there is none, it is standard normal noise, a function of the text alone.
    """
    size, device = rollout.batch_size, rollout.records[0].sample.device
    for output, _ in rollout.embeddings.values():
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim and len(leaf) == size:
                width = leaf.shape[-1] if leaf.ndim > 1 else 1
                return leaf.detach().to(device).float().reshape(size, -1, width).mean(1)
    sources = [torch.Generator("cpu").manual_seed(key("prompt", text)) for text in rollout.prompts]
    return torch.stack([torch.randn(WIDTH_OF_TEXT, generator=source) for source in sources]).to(device)
