"""`tiller demo`: the shipped model becomes better at what a reward asks, within minutes, on two CPU cores."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tiller import config
from tiller.commands import train
from tiller.recipe import Recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "demo.yaml"


def run(overrides: list[str], output: str | None) -> int:
    """Train as the demo's recipe says, into `output` or runs/demo."""
    recipe = config.load(Recipe, RECIPE, overrides)
    if output:
        recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, output_dir=output))
    return train.run(recipe, name="demo")
