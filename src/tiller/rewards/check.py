"""Can anything be learned from these scores? The question preflight asks before the first update."""

from __future__ import annotations

import numpy as np

from tiller.types import Scores


def describe(scores: Scores, group_size: int | None = None) -> str:
    """One sentence on what makes N scores useless for training; empty if nothing does.

    With `group_size` G the scores are N / G groups of the same prompt, one after the other, and at least
    one group must hold two different scores: an advantage is a difference within a group.
    """
    values = scores.values[scores.valid]
    if not len(scores.values):
        return "there are no pictures to score."
    if not len(values):
        why = ", ".join(sorted(set(scores.reasons.values()))) or "NaN"
        return f"the reward gave no score to any of {len(scores.values)} pictures (all {why})."
    if len(values) == 1 and len(scores.values) > 1:
        return f"the reward gave a score to only one of {len(scores.values)} pictures, so there is nothing to compare."
    if len(values) > 1 and np.ptp(values) == 0:
        return f"the reward gave {values[0]:g} to every one of {len(values)} pictures, so there is nothing to prefer."
    if group_size and group_size > 1 and not _varies_within_a_group(scores, group_size):
        return (
            "the reward gave the same score to all pictures of a prompt, for each of "
            f"{len(scores.values) // group_size} prompts; it must depend on the picture, not on the prompt alone."
        )
    return ""


def _varies_within_a_group(scores: Scores, group_size: int) -> bool:
    for start in range(0, len(scores.values), group_size):
        group = scores.values[start : start + group_size]
        group = group[np.isfinite(group)]
        if len(group) > 1 and np.ptp(group) > 0:
            return True
    return False
