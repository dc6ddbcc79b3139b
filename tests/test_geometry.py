"""Batch sizes against brute force, over hundreds of geometries; what a recipe may say, and a wrong size is told."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tiller import config
from tiller.geometry import Sizes, choose, memory_bytes, nearest, working
from tiller.recipe import Recipe
from tiller.settings import AUTO, TrainConfig
from tiller.types import ConfigError


def geometries() -> list[Sizes]:
    """Every small one in which groups are whole in an epoch."""
    ranges = (range(1, 7), range(1, 9), range(1, 4), range(1, 4), (False, True))
    return [Sizes(prompts * size, size, *rest) for prompts, size, *rest in itertools.product(*ranges)]


def shares(sizes: Sizes, batch: int) -> bool:
    """By dealing the pictures out: every batch is full, every update and process gets as many, groups stay whole."""
    pictures = list(range(sizes.samples))
    batches = [pictures[start : start + batch] for start in range(0, len(pictures), batch)]
    if any(len(one) < batch for one in batches) or len(batches) % sizes.updates:
        return False
    each = len(batches) // sizes.updates
    for turn in range(sizes.updates):
        mine = batches[turn * each : (turn + 1) * each]
        if len({len(mine[rank :: sizes.processes]) for rank in range(sizes.processes)}) > 1:
            return False
    groups = [{picture // sizes.group_size for picture in one} for one in batches]
    apart = len({group for found in groups for group in found}) == sum(map(len, groups))
    return apart or not sizes.whole_groups


def test_the_working_sizes_are_those_of_dealing_out() -> None:
    for sizes in geometries():
        assert working(sizes) == [b for b in range(1, sizes.samples + 1) if shares(sizes, b)], sizes


def test_the_choice_is_the_largest_that_works_and_fits() -> None:
    random = np.random.default_rng(0)
    for sizes in geometries():
        known = working(sizes)
        if not known:
            with pytest.raises(ConfigError, match=r"no train\.batch_size can share") as caught:
                choose(sizes, float, 1e9)
            better = int(str(caught.value).split("samples_per_epoch=")[1].split()[0])
            assert working(Sizes(better, sizes.group_size, sizes.updates, sizes.processes, sizes.whole_groups))
            continue
        memory = float(random.integers(1, sizes.samples + 2))
        found = choose(sizes, float, memory)
        fitting = [size for size in known if size <= memory]
        assert found.batch_size == (max(fitting) if fitting else min(known))
        assert found.fits == bool(fitting)
        assert found.per_step * found.batch_size * sizes.updates * sizes.processes == sizes.samples


def test_more_memory_never_makes_a_smaller_batch() -> None:
    sizes = Sizes(240, 8, 2, 1)
    found = [choose(sizes, lambda size: 10.0 * size, memory).batch_size for memory in range(1, 2000, 7)]
    assert found == sorted(found)


def test_the_reason_says_why_not_more() -> None:
    found = choose(Sizes(64, 8, whole_groups=True), lambda size: size * 1e9, 20e9)
    assert found.batch_size == 16
    assert "the next, 32, needs 32.00 GB" in found.reason
    assert "4 batches are summed for each optimiser step" in found.reason
    assert "may not fit" in choose(Sizes(64, 8, whole_groups=True), lambda size: size * 1e9, 1e9).reason


def test_wrong_sizes_are_told_the_nearest_that_work() -> None:
    assert nearest(Sizes(60, 6), 32) == [30, 60]
    with pytest.raises(
        ConfigError, match=r"no multiple of batch_size \(32\); 64 is; train.batch_size=30 or 60 works\."
    ):
        TrainConfig(samples_per_epoch=60, group_size=6, batch_size=32)
    with pytest.raises(ConfigError, match=r"no multiple of batch_size \* updates_per_epoch \(128\); .*=16 works\."):
        TrainConfig(samples_per_epoch=64, group_size=8, batch_size=32, updates_per_epoch=4)


def test_auto_in_a_recipe() -> None:
    recipe = config.from_mapping(Recipe, {"train": {"batch_size": "auto", "memory": "8GB"}})
    assert recipe.train.batch_size == AUTO
    with pytest.raises(ConfigError, match=r"train.batch_size is 'most'; it must be a whole number"):
        config.from_mapping(Recipe, {"train": {"batch_size": "most"}})
    with pytest.raises(ConfigError, match="memory is 'much'; it must be an amount such as 8GB"):
        config.from_mapping(Recipe, {"train": {"memory": "much"}})
    with pytest.raises(ConfigError, match="at least 1, or auto"):
        TrainConfig(batch_size=-1)


def test_amounts_of_memory() -> None:
    assert memory_bytes("8GB") == 8e9
    assert memory_bytes("7.5 GiB") == 7.5 * 2**30
