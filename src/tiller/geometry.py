"""Batch sizes that work: which there are, which is chosen, and which is near a wrong one. Numbers in, numbers out.

An epoch draws `samples` pictures in groups of `group_size` and makes `updates` optimiser steps. A batch of b pictures
goes through the pipeline at once, and a step's gradient is summed over its samples / updates / b batches, shared by all
processes. So b × updates × processes divides samples; where a loss compares a group's members, group_size divides b.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tiller.types import ConfigError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Sizes:
    """What a batch size must fit."""

    samples: int
    group_size: int
    updates: int = 1  # optimiser steps each time the samples are gone through
    processes: int = 1
    whole_groups: bool = False  # a batch must hold all pictures of its prompts

    def works(self, batch_size: int) -> bool:
        """Whether an epoch can be cut into such batches."""
        shared = batch_size * self.updates * self.processes
        return (
            batch_size >= 1 and not self.samples % shared and not (self.whole_groups and batch_size % self.group_size)
        )


def working(sizes: Sizes) -> list[int]:
    """Every batch size that works, ascending; none, where the other sizes contradict each other."""
    return [size for size in range(1, sizes.samples + 1) if sizes.works(size)]


def nearest(sizes: Sizes, wanted: int) -> list[int]:
    """The working sizes around a wrong one: the next below and the next above, where there are such."""
    known = working(sizes)
    return [*[size for size in known if size <= wanted][-1:], *[size for size in known if size > wanted][:1]]


def advice(sizes: Sizes, wanted: int) -> str:
    """What to say behind a complaint about a batch size."""
    near = nearest(sizes, wanted)
    return f"; train.batch_size={' or '.join(map(str, near))} works" if near else ""


@dataclass(frozen=True)
class Choice:
    """A batch size, and why."""

    batch_size: int
    per_step: int  # batches that one process goes through for an optimiser step
    fits: bool  # by the estimate
    reason: str  # one sentence


def choose(sizes: Sizes, needs: Callable[[int], float], memory: float) -> Choice:
    """The largest batch size that works and fits; if none fits, the smallest that works.

    Args:
        needs: the estimated bytes of a batch size; it grows with it.
        memory: bytes that may be used.

    Raises:
        ConfigError: no size works, whatever the memory.
    """
    known = working(sizes)
    if not known:
        raise ConfigError(_contradiction(sizes))
    fitting = [size for size in known if needs(size) <= memory]
    size = max(fitting) if fitting else min(known)
    per_step = sizes.samples // (size * sizes.updates * sizes.processes)
    return Choice(size, per_step, bool(fitting), _reason(sizes, known, size, needs, memory, per_step))


def _reason(
    sizes: Sizes, known: Sequence[int], size: int, needs: Callable[[int], float], memory: float, per_step: int
) -> str:
    place = known.index(size)
    whole = "whole groups, " if sizes.whole_groups else ""
    rule = f"{whole}{_many(sizes.samples, 'picture')} in {_shares(sizes)}"
    used = f"about {needs(size) / 1e9:.2f} of {memory / 1e9:.2f} GB"
    steps = (
        f"{per_step} batches are summed for each optimiser step" if per_step > 1 else "one batch is an optimiser step"
    )
    if needs(size) > memory:
        return f"batch_size {size} is the smallest that works ({rule}) and needs {used}, so it may not fit; {steps}."
    if place + 1 < len(known):
        more = known[place + 1]
        over = f"the next, {more}, needs {needs(more) / 1e9:.2f} GB"
        return f"batch_size {size} is the largest that works ({rule}) and fits: {used}, and {over}; {steps}."
    return f"batch_size {size} is the largest that works ({rule}), and fits: {used}; {steps}."


def _many(count: int, what: str, plural: str = "s") -> str:
    return f"{count} {what}{plural if count > 1 else ''}"


def _shares(sizes: Sizes) -> str:
    return f"{_many(sizes.updates, 'update')} on {_many(sizes.processes, 'process', 'es')}"


def _contradiction(sizes: Sizes) -> str:
    unit = sizes.updates * sizes.processes * (sizes.group_size if sizes.whole_groups else 1)
    near = max(1, (sizes.samples + unit // 2) // unit) * unit
    groups = f" and whole groups of {sizes.group_size}" if sizes.whole_groups else ""
    shared = f"{_many(sizes.samples, 'picture')} among {_shares(sizes)}{groups}"
    return f"no train.batch_size can share {shared}; train.samples_per_epoch={near} can be."


def memory_bytes(text: str) -> float:
    """`8GB` or `7.5 GiB` in bytes.

    Raises:
        ConfigError: it is no amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if not match or match[2].upper() not in UNITS or not float(match[1]):
        raise ConfigError(f"memory is {text!r}; it must be an amount such as 8GB.")
    return float(match[1]) * UNITS[match[2].upper()]
