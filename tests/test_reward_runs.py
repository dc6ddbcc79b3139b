"""Several rewards in a run, as a user meets them: files, going on, what is refused, evaluation, too many missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from tiller.cli import main
from tiller.run.claim import BEGINNING

RECIPE = """
model: {{name: {model}, lora_rank: 4}}
prompts: {folder}/prompts.txt
reward:
  - {{name: jpeg_compressibility, normalise: true}}
  - {{name: '{folder}/mine.py:Brighter', weight: 0.5}}
  - {{name: '{folder}/mine.py:Judge', weight: 0, gain: 2}}
sampling: {{num_inference_steps: 2, guidance_scale: 2.0, height: 16, width: 16}}
train: {{epochs: 1, samples_per_epoch: 8, group_size: 4, batch_size: 4, learning_rate: 1.0e-3}}
evaluation: {{samples_per_prompt: 2, every: 0}}
run: {{output_dir: {folder}/run, checkpoint_every: 1, sample_prompts: 1}}
"""
REWARDS = """
import os
from dataclasses import dataclass
from pathlib import Path
from tiller.types import Score

def grey(image):
    return sum(image.convert("L").tobytes()) / 256 / 255

@dataclass(frozen=True)
class Brighter:
    pairwise = True
    symmetric = True

    def __call__(self, first, second, prompts, metadata):
        return [float(grey(a) > grey(b)) for a, b in zip(first, second)]

@dataclass(frozen=True)
class Judge:
    gain: float = 1.0
    deterministic = True

    def __call__(self, images, prompts, metadata):
        with (Path(__file__).parent / "asked.txt").open("a") as file:
            file.write("x" * len(images))
        if (Path(__file__).parent / "away").exists():
            return [Score(None, f"server 503 for {os.environ['JUDGE_TOKEN']}") for image in images]
        return [Score(self.gain * grey(image), note=os.environ["JUDGE_TOKEN"]) for image in images]
"""
SECRET = "tok_SECRET_value"


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.tiny_sd().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("JUDGE_TOKEN", SECRET)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "mine.py").write_text(REWARDS)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=model, folder=tmp_path))
    return str(tmp_path / "recipe.yaml")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_of_three_rewards_from_start_to_evaluation(recipe: str, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    assert main(["train", recipe]) == 0
    said = capsys.readouterr().out
    assert "towards jpeg_compressibility + 0.5 Brighter, in" in said
    assert "3 Judge" in said  # the table

    beside = json.loads((run / "rewards.json").read_text())
    assert beside["pictures"] == 32
    assert list(beside["rewards"]) == ["Brighter", "Judge", "jpeg_compressibility"]
    scale = beside["rewards"]["jpeg_compressibility"]["scale"]
    assert scale == {key: beside["rewards"]["jpeg_compressibility"][key] for key in ("mean", "std")}
    assert beside["rewards"]["Brighter"]["mean"] == pytest.approx(0.5)  # of whole groups, by definition

    lines = read(run / "scores.jsonl")
    assert [line["epoch"] for line in lines] == [1] * 8
    assert {(line["prompt"], line["sample"]) for line in lines} == {
        (p, s) for p in ("a cat", "a dog") for s in range(4)
    }
    for line in lines:
        parts = line["components"]
        expected = (parts["jpeg_compressibility"] - scale["mean"]) / scale["std"] + 0.5 * parts["Brighter"]
        assert line["total"] == pytest.approx(expected)
        assert line["note"] == "Judge: [JUDGE_TOKEN]"
    (metrics,) = read(run / "metrics.jsonl")
    assert metrics["reward/mean"] == pytest.approx(np.mean([line["total"] for line in lines]))
    assert metrics["reward/Judge/mean"] == pytest.approx(np.mean([line["components"]["Judge"] for line in lines]))
    (timings,) = read(run / "timings.jsonl")
    assert timings["cache/misses"] >= 8

    # a run that goes on has the same scales, and the lines of before
    assert main(["train", recipe, "train.epochs=2"]) == 0
    assert json.loads((run / "rewards.json").read_text()) == beside
    assert read(run / "scores.jsonl")[:8] == lines
    assert [line["epoch"] for line in read(run / "scores.jsonl")[8:]] == [2] * 8

    # evaluation knows the scales, and asks nothing of what is in the cache
    compared = json.loads((run / "evaluation" / "comparison.json").read_text())
    (tmp_path / "asked.txt").unlink()
    assert main(["evaluate", str(run)]) == 0
    assert not (tmp_path / "asked.txt").exists()
    again = {line["reward"]: line for line in json.loads((run / "evaluation/again/comparison.json").read_text())}
    assert list(again) == ["total", "total[jpeg_compressibility]", "total[Brighter]", "total[Judge]"]
    for line in compared:
        assert again[line["reward"]]["tuned"] == pytest.approx(line["tuned"], abs=1e-4)

    assert not [path for path in run.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]

    # other scales, or none, are refused
    capsys.readouterr()
    text = (run / "rewards.json").read_text()
    (run / "rewards.json").write_text(text.replace(f'"std": {scale["std"]}', '"std": 123.0'))
    assert main(["train", recipe, "train.epochs=3"]) == 2
    assert "another scale of its rewards: rewards.json has changed" in capsys.readouterr().err
    (run / "rewards.json").unlink()
    assert main(["train", recipe, "train.epochs=3"]) == 2
    assert "the scale of jpeg_compressibility" in capsys.readouterr().err
    assert main(["train", recipe, "train.epochs=3", "reward.1.weight=0.7"]) == 2
    assert "belongs to another recipe: reward is" in capsys.readouterr().err


def test_a_judge_that_goes_away_ends_the_run_after_the_last_good_epoch_and_the_same_command_goes_on(
    recipe: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiller.run import Run

    command = ["train", recipe, "train.epochs=2", "reward.2.weight=0.1", "run.checkpoint_every=5"]
    log = Run.log

    def then_away(self: Run, report: Any, more: Any = None) -> None:
        log(self, report, more)
        if report.epoch == 1:
            (tmp_path / "away").touch()

    monkeypatch.setattr(Run, "log", then_away)
    assert main(command) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: in epoch 2, reward Judge gave no score to 8 of 8 pictures (100%, more than the 50%")
    assert "server 503 for [JUDGE_TOKEN] (8 times)" in error
    assert "\n" not in error
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["epoch-000001"]
    assert [line["epoch"] for line in read(tmp_path / "run" / "scores.jsonl")] == [1] * 8
    (tmp_path / "away").unlink()
    monkeypatch.setattr(Run, "log", log)
    assert main(command) == 0
    assert [line["epoch"] for line in read(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_what_does_not_fit_is_refused_before_anything_is_drawn(recipe: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["train", recipe, "train.batch_size=2"]) == 2
    assert "compares all pictures of a prompt, and a batch of 2 splits groups of 4" in capsys.readouterr().err
    assert main(["train", recipe, "algorithm=draft"]) == 2
    assert "DRaFT differentiates the reward, and jpeg_compressibility is not" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {*BEGINNING, ".lock"}
