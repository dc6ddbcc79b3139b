"""Whether a folder is fit for a recipe: empty, or with the same run in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tiller import reward_spec, yaml_text
from tiller.run import identity
from tiller.run.files import read_json, remove_temporary, replace_file, to_json, writing
from tiller.types import RunError

FORMAT = 1  # of the run folder
CONFIG, IDENTITY, ENVIRONMENT, FINISHED = "config.yaml", "identity.json", "environment.json", "finished.json"
METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"
STACKS = "stacks.txt"
REWARDS, CACHE = "rewards.json", "reward_cache.sqlite"
# what a run writes before there is anything to lose
BEGINNING = {CONFIG, IDENTITY, ENVIRONMENT, STACKS, REWARDS, CACHE}
VIEWS = {"tensorboard", "wandb"}  # trackers' folders: made before the first update, and never read
SETTING = {"model": "model.name", "scales": "scale of its rewards"}


def claim(folder: Path, recipe: Mapping[str, Any], saved: bool, resume: bool) -> None:
    """Make the folder this recipe's, or refuse.

    Raises:
        RunError: it holds something else, another or a finished run, or (with `resume`) no checkpoint.
    """
    contents = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    rest = sorted(contents - BEGINNING - VIEWS)
    if rest:
        _check_same(folder, recipe, rest[0])
    else:
        _clear(folder)
    if resume and not saved:
        raise RunError(f"{folder} holds no checkpoint to resume from; leave out --resume to begin.")
    with writing(folder):
        remove_temporary(folder)
        remove_temporary(folder / "checkpoints")
    identify(folder, recipe, identity.files(recipe))
    replace_file(folder / CONFIG, yaml_text.write(dict(recipe)).encode())


def epochs(recipe: Mapping[str, Any]) -> int:
    """How many epochs a recipe asks for."""
    return int(recipe.get("train", {}).get("epochs", 0))


def finished(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether everything that the recipe asks for is done."""
    path = folder / FINISHED
    return path.exists() and read_json(path)["epochs"] >= epochs(recipe)


def _check_same(folder: Path, recipe: Mapping[str, Any], content: str) -> None:
    path = folder / CONFIG
    if not path.exists():
        raise RunError(f"{folder} holds {content} but no run ({CONFIG} is missing); choose another run.output_dir.")
    odd = identity.difference(yaml_text.read(path), recipe)
    if odd:
        key, there, here = odd
        raise RunError(
            f"{folder} belongs to another recipe: {key} is {there} there and {here} here; choose another "
            "run.output_dir, or the same settings."
        )
    if finished(folder, recipe):
        raise RunError(
            f"{folder} is finished ({epochs(recipe)} epochs); raise train.epochs to go on, or choose another "
            "run.output_dir."
        )


def _clear(folder: Path) -> None:
    """Forget a run that ended before it began: its recipe may be another one now."""
    with writing(folder):
        for name in BEGINNING:
            (folder / name).unlink(missing_ok=True)


def identify(folder: Path, recipe: Mapping[str, Any], found: Mapping[str, str]) -> None:
    """Record hashes of what the run is made of; refuse those that differ from what is recorded.

    Raises:
        RunError: the model, the prompt file or the reward's source is another one.
    """
    path = folder / IDENTITY
    known = read_json(path) if path.exists() else {"format": FORMAT}
    if known["format"] != FORMAT:
        raise RunError(f"{folder} has format {known['format']} and this tiller reads {FORMAT}; update tiller.")
    for name, value in found.items():
        if known.get(name, value) != value:
            named = {spec.key: spec.name for spec in reward_spec.read(recipe.get("reward"))}
            named |= {"model": recipe.get("model", {}).get("name"), "scales": REWARDS}
            setting = named.get(name) or recipe.get(name)
            raise RunError(
                f"{folder} was begun with another {SETTING.get(name, name)}: {setting} has changed since; choose "
                "another run.output_dir, or put back what it was."
            )
    if not path.exists() or not set(found) <= set(known):
        replace_file(path, to_json({**known, **found}))


def note_environment(folder: Path, processes: int, tell: Callable[[str], None]) -> None:
    """Record versions, threads and device; tell of what is no longer as it was."""
    path = folder / ENVIRONMENT
    now = identity.environment(processes)
    changed = identity.changes(read_json(path), now) if path.exists() else []
    if changed:
        tell(f"{', '.join(changed)}: the run goes on, but not bit for bit as it would have.")
    replace_file(path, to_json(now))
