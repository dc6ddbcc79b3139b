"""How long a run takes: operations over a speed that was measured here, or is stated for machines like this one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiller.dry_run.headers import Files
from tiller.dry_run.machine import Machine
from tiller.dry_run.memory import branches, row_cost
from tiller.dry_run.network import decoder_cost, picture_size
from tiller.dry_run.work import Work
from tiller.recipe import Recipe

PER_THREAD = 40e9  # operations per second of one CPU thread in small models; docs/dry-run.md has the measurement
SHARE = 0.3  # of a card's nominal operations that are reached
CARDS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12, "3090": 71e12, "T4": 65e12}
OTHER_CARD = 50e12
TRAINED, TRAINED_WHOLE, RECOMPUTED = 2.2, 3.0, 1.0  # a call with a gradient, in calls without one


@dataclass(frozen=True)
class Speed:
    """Of one machine."""

    forward: float  # denoiser operations per second without a gradient
    training: float  # of the same operations, when they come with a gradient
    decoding: float  # decoder operations per second
    source: str  # where it is from, and how sure that is


def speed_of(machine: Machine, recipe: Recipe, file: Path | None = None) -> Speed:
    """The calibration of this machine, of the same model if there is one; else stated speeds."""
    known = _read(file or store()).get(machine.key, {})
    exact, others = known.get(_name(recipe)), [entry for key, entry in known.items() if _same_kind(key, recipe)]
    if exact:
        return _as_speed(exact, "measured here on this model; expect it within a third")
    if others:
        return _as_speed(others[-1], "measured here on another model; expect it within a factor of two")
    cards = [speed for name, speed in CARDS.items() if name in machine.name]
    forward = (cards or [OTHER_CARD])[0] * SHARE if machine.kind == "cuda" else PER_THREAD * machine.threads
    times = TRAINED_WHOLE if recipe.model.lora_rank is None else TRAINED
    times += RECOMPUTED if recipe.model.gradient_checkpointing else 0
    said = "a third of the card's nominal speed, never measured" if machine.kind == "cuda" else "a usual CPU thread's"
    words = f"not measured here: {said}; it may be wrong by a factor of three. --calibrate measures it"
    return Speed(forward, forward / times, forward, words)


def seconds(work: Work, files: Files, recipe: Recipe, speed: Speed, processes: int = 1) -> tuple[float, float] | None:
    """(of an epoch, of the whole run), without the reward's own time; None where the shapes are not known."""
    cost = row_cost(files, recipe)
    if cost is None:
        return None
    rows = recipe.train.samples_per_epoch * branches(files.denoiser, recipe.sampling)
    calls = max(1, recipe.train.samples_per_epoch // max(1, _batch(recipe)))
    decode = decoder_cost(files, picture_size(files, recipe.sampling))[0] / speed.decoding
    one = cost.operations / speed.forward  # of a row
    trained = cost.operations / speed.training
    epoch = rows / calls * ((work.drawing + work.asking) * one + work.training * trained)
    epoch += decode * recipe.train.samples_per_epoch * (work.drawing > 0)
    shown = work.shown * (branches(files.denoiser, recipe.sampling) * work.steps * one + decode)
    return epoch / processes, (work.epochs * epoch + shown) / processes


def _batch(recipe: Recipe) -> int:
    return recipe.train.batch_size or recipe.train.samples_per_epoch


def store() -> Path:
    """The file of calibrations."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tiller" / "speed.json"


def keep(machine: Machine, recipe: Recipe, measured: Mapping[str, float], file: Path | None = None) -> Path:
    """Write a calibration down: operations per second, `forward`, `training` and `decoding`."""
    path = file or store()
    known = _read(path)
    known.setdefault(machine.key, {})[_name(recipe)] = dict(measured)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1, sort_keys=True))
    return path


def _name(recipe: Recipe) -> str:
    model = recipe.model
    what = "all weights" if model.lora_rank is None else "LoRA"
    checkpointed = ", checkpointed" if model.gradient_checkpointing else ""
    return f"{Path(model.name).name} {model.dtype}/{model.mixed_precision} {what}{checkpointed}"


def _same_kind(key: str, recipe: Recipe) -> bool:
    return key.split(" ", 1)[1] == _name(recipe).split(" ", 1)[1]


def _as_speed(entry: Mapping[str, Any], source: str) -> Speed:
    return Speed(entry["forward"], entry["training"], entry["decoding"], source)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
