"""`tiller train RECIPE --dry-run`: what the run will take, in seconds, before anything is loaded. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tiller.dry_run import pace, report, solve, work
from tiller.dry_run.headers import Files, folder_of, read
from tiller.dry_run.machine import Machine, this_machine
from tiller.dry_run.memory import estimate
from tiller.geometry import advice
from tiller.recipe import Recipe
from tiller.settings import AUTO
from tiller.types import ConfigError


def run(recipe: Recipe, name: str, calibrate: bool = False) -> int:
    """Print the estimate; with `calibrate`, load the model and measure this machine first.

    Raises:
        ConfigError: the sizes do not fit each other.
    """
    facts, machine = solve.known_facts(recipe), this_machine(recipe.model.device)
    folder = folder_of(recipe.model)
    files = None if folder is None else read(folder, recipe.model.variant)
    recipe, reason = _with_sizes(recipe, files, machine, Path(recipe.run.output_dir or f"runs/{name}"))
    found = list(report.lines(recipe, work.count(recipe, facts, recipe.train.batch_size), reason, machine))
    memory = estimate(files, recipe, facts, machine.kind, machine.processes) if files else None
    if files is None or memory is None:
        missing = f"{recipe.model.name} is not on this machine, so its memory and time cannot be told"
        found.append(("model", f"{missing}; to have them: hf download {recipe.model.name}"))
    else:
        if calibrate:
            from tiller.dry_run.calibrate import measure

            print(f"calibration kept in {pace.keep(machine, recipe, measure(recipe, files))}")
        counted, speed = work.count(recipe, facts, recipe.train.batch_size), pace.speed_of(machine, recipe)
        spent = pace.seconds(counted, files, recipe, speed, machine.processes)
        found += report.cost_lines(recipe, files, memory, spent, speed, machine)
    print(report.page(found))
    return 0


def _with_sizes(recipe: Recipe, files: Files | None, machine: Machine, folder: Path) -> tuple[Recipe, str]:
    """The recipe with its batch size, and why; a wrong one is refused as the run itself would."""
    facts = solve.known_facts(recipe)
    sizes = solve.sizes_of(recipe, facts, machine.processes)
    if recipe.train.batch_size != AUTO:
        if not sizes.works(recipe.train.batch_size):
            whole = f", in whole groups of {sizes.group_size}," if sizes.whole_groups else ""
            cure = advice(sizes, recipe.train.batch_size)
            raise ConfigError(
                f"train.batch_size is {recipe.train.batch_size}, and {sizes.samples} pictures{whole} cannot be shared "
                f"so among {sizes.updates} updates and {sizes.processes} processes{cure}."
            )
        return recipe, ""
    if files is None:
        largest = replace(recipe.train, batch_size=recipe.train.samples_per_epoch // recipe.train.updates_per_epoch)
        return replace(
            recipe, train=largest
        ), "auto, which the model's files decide; counted here as the largest there is"
    return solve.solved(recipe, folder)
