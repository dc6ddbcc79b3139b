"""Trackers get every line, and can neither stop nor delay a run."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from test_run import RECIPE, go, metrics, new_state
from tiller import trackers
from tiller.run import Run
from tiller.trackers import InThread, tracker
from tiller.types import ConfigError


class Target:
    """Remembers what it gets; `then` may raise or hang."""

    def __init__(self, then: Callable[[], Any] = lambda: None):
        self.lines: list[tuple[int, Mapping[str, float]]] = []
        self.closed, self._then = False, then

    def log(self, step: int, metrics: Mapping[str, float], images: Sequence[Any] = ()) -> None:
        self.lines.append((step, metrics))
        self._then()

    def close(self) -> None:
        self.closed = True


def fail() -> None:
    raise OSError("database is locked")


def mirrored(folder: Path, target: Target, epochs: int = 3) -> float:
    """Train with a tracker; the seconds it took."""
    began = time.monotonic()
    with Run.open(folder, RECIPE) as run:
        run.trackers = [InThread("mine", lambda: target, patience=0.1)]
        go(run, new_state(), epochs, every=99)
    return time.monotonic() - began


def test_a_tracker_gets_the_metrics_and_timings_of_every_epoch(tmp_path: Path) -> None:
    target = Target()
    mirrored(tmp_path, target)
    assert [step for step, _ in target.lines] == [1, 2, 3]
    assert target.lines[0][1] == {"reward/mean": 1 / 3, "time/sample": 0.5}
    assert target.closed


def test_a_tracker_that_raises_is_mentioned_once_and_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = Target(fail)
    mirrored(tmp_path, target)
    assert len(metrics(tmp_path)) == 3
    assert len(target.lines) == 1
    told = capsys.readouterr().err
    assert told.count("mine failed (OSError: database is locked); metrics.jsonl is complete.") == 1


def test_a_tracker_that_hangs_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "WAITING", 2)
    mirrored(tmp_path, Target(threading.Event().wait), epochs=9)
    assert len(metrics(tmp_path)) == 9
    assert capsys.readouterr().err.count("mine does not keep up") == 1


def test_a_tracker_that_cannot_begin_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def make() -> Any:
        raise ConnectionError("no network")

    thread = InThread("mine", make)
    thread.log(1, {})
    thread.close()
    assert "no network" in capsys.readouterr().err


def test_unknown_and_missing_trackers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"names comet; it can be tensorboard, wandb, trackio"):
        tracker("comet", "run", {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'tiller\[wandb\]'"):
        tracker("wandb", "run", {})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_trackers_get_project_name_and_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Session:
        def log(self, line: Mapping[str, Any], step: int) -> None:
            calls.append((line, step))

        def finish(self) -> None:
            calls.append("finish")

    def init(**options: Any) -> Session:
        calls.append(options)
        return Session()

    library = ModuleType(name)
    library.init, library.Image = init, lambda image: ("picture", image)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, library)
    made = tracker(name, "cats", {"reward": "mine"})
    made.log(4, {"reward/mean": 0.5}, ["cat"])
    made.close()
    assert calls == [
        {"project": "tiller", "name": "cats", "config": {"reward": "mine"}},
        ({"reward/mean": 0.5, "samples": [("picture", "cat")]}, 4),
        "finish",
    ]
