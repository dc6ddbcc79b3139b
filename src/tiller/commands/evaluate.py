"""`tiller evaluate RUN`: base against tuned model, on the same prompts and the same noise, split by split."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rich.console import Console

from tiller import config
from tiller.commands import building
from tiller.commands.outcome import Outcome, outcome_tables
from tiller.commands.sample import open_run
from tiller.commands.train import evaluate_policy, write_scores
from tiller.recipe import Evaluation
from tiller.run.rewards import restored
from tiller.types import RunError


def run(folder: Path, overrides: list[str]) -> int:
    """Score both models anew, print the table, and keep it beside the run's own evaluation."""
    if not (folder / "config.yaml").exists():
        raise RunError(f"{folder} is no run folder: it has no config.yaml; give a folder that tiller train wrote.")
    recipe, tuned = open_run(folder)
    settings = config.from_mapping(Evaluation, config.to_mapping(recipe.evaluation) | config.parse_pairs(overrides))
    recipe = dataclasses.replace(recipe, evaluation=settings)
    splits, rewards = building.splits(recipe), building.without_people(building.rewards(recipe, folder))
    rewards = {name: restored(folder, reward) for name, reward in rewards.items()}
    after = evaluate_policy(tuned, recipe, splits, rewards)
    del tuned
    before = evaluate_policy(building.policy(recipe.model, recipe.train.seed), recipe, splits, rewards)
    outcome = Outcome(before, after, next(iter(rewards), None))
    again = folder / "evaluation" / "again"
    write_scores(again / "base.json", before)
    write_scores(again / "tuned.json", after)
    (again / "comparison.json").write_text(json.dumps(outcome.to_data(), indent=1))
    console = Console(highlight=False)
    for table in outcome_tables(outcome):
        console.print(table)
    return 0
