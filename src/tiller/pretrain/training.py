"""One resumable optimisation: a module, AdamW, averaged weights and a step count, saved as safetensors and JSON."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tiller.types import RunError


@dataclass(frozen=True)
class Progress:
    """Where pretraining is."""

    phase: str  # "autoencoder", "denoiser", "decoder"
    step: int  # steps done
    steps: int  # steps in this phase
    loss: float  # mean since the last report
    images_per_second: float


class Training:
    """AdamW on a module. After `load`, it goes on bit for bit where `save` was called."""

    def __init__(self, module: nn.Module, lr: float, steps: int, ema: float = 0.0) -> None:
        self.module = module
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.lr, self.steps, self.ema, self.step = lr, steps, ema, 0
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()} if ema else {}

    def rate(self) -> float:
        """Learning rate of this step: 2 % warm-up, constant, then linear to 0 over the last 40 %."""
        warm = min(1.0, (self.step + 1) / max(1, 0.02 * self.steps))
        return self.lr * warm * min(1.0, (self.steps - self.step) / (0.4 * self.steps))

    def update(self, loss: Tensor) -> None:
        """One step down the gradient of `loss` ()."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        if self.average:
            decay = min(self.ema, self.step / (self.step + 10))
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)

    def use_average(self) -> None:
        """Puts the averaged weights into the module; training is over."""
        with torch.no_grad():
            for name, value in self.average.items():
                self.parameters[name].copy_(value)

    def save(self, path: Path) -> None:
        """Writes everything needed to go on; an interrupted write leaves the old file."""
        state = {f"weight.{n}": p.detach() for n, p in self.parameters.items()}
        state |= {f"average.{n}": t for n, t in self.average.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                state[f"{key}.{name}"] = value
        tensors = {k: v.contiguous() for k, v in state.items()}
        write_tensors(path, tensors, {"step": str(self.step), "steps": str(self.steps)})

    @torch.no_grad()
    def load(self, path: Path) -> bool:
        """Takes up what `save` wrote; False if there is nothing."""
        if not path.exists():
            return False
        state, about = load_file(path), read_metadata(path)
        if int(about["steps"]) != self.steps or any(f"weight.{n}" not in state for n in self.parameters):
            raise RunError(f"{path} belongs to other settings; choose another output folder or delete this one")
        self.step = int(about["step"])
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"weight.{name}"])
            if name in self.average:
                self.average[name].copy_(state[f"average.{name}"])
            if f"exp_avg.{name}" in state:
                self.optimiser.state[parameter] = {"step": state[f"step.{name}"].to(parameter.device)} | {
                    # in the parameter's own memory layout, which the fused optimiser takes for granted
                    k: torch.empty_like(parameter).copy_(state[f"{k}.{name}"])
                    for k in ("exp_avg", "exp_avg_sq")
                }
        return True


def optimise(
    training: Training, loss: Callable[[int], Tensor], phase: str, batch: int, path: Path, save_every: int
) -> Iterator[Progress]:
    """Runs `training` to its end, `loss(step)` being a function of the step alone; reports every 20 steps."""
    training.load(path)
    losses: list[float] = []
    since = time.perf_counter()
    while training.step < training.steps:
        value = loss(training.step)
        training.update(value)
        losses.append(value.item())
        done = training.step == training.steps
        if done or training.step % save_every == 0:
            training.save(path)
        if done or training.step % 20 == 0:
            speed = batch * len(losses) / (time.perf_counter() - since)
            yield Progress(phase, training.step, training.steps, sum(losses) / len(losses), speed)
            losses, since = [], time.perf_counter()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    save_file(tensors, beside, metadata)
    os.replace(beside, path)


def read_metadata(path: Path) -> dict[str, str]:
    """The header's metadata of a safetensors file."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header.get("__metadata__", {})
