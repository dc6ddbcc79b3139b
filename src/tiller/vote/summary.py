"""What the votes of a file come to, in a few lines for the terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from tiller.vote.tally import Tally, preferences


def summary(tally: Tally) -> Iterator[str]:
    """Sentences: how many votes of whom, which model is preferred, how far raters agree, which side they lean to."""
    votes = [vote for contest in tally.contests() for vote in contest.values()]
    if not votes:
        yield "no votes yet"
        return
    choices = Counter(vote.choice for vote in votes)
    per_rater = Counter(vote.rater for vote in votes)
    pairs, raters = sum(1 for _ in tally.contests()), [f"{name} ({number})" for name, number in per_rater.most_common()]
    yield (
        f"{_count(len(votes), 'vote')} on {_count(pairs, 'pair')} ({_count(choices['tie'], 'tie')}, "
        f"{_count(choices['skip'], 'skip')}) of {', '.join(raters)}"
    )
    yield from _models(tally)
    alpha = tally.agreement.alpha
    if alpha is not None:
        yield f"agreement: Krippendorff's alpha {alpha:.2f}, on {tally.agreement.units} pairs with two votes or more"
    decided = [vote for vote in votes if vote.choice in ("first", "second")]
    if decided:
        left = sum(vote.choice == vote.left for vote in decided)
        yield f"the left picture was chosen in {left} of {len(decided)} votes{_interval(left, len(decided))}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _models(tally: Tally) -> Iterator[str]:
    """How often one model's picture was preferred over the other's, by the majority of each pair."""
    wins: dict[tuple[str, str], Counter[str]] = {}
    for found in preferences(tally):
        first, second = found.vote.first_from, found.vote.second_from
        if first and second and first != second:
            wins.setdefault((first, second), Counter())[found.choice] += 1
    for (first, second), counts in wins.items():
        decided = counts["first"] + counts["second"]
        if decided:
            yield (
                f"{second} is preferred over {first} in {counts['second']} of {decided} decided pairs"
                f"{_interval(counts['second'], decided)}, {counts['tie']} ties"
            )


def _interval(successes: int, trials: int) -> str:
    low, high = wilson(successes, trials)
    return f" ({successes / trials:.0%}, 95 % interval {low:.0%} to {high:.0%})"


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share (Wilson 1927, JASA 22), by default of 95 %."""
    share, square = successes / trials, z * z / trials
    centre = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / trials + square / (4 * trials)) / (1 + square)
    return centre - half, centre + half
