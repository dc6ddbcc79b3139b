"""How much of a slow reward's time an epoch hides: drawing and scoring together, against the longer of the two alone.

    python bench/reward_overlap.py                    # the embedded model, 8 batches of 8, rewards that sleep
    python bench/reward_overlap.py --batches 16 --threads 1

The reward takes a set time for each batch, measured against drawing one with a reward that costs nothing: it sleeps in
its thread, waits in an event loop, or allows several calls at once. The ratio is the epoch's wall-clock time over the
longer of two: its own drawing, and the sum of the reward's sleeps divided by the calls it allows at once.

Updates are not counted: they need the scores, and the next epoch's pictures need the updates, so neither can begin
earlier. The last batch is drawn before it can be scored, which bounds the ratio from below: (B + 1) / B for B batches,
one call at a time, and a reward exactly as fast as drawing.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tiller import DDPO, Policy, Prompt
from tiller.collect import collect
from tiller.distributed import World
from tiller.metrics import Clock
from tiller.settings import TrainConfig
from tiller.state import TrainState

PROMPTS = [Prompt(f"a {animal}") for animal in ("cat", "dog", "horse", "cow", "rabbit", "lion", "pig", "bear")]


def free(images: list[Any], prompts: list[str], metadata: list[Any]) -> list[float]:
    return [float(index) for index in range(len(images))]


def sleeping(seconds: float, workers: int = 1) -> Callable[..., list[float]]:
    def reward(images: list[Any], prompts: list[str], metadata: list[Any]) -> list[float]:
        time.sleep(seconds)
        return free(images, prompts, metadata)

    reward.workers = workers  # type: ignore[attr-defined]
    return reward


def waiting(seconds: float) -> Callable[..., Any]:
    async def reward(images: list[Any], prompts: list[str], metadata: list[Any]) -> list[float]:
        await asyncio.gather(*(asyncio.sleep(seconds) for _ in images))  # one request per picture, all at once
        return free(images, prompts, metadata)

    return reward


class Epochs:
    """Epochs of the embedded model, without their updates."""

    def __init__(self, batches: int, batch_size: int, steps: int):
        self.policy = Policy.from_pretrained("emoji", lora_rank=4)
        self.config = TrainConfig(samples_per_epoch=batches * batch_size, group_size=4, batch_size=batch_size)
        self.sampling = {"num_inference_steps": steps}
        self.algorithm = DDPO()

    def seconds(self, reward: Any, repeats: int) -> list[tuple[float, float]]:
        """Wall-clock seconds of epochs' drawing and scoring together, and of the drawing alone in each."""
        found = []
        for _ in range(repeats):
            state, clock = TrainState(self.policy, self.config, self.algorithm), Clock()
            places = (self.algorithm, self.config, self.sampling, state, World(), clock)
            collect(self.policy, PROMPTS, reward, *places)
            found.append((sum(clock.laps.values()), clock.laps["time/sample"]))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    epochs = Epochs(arguments.batches, arguments.batch_size, arguments.steps)
    epochs.seconds(free, 1)  # warm up
    drawing = statistics.median(drawn for _, drawn in epochs.seconds(free, arguments.repeats))
    each = drawing / arguments.batches
    bound = (arguments.batches + 1) / arguments.batches
    print(f"{arguments.batches} batches of {arguments.batch_size}, {arguments.steps} steps: drawing {drawing:.2f} s")
    print(f"as long as drawing, {each:.3f} s per batch, one call at a time, bounds the ratio by {bound:.3f}")
    print(f"{'reward':<36}{'epoch':>9}{'drawing':>9}{'scoring':>9}{'ratio':>8}")
    kinds = {
        "sleeps, as long as drawing": (sleeping(each), drawing),
        "async, as long as drawing": (waiting(each), drawing),
        "sleeps, half as long": (sleeping(each / 2), drawing / 2),
        "sleeps, twice as long": (sleeping(2 * each), 2 * drawing),
        "sleeps, twice as long, workers = 2": (sleeping(2 * each, workers=2), drawing),
    }
    for name, (reward, scoring) in kinds.items():
        found = epochs.seconds(reward, arguments.repeats)
        ratio = statistics.median(whole / max(drawn, scoring) for whole, drawn in found)
        whole, drawn = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{name:<36}{whole:>9.2f}{drawn:>9.2f}{scoring:>9.2f}{ratio:>8.3f}")


if __name__ == "__main__":
    main()
