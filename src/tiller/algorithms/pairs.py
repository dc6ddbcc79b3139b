"""Which two pictures of a group are compared: its best and its worst."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tiller.advantages import group


def preferences(values: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """(N,) how much each sample is preferred among those of its prompt; NaN where no two of these differ.

    A pair of equal rewards has no better picture: it is left out, not labelled at random.
    """
    found = group(values, prompts)
    labels = np.asarray(prompts)
    for label in set(prompts):
        if not (found[labels == label] > 0).any():
            found[labels == label] = np.nan
    return found
