"""Rewards that compare the pictures of one prompt: all of them at once, or two at a time.

A groupwise reward is called once for every group, with all pictures of it, and returns one entry per picture.

A pairwise reward is asked about pairs of pictures of one group, and returns for each pair the probability that the
first is better. The score of picture i is

    score_i = mean over j != i of P(i beats j),    P(i beats j) = mean of the known ones of p(i, j) and 1 - p(j, i),

the share of the others that it is expected to win against: where p is the Bradley-Terry model (1952, "Rank analysis of
incomplete block designs"), p(i, j) = 1 / (1 + exp(s_j - s_i)), it rises with the strength s_i. A comparison that is
missing is left out of both means; a picture without any comparison has no score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations, permutations
from typing import Any

import numpy as np
from PIL.Image import Image

from tiller.rewards.call import Reward, call, flag, reward_name
from tiller.rewards.contract import pointwise
from tiller.rewards.rows import Column, column
from tiller.types import RewardError, Scores, join_scores

ALONE = "there is no other picture of its prompt to compare it with"


def score_groups(
    reward: Reward,
    images: Sequence[Image],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    weights: Mapping[str, float] | None,
    groups: Sequence[Hashable],
) -> Scores:
    """N scores by a reward that compares the pictures of a group; `groups` (N,) says which one each picture is of.

    Raises:
        RewardError: the reward failed, or did not return one entry per picture, or one probability per pair.
    """
    if len(groups) != len(images):
        raise RewardError(f"{len(images)} images and {len(groups)} groups do not belong together; give one per image.")
    together: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        together.setdefault(group, []).append(index)
    members = list(together.values())
    if flag(reward, "pairwise"):
        return _tournament(reward, images, prompts, metadata, members)
    parts = [
        pointwise(reward, [images[i] for i in rows], [prompts[i] for i in rows], [metadata[i] for i in rows], weights)
        for rows in members
    ]
    return _put_back(join_scores(parts), [row for rows in members for row in rows])


def pairs(members: Iterable[Sequence[int]], symmetric: bool) -> list[tuple[int, int]]:
    """Which pictures are compared: all pairs within each group, in both orders, or in one where that is enough."""
    choose = combinations if symmetric else permutations
    return [pair for rows in members for pair in choose(rows, 2)]


def win_rates(asked: Sequence[tuple[int, int]], probabilities: np.ndarray, count: int) -> np.ndarray:
    """(count,) each picture's mean probability of winning against another; NaN where nothing is known of it.

    Args:
        asked: P pairs (first, second) of picture indices.
        probabilities: (P,) that the first is better, NaN where that is not known.
    """
    known: dict[tuple[int, int], list[float]] = {}
    for (first, second), probability in zip(asked, probabilities.tolist(), strict=True):
        if np.isfinite(probability):
            known.setdefault((first, second), []).append(probability)
            known.setdefault((second, first), []).append(1 - probability)
    against: list[list[float]] = [[] for _ in range(count)]
    for (first, _), found in known.items():
        against[first].append(sum(found) / len(found))
    return np.array([np.mean(found) if found else np.nan for found in against])


def _tournament(
    reward: Reward,
    images: Sequence[Image],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    members: Sequence[Sequence[int]],
) -> Scores:
    """One call with all pairs of all groups."""
    asked = pairs(members, flag(reward, "symmetric"))
    count, name = len(images), reward_name(reward)
    if not asked:
        return Scores(np.full(count, np.nan), {}, dict.fromkeys(range(count), ALONE))
    firsts, seconds = [first for first, _ in asked], [second for _, second in asked]
    texts = [prompts[index] for index in firsts]
    answer = call(
        reward,
        [[images[index] for index in firsts], [images[index] for index in seconds]],
        list(texts),
        [metadata[index] for index in firsts],
    )
    if isinstance(answer, Mapping):
        raise RewardError(
            f"reward {name} returned named lists for {len(asked)} pairs; return one list, with the probability that "
            "the first picture is better, or split it into several rewards."
        )
    found = column(name, answer, texts, "pair")
    known = found.values[np.isfinite(found.values)]
    if ((known < 0) | (known > 1)).any():
        odd = known[(known < 0) | (known > 1)][0]
        raise RewardError(
            f"reward {name} returned {odd:g} for a pair; return the probability that the first picture is better, from "
            "0 to 1, or None where the two cannot be compared."
        )
    values = win_rates(asked, found.values, count)
    return Scores(values, {}, _reasons(values, asked, found), _notes(asked, found))


def _reasons(values: np.ndarray, asked: Sequence[tuple[int, int]], found: Column) -> dict[int, str]:
    """Why a picture has no score: the commonest reason among its comparisons."""
    said: dict[int, Counter[str]] = {int(index): Counter() for index in np.flatnonzero(~np.isfinite(values))}
    for pair, reason in found.reasons.items():
        for index in asked[pair]:
            if index in said:
                said[index][reason] += 1
    return {index: counted.most_common(1)[0][0] if counted else ALONE for index, counted in said.items()}


def _notes(asked: Sequence[tuple[int, int]], found: Column) -> dict[int, str]:
    """What was said of the pairs in which a picture came first, each with the number of the other one."""
    notes: dict[int, list[str]] = {}
    for pair, note in found.notes.items():
        first, second = asked[pair]
        notes.setdefault(first, []).append(f"against {second}: {note}")
    return {index: "\n".join(said) for index, said in notes.items()}


def _put_back(scores: Scores, rows: Sequence[int]) -> Scores:
    """Scores of pictures that were taken group by group, in their first order; rows[k] is the k-th's place there."""
    back = np.argsort(rows)
    return Scores(
        scores.values[back],
        {name: values[back] for name, values in scores.components.items()},
        {rows[index]: reason for index, reason in scores.reasons.items()},
        {rows[index]: note for index, note in scores.notes.items()},
    )
