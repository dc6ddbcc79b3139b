"""A training run small enough to be killed many times: in processes that begin with everything imported.

The processes are forked off a server that has imported torch and diffusers but never used them, so one costs
milliseconds; and a kill -9 is a real one.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tiny
from tiller import config
from tiller.algorithms.ddpo import DDPO
from tiller.distributed import World
from tiller.policy import Policy
from tiller.recipe import Model, Recipe
from tiller.run import Interrupts, Run, checkpoints, files, lines, sick
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.training import train

PROMPTS = ["a cat", "a dog", "two birds"]
SAMPLING = {"num_inference_steps": 2, "height": 16, "width": 16}
SETTINGS = TrainConfig(
    epochs=4, samples_per_epoch=4, group_size=2, batch_size=2, updates_per_epoch=2, learning_rate=1e-3, ema_decay=0.9
)
RECIPE = Recipe(prompts="animals", train=SETTINGS, model=Model(name="tiny", lora_rank=2))
EVERY = 2  # epochs between checkpoints


def _policy() -> Policy:
    return Policy(tiny.tiny_sd(), lora_rank=2)


def _warm_up() -> None:
    """Import what torch, diffusers and transformers import on first use. No gradients: they do not survive a fork."""
    policy = _policy()
    TrainState(policy, SETTINGS)
    policy.sample(PROMPTS[0], **SAMPLING)


_warm_up()
_servers = multiprocessing.get_context("forkserver")
_servers.set_forkserver_preload(["trial"])


@dataclass(frozen=True)
class Event:
    """What a process does to itself when a point is reached for the `count`-th time; "anything" is every point."""

    point: str
    count: int
    action: str  # signals, one after the other, and "hang": kill, term, int hang, term term ...

    def happen(self) -> None:
        """Do it."""
        for word in self.action.split():
            if word == "hang":
                time.sleep(600)
            os.kill(os.getpid(), getattr(signal, f"SIG{word.upper()}"))


class Counter:
    """Counts how often each point is reached, and lets events happen."""

    def __init__(self, events: Sequence[Event]):
        self.events = events
        self.counts: dict[str, int] = {}

    def __call__(self, point: str) -> None:
        for name in (point, "anything"):
            self.counts[name] = self.counts.get(name, 0) + 1
            for event in self.events:
                if (event.point, event.count) == (name, self.counts[name]):
                    event.happen()


def brightness(images: Sequence[Any], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float | None]:
    """The mean of a picture; missing for some."""
    means = [float(np.asarray(image, dtype=np.float64).mean()) for image in images]
    return [None if round(mean * 1000) % 7 == 0 else mean for mean in means]


def recipe(settings: TrainConfig = SETTINGS) -> dict[str, Any]:
    """The recipe as a run folder records it."""
    return config.to_mapping(replace(RECIPE, train=settings), complete=True)


def watch(reached: Callable[[str], None], policy: Policy) -> None:
    """Have `reached` called at every write of a run folder, denoiser call and optimiser step of this process."""
    for module in (files, lines, checkpoints):
        module.reached = reached  # type: ignore[attr-defined]
    policy.pipe.unet.register_forward_pre_hook(lambda *_: reached("denoise"))
    step = TrainState.step

    def counted(self: TrainState, settings: TrainConfig) -> float:
        reached("update")
        norm = step(self, settings)
        reached("updated")
        return norm

    TrainState.step = counted  # type: ignore[method-assign]


def run(
    folder: str | Path,
    events: Sequence[Event] = (),
    settings: TrainConfig = SETTINGS,
    policy: Policy | None = None,
    world: World | None = None,
) -> None:
    """Train in a run folder, from wherever it is."""
    torch.set_num_threads(1)
    policy, reached = policy or _policy(), Counter(events)
    watch(reached, policy)

    def reward(images: Sequence[Any], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float | None]:
        reached("reward")
        return brightness(images, prompts, metadata)

    with Run.open(folder, recipe(settings), world=world) as record, Interrupts(record.save_last) as interrupts:
        record.check_model(policy)
        state = TrainState(policy, settings)
        record.restore(state)
        reports = train(policy, PROMPTS, reward, DDPO(), settings, sampling=SAMPLING, state=state, world=world)
        for report in interrupts.over(sick.watch(reports, Path(folder), recipe(settings), world)):
            reached("report")
            record.log(report)
            if report.epoch % EVERY == 0 or report.epoch == settings.epochs:
                record.save(state)
        record.finish()


def run_shared(
    rank: int, size: int, port: int, folder: str, events: Sequence[Event], settings: TrainConfig, timeout: float
) -> None:
    """`run` in one of several processes, keeping what it drew and each update's gradient in the folder's `kept`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = World(timedelta(seconds=timeout)) if size > 1 else None
    policy, kept = _policy(), dict[str, torch.Tensor]()
    sample, step = policy.sample, TrainState.step

    def sampled(prompts: Sequence[str], **options: Any) -> Any:
        rollout = sample(prompts, **options)
        for row, (prompt, index) in enumerate(zip(rollout.prompts, rollout.samples, strict=True)):
            kept[f"picture {prompt} {index}"] = rollout.latents[-1][row].clone()
        return rollout

    def stepped(self: TrainState, settings: TrainConfig) -> float:
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        kept[f"gradient {self.updates}"] = torch.cat([gradient.flatten() for gradient in gradients])
        return step(self, settings)

    policy.sample = sampled  # type: ignore[method-assign, assignment]
    TrainState.step = stepped  # type: ignore[method-assign]
    run(folder, events, settings, policy, world)
    save_file(kept, f"{folder}-{size}-{rank}.safetensors")


def start(target: Callable[..., None], *args: Any) -> Any:
    """A process that runs `target`."""
    with pytest.MonkeyPatch.context() as patch:  # some versions of Python do not hand sys.path to the server
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        forkserver.ensure_running()
    process = _servers.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def ended(process: Any, seconds: float = 240) -> int:
    """Its exit code; -9 means killed."""
    process.join(seconds)
    assert process.exitcode is not None, "the process did not end"
    return process.exitcode


def once(folder: Path, *events: Event) -> int:
    """Run in a process of its own; the exit code."""
    return ended(start(run, folder, events))


def outcome(folder: Path) -> dict[str, str]:
    """Hashes of everything that must be the same whenever the same run is made."""
    newest = checkpoints.listed(folder / "checkpoints")[-1]
    paths = [
        folder / "metrics.jsonl",
        *(newest / name for name in ("state.safetensors", "state.json", "manifest.json")),
    ]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
