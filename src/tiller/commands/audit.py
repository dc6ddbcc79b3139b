"""`tiller audit RUN`: what training did to what prompts leave open."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tiller import config
from tiller.commands import building
from tiller.commands.sample import open_run
from tiller.emoji.attributes import OPEN_PROMPTS
from tiller.evaluation import draw_pictures
from tiller.evaluation.audit import Shift, audit
from tiller.evaluation.readers import ReaderSettings
from tiller.policy import Policy
from tiller.prompts import load
from tiller.recipe import Recipe
from tiller.types import ConfigError, Prompt, RunError


@dataclass(frozen=True)
class AuditSettings:
    """What to draw, and who reads it."""

    prompts: str | tuple[str, ...] = ()  # a file, or texts; none are those of the embedded world
    samples_per_prompt: int = 16
    reader: ReaderSettings = field(default_factory=lambda: ReaderSettings(name="emoji"))

    def __post_init__(self) -> None:
        if self.samples_per_prompt < 1:
            raise ConfigError(f"samples_per_prompt is {self.samples_per_prompt}; it must be at least 1.")
        if not self.prompts and self.reader.name != "emoji":
            raise ConfigError("prompts are empty; name prompts that leave the attributes open.")

    def asked(self) -> list[Prompt]:
        """The prompts."""
        if isinstance(self.prompts, str):
            return load(self.prompts)
        return [Prompt(text) for text in self.prompts or OPEN_PROMPTS]


def run(folder: Path, file: Path | None, overrides: Sequence[str]) -> int:
    """Draw both models' pictures, read them, print the shares, and keep them as `evaluation/audit.json`.

    Raises:
        RunError: the folder is no finished run.
    """
    if not (folder / "config.yaml").exists():
        raise RunError(f"{folder} is no run folder: it has no config.yaml; give a folder that tiller train wrote.")
    settings = config.load(AuditSettings, file, overrides)
    recipe, tuned = open_run(folder)
    if recipe.model.name not in ("emoji", "emoji-flow") and not settings.prompts:
        raise ConfigError("this model is not of the embedded world; give an audit file with prompts and a reader.")
    prompts, reader = settings.asked(), settings.reader.build()
    texts = [prompt.text for prompt in prompts for _ in range(settings.samples_per_prompt)]
    after = reader(_drawn(tuned, recipe, prompts, settings), texts)
    del tuned
    before = reader(_drawn(building.policy(recipe.model, recipe.train.seed), recipe, prompts, settings), texts)
    shifts = audit(before, after, texts)
    about = {"settings": config.to_mapping(settings, complete=True), "shifts": [shift.to_data() for shift in shifts]}
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / "evaluation" / "audit.json").write_text(json.dumps(about, indent=1))
    _tell(shifts)
    return 0


def _drawn(policy: Policy, recipe: Recipe, prompts: Sequence[Prompt], settings: AuditSettings) -> list[Any]:
    call: Mapping[str, Any] = building.per_picture(recipe.sampling) | recipe.evaluation.sampling
    return draw_pictures(policy, prompts, settings.samples_per_prompt, recipe.train.seed, recipe.train.batch_size, call)


def _tell(shifts: Sequence[Shift]) -> None:
    console = Console(highlight=False)
    for shift in shifts:
        verdict = (
            "shifted" if shift.flagged else "no shift beyond chance" if shift.distance <= shift.by_chance else "small"
        )
        sure = f"distance {shift.distance:.2f}, by chance up to {shift.by_chance:.2f}, {shift.count} pairs"
        console.print(f"[bold]{shift.attribute}: {verdict}[/bold] ({sure})", soft_wrap=True)
        table = Table()
        for heading in ("option", "before", "after", "difference (95 % interval)"):
            table.add_column(heading, justify="left" if heading == "option" else "right", no_wrap=True)
        for one in sorted(shift.shares, key=lambda share: -abs(share.after - share.before))[:8]:
            difference = f"{one.after - one.before:+.2f} ({one.low:+.2f}, {one.high:+.2f})"
            table.add_row(one.option, f"{one.before:.0%}", f"{one.after:.0%}", difference)
        console.print(table)
    flagged = [shift.attribute for shift in shifts if shift.flagged]
    console.print(f"shifted: {', '.join(flagged)}" if flagged else "no attribute has shifted beyond chance and 0.1")
