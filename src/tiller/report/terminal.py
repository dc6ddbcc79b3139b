"""A run on the terminal: a bar while it goes on, one line per epoch; elsewhere the lines alone."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Terminal:
    """Prints what a run says; silent in all but the main process."""

    def __init__(self, epochs: int, silent: bool = False):
        width = None if sys.stdout.isatty() else 120  # a file has no width; 80 would cut tables
        self.console = Console(highlight=False, soft_wrap=True, quiet=silent, width=width)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=silent or not self.console.is_terminal,
        )
        self._task = self._progress.add_task("epochs", total=epochs)

    def __enter__(self) -> Terminal:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: Any) -> None:
        """A line, or a table."""
        self.console.print(text)

    def epoch(self, number: int, line: str) -> None:
        """An epoch is done, and this is what it came to."""
        self._progress.update(self._task, completed=number)
        self.say(line)
