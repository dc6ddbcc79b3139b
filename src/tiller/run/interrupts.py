"""SIGTERM and Ctrl-C: the first saves and leaves, the second leaves at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 2.0  # seconds


class Interrupted(SystemExit):
    """A signal asked to leave. Uncaught, it ends the program with 128 + the signal's number: 143 or 130."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class Interrupts:
    """Signals become an orderly end, while the block lasts.

        with Interrupts(run.save_last) as interrupts:
            for report in interrupts.over(train(...)):
                run.log(report)

    A signal breaks off whatever is under way: drawing, waiting for a reward, updating, evaluating. Only in the body of
    the loop over `over` does it wait until the body is done, so that nothing the body writes is torn. Then
    `on_interrupt` is called, and `Interrupted` is raised. A second signal ends the process at once.
    (Launchers of several processes pass on a Ctrl-C that the processes got already; that echo does not count.)
    """

    def __init__(self, on_interrupt: Callable[[], Any] = lambda: None):
        self.requested: int | None = None  # the number of the signal that came
        self._on_interrupt = on_interrupt
        self._wait = False  # the loop's body is at work
        self._before: dict[int, Any] = {}
        self._since = 0.0

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The same items, one after the other, unless a signal comes."""
        try:
            for item in items:
                self._wait = True
                yield item
                self._wait = False
                self.check()
        finally:
            self._wait = False

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.requested is not None:
            raise Interrupted(self.requested)

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # no other thread may ask for signals
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.requested is not None:
            self._on_interrupt()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is None:
            self.check()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            if time.monotonic() - self._since > ECHO * ("TORCHELASTIC_RUN_ID" in os.environ):
                os._exit(128 + number)
            return
        self.requested, self._since = number, time.monotonic()
        os.write(2, b"saving and leaving; the same again leaves at once\n")  # print may not be entered twice
        if not self._wait:
            raise Interrupted(number)
