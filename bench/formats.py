"""What memory layout, autocast, the type of the weights, attention and compilation make of a denoiser call.

    python bench/formats.py --model embedded --batch 16
    python bench/formats.py --model small --batch 4
    python bench/formats.py --model embedded --batch 16 --only plain --compile

All are measured in turn in one process, on one U-Net with a LoRA, guidance's doubled batch included; the numbers are
how many times as fast as float32 weights in rows with diffusers' own attention, over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
from typing import Any, NamedTuple

import torch
import torch._inductor.config
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from models import pipeline
from timing import one_thread, seconds

from tiller import Policy
from tiller.policy import layout


class Format(NamedTuple):
    """How a denoiser is called."""

    layout: torch.memory_format = torch.contiguous_format
    bf16: bool = False  # under autocast
    plain: bool = False  # attention as two matrix products
    weights: torch.dtype = torch.float32
    once: bool = False  # frozen matrices cast once, as `tiller train` does
    compiled: bool = False


LAST = torch.channels_last
FORMATS = {
    "fp32": Format(),
    "fp32, channels last": Format(LAST),
    "fp32, channels last, plain attention": Format(LAST, plain=True),
    "bf16": Format(bf16=True),
    "bf16, plain attention, cast once": Format(bf16=True, plain=True, once=True),
    "bf16, channels last": Format(LAST, True),
    "bf16, channels last, plain attention": Format(LAST, True, True),
    "bf16, channels last, plain attention, cast once": Format(LAST, True, True, once=True),
    "bf16, channels last, plain attention, bf16 weights": Format(LAST, True, True, torch.bfloat16),
}
COMPILED = {
    "fp32, channels last, plain attention, compiled": Format(LAST, plain=True, compiled=True),
    "bf16, channels last, plain attention, compiled": Format(LAST, True, True, compiled=True),
}


class Denoiser:
    """A U-Net with a LoRA that can be put into any format, and its inputs."""

    def __init__(self, model: Any, latents: int | None, batch: int):
        pipe = pipeline(model, latents)
        self.policy = Policy(pipe, lora_rank=16)
        self.unet = pipe.unet
        settings, side = self.unet.config, self.unet.config.sample_size
        self.latents = torch.randn(2 * batch, settings.in_channels, side, side)
        self.text = torch.randn(2 * batch, pipe.tokenizer.model_max_length, settings.cross_attention_dim)
        self.compiled = torch.compile(self.unet)

    def put(self, wanted: Format) -> None:
        """The U-Net in the wanted format, its adapters in float32."""
        self.unet.to(wanted.weights, memory_format=wanted.layout)
        for parameter in self.policy.parameters.values():
            parameter.data = parameter.data.float()
        if wanted.once:
            layout.cast_once(self.unet)
        self.unet.set_attn_processor(AttnProcessor() if wanted.plain else AttnProcessor2_0())

    def forward(self, wanted: Format) -> torch.Tensor:
        """One call."""
        call = self.compiled if wanted.compiled else self.unet
        with torch.autocast("cpu", torch.bfloat16, enabled=wanted.bf16):
            return call(self.latents, 500, encoder_hidden_states=self.text, return_dict=False)[0]

    def sampling(self, wanted: Format) -> None:
        """A call without a graph."""
        with torch.no_grad():
            self.forward(wanted)

    def training(self, wanted: Format) -> None:
        """A call with a graph, and its backward pass."""
        self.forward(wanted).float().square().mean().backward()


def compile_first(denoiser: Denoiser, formats: dict[str, Format]) -> None:
    """Make the compiled calls once, and print the seconds that takes: processor time, the compiler's included."""
    torch._inductor.config.compile_threads = 1  # compilers that this process waits for, so that their time is counted
    for name, wanted in formats.items():
        if wanted.compiled:
            denoiser.put(wanted)
            for kind, call in (("sampling", denoiser.sampling), ("training", denoiser.training)):
                start = compiling()
                call(wanted)
                print(f"{name}: {compiling() - start:.0f} s to compile for {kind}", flush=True)


def compiling() -> float:
    """Processor seconds of this process and of those it has started and waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def measure(denoiser: Denoiser, formats: dict[str, Format], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of a sampling and a training call by format, over the rounds, after one call that does not count."""
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in formats}
    for _ in range(rounds):
        for name, wanted in formats.items():
            denoiser.put(wanted)
            denoiser.training(wanted)
            sampling = seconds(lambda wanted=wanted: denoiser.sampling(wanted))
            took[name].append((sampling, seconds(lambda wanted=wanted: denoiser.training(wanted))))
    return took


def against(base: list[float], mine: list[float]) -> str:
    """How many times as fast: the median over rounds, and the extremes."""
    ratios = [a / b for a, b in zip(base, mine, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["sd15", "embedded", "small"], default="embedded")
    parser.add_argument("--latents", type=int, help="side of the latents")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="the formats with this in their names, and fp32")
    parser.add_argument("--compile", action="store_true", help="compiled too; compiling takes minutes")
    chosen = parser.parse_args()
    one_thread()
    formats = {**FORMATS, **(COMPILED if chosen.compile else {})}
    formats = {name: wanted for name, wanted in formats.items() if name == "fp32" or chosen.only in name}
    denoiser = Denoiser(chosen.model, chosen.latents, chosen.batch)
    compile_first(denoiser, formats)
    took = measure(denoiser, formats, chosen.rounds)
    for name, times in took.items():
        columns = zip(zip(*took["fp32"], strict=True), zip(*times, strict=True), strict=True)
        sampling, training = (against(base, mine) for base, mine in columns)
        print(f"{name:<52} sampling {sampling}   training {training}", flush=True)


if __name__ == "__main__":
    main()
