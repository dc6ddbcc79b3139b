"""Faults on purpose: kills, full disks, signals, flipped bits, pickles. The run goes on as if nothing had been.

The numbers are those of the list in docs/reliability.md.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trial
from test_run import RECIPE, SETTINGS, advance, equal, go, new_state, report
from tiller.algorithms import DDPO
from tiller.run import Run, checkpoints, files, lines, sick
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.types import RunError, TillerError
from tiller.update import Attempt, NotFinite
from trial import Event

NAMES = ["manifest.json", "state.json", "state.safetensors"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The outcome of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert trial.once(folder) == 0
    return trial.outcome(folder)


def finish(folder: Path) -> dict[str, str]:
    """The outcome once the run is resumed and left alone."""
    assert trial.once(folder) == 0
    return trial.outcome(folder)


# 1: kill -9 at random moments


def test_a_run_killed_again_and_again_ends_where_the_undisturbed_one_ends(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    dice = random.Random(0)
    for _ in range(4):
        assert trial.once(tmp_path, Event("anything", dice.randint(10, 60), "kill")) == -9
    assert finish(tmp_path) == undisturbed


@pytest.mark.parametrize("event", [("updated", 5), ("append metrics.jsonl", 3), ("replace", 1), ("reward", 6)])
def test_a_run_killed_at_a_chosen_point_ends_the_same(
    tmp_path: Path, undisturbed: dict[str, str], event: tuple[str, int]
) -> None:
    assert trial.once(tmp_path, Event(*event, "kill")) == -9
    assert finish(tmp_path) == undisturbed


def test_a_run_killed_from_outside_at_any_time_ends_the_same(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    dice = random.Random()  # truly any time
    for _ in range(3):
        process = trial.start(trial.run, tmp_path)
        time.sleep(dice.uniform(0.3, 1.5))
        process.kill()
        assert trial.ended(process) in (-9, 0)
        if (tmp_path / "finished.json").exists():
            break
    else:
        assert trial.once(tmp_path) == 0
    assert trial.outcome(tmp_path) == undisturbed


# 2 and 3: kill -9 at every step of a save


def killed_save(folder: str, keep_last: int, point: int) -> None:
    """Save epoch 2 beside epoch 1, and be killed at a step of that."""
    torch.set_num_threads(1)
    with Run.open(folder, RECIPE, keep_last=keep_last) as run:
        state = new_state(2)
        run.log(report(state))
        counter = trial.Counter([Event("anything", point, "kill")])
        for module in (files, lines, checkpoints):
            module.reached = counter  # type: ignore[attr-defined]
        run.save(state)


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_save_killed_at_any_step_leaves_a_checkpoint_that_loads(tmp_path: Path, keep_last: int) -> None:
    with Run.open(tmp_path / "start", RECIPE) as run:
        go(run, new_state(), 1)
    epochs = []
    for point in range(1, 99):
        folder = tmp_path / str(point)
        shutil.copytree(tmp_path / "start", folder)
        code = trial.ended(trial.start(killed_save, str(folder), keep_last, point))
        state = new_state()
        with Run.open(folder, RECIPE, keep_last=keep_last) as run:
            assert run.restore(state)
            assert equal(state, new_state(state.epoch))
            assert not list(folder.rglob(".tmp-*"))
        epochs.append(state.epoch)
        if code == 0:
            break
        assert code == -9
    assert len(epochs) >= 14
    assert epochs == sorted(epochs)  # the old one, until the new one is whole
    assert epochs[0] == 1
    assert epochs[-1] == 2


# 4: no room, no permission, a disk that fails


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """`failing(point, number)`: the system's error of that number at that point."""

    def arrange(point: str, number: int) -> None:
        def reached(at: str) -> None:
            if at == point:
                raise OSError(number, os.strerror(number))

        for module in (files, lines, checkpoints):
            monkeypatch.setattr(module, "reached", reached)

    return arrange


@pytest.mark.parametrize(
    ("point", "number"),
    [
        ("mkdir", errno.EACCES),
        ("write state.safetensors", errno.ENOSPC),
        ("sync state.safetensors", errno.EIO),
        ("write state.json", errno.ENOSPC),
        ("fsync manifest.json", errno.EIO),
    ],
)
def test_a_save_that_fails_says_so_and_leaves_the_checkpoints_alone(
    tmp_path: Path, failing: Callable[[str, int], None], point: str, number: int
) -> None:
    with Run.open(tmp_path, RECIPE, keep_last=1) as run:
        state = new_state()
        go(run, state, 1)
        before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
        advance(state)
        failing(point, number)
        with pytest.raises(RunError, match=r"epoch-000002: .* \([\d.]+ GB free there\)") as caught:
            run.save(state)
        assert os.strerror(number) in str(caught.value)
        assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
        failing("", 0)
        run.save(state)
        assert [path.name for path in run.checkpoints()] == ["epoch-000002"]


