"""What a run holds, and which of its weights are wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tiller import config
from tiller.commands import building
from tiller.export.families import ExportError
from tiller.policy import Policy
from tiller.policy.weights import load
from tiller.recipe import Recipe
from tiller.run import checkpoints
from tiller.types import RunError

CHOICES = "model, last, ema, best, or an epoch that is kept, such as 10"


@dataclass(frozen=True)
class Trained:
    """A run, opened for export: float32, on the recipe's device, with the wanted weights in place."""

    folder: Path
    recipe: Recipe
    policy: Policy
    weights: str  # which they are, in words
    epoch: int  # after which they were taken


def read_run(folder: Path, weights: str = "model") -> Trained:
    """The run's recipe, and its model with the wanted weights.

    Args:
        weights: `model` is what the run saved at its end (the running mean, where it keeps one); `last` and `ema` are
            the newest checkpoint's weights and running mean; `best` those of the best evaluation that lost
            nothing; a number is an epoch.

    Raises:
        RunError: this is no run, or it has no such weights.
    """
    if not (folder / "config.yaml").exists():
        raise RunError(f"{folder} is no run folder: it has no config.yaml; give a folder that tiller train wrote.")
    recipe = config.load(Recipe, folder / "config.yaml")
    saved = folder / "model"
    if weights == "model":
        if not saved.exists():
            raise RunError(f"{folder} has not finished; go on training it, or give --weights last for its checkpoint.")
        whole = recipe.model.lora_rank is None
        policy = open_policy(recipe, str(saved) if whole else None)
        if not whole:
            load(policy, saved)
        kind = "the running mean of the weights" if recipe.train.ema_decay is not None else "the weights"
        return Trained(folder, recipe, policy, f"{kind} at the end of the run", recipe.train.epochs)
    if weights == "best":
        file, epoch = _best(folder)
        policy = open_policy(recipe)
        _put(policy, load_file(file), file)
        return Trained(folder, recipe, policy, f"the best weights of the run, those after epoch {epoch}", epoch)
    checkpoint, kind = _choose(folder, recipe, weights)
    tensors = checkpoints.load(checkpoint).tensors
    policy = open_policy(recipe)
    _put(policy, {name: tensors.get(f"{kind}.{name}") for name in policy.parameters}, checkpoint)
    words = "the running mean of the weights" if kind == "ema" else "the weights"
    epoch = checkpoints.epoch_of(checkpoint)
    return Trained(folder, recipe, policy, f"{words} after epoch {epoch}", epoch)


def open_policy(recipe: Recipe, name: str | None = None) -> Policy:
    """The recipe's pipeline as its plain self: float32, no autocast, diffusers' own attention and layout."""
    model = dataclasses.replace(recipe.model, dtype="float32", mixed_precision="no", name=name or recipe.model.name)
    return Policy.from_pretrained(
        model.name,
        lora_rank=model.lora_rank,
        lora_alpha=model.lora_alpha,
        target_modules=model.target_modules,
        seed=recipe.train.seed,
        device=building.device(model.device),
        **loading(recipe, name),
    )


def loading(recipe: Recipe, name: str | None = None) -> dict[str, Any]:
    """What to load the base model with: float32, and the revision and variant that the recipe names."""
    pinned = {key: getattr(recipe.model, key) for key in ("revision", "variant") if name is None}
    return {"dtype": torch.float32, **{key: value for key, value in pinned.items() if value is not None}}


def _choose(folder: Path, recipe: Recipe, weights: str) -> tuple[Path, str]:
    """The checkpoint, and which of its sets of weights."""
    kept = checkpoints.listed(folder / "checkpoints")
    if not kept:
        raise RunError(f"{folder} holds no checkpoint; give --weights model.")
    averaged = recipe.train.ema_decay is not None
    if weights == "ema":
        if not averaged:
            raise RunError(f"{folder} keeps no running mean of its weights (train.ema_decay is null).")
        return kept[-1], "ema"
    if weights == "last":
        return kept[-1], "weights"
    wanted = weights.removeprefix("epoch-")
    found = [path for path in kept if wanted.isdecimal() and checkpoints.epoch_of(path) == int(wanted)]
    if not found:
        epochs = ", ".join(str(checkpoints.epoch_of(path)) for path in kept)
        raise RunError(f"--weights is {weights!r}; it must be {CHOICES} (kept here: {epochs}).")
    return found[0], "ema" if averaged else "weights"


def _best(folder: Path) -> tuple[Path, int]:
    """The weights of the best evaluation that lost nothing, and its epoch (`tiller.commands.watching`)."""
    kept = sorted((folder / "evaluation").glob("best-*.safetensors"))
    if not kept:
        raise RunError(
            f"{folder} holds no best weights; evaluation.every makes a run keep them. Give --weights model, or last."
        )
    return kept[-1], int(kept[-1].stem.removeprefix("best-"))


@torch.no_grad()
def _put(policy: Policy, values: Mapping[str, Tensor | None], checkpoint: Path) -> None:
    for name, parameter in policy.parameters.items():
        value = values.get(name)
        if value is None or value.shape != parameter.shape:
            raise ExportError(
                f"{checkpoint} does not fit the model that its run names ({name}); its recipe has changed."
            )
        parameter.copy_(value)
