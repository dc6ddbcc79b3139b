"""Several calls at once, in threads that cannot keep the program from ending."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def together(tasks: Sequence[Callable[[], T]], workers: int) -> list[T]:
    """The results of all tasks, in their order, with `workers` of them at work at a time.

    Raises the first error of any task; those that have not begun are dropped, and those at work are left behind.
    """
    if len(tasks) < 2 or workers < 2:
        return [task() for task in tasks]
    waiting: SimpleQueue[int] = SimpleQueue()
    done: SimpleQueue[tuple[int, T | None, BaseException | None]] = SimpleQueue()
    stop = threading.Event()
    for number in range(len(tasks)):
        waiting.put(number)

    def work() -> None:
        while not stop.is_set():
            try:
                number = waiting.get_nowait()
            except Empty:
                return
            try:
                done.put((number, tasks[number](), None))
            except BaseException as error:  # handed to whoever waits
                done.put((number, None, error))

    for _ in range(min(workers, len(tasks))):
        threading.Thread(target=work, daemon=True).start()
    results: dict[int, T] = {}
    try:
        for _ in tasks:
            number, result, error = done.get()
            if error is not None:
                raise error
            results[number] = result  # type: ignore[assignment]  # no error: there is a result
    finally:
        stop.set()
    return [results[number] for number in range(len(tasks))]
