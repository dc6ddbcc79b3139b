"""Evaluations during a run, on a tiny pipeline: what is seen, what is done about it, and runs that go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
import tiny_scorers
from tiller.cli import main
from tiller.commands.watching import Watch

RECIPE = """
model: {{name: {model}, lora_rank: 4}}
prompts: {prompts}
reward: jpeg_compressibility
sampling: {{num_inference_steps: 3, guidance_scale: 2.0, height: 16, width: 16}}
train: {{epochs: 4, samples_per_epoch: 8, group_size: 4, batch_size: 4, learning_rate: 1.0e-2}}
evaluation: {{samples_per_prompt: 1, every: 1, pictures: 4}}
run: {{output_dir: {output}, checkpoint_every: 1, sample_prompts: 0}}
"""
MOVED = "evaluation.monitor.kl=1e-9"  # a rule that every trained model breaks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.tiny_sd().save_pretrained(folder)
    return folder


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Any:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")

    def go(name: str, *overrides: str) -> Path:
        text = RECIPE.format(model=model, prompts=tmp_path / "prompts.txt", output=tmp_path / name)
        (tmp_path / f"{name}.yaml").write_text(text)
        assert main(["train", str(tmp_path / f"{name}.yaml"), *overrides]) == 0
        return tmp_path / name

    return go


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluation" / "history.jsonl").read_text().splitlines()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_looked_at_on_fixed_noise_and_the_numbers_are_in_the_log(run: Any) -> None:
    folder = run("run", "evaluation.every=2")
    assert [line["epoch"] for line in history(folder)] == [2, 4]
    (file,) = (folder / "evaluation").glob("in-run-base-*.json")
    base = json.loads(file.read_text())["scores"]["trained"]
    assert base["prompts"] == ["a cat", "a cat", "a dog", "a dog"]
    mean = sum(base["scores"]["jpeg_compressibility"]) / 4
    for line in history(folder):
        assert line["compared"]["jpeg_compressibility"]["base"] == pytest.approx(mean)
        now = line["compared"]["jpeg_compressibility"]["tuned"]
        assert metrics(folder)[line["epoch"] - 1]["eval/trained/jpeg_compressibility"] == pytest.approx(now)
        assert line["kl"] > 0
    assert "drift/edges" not in metrics(folder)[0]
    assert metrics(folder)[1]["drift/edges"] == history(folder)[0]["statistics"]["edges"][1]


def test_distances_may_be_those_of_a_networks_features(run: Any, tmp_path: Path) -> None:
    """Vectors of length 1 are at most 2 apart; the same run counts on when what is looked at changes."""
    tiny_scorers.clip(tmp_path / "clip")
    folder = run("run", "train.epochs=1")
    again = run("run", "train.epochs=2", f"evaluation.features={tmp_path}/clip")
    assert again == folder
    first, second = history(folder)
    assert 0 < second["distance"] <= 2
    assert first["distance"] != second["distance"]
    assert len(list((folder / "evaluation").glob("in-run-base-*.json"))) == 2


def test_a_run_that_loses_too_much_goes_back_to_its_best(
    run: Any, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit on the paths lies between what the first and what the second epoch moved."""
    moved = [line["kl"] for line in history(run("free"))]
    assert moved[0] < min(moved[1:])
    rules = [f"evaluation.monitor.kl={(moved[0] + min(moved[1:])) / 2}", "evaluation.monitor.action=roll_back"]
    folder = run("held", *rules)
    told = capsys.readouterr().out
    assert "over-optimised? the paths have moved" in told
    assert "monitor: stopped after epoch 3, with the weights of epoch 1" in told
    about = json.loads((folder / "evaluation" / "monitor.json").read_text())
    assert (about["acted"], about["best"]["epoch"]) == ([3], 1)
    assert [finding["epoch"] for finding in about["findings"]] == [2, 3]
    assert len(metrics(folder)) == 3
    after = json.loads((folder / "evaluation" / "comparison.json").read_text())[0]
    assert after["tuned"] != after["base"]
    best = load_file(folder / "evaluation" / "best-000001.safetensors")
    last = load_file(max((folder / "checkpoints").glob("*3*")) / "state.safetensors")
    for name, value in best.items():
        torch.testing.assert_close(last[f"weights.{name}"], value, rtol=0, atol=0)

    (folder / "finished.json").unlink()  # as if it had been killed right before the end
    monkeypatch.setattr(Watch, "at", None)  # it must not look again
    assert run("held", *rules) == folder
    assert len(metrics(folder)) == 3


def test_a_lower_rate_is_taken_up_again_by_a_resumed_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [MOVED, "evaluation.monitor.action=lower_rate", "evaluation.monitor.patience=1"]
    whole = run("whole", *rules)
    at = Watch.at

    def interrupted(self: Watch, state: Any) -> dict[str, float]:
        if state.epoch == 3:
            raise KeyboardInterrupt
        return at(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "at", interrupted)
        with pytest.raises(AssertionError):
            run("halves", *rules)
    halves = run("halves", *rules)
    assert metrics(halves) == metrics(whole)
    assert history(halves) == history(whole)
    assert json.loads((whole / "evaluation" / "monitor.json").read_text())["acted"] == [1, 2, 3, 4]


def test_without_a_rule_broken_the_monitor_changes_nothing_in_training(run: Any) -> None:
    watched, alone = run("watched"), run("alone", "evaluation.every=0")
    assert not (alone / "evaluation" / "history.jsonl").exists()
    for one, other in zip(metrics(watched), metrics(alone), strict=True):
        assert {name: value for name, value in one.items() if name in other} == other
