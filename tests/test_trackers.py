"""Trackers get every line, and can neither stop nor delay a run."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

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
    made = tracker(name, "cats", {"reward": "mine"}, "runs/cats")
    made.log(4, {"reward/mean": 0.5}, ["cat", "dog"])
    made.close()
    where = {"dir": "runs/cats"} if name == "wandb" else {}
    assert calls == [
        {"project": "tiller", "name": "cats", "config": {"reward": "mine"}, **where},
        ({"reward/mean": 0.5, "samples/0": ("picture", "cat"), "samples/1": ("picture", "dog")}, 4),
        "finish",
    ]


# ---- the real packages, where they are installed; none of them needs a network ----

LINES = [(1, {"reward/mean": 0.25}), (2, {"reward/mean": 0.5, "time/sample": 2.0})]


def write(name: str, folder: Path) -> None:
    """Two lines, and two pictures with the second."""
    made = tracker(name, "cats", {"reward": "mine", "train": {"betas": [0.9, 0.999]}}, folder)
    pictures = [Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8))]
    for (step, line), images in zip(LINES, ([], pictures), strict=True):
        made.log(step, line, images)
    made.close()


def test_tensorboard_receives_lines_pictures_and_recipe(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write("tensorboard", tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("time/sample")] == [(2, 2.0)]
    image = Image.open(io.BytesIO(events.Images("samples/0")[0].encoded_image_string))
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert events.Images("samples/1")[0].step == 2
    assert b"mine" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def records(file: Path) -> Iterator[bytes]:
    """The records of an offline run of wandb: LevelDB's log format behind a header of seven bytes."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # the rest of a block that no header fits in
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def test_wandb_receives_lines_pictures_and_recipe_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    write("wandb", tmp_path)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    found, until = list[Any](), time.monotonic() + 60
    while time.monotonic() < until and not (found and found[-1].HasField("exit")):
        time.sleep(0.1)  # wandb's own process may write the end after `finish` has returned
        found = [proto.Record.FromString(record) for record in records(file)]
    named = {item.key: item.value_json for record in found for item in record.run.config.update}
    assert json.loads(named["reward"]) == "mine"
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    assert [(row["_step"], row["reward/mean"]) for row in rows] == [(1, 0.25), (2, 0.5)]
    assert rows[1]["time/sample"] == 2.0
    path = next((tmp_path / "wandb").glob("offline-run-*")) / "files" / rows[1]["samples/0/path"]
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)


def test_trackio_receives_lines_pictures_and_recipe(tmp_path: Path) -> None:
    """In a process of its own: trackio reads TRACKIO_DIR when it is imported."""
    pytest.importorskip("trackio")
    code = (
        f"import sys\nsys.path[:] = {sys.path!r}\nfrom test_trackers import write\nwrite('trackio', {str(tmp_path)!r})"
    )
    where = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "skipped" not in done.stderr
    with sqlite3.connect(tmp_path / "trackio" / "tiller.db") as database:
        lines = database.execute("SELECT step, metrics FROM metrics WHERE run_name = 'cats' ORDER BY step").fetchall()
        ((settings,),) = database.execute("SELECT config FROM configs WHERE run_name = 'cats'").fetchall()
    assert [(step, json.loads(text)["reward/mean"]) for step, text in lines] == [(1, 0.25), (2, 0.5)]
    assert json.loads(settings)["reward"] == "mine"
    path = tmp_path / "trackio" / "media" / json.loads(lines[1][1])["samples/0"]["file_path"]
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0, 255)
