"""What services behind rewards say while a run waits, on the run's own terminal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.markup import escape

LOGGER = __name__.rpartition(".")[0]  # of everything in this folder


@contextmanager
def told(tell: Callable[[str], Any]) -> Iterator[None]:
    """Hand each line to `tell` while the block lasts; without it they go to standard error."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell(escape(record.getMessage()))

    logger, handler = logging.getLogger(LOGGER), Handler(logging.WARNING)
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
