"""Asking until there is an answer: retries with growing pauses, a pause for a server that is away, and an end to it."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from tiller.rewards.serving.exchange import Fault
from tiller.rewards.serving.together import together
from tiller.types import ConfigError, ServiceError

T = TypeVar("T")
SLOW = 5.0  # seconds; a try that was silent for longer is followed by a look whether the server lives
STRIKES = 2  # rounds of retries that one batch may cost while the server lives
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """There is no answer, and why."""

    reason: str


@dataclass(frozen=True)
class Persistence:
    """How long to go on asking."""

    concurrency: int = 4  # requests at once
    retries: int = 4  # of one request, after the first try
    backoff: float = 0.5  # seconds before the first retry; twice as long before each further one
    longest_wait: float = 30.0  # seconds between two tries, also where the server asks for more
    budget: float = 600.0  # seconds without any answer, after which the run ends

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.retries < 0:
            raise ConfigError("concurrency must be at least 1, and retries cannot be negative.")
        if min(self.backoff, self.longest_wait, self.budget) <= 0:
            raise ConfigError("backoff, longest_wait and budget must be more than 0 seconds.")

    def pause(self, attempt: int, chance: random.Random, wanted: float | None = None) -> float:
        """Seconds before retry number `attempt`, between half of the nominal pause and all of it, so that requests
        which failed together do not come back together; at least what the server asked for, within `longest_wait`."""
        nominal = self.backoff * 2 ** (attempt - 1) * chance.uniform(0.5, 1.0)
        return min(self.longest_wait, max(nominal, wanted or 0.0))


class Asking(Generic[T]):
    """N questions to one service, in batches, until each has an answer or a reason why it has none.

    Args:
        service: what to call it in messages.
        ask: (numbers of the questions, deadline) -> the answers among them; raises Fault. Answers are kept: only
            questions without one are asked again.
        split: numbers of questions -> batches of them.
        alive: whether the server is there at all; asked before a run is paused, and while it is.
    """

    def __init__(
        self,
        service: str,
        ask: Callable[[list[int], float], Mapping[int, T]],
        split: Callable[[list[int]], Sequence[list[int]]],
        alive: Callable[[], bool],
        persistence: Persistence,
    ):
        self._service, self._ask, self._split, self._alive = service, ask, split, alive
        self._settings = persistence
        self._answers: dict[int, T | Failure] = {}
        self._deadline = time.monotonic() + persistence.budget
        self._stopped = threading.Event()

    def all(self, count: int) -> list[T | Failure]:
        """One answer or failure per question, in order.

        Raises:
            ServiceError: the service was away for `budget` seconds; or whatever `ask` says cannot be mended by asking.
        """
        strikes: Counter[int] = Counter()
        try:
            while pending := [number for number in range(count) if number not in self._answers]:
                self._round(pending, strikes)
        finally:
            self._stopped.set()  # threads that wait for their next try end
        return [self._answers[number] for number in range(count)]

    def _round(self, pending: list[int], strikes: Counter[int]) -> None:
        """Every batch gets its tries; those that met silence are left for another round if the server may come back."""
        batches = self._split(pending)
        faults = together([partial(self._persist, batch) for batch in batches], self._settings.concurrency)
        failed = [(batch, fault) for batch, fault in zip(batches, faults, strict=True) if fault is not None]
        silent = [(batch, fault) for batch, fault in failed if not fault.answered]
        if silent and not self._alive():
            self._wait(silent[-1][1])
            return
        for batch, fault in failed:
            strikes[batch[0]] += 1
            if fault.answered or strikes[batch[0]] >= STRIKES or time.monotonic() >= self._deadline:
                reason = f"{self._service}: {fault.reason}"
                self._answers.update({number: Failure(reason) for number in batch if number not in self._answers})

    def _persist(self, batch: list[int]) -> Fault | None:
        """Ask for a batch until all of it is answered; the last fault, if it was not."""
        left, chance = list(batch), random.Random(f"{self._service} {batch[0]}")
        fault = Fault(f"no answer within {self._settings.budget:g} s", answered=False)
        for attempt in range(self._settings.retries + 1):
            if attempt:
                self._stopped.wait(self._settings.pause(attempt, chance, fault.wait))
            if self._stopped.is_set() or time.monotonic() >= self._deadline:
                break
            began = time.monotonic()
            try:
                found = self._ask(left, self._deadline)
            except Fault as error:
                fault = error
                if not fault.answered and time.monotonic() - began > SLOW and not self._alive():
                    break
                continue
            if found:
                self._answers.update(found)
                self._deadline = time.monotonic() + self._settings.budget
            left = [number for number in left if number not in self._answers]
            if not left:
                return None
            fault = Fault("the answer left it out", answered=True)
        return fault

    def _wait(self, fault: Fault) -> None:
        """Until the server is there again; says so. Raises ServiceError when the budget is spent."""
        began = time.monotonic()
        pause = min(self._settings.longest_wait, self._settings.backoff * 2**self._settings.retries)
        while (left := self._deadline - time.monotonic()) > 0:
            pause = min(pause, left)
            logger.warning(
                f"{self._service} does not answer ({fault.reason}); waiting, next try in {duration(pause)}, giving up "
                f"in {duration(left)}"
            )
            time.sleep(pause)
            if self._alive():
                logger.warning(f"{self._service} answers again, after {duration(time.monotonic() - began)}; going on")
                return
            pause = min(2 * pause, self._settings.longest_wait)
        raise ServiceError(
            f"{self._service} gave no answer for {duration(self._settings.budget)} ({fault.reason}); start it again, "
            "and then the same command, which goes on from the last checkpoint."
        ) from fault


def duration(seconds: float) -> str:
    """ "8 s" or "9 min"."""
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.1f} s" if seconds < 3 else f"{seconds:.0f} s"
