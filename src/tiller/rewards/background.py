"""A reward off the critical path: the next pictures are drawn while the last ones are judged."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from PIL.Image import Image

from tiller.rewards.call import workers as allowed
from tiller.rewards.contract import Reward, score
from tiller.types import RewardError, Scores

_Task = tuple["Future[Scores]", "partial[Scores]"]


class Background:
    """Scores pictures in threads of its own, in the order in which they were submitted.

    There are as many workers as the reward allows calls at once (its attribute `workers`, 1 by default), unless
    `workers` says otherwise. The threads are daemons, so a reward that hangs cannot keep the program from ending.

    What bounds the overlap is the last batch, which is drawn before it can be judged: with B batches, one worker, and a
    reward that takes as long as drawing, both together take (B + 1) / B times as long as drawing alone.

        with Background(reward) as judge:
            pending = judge.submit(images, prompts, metadata)
            ...
            scores = pending.result()  # raises the RewardError of that call
    """

    def __init__(self, reward: Reward, weights: Mapping[str, float] | None = None, workers: int | None = None) -> None:
        self._score = partial(score, reward, weights=weights)
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers or allowed(reward))]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        images: Sequence[Image],
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        groups: Sequence[Hashable] | None = None,
    ) -> Future[Scores]:
        """Queue one call of `score`; the future holds its checked scores, or its `RewardError`."""
        if self._closed:
            raise RewardError("this background reward is closed; make a new one.")
        future: Future[Scores] = Future()
        self._tasks.put((future, partial(self._score, list(images), list(prompts), list(metadata), groups=groups)))
        return future

    def close(self, wait: bool = True) -> None:
        """Take no more calls. `wait` finishes those that are queued; without it they are cancelled."""
        if self._closed:
            return
        self._closed = True
        while not wait and not self._tasks.empty():
            task = self._tasks.get()
            if task:
                task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads if wait else ():
            thread.join()

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(wait=error is None)

    def _work(self) -> None:
        while task := self._tasks.get():
            future, call = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # handed to whoever waits for the result
                future.set_exception(error)
