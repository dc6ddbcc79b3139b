"""The model card beside an export: what was optimised and what came of it, from the run folder alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tiller import reward_spec, yaml_text
from tiller.config import to_mapping
from tiller.export.families import Family
from tiller.export.header import hub_name, model_name, shown_name, shown_title, without_folders
from tiller.export.licence import UNKNOWN, licence_of
from tiller.export.markdown import escape, table
from tiller.export.usage import how_to_load
from tiller.export.verify import Verified
from tiller.recipe import Recipe
from tiller.rewards.redact import SECRET, redacted
from tiller.run.files import replace_file

GALLERY = "before_after.jpg"
WIDEST = 900  # pixels of the gallery
OWN = "<!-- written by tiller export -->"
CLEARTEXT = ("token", "tokens", "max_tokens")  # settings that are named like a secret and are none


@dataclass(frozen=True)
class About:
    """What is exported."""

    run: Path
    recipe: Recipe
    weights: str  # which, in words
    epoch: int
    form: str
    target: Path  # the file, or the folder of a whole pipeline
    dtype: str


def write(about: About, family: Family | None, checked: Verified | None, repository: str | None = None) -> Path:
    """The card and its gallery; README.md, unless somebody else's is there.

    Raises:
        RunError: it cannot be written.
    """
    folder = about.target if about.target.is_dir() else about.target.parent
    gallery = _gallery(about, folder)
    file = folder / "README.md"
    if file.exists() and OWN not in file.read_text(errors="replace"):
        file = folder / f"{about.target.stem}.README.md"
    text = redacted("\n".join(_lines(about, family, checked, gallery, repository)))
    replace_file(file, text.encode())
    return file


def updates(run: Path, epoch: int) -> int:
    """Optimiser steps taken up to an epoch."""
    return int(max((line.get("optim/updates", 0) for line in _metrics(run) if line["epoch"] <= epoch), default=0))


def _lines(
    about: About, family: Family | None, checked: Verified | None, gallery: str | None, repository: str | None
) -> Iterator[str]:
    recipe, rewards = about.recipe, escape(shown_title(about.recipe)) or "preference pairs"
    yield f"---\n{yaml_text.write(_front(about))}---\n{OWN}\n"
    yield f"# {escape(about.run.resolve().name)}\n"
    yield (
        f"{escape(model_name(recipe))}, fine-tuned by reinforcement learning ({escape(recipe.algorithm.name)}) towards "
        f"**{rewards}** with tiller. These are {about.weights}, as {about.form}, {about.dtype}.\n"
    )
    if gallery:
        yield f"![before and after, the same prompts and the same noise]({gallery})\n"
    yield "## How to load\n"
    yield how_to_load(about.form, about.target, model_name(recipe), recipe.sampling, repository)
    yield f"{_checked(checked)}\n"
    yield "## What was optimised\n"
    yield table(["reward", "weight", "settings"], list(_rewards(recipe)))
    yield f"Prompts: {escape(shown_name(recipe.prompts))}. Seed: {recipe.train.seed}.\n"
    yield "## What came of it\n"
    yield from _outcome(about.run)
    yield "## Over-optimisation\n"
    yield from _findings(about.run)
    yield "## Settings\n"
    yield f"```yaml\n{yaml_text.write(settings(recipe))}```\n"
    yield "## Licence\n"
    found, where = licence_of(recipe.model.name, recipe.model.revision)
    said = (
        f"{escape(found)}, as {escape(where)} says" if found != UNKNOWN else "unknown: nothing at hand says; look it up"
    )
    yield f"Of the base model: {said}. What was trained on it is bound by that licence too."


def _front(about: About) -> dict[str, Any]:
    """The YAML front matter, as the hub reads it."""
    recipe, lora = about.recipe, about.target.suffix == ".safetensors"
    base = hub_name(recipe)
    licence, _ = licence_of(recipe.model.name, recipe.model.revision)
    found: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if licence != UNKNOWN:
        found["license"] = licence
    if base:
        found["base_model"] = base
        found["base_model_relation"] = "adapter" if lora else "finetune"
    found["tags"] = [
        "text-to-image",
        "diffusers",
        "tiller",
        "reinforcement-learning",
        recipe.algorithm.name.split(":")[-1],
    ]
    found["tags"] += ["lora"] if lora else []
    return found


def _checked(checked: Verified | None) -> str:
    return f"Checked when it was made: {escape(str(checked))}." if checked else "Not read back when it was made."


def _rewards(recipe: Recipe) -> Iterator[list[str]]:
    for spec in (*reward_spec.read(recipe.reward), *reward_spec.read_reported(recipe.evaluation.rewards)):
        trained = spec.key.startswith("reward")
        pinned = ", ".join(f"{key} {plain(key, value)}" for key, value in spec.settings.items())
        yield [escape(without_folders(spec.name)), f"{spec.weight:g}" if trained else "only reported", escape(pinned)]


def _outcome(run: Path) -> Iterator[str]:
    rows = _json(run / "evaluation" / "comparison.json") or []
    if rows:
        yield "Base against tuned model, the same prompts and the same noise; intervals are 95 %, bootstrapped.\n"
        header = ["prompts", "reward", "base", "tuned", "difference", "wins", "n"]
        yield table(header, [_row(row) for row in rows])
    else:
        yield "The run has no evaluation of both models yet.\n"
    drift = _json(run / "evaluation" / "drift.json") or {}
    if drift.get("kl_to_base") is not None:
        yield (
            f"Distance from the base model: KL {drift['kl_to_base']:.1f} nats per picture along the sampled paths; "
            f"pictures of one prompt differ by {drift['diversity_tuned']:.3f} (base: {drift['diversity_base']:.3f}).\n"
        )


def _row(row: Mapping[str, Any]) -> list[str]:
    between = f"{row['difference']:+.4g} ({row['low']:+.4g}, {row['high']:+.4g})"
    names = [escape(str(row["split"]).replace("_", " ")), escape(str(row["reward"]))]
    return [*names, f"{row['base']:.4g}", f"{row['tuned']:.4g}", between, f"{row['win_rate']:.0%}", str(row["count"])]


def _findings(run: Path) -> Iterator[str]:
    """What the run's own monitor found; and every reported score that fell."""
    monitor = _json(run / "evaluation" / "monitor.json")
    said = [f"* {escape(text)}" for text in dict.fromkeys(_texts(monitor))]
    for row in _json(run / "evaluation" / "comparison.json") or []:
        if row["high"] < 0:
            fell = f"{row['reward']} fell on {str(row['split']).replace('_', ' ')} by {-row['difference']:.4g}"
            said.append(f"* {escape(fell)} (95 %: {-row['high']:.4g} to {-row['low']:.4g})")
    yield "\n".join(said) + "\n" if said else _nothing(monitor)


