"""Trackers mirror the metrics to TensorBoard, Weights & Biases or trackio, and can never hold training up.

`metrics.jsonl` is the record; a tracker is a view of it. Each lives in a thread of its own behind a queue: what it
raises is said once and ends it, and when it hangs, the lines that no longer fit in the queue are dropped.
"""

from __future__ import annotations

import importlib
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tiller.types import ConfigError

WAITING = 1000  # lines that a tracker may lag behind
PATIENCE = 30.0  # seconds that a tracker gets at the end to catch up; wandb took 5 to write three lines to a disk


class Tracker(Protocol):
    """What a tracker does."""

    def log(self, step: int, metrics: Mapping[str, float], images: Sequence[Any] = ()) -> None:
        """One step's numbers, and pictures (PIL) if there are any."""

    def close(self) -> None:
        """Write out what is left."""


def tracker(name: str, run_name: str, config: Mapping[str, Any], folder: str | Path = ".") -> Tracker:
    """A tracker by name: tensorboard and wandb (which obeys WANDB_MODE) write into `folder`, trackio where it wants.

    Raises:
        ConfigError: there is no tracker of this name, or its package is not installed.
    """
    if name not in TRACKERS:
        raise ConfigError(f"run.report_to names {name}; it can be {', '.join(TRACKERS)}.")
    module, make = TRACKERS[name]
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{name} in run.report_to needs a package that is not installed; pip install 'tiller[{name}]'."
        ) from error
    return InThread(name, lambda: make(library, run_name, dict(config), Path(folder)))


class InThread:
    """A tracker made and used in a daemon thread. Whatever it does, `log` returns at once and raises nothing."""

    def __init__(self, name: str, make: Callable[[], Tracker], patience: float = PATIENCE):
        self._name, self._make, self._patience = name, make, patience
        self._lines: queue.Queue[tuple[int, Mapping[str, float], Sequence[Any]] | None] = queue.Queue(WAITING)
        self._silent = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float], images: Sequence[Any] = ()) -> None:
        """Hand a step over."""
        try:
            self._lines.put_nowait((step, dict(metrics), list(images)))
        except queue.Full:
            self._complain("does not keep up; metrics are dropped there")

    def close(self) -> None:
        """Wait a few seconds for what is left."""
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(self._patience)

    def _work(self) -> None:
        try:
            target = self._make()
            while (line := self._lines.get()) is not None:
                target.log(*line)
            target.close()
        except BaseException as error:  # a tracker is never a reason to stop
            self._complain(f"failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})")
            while self._lines.get() is not None:
                pass

    def _complain(self, what: str) -> None:
        if not self._silent:
            self._silent = True
            print(f"{self._name} {what}; metrics.jsonl is complete.", file=sys.stderr)


class TensorBoard:
    """Scalars and pictures as event files."""

    def __init__(self, library: Any, run_name: str, config: Mapping[str, Any], folder: Path):
        self._writer = library.SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("config", f"```\n{config}\n```")

    def log(self, step: int, metrics: Mapping[str, float], images: Sequence[Any] = ()) -> None:
        """See Tracker."""
        import numpy as np

        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        for number, image in enumerate(images):
            self._writer.add_image(f"samples/{number}", np.asarray(image), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """See Tracker."""
        self._writer.close()


class Hosted:
    """A run of wandb, or of trackio, which has the same calls. Keys and modes are the packages' own business."""

    def __init__(self, run: Any, image: Callable[[Any], Any]):
        self._run, self._image = run, image

    @classmethod
    def wandb(cls, library: Any, run_name: str, config: Mapping[str, Any], folder: Path) -> Hosted:
        """Its files go into `folder`/wandb."""
        return cls(library.init(project="tiller", name=run_name, config=dict(config), dir=str(folder)), library.Image)

    @classmethod
    def trackio(cls, library: Any, run_name: str, config: Mapping[str, Any], folder: Path) -> Hosted:
        """Its files go where TRACKIO_DIR says."""
        return cls(library.init(project="tiller", name=run_name, config=dict(config)), library.Image)

    def log(self, step: int, metrics: Mapping[str, float], images: Sequence[Any] = ()) -> None:
        """See Tracker. Each picture has a name of its own, for trackio drops lists of them."""
        pictures = {f"samples/{number}": self._image(image) for number, image in enumerate(images)}
        self._run.log({**metrics, **pictures}, step=step)

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()


TRACKERS: Mapping[str, tuple[str, Callable[..., Tracker]]] = {
    "tensorboard": ("torch.utils.tensorboard", TensorBoard),
    "wandb": ("wandb", Hosted.wandb),
    "trackio": ("trackio", Hosted.trackio),
}
