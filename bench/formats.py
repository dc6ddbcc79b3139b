"""What memory layout, precision and compilation make of a denoiser call: each held against fp32 weights in rows.

    python bench/formats.py --model small --latents 16 --batch 4
    python bench/formats.py --model small --latents 16 --batch 4 --compile

Times are of a whole round, as training makes it: sampling a batch, then one update over all of its steps.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any, NamedTuple

import torch
from overhead import Workload
from timing import one_thread, seconds


class Format(NamedTuple):
    """How the denoiser's weights lie in memory, of what type they are, and under what autocast they run."""

    channels_last: bool
    precision: str = "no"
    weights: torch.dtype = torch.float32
    compiled: bool = False


FORMATS = {
    "fp32": Format(False),
    "fp32, channels last": Format(True),
    "bf16 autocast": Format(False, "bf16"),
    "bf16 autocast, channels last": Format(True, "bf16"),
    "bf16 autocast, channels last, bf16 weights": Format(True, "bf16", torch.bfloat16),
}
COMPILED = {
    "fp32, channels last, compiled": Format(True, compiled=True),
    "bf16 autocast, channels last, compiled": Format(True, "bf16", compiled=True),
}


def workload(chosen: argparse.Namespace, wanted: Format) -> Workload:
    """The same policy and batch in another format."""
    settings = {**vars(chosen), "precision": wanted.precision, "no_channels_last": not wanted.channels_last}
    work = Workload(argparse.Namespace(**settings), wanted.weights)
    if wanted.compiled:
        unet: Any = work.policy.pipe.unet
        unet.forward = torch.compile(unet.forward)
    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["sd15", "embedded", "small"], default="small")
    parser.add_argument("--latents", type=int, help="side of the latents")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--full", action="store_true", help="train all weights in place of a LoRA")
    parser.add_argument("--compile", action="store_true", help="compiled denoisers too; compiling takes minutes")
    chosen = parser.parse_args()
    one_thread()
    formats = {**FORMATS, **(COMPILED if chosen.compile else {})}
    works = {name: workload(chosen, wanted) for name, wanted in formats.items()}
    for work in works.values():
        work.sample(), work.train()  # warms up, and compiles
    sampling: dict[str, list[float]] = {name: [] for name in formats}
    training: dict[str, list[float]] = {name: [] for name in formats}
    for _ in range(chosen.rounds):
        for name, work in works.items():
            sampling[name].append(seconds(work.sample))
            training[name].append(seconds(work.train))
    for name in formats:
        print(f"{name:<44} sampling {against(sampling, name)}   training {against(training, name)}", flush=True)


def against(took: dict[str, list[float]], name: str) -> str:
    """How many times as fast as the first format: the median over rounds, and the extremes."""
    ratios = [base / mine for base, mine in zip(took["fp32"], took[name], strict=True)]
    return f"{statistics.median(ratios):5.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
