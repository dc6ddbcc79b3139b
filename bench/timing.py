"""Times of two things held against each other in one process, turn by turn, so that what else runs falls on both."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ratio:
    """How many times as long one thing takes as another: over the rounds, the median and the extremes."""

    median: float
    low: float
    high: float
    ours: float  # median seconds
    theirs: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})  {self.ours:.3f} s / {self.theirs:.3f} s"


def one_thread() -> None:
    """As many threads as OMP_NUM_THREADS says; one by default."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def seconds(work: Callable[[], object]) -> float:
    """What `work` takes: processor time, which other programs on the machine do not lengthen; with a GPU wall time."""
    cuda = torch.cuda.is_available()
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    work()
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def interleaved(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> Ratio:
    """A B A B ..., after one round that does not count; each of ours against its two neighbours."""
    ours(), theirs()
    before, mine, ratios, all_theirs = seconds(theirs), [], [], []
    for _ in range(rounds):
        mine.append(seconds(ours))
        after = seconds(theirs)
        ratios.append(2 * mine[-1] / (before + after))
        all_theirs.append(after)
        before = after
    return summary(ratios, mine, all_theirs)


def summary(ratios: Sequence[float], ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The ratio over all rounds."""
    return Ratio(
        statistics.median(ratios), min(ratios), max(ratios), statistics.median(ours), statistics.median(theirs)
    )
