"""Seconds of one denoiser call of a shipped model on 64 latents, bf16 autocast, as `tiller train` sets it up.

python bench/one_call.py [emoji | emoji-flow]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from tiller.commands import building
from tiller.recipe import Model

CALLS, WARM_UP = 20, 3


def denoiser_call(name: str) -> Callable[[], object]:
    """The call that the pipeline makes in each step, without guidance."""
    pipe = building.policy(Model(name=name, lora_rank=None, mixed_precision="bf16"), seed=0).pipe
    latents = torch.randn(64, 8, 8, 8)
    if name == "emoji":
        return lambda: pipe.unet(latents, 500, encoder_hidden_states=torch.zeros(64, 24, 192))
    size, times = torch.full((64, 2), 64.0), torch.full((64,), 500.0)
    states = torch.zeros(64, 16, 192)
    return lambda: pipe.transformer(latents, states, times, size, size, 0 * size)


def main() -> None:
    """Prints the threads, the best and the median call, and its processor time."""
    call = denoiser_call(sys.argv[1] if len(sys.argv) > 1 else "emoji")
    seconds, spent = [], []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(CALLS):
            start = time.perf_counter(), time.process_time()
            call()
            seconds.append(time.perf_counter() - start[0])
            spent.append(time.process_time() - start[1])
    counted, own = seconds[WARM_UP:], spent[WARM_UP:]
    print(f"{torch.get_num_threads()} threads: best {min(counted):.3f} s, median {statistics.median(counted):.3f} s")
    print(f"processor time: median {statistics.median(own):.3f} s ({min(own):.3f} to {max(own):.3f})")


if __name__ == "__main__":
    main()
