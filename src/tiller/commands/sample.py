"""`tiller sample`: pictures from a model, a run, or a model with an adapter, and one sheet of them all."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiller import config
from tiller.commands import building
from tiller.evaluation import draw_pictures
from tiller.policy import Policy
from tiller.policy.weights import load
from tiller.recipe import Model, Recipe
from tiller.report import sheet
from tiller.report.listed import write_list
from tiller.types import Prompt, RunError


def run(
    model: str,
    prompts: Sequence[Prompt],
    adapter: str | None,
    per_prompt: int,
    seed: int,
    output: str,
    sampling: Mapping[str, Any],
) -> int:
    """Draw `per_prompt` pictures of each prompt into the folder `output`."""
    folder = Path(output)
    if (Path(model) / "config.yaml").exists():
        recipe, policy = open_run(Path(model))
        call = building.per_picture(recipe.sampling) | recipe.evaluation.sampling | dict(sampling)
    else:
        policy, call = building.policy(Model(name=model, lora_rank=None), seed), dict(sampling)
    if adapter:
        policy.pipe.load_lora_weights(adapter)
    pictures = draw_pictures(policy, prompts, per_prompt, seed, min(16, len(prompts) * per_prompt), call)
    folder.mkdir(parents=True, exist_ok=True)
    rows, listed = [], []
    for index, prompt in enumerate(prompts):
        drawn = pictures[index * per_prompt : (index + 1) * per_prompt]
        rows.append((prompt.text, drawn))
        for number, picture in enumerate(drawn):
            listed.append((f"{index:04d}-{_slug(prompt.text)}-{number}.png", prompt.text, ""))
            picture.save(folder / listed[-1][0])
    write_list(folder, listed)
    sheet(rows, folder / "sheet.png")
    print(f"{len(pictures)} pictures in {folder}, all of them on {folder / 'sheet.png'}")
    return 0


def open_run(folder: Path) -> tuple[Recipe, Policy]:
    """A run's recipe, and its model with what it has learned.

    Raises:
        RunError: the run has not finished, so there is no model to load.
    """
    recipe = config.load(Recipe, folder / "config.yaml")
    if not (folder / "model").exists():
        raise RunError(
            f"{folder} holds no finished model; go on training it first (tiller train with the same recipe)."
        )
    if recipe.model.lora_rank is None:
        return recipe, building.policy(dataclasses.replace(recipe.model, name=str(folder / "model")), recipe.train.seed)
    policy = building.policy(recipe.model, recipe.train.seed)
    load(policy, folder / "model")
    return recipe, policy


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-")