def _nothing(monitor: Any) -> str:
    if monitor is None:
        return "No score that was reported fell. The run was not watched by other means.\n"
    return "Nothing was found by the run's monitor, and no score that was reported fell.\n"


def _texts(found: Any, epoch: Any = None) -> Iterator[str]:
    """Every sentence in the monitor's file, with its epoch where one is given."""
    if isinstance(found, Mapping):
        epoch = found.get("epoch", epoch)
        if isinstance(found.get("text"), str):
            yield f"epoch {epoch}: {found['text']}" if epoch is not None else found["text"]
        for value in found.values():
            yield from _texts(value, epoch)
    elif isinstance(found, Sequence) and not isinstance(found, str):
        for value in found:
            yield from _texts(value, epoch)


def settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe with no path of this machine and no value that is named like a secret."""
    return dict(plain("", to_mapping(recipe)))


def plain(key: str, value: Any) -> Any:
    """A setting fit to be shown."""
    if isinstance(value, Mapping):
        return {name: plain(str(name), entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(key, entry) for entry in value]
    if isinstance(value, str) and SECRET.search(key) and key not in CLEARTEXT:
        return "[left out]"
    return without_folders(value) if isinstance(value, str) else value


def _gallery(about: About, folder: Path) -> str | None:
    """The run's sheet of pictures before and after, made small. Checkpoints show the sheets of their epoch."""
    source = about.run / "before_after.png"
    kept = about.run / "images" / f"epoch-{about.epoch:06d}.png"
    if about.epoch != about.recipe.train.epochs and kept.exists():
        source = kept
    if not source.exists():
        return None
    picture = Image.open(source).convert("RGB")
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.Resampling.LANCZOS)
    picture.save(folder / GALLERY, quality=88)
    return GALLERY


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _metrics(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
