"""`train.batch_size: auto`, solved: from the recipe and the memory alone, and never anew for a run that has begun."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tiller import yaml_text
from tiller.config import build
from tiller.dry_run.facts import Facts, facts_of
from tiller.dry_run.headers import Files, folder_of, read
from tiller.dry_run.machine import Machine, this_machine
from tiller.dry_run.memory import estimate
from tiller.geometry import Choice, Sizes, choose, memory_bytes
from tiller.recipe import Recipe
from tiller.settings import AUTO
from tiller.types import ConfigError

CONFIG, METRICS = "config.yaml", "metrics.jsonl"  # of a run folder, as `tiller.run.claim` calls them
FREE_SHARE = 0.9  # of the device's memory


def solved(recipe: Recipe, folder: Path) -> tuple[Recipe, str]:
    """The recipe with a number for its batch size, and a sentence that says why this one; empty where it was given.

    Raises:
        ConfigError: no size works, or the model is not here to be measured.
    """
    if recipe.train.batch_size != AUTO:
        return recipe, ""
    begun = _begun(folder)
    if begun:
        return with_batch(recipe, begun), f"batch_size {begun}, as the run began with (train.batch_size is auto)."
    model = folder_of(recipe.model)
    if model is None:
        raise ConfigError(
            f"train.batch_size is auto, and {recipe.model.name} is not on this machine to be measured; give a "
            f"number, or first: hf download {recipe.model.name}"
        )
    choice = fitted(recipe, read(model, recipe.model.variant), this_machine(recipe.model.device))
    return with_batch(recipe, choice.batch_size), choice.reason


def with_batch(recipe: Recipe, batch_size: int) -> Recipe:
    """The recipe with this batch size."""
    return replace(recipe, train=replace(recipe.train, batch_size=batch_size))


def known_facts(recipe: Recipe) -> Facts:
    """What the algorithm asks for; one that is not tiller's own is imported to be asked."""
    found = facts_of(recipe.algorithm)
    if found is not None:
        return found
    own = build(recipe.algorithm)
    settings = {"inner_epochs": own.inner_epochs, "timestep_fraction": own.timestep_fraction}
    return Facts(own.walk, own.whole_groups, needs=len(own.needs), copies=len(own.copies), settings=settings)


def sizes_of(recipe: Recipe, facts: Facts, processes: int) -> Sizes:
    """What a batch size of this recipe must fit."""
    train = recipe.train
    return Sizes(train.samples_per_epoch, train.group_size, train.updates_per_epoch, processes, facts.whole_groups)


def fitted(recipe: Recipe, files: Files, machine: Machine) -> Choice:
    """The batch size that is chosen for a machine.

    Raises:
        ConfigError: no size works, or the files do not tell what a batch needs.
    """
    facts = known_facts(recipe)
    memory = estimate(files, recipe, facts, machine.kind, machine.processes)
    if memory is None:
        raise ConfigError(
            f"train.batch_size is auto, and the weights of {recipe.model.name} are not on this machine as safetensors, "
            "so nothing tells what fits; give a number."
        )
    shared = machine.processes if machine.kind == "cpu" else 1  # cards have their own memory
    budget = memory_bytes(recipe.train.memory) if recipe.train.memory else FREE_SHARE * machine.memory / shared
    return choose(sizes_of(recipe, facts, machine.processes), memory.needs, budget)


def _begun(folder: Path) -> int:
    """The batch size of the run in a folder, if one has finished an epoch there; else 0."""
    if not (folder / CONFIG).exists() or not (folder / METRICS).exists():
        return 0
    found = yaml_text.read(folder / CONFIG)
    return int((found.get("train") or {}).get("batch_size") or 0) if isinstance(found, dict) else 0
