"""A comparison: variants of one recipe, several seeds each, at an equal budget of reward calls. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiller import config
from tiller.recipe import Recipe
from tiller.types import ConfigError


@dataclass(frozen=True)
class Comparison:
    """What to compare. Every variant is the recipe with a few settings changed; nothing else differs."""

    recipe: str  # a recipe's file, beside this one
    reward_calls: int  # pictures that every run may have scored
    runs: dict[str, Any] = field(default_factory=dict)  # name -> {key.sub: value}, as on the command line
    seeds: tuple[int, ...] = (0, 1, 2)
    split: str = "unseen_animals"  # the held-out split that the table and the plot show
    output_dir: str | None = None  # None is runs/ and the file's name
    jobs: int = 1  # runs at a time, one thread each

    def __post_init__(self) -> None:
        if self.reward_calls < 1 or self.jobs < 1:
            raise ConfigError("reward_calls and jobs must be at least 1.")
        if not self.runs or not self.seeds:
            raise ConfigError("there is nothing to compare; name at least one entry under runs:, and one seed.")


@dataclass(frozen=True)
class Variant:
    """One run of a comparison."""

    name: str
    seed: int
    recipe: Path
    overrides: tuple[str, ...]
    folder: Path


def variants(comparison: Comparison, file: Path) -> Iterator[Variant]:
    """Every run of the comparison in `file`; each one's recipe is checked here, before any is started.

    Raises:
        ConfigError: a variant is no valid recipe, or its epochs do not divide the budget.
    """
    recipe = file.parent / comparison.recipe
    folder = Path(comparison.output_dir or Path("runs") / file.stem)
    for seed in comparison.seeds:
        for name, changes in comparison.runs.items():
            if not isinstance(changes, Mapping):
                raise ConfigError(f"config error: runs.{name} is {changes!r}; write `key.sub: value` lines under it.")
            overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
            whole = config.load(Recipe, recipe, overrides)
            epochs, rest = divmod(comparison.reward_calls, whole.train.samples_per_epoch)
            if rest or not epochs:
                raise ConfigError(
                    f"config error: reward_calls ({comparison.reward_calls}) is no multiple of what an epoch of {name} "
                    f"draws ({whole.train.samples_per_epoch}); change one of them."
                )
            target = folder / f"{name}-{seed}"
            overrides += [f"train.epochs={epochs}", f"train.seed={seed}", f"run.output_dir={target}"]
            yield Variant(name, seed, recipe, tuple(overrides), target)
