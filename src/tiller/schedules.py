"""Schedules: how a copy of the weights lags behind, and where a window of noise stands. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tiller.types import ConfigError

Decay = Callable[[int], float]
"""From the number of updates (or epochs) done to how much of the copy is kept."""


def constant(decay: float) -> Decay:
    """Always the same; 0 copies the weights as they are."""
    if not 0 <= decay <= 1:
        raise ConfigError(f"a decay of {decay} is no share; it must be between 0 and 1.")
    return lambda count: decay


def ramp(slope: float, most: float, start: int = 0, least: float = 0.0) -> Decay:
    """min(least + slope·(n - start), most), and `least` before `start` (Zheng et al. 2025, DiffusionNFT, section 4)."""
    if slope < 0 or not 0 <= least <= most <= 1 or start < 0:
        raise ConfigError(f"a decay of {slope} per update up to {most} from {start} on makes no sense; see schedules.")
    return lambda count: min(least + slope * max(0, count - start), most)


def warm_up(most: float) -> Decay:
    """min((1 + n)/(10 + n), most): a running mean that forgets its start (Flow-GRPO's reference code)."""
    if not 0 <= most <= 1:
        raise ConfigError(f"a decay of {most} is no share; it must be between 0 and 1.")
    return lambda count: min((1 + count) / (10 + count), most)


def random_window(size: int, first: int, last: int, key: tuple[int, ...]) -> range:
    """`size` steps side by side that begin anywhere from `first` to `last`, the same for the same key."""
    if not 0 <= first <= last or size < 1:
        raise ConfigError(f"a window of {size} steps that begins from {first} to {last} is empty; see window_first.")
    start = int(np.random.default_rng(key).integers(first, last + 1))
    return range(start, start + size)


def moving_window(size: int, steps: int, epoch: int, every: int, stride: int) -> range:
    """`size` of `steps` steps that move on by `stride` every `every` epochs, and begin again at the end (MixGRPO)."""
    if not 1 <= size <= steps or every < 1 or stride < 1:
        raise ConfigError(
            f"a window of {size} steps does not fit into {steps} denoising steps; set window_size to {steps} or less, "
            "and window_every and window_stride to at least 1."
        )
    places = (steps - size) // stride + 1
    start = epoch // every % places * stride
    return range(start, start + size)