def save_beyond_the_limit(folder: str) -> None:
    """Save under a limit on the size of files, which stops a write in the middle as a full disk does."""
    import resource

    with Run.open(folder, RECIPE) as run:
        state = new_state()
        go(run, state, 1)
        before = {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
        advance(state)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(RunError, match=r"cannot write .*epoch-000002: .*File too large"):
            run.save(state)
        assert {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()} == before
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
        with pytest.raises(RunError, match=r"cannot write .*metrics.jsonl: File too large"):  # noqa: PT012
            for _ in range(99):
                run.log(report(state))
    assert all(json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines())


def test_a_write_that_is_cut_short_by_the_system_loses_nothing(tmp_path: Path) -> None:
    assert trial.ended(trial.start(save_beyond_the_limit, str(tmp_path))) == 0


# 5 and 6: SIGTERM and Ctrl-C


@pytest.mark.parametrize(
    ("event", "code", "saved"),
    [
        (Event("denoise", 12, "term"), 143, 1),  # drawing or updating, in the second epoch
        (Event("reward", 3, "term hang"), 143, 1),  # waiting for a reward that hangs
        (Event("updated", 5, "int"), 130, 2),  # between two updates of the third epoch
        (Event("write state.safetensors", 1, "int"), 130, 2),  # in a save
        (Event("report", 3, "term"), 143, 3),  # between two epochs
    ],
)
def test_a_signal_saves_the_last_epoch_and_leaves(
    tmp_path: Path, undisturbed: dict[str, str], event: Event, code: int, saved: int
) -> None:
    assert trial.once(tmp_path, event) == code
    assert checkpoints.epoch_of(checkpoints.listed(tmp_path / "checkpoints")[-1]) == saved
    assert not list(tmp_path.rglob(".tmp-*"))
    assert finish(tmp_path) == undisturbed


def test_a_second_signal_leaves_at_once_and_still_loses_nothing(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    assert trial.once(tmp_path, Event("write state.safetensors", 2, "term int hang")) == 130
    assert [path.name for path in checkpoints.listed(tmp_path / "checkpoints")] == ["epoch-000002"]
    assert finish(tmp_path) == undisturbed


# 7: flipped bits, cut files


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with Run.open(folder, RECIPE) as run:
        go(run, new_state(), 2)
    return folder


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path: Path, two_checkpoints: Path, name: str, damage: str
) -> None:
    folder, told = tmp_path / "run", list[str]()
    shutil.copytree(two_checkpoints, folder)
    path = folder / "checkpoints" / "epoch-000002" / name
    size = path.stat().st_size
    if damage == "flip":
        flip(path, random.Random(name).randrange(8 * size))
    elif damage == "cut":
        os.truncate(path, size // 2)
    else:
        path.unlink()
    with Run.open(folder, RECIPE, tell=told.append) as run:
        state = new_state()
        assert run.restore(state)
        assert equal(state, new_state(1))
        assert name in told[0]
        assert "goes on from epoch-000001" in told[0]
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
        go(run, state, 1)
        assert checkpoints.load(folder / "checkpoints" / "epoch-000002").epoch == 2
    assert (folder / "checkpoints" / "damaged-epoch-000002").is_dir()


def test_any_bit_counts(tmp_path: Path, two_checkpoints: Path) -> None:
    checkpoint = tmp_path / "epoch-000002"
    shutil.copytree(two_checkpoints / "checkpoints" / "epoch-000002", checkpoint)
    for name in NAMES:
        path = checkpoint / name
        bits = 8 * path.stat().st_size
        for bit in random.Random(0).sample(range(bits), 60):
            flip(path, bit)
            with pytest.raises(checkpoints.Damaged, match=name):
                checkpoints.load(checkpoint)
            flip(path, bit)
    assert checkpoints.load(checkpoint).epoch == 2


def test_with_all_checkpoints_damaged_nothing_begins_again_in_silence(tmp_path: Path, two_checkpoints: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    for path in folder.rglob("state.json"):
        flip(path, 3)
    with Run.open(folder, RECIPE) as run, pytest.raises(RunError, match=r"no checkpoint in .* is sound"):
        run.restore(new_state())
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(checkpoints.listed(folder / "checkpoints")) == 2


# 8: pickles


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", [*NAMES, "identity.json", "environment.json", "config.yaml", "metrics.jsonl"])
@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_in_place_of_any_file_is_never_run(
    tmp_path: Path, two_checkpoints: Path, name: str, kind: str
) -> None:
    folder, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(two_checkpoints, folder)
    path = next(folder.rglob(name)) if name not in NAMES else folder / "checkpoints" / "epoch-000002" / name
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(mark)))
    else:
        torch.save(Bomb(mark), path)
    _make_manifest_fit(path)
    try:
        with Run.open(folder, RECIPE, tell=lambda _: None) as run:
            run.restore(new_state())
    except TillerError as error:
        assert path.name in str(error)  # noqa: PT017
    assert not mark.exists()


def _make_manifest_fit(path: Path) -> None:
    """As an attacker would."""
    manifest = path.parent / "manifest.json"
    if path.name in ("state.json", "state.safetensors"):
        content = json.loads(manifest.read_text())
        content["files"][path.name] = {"sha256": files.sha256(path), "bytes": path.stat().st_size}
        manifest.write_bytes(files.to_json(content))


def test_pickle_bombs_go_off_when_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


# 12: a gradient that is not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count(value: float) -> None:
    state, same = new_state(2), new_state(2)
    for parameter in state.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    state.parameters["unet.linear"].grad[0, 0] = value  # type: ignore[index]
    state.step(SETTINGS)
    assert state.skipped == 1
    state.skipped = state.skipped_in_a_row = 0
    assert equal(state, same)
    advance(state)
    advance(same)
    assert equal(state, same)


def run_into_nan(folder: str) -> None:
    """Train; from the second epoch on, one element of one gradient is NaN."""
    step = TrainState.step

    def poisoned(self: TrainState, settings: TrainConfig) -> float:
        if self.epoch >= 1:
            next(iter(self.parameters.values())).grad[0, 0] = float("nan")  # type: ignore[index]
        return step(self, settings)

    TrainState.step = poisoned  # type: ignore[method-assign]
    with pytest.raises(NotFinite, match=r"not finite 5 times in a row.*is in .*not-finite-epoch-000004\.$"):
        trial.run(folder)


def test_training_that_only_meets_nan_stops_with_the_last_good_state(tmp_path: Path) -> None:
    assert trial.ended(trial.start(run_into_nan, str(tmp_path))) == 0
    last = checkpoints.load(checkpoints.listed(tmp_path / "checkpoints")[-1])
    assert last.epoch == 3
    assert last.data["updates"] == 2
    assert all(bool(value.isfinite().all()) for value in last.tensors.values())


def test_the_last_update_that_met_nan_can_be_made_again_from_what_is_written(tmp_path: Path) -> None:
    """Weights, prompts, sample indices and seed give the very same latents and log-probabilities."""
    assert trial.ended(trial.start(run_into_nan, str(tmp_path))) == 0
    kept = tmp_path / "not-finite-epoch-000004"
    about = json.loads((kept / "about.json").read_text())
    policy = trial._policy()
    assert about["gradients_not_finite"] == [next(iter(policy.parameters))]
    assert (about["epoch"], about["inner_epoch"], about["seed"], about["steps"]) == (3, 0, 0, [0, 1])
    assert about["recipe"]["train"]["samples_per_epoch"] == 4
    weights = load_file(kept / "weights.safetensors")
    assert weights.keys() == policy.parameters.keys()
    with torch.no_grad():
        for name, parameter in policy.parameters.items():
            parameter.copy_(weights[name])
    (chunk,) = about["chunks"]  # an update has one of the epoch's two batches
    assert chunk["latents_not_finite"] == []
    rollout = policy.sample(chunk["prompts"], seed=0, samples=chunk["samples"], kernel=DDPO().kernel, **trial.SAMPLING)
    tensors = load_file(kept / f"chunk-{chunk['number']:06d}.safetensors")
    assert torch.equal(tensors["latents"], torch.stack(rollout.latents))
    assert torch.equal(tensors["log_probs"], rollout.log_probs)
    scores = trial.brightness(rollout.images, [], [])
    assert chunk["scores"] == scores
    assert [value != value for value in tensors["scores"].tolist()] == [score is None for score in scores]
    assert not list(tmp_path.glob(".tmp-*"))


def test_an_update_that_cannot_be_written_down_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"unet.conv": torch.ones(2)}
    attempt = Attempt(0, 0, 0, chunks=[], scores=[], advantages=[], steps=[], not_finite=[], weights=weights)
    before = sick.write(tmp_path, attempt, {})
    assert load_file(before / "weights.safetensors")["unet.conv"].tolist() == [1, 1]

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sick, "save_file", full)
    with pytest.raises(RunError, match=r"not-finite-epoch-000001: No space left.*GB free there"):
        sick.write(tmp_path, attempt, {})
    assert [path.name for path in tmp_path.iterdir()] == [before.name]


# 23: secrets


def test_no_secret_of_the_environment_reaches_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "hf_SECRET")
    with Run.open(tmp_path, RECIPE) as run:
        go(run, new_state(), 2)
        run.finish()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_SECRET" in path.read_bytes()]
