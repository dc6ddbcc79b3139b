"""From a recipe's plain data to the objects it names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from tiller import config, reward_spec
from tiller.algorithms.base import Algorithm
from tiller.commands import quiet
from tiller.distributed import World
from tiller.policy import Policy, layout
from tiller.prompts import SETS, held_out, load
from tiller.recipe import Model, Recipe
from tiller.reward_spec import RewardSpec
from tiller.rewards import Reward, resolve, within
from tiller.rewards.cache import Store, cached
from tiller.rewards.mix import Mix, mix
from tiller.rewards.resolve import complete
from tiller.run.claim import CACHE, STACKS
from tiller.types import ConfigError, Prompt
from tiller.vote import asks_people

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def algorithm(recipe: Recipe) -> Algorithm:
    """The recipe's algorithm, with the recipe's kernel where it names one."""
    built = config.build(recipe.algorithm)
    return built if recipe.kernel is None else replace(built, kernel=config.build(recipe.kernel))


def policy(model: Model, seed: int) -> Policy:
    """The pipeline, loaded and put on its device, with fresh adapters."""
    quiet.hide_bars()
    loaded = Policy.from_pretrained(
        model.name,
        lora_rank=model.lora_rank,
        lora_alpha=model.lora_alpha,
        target_modules=model.target_modules,
        mixed_precision=model.mixed_precision,
        seed=seed,
        device=device(model.device),
        dtype=DTYPES[model.dtype],
        **{key: getattr(model, key) for key in ("revision", "variant") if getattr(model, key) is not None},
    )
    bfloat16 = model.mixed_precision == "bf16" or model.dtype == "bfloat16"
    for denoiser in loaded.denoisers.values():
        layout.plain_attention(denoiser, bfloat16)
        if model.channels_last:
            layout.channels_last(denoiser)
        if model.mixed_precision == "bf16":
            layout.cast_once(denoiser)
        if model.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        if model.compile:
            # rounded as uncompiled code rounds, so that calls with and without a graph agree to the bit
            rounding: dict[str, Any] | None = {"emulate_precision_casts": True} if bfloat16 else None
            denoiser.forward = torch.compile(denoiser.forward, options=rounding)
    decoder: Any = getattr(loaded.pipe, "vae", None)
    if model.gradient_checkpointing and getattr(decoder, "_supports_gradient_checkpointing", False):
        decoder.enable_gradient_checkpointing()  # a reward's gradient may come back through it
    return loaded


def device(name: str) -> torch.device:
    """The device a recipe asks for; "auto" is the launcher's, or the best there is.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return World().device
    try:
        wanted = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"config error: model.device is {name!r}; give auto, cpu, cuda, cuda:1 or mps.") from error
    there: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if not there.get(wanted.type, lambda: False)():
        raise ConfigError(f"model.device is {name!r}, but this machine has none; give model.device=cpu or auto.")
    return wanted


def splits(recipe: Recipe) -> dict[str, list[Prompt]]:
    """The prompts to evaluate on, by split: a built-in set's held-out ones, or a file's, or the trained ones."""
    source = recipe.held_out or recipe.prompts
    return held_out(source) if source in SETS else {"held_out" if recipe.held_out else "trained": load(source)}


def rewards(recipe: Recipe, folder: Path) -> dict[str, Reward]:
    """The trained reward first, then those that are only reported, by the names the recipe gives them.

    There may be none, where preference pairs are trained on. Each must answer in the recipe's time; where one does not,
    the stacks go into the run's folder. What is deterministic has a cache there.
    """
    rank = World().rank
    store = Store(folder / (CACHE if not rank else CACHE.replace(".", f"-{rank}.")))

    def built(spec: RewardSpec) -> Reward:
        reward = resolve(spec.name, spec.settings, spec.key)
        if asks_people(reward):
            return getattr(reward, "in_run", lambda _: reward)(folder)
        return cached(within(reward, recipe.run.reward_timeout, folder / STACKS), reward, store)

    found: dict[str, Reward] = {}
    trained, title = reward_spec.read(recipe.reward), reward_spec.heading(recipe.reward)
    if title is not None:
        found[title] = mix(trained, [built(spec) for spec in trained])
        if isinstance(found[title], Mix) and asks_people(found[title]):
            raise ConfigError(
                "people cannot be one of several rewards, nor be weighted: the trial before training would ask them "
                "about pictures that teach nothing; name people alone."
            )
    for spec in reward_spec.read_reported(recipe.evaluation.rewards):
        same = [one for one in trained if (one.name, one.settings) == (spec.name, spec.settings)]
        if not same or len(trained) > 1:  # else it is the trained one, which is there already
            label = spec.label if spec.label not in found else f"{spec.label} (reported)"
            found[label] = built(spec)
            if asks_people(found[label]):
                raise ConfigError(
                    "evaluation.rewards names people, who compare pictures with each other; leave it out, and let them "
                    "vote on base against tuned model with tiller vote RUN."
                )
    return found


def without_people(rewards: Mapping[str, Reward]) -> dict[str, Reward]:
    """The rewards that an evaluation may ask, which scores a model's pictures by themselves."""
    return {name: reward for name, reward in rewards.items() if not asks_people(reward)}


def record(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a run records it: with the defaults of every class it names, also of the rewards' classes."""
    whole = config.to_mapping(recipe, complete=True)
    whole["reward"] = complete(recipe.reward)
    whole["evaluation"]["rewards"] = complete(recipe.evaluation.rewards)
    return whole


def folder(recipe: Recipe, name: str) -> Path:
    """Where the run lives."""
    return Path(recipe.run.output_dir or f"runs/{name}")


def per_picture(call: dict[str, Any]) -> dict[str, Any]:
    """A recipe's call arguments, as the pipeline gets them; one picture per prompt, for rollouts count prompts.

    Raises:
        ConfigError: they hold what is not theirs to set.
    """
    for key in ("prompt", "generator", "num_images_per_prompt", "return_dict", "latents"):
        if key in call:
            raise ConfigError(f"sampling.{key} is set by the run itself; leave it out.")
    return dict(call)


def check_call(policy: Policy, call: Mapping[str, Any]) -> None:
    """Refuse call arguments that the pipeline does not name; many pipelines would swallow them without a word.

    Raises:
        ConfigError: one of them is unknown.
    """
    known = [
        name for name in inspect.signature(type(policy.pipe).__call__).parameters if name not in ("self", "kwargs")
    ]
    for key in call:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"; did you mean sampling.{near[0]}?" if near else "."
            raise ConfigError(f"config error: sampling.{key} is no call argument of {type(policy.pipe).__name__}{hint}")
