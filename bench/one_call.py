"""Seconds of one denoiser call of the shipped model on 64 latents, bf16 autocast, as `tiller train` sets it up.

python bench/one_call.py
"""

from __future__ import annotations

import statistics
import time

import torch

from tiller.commands import building
from tiller.recipe import Model

CALLS, WARM_UP = 20, 3


def main() -> None:
    """Prints the threads, and the best and the median call."""
    unet = building.policy(Model(name="emoji", lora_rank=None, mixed_precision="bf16"), seed=0).pipe.unet
    latents = torch.randn(64, unet.config.in_channels, 8, 8)
    states = torch.randn(64, 24, unet.config.cross_attention_dim)
    seconds = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(CALLS):
            start = time.perf_counter()
            unet(latents, 500, encoder_hidden_states=states)
            seconds.append(time.perf_counter() - start)
    counted = seconds[WARM_UP:]
    print(f"{torch.get_num_threads()} threads: best {min(counted):.3f} s, median {statistics.median(counted):.3f} s")


if __name__ == "__main__":
    main()
