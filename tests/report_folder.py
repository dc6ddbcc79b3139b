"""A run folder made by hand, for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tiller.report.pictures import keep_stage

EVIL = "<script>document.title = 'owned'</script>\"'><img src=x onerror=\"document.title = 'owned'\">"
PROMPTS = ("a cat", EVIL)
EPOCHS = (0, 2, 4)
CONFIG = """
model: {name: some/model, lora_rank: 4, revision: abc}
prompts: animals
reward: jpeg_compressibility
algorithm: {name: ddpo, inner_epochs: 1}
sampling: {num_inference_steps: 7}
train: {epochs: 4, samples_per_epoch: 8, group_size: 4, seed: 0, updates_per_epoch: 1}
"""


def colour(epoch: int, index: int) -> tuple[int, int, int]:
    """Of a made-up picture."""
    return (40 * epoch, 60 * index, 200)


def gain(split: str, reward: str, low: float, middle: float, high: float) -> dict[str, object]:
    """A line of comparison.json."""
    numbers = {"base": 1.0, "tuned": 1.0 + middle, "difference": middle, "low": low, "high": high}
    return {"split": split, "reward": reward, **numbers, "win_rate": 0.75, "count": 40}


def run_folder(folder: Path, epochs: Sequence[int] = EPOCHS, lift: float = 0.1) -> Path:
    """Four epochs of a run that won 0.34 kB on animals never trained on, and lost nothing beyond chance."""
    (folder / "evaluation").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    lines = [
        {"epoch": n, "reward/mean": lift * n, "reward/std": 0.5, "reward_calls": 8 * n, "optim/grad_norm": 0.1,
         "policy/clip_fraction": 0.25, "optim/updates": n, "optim/skipped": 0, "drift/diversity": 0.5}
        for n in range(1, 5)
    ]  # fmt: skip
    timings = [
        {
            "epoch": n,
            "time/sample": 30.0,
            "time/reward": 0.0,
            "time/update": 60.0,
            "memory/gb": 1.5,
            "time/evaluate": 9.0,
        }
        for n in range(1, 5)
    ]
    for name, rows in (("metrics.jsonl", lines), ("timings.jsonl", timings)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    gains = [
        gain("trained", "jpeg_compressibility", 0.3, 0.35, 0.4),
        gain("trained", "emoji_gold", -0.2, -0.03, 0.14),
        gain("unseen_animals", "jpeg_compressibility", 0.28, 0.34, 0.4),
    ]
    drift = {"kl_to_base": 800.0, "diversity_base": 0.2, "diversity_tuned": 0.15}
    for name, value in (("comparison.json", gains), ("drift.json", drift)):
        (folder / "evaluation" / name).write_text(json.dumps(value))
    (folder / "environment.json").write_text(json.dumps({"device": "cpu", "packages": {"torch": "9.9"}}))
    (folder / "finished.json").write_text('{"epochs": 4}')
    for epoch in epochs:
        drawn = [Image.new("RGB", (32, 32), colour(epoch, index)) for index in range(4)]
        keep_stage(folder / "images", epoch, PROMPTS, drawn, 2)
    return folder
