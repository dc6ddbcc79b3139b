"""Short runs on the toy, each sick on purpose: `python tests/sick_runs.py` writes what they logged to tests/data/runs.

What is kept of a run is what the diagnosis reads: config.yaml, metrics.jsonl and timings.jsonl.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiller import yaml_text
from tiller.algorithms.adjoint_matching import AdjointMatching
from tiller.algorithms.base import Algorithm
from tiller.algorithms.ddpo import DDPO
from tiller.algorithms.flow_grpo import FlowGRPO
from tiller.algorithms.ppo import PPO
from tiller.algorithms.refl import ReFL
from tiller.critic import CriticSettings
from tiller.kernels import DDIM
from tiller.policy import Policy
from tiller.run import lines
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.training import train
from toy import ToyPipeline, brightness, glow, toy

RUNS = Path(__file__).parent / "data" / "runs"
TRAIN = TrainConfig(epochs=24, samples_per_epoch=32, group_size=4, batch_size=16, learning_rate=3e-3)
NAMES: Mapping[type, str] = {
    DDPO: "ddpo",
    FlowGRPO: "flow_grpo",
    PPO: "ppo",
    ReFL: "refl",
    AdjointMatching: "adjoint_matching",
}
PROMPTS = [f"prompt {number}" for number in range(8)]


class Moving(ToyPipeline):
    """Computes something else where gradients are wanted, as a layer with a fast path of its own may."""

    def denoise(self, latents: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return super().denoise(latents * 1.5 if torch.is_grad_enabled() else latents, t, condition)


@dataclass(frozen=True)
class Case:
    """One run."""

    reward: Any = brightness
    algorithm: Algorithm = field(default_factory=lambda: DDPO(clip_range=0.02, min_count=8))
    train: TrainConfig = TRAIN
    kind: type[ToyPipeline] = ToyPipeline


def rarely(images: Sequence[Any], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
    """1 for what is very bright, which nearly nothing is."""
    return [float(value > 185) for value in brightness(images, prompts, metadata)]


def chance(images: Sequence[Any], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
    """Has nothing to do with what can be seen."""
    return [float(hashlib.sha256(np.asarray(image).tobytes()).digest()[0]) for image in images]


def moody(images: Sequence[Any], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float | None]:
    """Does not answer for every fourth picture or so."""
    return [None if int(np.asarray(image).astype(int).sum()) % 4 == 0 else value
            for image, value in zip(images, brightness(images, prompts, metadata), strict=True)]  # fmt: skip


def enough(pictures: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    """Brightness, of which there soon is enough."""
    return glow(pictures, prompts, metadata).clamp(max=125.0)


enough.differentiable = True  # type: ignore[attr-defined]


def slow(images: Sequence[Any], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
    """Takes its time."""
    time.sleep(0.5)
    return brightness(images, prompts, metadata)


def darkening(images: Sequence[Any], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
    """Brightness, less and less of it with every call: what a drifting judge does."""
    darkening.calls += 1
    return [value - 2.0 * darkening.calls for value in brightness(images, prompts, metadata)]


darkening.calls = 0

CASES: Mapping[str, Case] = {
    "healthy": Case(glow, ReFL(target=None), replace(TRAIN, learning_rate=1e-2)),
    "no_spread": Case(rarely),
    "missing_scores": Case(moody),
    "reward_flat": Case(chance),
    "reward_falls": Case(darkening),
    "saturated": Case(enough, ReFL(target=None), replace(TRAIN, learning_rate=3e-2)),
    "clipped": Case(algorithm=DDPO(clip_range=1e-4, min_count=8, inner_epochs=4), train=replace(TRAIN, epochs=8)),
    "kl_dominates": Case(
        algorithm=FlowGRPO(clip_range=1.0, kl_coefficient=2000.0, kl_estimator="gaussian", inner_epochs=2),
        train=replace(TRAIN, epochs=8, learning_rate=1e-2),
    ),
    "first_ratio": Case(train=replace(TRAIN, epochs=4), kind=Moving),
    "value_network": Case(
        algorithm=PPO(clip_range=0.02, critic=CriticSettings(learning_rate=1.0)), train=replace(TRAIN, epochs=8)
    ),
    "adjoint_dropped": Case(
        glow, AdjointMatching(reward_weight=1e4, kernel=DDIM(1.0)), replace(TRAIN, epochs=6)
    ),
    "above_target": Case(glow, ReFL(target=60.0), replace(TRAIN, epochs=6)),
    "reward_waits": Case(slow, train=replace(TRAIN, epochs=6)),
}  # fmt: skip


def make(name: str, folder: Path) -> None:
    """Run a case, and write down what it logged."""
    case = CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    policy = Policy(toy(case.kind), lora_rank=None)
    settings = asdict(case.algorithm)
    settings.pop("kernel")
    algorithm = {"name": NAMES[type(case.algorithm)], **settings}
    recipe = {"reward": case.reward.__name__, "algorithm": algorithm, "train": _plain(asdict(case.train))}
    (folder / "config.yaml").write_text(yaml_text.write(recipe))
    state = TrainState(policy, case.train, case.algorithm)  # given, so that nothing is refused beforehand
    for report in train(policy, PROMPTS, case.reward, case.algorithm, case.train, state=state):
        lines.append(folder / "metrics.jsonl", _short({"epoch": report.epoch, **report.metrics}))
        lines.append(folder / "timings.jsonl", _short({"epoch": report.epoch, **report.timings}))


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def _short(line: Mapping[str, float]) -> dict[str, float]:
    """Six digits will do."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value
            for name, value in line.items()}  # fmt: skip


if __name__ == "__main__":
    import sys

    run: Callable[[str, Path], None] = make
    for wanted in sys.argv[1:] or CASES:
        run(wanted, RUNS / wanted)
