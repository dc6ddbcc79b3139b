"""Which prompts an epoch draws: a pure function of (seed, epoch), so that a resumed run draws the same."""

from __future__ import annotations

from collections.abc import Sized

import numpy as np

from tiller.types import ConfigError


def draw(prompts: Sized, seed: int, epoch: int, count: int, group_size: int) -> list[tuple[int, int]]:
    """`count` samples of one epoch as (prompt index, sample index), those of one prompt side by side.

    Prompts are shuffled and dealt out without replacement; when all have been drawn they are shuffled anew.
    The deal goes on across epochs. Each prompt drawn gets `group_size` samples, whose indices count on from
    the prompt's earlier draws: a (prompt, sample) pair never comes twice in a run, so noise keyed by it
    never repeats.
    """
    if not len(prompts):
        raise ConfigError("there are no prompts to draw from; give at least one.")
    if group_size < 1 or count < 1:
        raise ConfigError(f"{count} samples in groups of {group_size} cannot be drawn; both must be at least 1.")
    if count % group_size:
        near = max(1, (count + group_size // 2) // group_size) * group_size
        raise ConfigError(
            f"{count} samples per epoch do not make whole groups of {group_size}; the nearest that does is {near}."
        )
    groups = count // group_size
    pairs = []
    orders: dict[int, np.ndarray] = {}
    for position in range(epoch * groups, (epoch + 1) * groups):
        deal, place = divmod(position, len(prompts))
        if deal not in orders:
            orders[deal] = np.random.default_rng((seed, deal)).permutation(len(prompts))
        prompt = int(orders[deal][place])
        pairs += [(prompt, deal * group_size + member) for member in range(group_size)]
    return pairs
