"""How long the report of a large run takes: 500 epochs, 200 pictures of 512x512 pixels, ten evaluations.

    python bench/report.py

Prints the seconds for reading and writing (by the clock, and of the processor, where others are at work too), and the
size of the page. The folder is made up: noisy curves, and pictures as hard to compress as photographs.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tiller.report import html
from tiller.report.pictures import keep_stage

EPOCHS, STAGES, PROMPTS, SIDE = 500, 25, 4, 512


def picture(random: np.random.Generator) -> Image.Image:
    """Smooth shapes and some noise."""
    rough = Image.fromarray(random.integers(0, 256, (12, 12, 3), np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    noise = random.normal(0, 6, (SIDE, SIDE, 3))
    return Image.fromarray((np.asarray(rough) + noise).clip(0, 255).astype(np.uint8))


def make(folder: Path) -> None:
    """A run folder of that size."""
    random = np.random.default_rng(0)
    recipe = "reward: r\nmodel: {name: m, lora_rank: 4}\ntrain: {epochs: 500, samples_per_epoch: 64, group_size: 8}\n"
    (folder / "config.yaml").write_text(recipe)
    metrics, timings = [], []
    for epoch in range(1, EPOCHS + 1):
        names = [f"policy/metric_{number}" for number in range(12)]
        line = {name: float(random.normal()) for name in names} | {"reward/mean": epoch / 100 + float(random.normal())}
        line |= {f"eval/{split}/r": float(random.normal()) for split in ("a", "b")} if epoch % 50 == 0 else {}
        metrics.append({"epoch": epoch, "reward/std": 1.0, "reward_calls": 64 * epoch, **line})
        timings.append({"epoch": epoch, "time/sample": 4.0, "time/reward": 0.1, "time/update": 8.0})
    for name, lines in (("metrics.jsonl", metrics), ("timings.jsonl", timings)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for stage in range(STAGES):
        drawn = [picture(random) for _ in range(2 * PROMPTS)]
        keep_stage(folder / "images", stage * EPOCHS // (STAGES - 1), [f"prompt {n}" for n in range(PROMPTS)], drawn, 2)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        started, worked = time.perf_counter(), time.process_time()
        path = html.write(folder)
        taken, own, size = time.perf_counter() - started, time.process_time() - worked, path.stat().st_size / 1e6
        count = STAGES * 2 * PROMPTS
        print(f"{EPOCHS} epochs, {count} pictures: {taken:.2f} s ({own:.2f} s of the processor), {size:.2f} MB")


if __name__ == "__main__":
    main()
