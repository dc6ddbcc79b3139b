"""TRL's side of `peer.py`, run by a python that has TRL: trains and prints the processor seconds of each epoch."""

from __future__ import annotations

import itertools
import json
import sys
import time

import torch
from accelerate import PartialState
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

PROMPTS = ("a cat", "a dog", "a horse", "a monkey", "a rabbit", "a zebra", "a spider", "a bird")  # as in models.py


def brightness(images: torch.Tensor, prompts: tuple, metadata: tuple) -> tuple[torch.Tensor, dict]:
    """The mean of the red channel, which costs nothing."""
    return images[:, 0].float().mean(dim=(1, 2)), {}


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    prompts = itertools.cycle(PROMPTS)
    config = DDPOConfig(
        num_epochs=asked["epochs"],
        mixed_precision=asked["precision"],
        sample_num_steps=asked["steps"],
        sample_batch_size=asked["batch"],
        sample_num_batches_per_epoch=1,
        train_batch_size=asked["batch"],
        per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_buffer_size=32,
        save_freq=10**9,
        accelerator_kwargs={"cpu": True},
    )
    PartialState(cpu=True)  # TRL's logger asks for it
    pipe = DefaultDDPOStableDiffusionPipeline(asked["folder"], use_lora=not asked["full"])
    trainer = DDPOTrainer(config, brightness, lambda: (next(prompts), {}), pipe)
    took, step = [], 0
    for epoch in range(asked["epochs"]):
        start = time.process_time()
        step = trainer.step(epoch, step)
        took.append(time.process_time() - start)
    print(json.dumps(took))


if __name__ == "__main__":
    main()
