"""Two gloo processes on a CPU do what one does; when one dies, so does the other."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trial
from tiller.run import checkpoints
from trial import Event

SETTINGS = replace(trial.SETTINGS, epochs=2, samples_per_epoch=8)


def begin(
    folder: Path, size: int, events: Sequence[Sequence[Event]] = ((), ()), epochs: int = 2, timeout: float = 60
) -> list[Any]:
    """Processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = replace(SETTINGS, epochs=epochs)
    return [
        trial.start(trial.run_shared, rank, size, port, str(folder), events[rank], settings, timeout)
        for rank in range(size)
    ]


def together(folder: Path, size: int, **options: Any) -> list[int]:
    """Train in `size` processes; their exit codes."""
    return [trial.ended(member) for member in begin(folder, size, **options)]


def kept(folder: Path, size: int) -> dict[str, torch.Tensor]:
    """What the processes drew, and the gradients, which are the same in all of them."""
    found: dict[str, torch.Tensor] = {}
    for rank in range(size):
        for name, value in load_file(f"{folder}-{size}-{rank}.safetensors").items():
            if name.startswith("gradient"):
                assert torch.equal(found.setdefault(name, value), value)
            else:
                assert name not in found, "drawn twice"
                found[name] = value
    return found


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs in one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert together(folder, 1) == [0]
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in two processes."""
    folder = tmp_path_factory.mktemp("two") / "run"
    assert together(folder, 2) == [0, 0]
    return folder


def test_two_processes_draw_the_same_pictures_and_take_the_same_gradients(one: Path, two: Path) -> None:
    alone, shared = kept(one, 1), kept(two, 2)
    assert alone.keys() == shared.keys()
    assert sum(name.startswith("picture") for name in alone) == 16
    assert sum(name.startswith("gradient") for name in alone) == 4
    same = [name for name, value in alone.items() if torch.equal(value, shared[name])]
    assert sum(name.startswith("picture") for name in same) >= 8  # those before the first update, bit for bit
    assert (alone["gradient 0"] - shared["gradient 0"]).abs().max() <= 1e-6
    assert float(alone["gradient 0"].abs().max()) > 1e-3
    for name, value in alone.items():  # later ones carry on what Adam makes of a difference in rounding
        assert (value - shared[name]).abs().max() <= 1e-3 * value.abs().max(), name


def test_two_processes_report_the_same_numbers_in_one_folder(one: Path, two: Path) -> None:
    assert len(metrics(two)) == 2
    for epoch, (alone, shared) in enumerate(zip(metrics(one), metrics(two), strict=True)):
        assert list(alone) == list(shared)
        for name, value in alone.items():
            if epoch == 0 and name.startswith("reward"):
                assert value == shared[name]
            assert math.isclose(value, shared[name], rel_tol=1e-2, abs_tol=1e-5), name
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    assert (one / "config.yaml").read_bytes() == (two / "config.yaml").read_bytes()


def test_statistics_are_complete_in_the_checkpoint(one: Path, two: Path) -> None:
    histories = [checkpoints.load(folder / "checkpoints" / "epoch-000002").data["history"] for folder in (one, two)]
    assert histories[0].keys() == histories[1].keys()
    for prompt, rewards in histories[0].items():
        assert histories[1][prompt] == pytest.approx(rewards, abs=1e-4)


def test_a_run_of_two_processes_goes_on_in_one(one: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert together(folder, 2, epochs=2) == [0, 0]
    assert together(folder, 1, epochs=3) == [0]
    assert [line["epoch"] for line in metrics(folder)] == [1, 2, 3]
    assert metrics(folder)[-1]["reward_calls"] == 24
    pictures = {name for name in kept(folder, 1) if name.startswith("picture")}
    assert len(pictures) == 8  # of the third epoch, none of them drawn before
    assert not pictures & kept(one, 1).keys()


@pytest.mark.parametrize("dying", [0, 1])
def test_when_a_process_dies_the_other_ends(tmp_path: Path, dying: int) -> None:
    events: list[list[Event]] = [[], []]
    events[dying] = [Event("update", 2, "kill")]
    began = time.monotonic()
    codes = together(tmp_path / "run", 2, events=events, timeout=1800)
    assert codes[dying] == -9
    assert codes[1 - dying] > 0
    assert time.monotonic() - began < 60


def test_when_a_process_hangs_the_other_ends_after_the_timeout(tmp_path: Path) -> None:
    members = begin(tmp_path / "run", 2, [[], [Event("reward", 2, "hang")]], timeout=5)
    try:
        assert trial.ended(members[0]) > 0
        assert members[1].exitcode is None
    finally:
        members[1].kill()


def test_accelerate_launch_starts_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from tiller.distributed import World\n"
        "world = World()\n"
        "found = world.gather(world.share(list('abcde')))\n"
        "with open(f'{__file__}.{world.rank}', 'w') as file:\n"
        "    print(world.rank, 'of', world.size, *found, file=file)\n"
    )
    # not --cpu, with which accelerate starts one process, however many are asked for
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    said = [(tmp_path / f"script.py.{rank}").read_text().strip() for rank in range(2)]
    assert said == ["0 of 2 a b c d e", "1 of 2 a b c d e"]
