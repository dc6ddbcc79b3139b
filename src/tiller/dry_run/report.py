"""The dry run in words."""

from __future__ import annotations

from collections.abc import Iterator

from tiller import reward_spec
from tiller.dry_run.headers import Files
from tiller.dry_run.machine import Machine
from tiller.dry_run.memory import Memory, branches
from tiller.dry_run.pace import Speed
from tiller.dry_run.work import Work
from tiller.recipe import Recipe


def lines(recipe: Recipe, work: Work, reason: str, machine: Machine) -> Iterator[tuple[str, str]]:
    """(heading, words) of what needs no model."""
    train, title = recipe.train, reward_spec.title(recipe.reward) or recipe.data or ""
    groups = train.samples_per_epoch // train.group_size
    yield "run", f"{recipe.algorithm.name} on {recipe.model.name} towards {title}"
    yield "epochs", f"{train.epochs}, each of {train.samples_per_epoch} pictures: {groups} prompts × {train.group_size}"
    yield "optimiser steps", f"{work.updates:,}"
    yield "pictures", f"{work.pictures:,} to learn from, about {work.shown:,} to show and to compare"
    yield "reward calls", f"{work.scored:,} scored to learn from, about {work.judged:,} to compare"
    asked = f", {work.asking} of copies of the weights" if work.asking else ""
    yield "denoiser calls", f"an epoch: {work.drawing} that draw, {work.training} with a gradient{asked}"
    chosen = f" in each of {machine.processes} processes" if machine.processes > 1 else ""
    yield "batches", (reason or f"{train.batch_size} pictures at once, as the recipe says") + chosen


def cost_lines(
    recipe: Recipe,
    files: Files,
    memory: Memory,
    spent: tuple[float, float] | None,
    speed: Speed,
    machine: Machine,
) -> Iterator[tuple[str, str]]:
    """(heading, words) of what the model's files tell."""
    batch, rows = recipe.train.batch_size, branches(files.denoiser, recipe.sampling)
    parts = sum(part.count for part in files.parts.values())
    guided = " under guidance" if rows == 2 else ""
    yield "model", f"{files.kind}, {_many(parts)} numbers, {_many(memory.numbers)} trained{guided}"
    yield (
        "memory",
        f"about {_bytes(memory.needs(batch))} of {_bytes(machine.memory)} ({machine.name}): program "
        f"{_bytes(memory.program)}, weights {_bytes(memory.weights)}, training {_bytes(memory.trained)}, a batch "
        f"{_bytes(batch * max(memory.graph, memory.decoding))}; reward models are not in it. Expect it within a third.",
    )
    if memory.needs(batch) > machine.memory:
        yield (
            "",
            "that does not fit; lower train.batch_size, or set model.gradient_checkpointing or model.dtype=bfloat16.",
        )
    if spent is not None:
        epoch, whole = spent
        yield "time", f"about {_time(whole)}, {_time(epoch)} an epoch, without the reward's own time ({speed.source})."


def page(found: list[tuple[str, str]]) -> str:
    """Aligned lines."""
    width = max(len(heading) for heading, _ in found)
    return "\n".join(f"{heading:<{width}}  {words}" for heading, words in found)


def _many(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
