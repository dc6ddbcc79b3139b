"""Can anything be learned from these scores? The question preflight asks before the first update."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tiller.types import Scores

CURE = "check it on pictures that it should tell apart, or choose prompts where it sometimes gives another score"


def describe(scores: Scores, prompts: Sequence[str] | None = None) -> str:
    """One sentence on what makes N scores useless for training; empty if nothing does.

    With the N pictures' `prompts`, at least two pictures of one prompt must have different scores: an advantage is
    a difference within a group.
    """
    values = scores.values[scores.valid]
    pictures = f"{len(scores.values)} pictures" + _of(prompts)
    if not len(scores.values):
        return "there are no pictures to score."
    if not len(values):
        why = ", ".join(sorted(set(scores.reasons.values()))) or "NaN"
        return f"the reward gave no score to any of {pictures} (all {why}); {CURE}."
    if len(values) == 1 and len(scores.values) > 1:
        return f"the reward gave a score to only one of {pictures}, so there is nothing to compare; {CURE}."
    if len(values) > 1 and np.ptp(values) == 0:
        missing = "" if len(values) == len(scores.values) else ", where it gave one at all"
        return (
            f"the reward gave {values[0]:g} to every one of {pictures}{missing}, so there is nothing to prefer; {CURE}."
        )
    if prompts is not None and not _varies_within_a_group(scores, prompts):
        return (
            f"the reward gave the same score to all pictures of a prompt, for {pictures}; it must depend on the "
            "picture, not on the prompt alone."
        )
    return ""


def _of(prompts: Sequence[str] | None) -> str:
    """ " of 8 prompts", where the prompts are known."""
    count = len(set(prompts or ()))
    return "" if not prompts else " of one prompt" if count == 1 else f" of {count} prompts"


def _varies_within_a_group(scores: Scores, prompts: Sequence[str]) -> bool:
    groups: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, scores.values, strict=True):
        if np.isfinite(value):
            groups.setdefault(prompt, []).append(value)
    return any(min(group) < max(group) for group in groups.values())
