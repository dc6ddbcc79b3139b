"""What a recipe will do, counted: pictures, reward calls, denoiser calls, optimiser steps."""

from __future__ import annotations

from dataclasses import dataclass

from tiller import reward_spec
from tiller.dry_run.facts import Facts
from tiller.prompts import SETS, held_out, load
from tiller.recipe import Recipe

USUAL_STEPS = 50  # of a pipeline whose recipe does not say
SHEET, DRIFT = 2, 8  # pictures of a prompt on the sheet; prompts on which the distance from the base is measured


@dataclass(frozen=True)
class Work:
    """Of a whole run, all processes together. A call takes one batch through the denoiser, all branches at once."""

    epochs: int
    updates: int  # optimiser steps
    pictures: int  # drawn to learn from
    scored: int  # by the trained reward, of these
    steps: int  # denoising steps of a picture
    drawing: int  # denoiser calls of an epoch that draw
    training: int  # with a gradient
    asking: int  # of copies of the weights, without one
    shown: int  # pictures for sheets, evaluations and the distance from the base, in the whole run
    judged: int  # scores of these


def count(recipe: Recipe, facts: Facts, batch_size: int) -> Work:
    """Count a recipe's work; the preflight's few calls are left out, and random choices count with their mean."""
    train, steps = recipe.train, int(recipe.sampling.get("num_inference_steps") or USUAL_STEPS)
    batches, inner = train.samples_per_epoch // batch_size, int(facts.settings.get("inner_epochs", 1))
    offline = recipe.reward is None
    passes = live_steps(facts, recipe, steps) if facts.walk == "live" else facts.trained(steps)
    on_data = 2 if recipe.data and not offline and facts.settings.get("data_weight") else 1
    pictures = 0 if offline else train.epochs * train.samples_per_epoch
    shown, judged = _shown(recipe)
    return Work(
        epochs=train.epochs,
        updates=train.epochs * inner * train.updates_per_epoch,
        pictures=pictures,
        scored=pictures,
        steps=steps,
        drawing=0 if offline else batches * steps,
        training=round(batches * inner * passes * on_data),
        asking=round(batches * inner * passes * facts.asked),
        shown=shown,
        judged=judged,
    )


def live_steps(facts: Facts, recipe: Recipe, steps: int) -> float:
    """Steps taken with a graph in one pass of an algorithm that differentiates the reward."""
    name, settings = recipe.algorithm.name, facts.settings
    if name == "draft":
        return min(int(settings.get("last_steps", 1)), steps)
    if name == "draft_lv":
        return 1 + int(settings.get("noised", 2))
    if name == "align_prop":
        kept = settings.get("truncation", "uniform")
        return (steps + 1) / 2 if kept == "uniform" or not isinstance(kept, int) else min(kept, steps)
    return 1


def _shown(recipe: Recipe) -> tuple[int, int]:
    """(pictures, scores) beside those that are learned from."""
    train, wish = recipe.train, recipe.evaluation
    source = recipe.held_out or recipe.prompts
    splits = list(held_out(source).values()) if source in SETS else [load(source)]
    rewards = len(reward_spec.read_reported(wish.rewards)) + (recipe.reward is not None)
    compared = 2 * wish.samples_per_prompt * sum(map(len, splits))
    looks = 1 + train.epochs // wish.every if 0 < wish.every <= train.epochs else 0
    looked = looks * wish.pictures * (len(splits) + (source in SETS or recipe.held_out is not None))
    sheets = SHEET * recipe.run.sample_prompts * (1 + -(-train.epochs // recipe.run.checkpoint_every))
    drift = 5 * DRIFT * max(2, wish.samples_per_prompt) if recipe.model.lora_rank is not None else 0
    return compared + looked + sheets + drift, (compared + looked) * rewards
