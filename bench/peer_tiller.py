"""Tiller's side of `peer.py`: trains on one thread and prints the processor seconds of each epoch."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from models import PROMPTS

from tiller import DDPO, Policy, TrainConfig, TrainState, train
from tiller.policy import layout


def brightness(images: list, prompts: list, metadata: list) -> list[float]:
    """The mean of the red channel, which costs nothing."""
    return [float(np.asarray(image)[..., 0].mean()) for image in images]


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    rank = None if asked["full"] else 4
    policy = Policy.from_pretrained(asked["folder"], lora_rank=rank, mixed_precision=asked["precision"])
    layout.plain_attention(policy.pipe.unet, asked["precision"] == "bf16")  # all three as `tiller train` does
    layout.channels_last(policy.pipe.unet)
    if asked["precision"] == "bf16":
        layout.cast_once(policy.pipe.unet)
    config = TrainConfig(
        epochs=asked["epochs"], samples_per_epoch=asked["batch"], batch_size=asked["batch"], group_size=1
    )
    sampling = {"num_inference_steps": asked["steps"], "guidance_scale": 5.0}
    state = TrainState(policy, config)
    took, start = [], time.process_time()
    for _ in train(policy, PROMPTS, brightness, DDPO(), config, sampling=sampling, state=state):
        took.append(time.process_time() - start)
        start = time.process_time()
    print(json.dumps(took))


if __name__ == "__main__":
    main()
