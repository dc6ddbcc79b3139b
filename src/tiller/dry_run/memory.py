"""The memory of a run, estimated from shapes alone.

    program + weights + trained numbers + the larger of (one step's graph, decoding) of a batch + the epoch's latents

A step's graph is GRAPH times the numbers that the denoiser's matrices take in. The factor was measured on the embedded
models: 1.8 to 2.2 on the U-Net, 1.6 on the transformer; with checkpointing 0.33 to 0.38 and 0.12 (docs/dry-run.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiller.dry_run.facts import Facts
from tiller.dry_run.headers import Files, Part
from tiller.dry_run.network import GUIDED_WITHIN, Cost, decoder_cost, denoiser_cost, picture_size, vae_scale
from tiller.recipe import Model, Recipe

GRAPH = {"unet": (2.0, 0.35), "transformer": (1.6, 0.12)}  # numbers kept per number taken in; with checkpointing
ALIVE = 4.0  # feature maps of the decoder's largest kind that are there at once
PROGRAM = {"cpu": 0.8e9, "cuda": 0.6e9}  # bytes of Python with its libraries, or of the card's context
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    program: float
    weights: float  # of all parts
    trained: float  # values, gradients, optimiser, copies
    graph: float  # of one step, per picture of a batch
    decoding: float  # per picture of a batch
    latents: float  # of the epoch's paths, in one process
    numbers: int  # that are trained

    def needs(self, batch_size: int) -> float:
        """All of it, at a batch size."""
        return self.program + self.weights + self.trained + self.latents + batch_size * max(self.graph, self.decoding)


def estimate(files: Files, recipe: Recipe, facts: Facts | None, kind: str, processes: int = 1) -> Memory | None:
    """The memory of a run; None where the denoiser's weights are not at hand."""
    part = files.denoiser
    if part is None or not part.weights:
        return None
    model, size = recipe.model, picture_size(files, recipe.sampling)
    cost, wide = denoiser_cost(files, part, size), WIDTH[model.dtype]
    numbers = trained_numbers(part, model)
    acts = 2 if model.mixed_precision == "bf16" or wide == 2 else 4
    kind_of = "unet" if any(name.startswith("down_blocks.") for name in part.weights) else "transformer"
    kept = GRAPH[kind_of][model.gradient_checkpointing]
    own = 4 if model.lora_rank is not None else wide
    averages = (recipe.train.ema_decay is not None) + (facts.copies if facts else 0)
    averages += model.lora_rank is None and facts is not None and facts.asked > 0  # the model before training, kept
    return Memory(
        program=PROGRAM[kind],
        weights=wide * sum(one.count for one in files.parts.values()),
        trained=numbers * (_per_number(model, own) + 4 * averages),
        graph=kept * cost.inputs * branches(part, recipe.sampling) * acts,
        decoding=ALIVE * decoder_cost(files, size)[1] * wide,
        latents=_latents(files, recipe, size) * 4 / processes,
        numbers=numbers,
    )


def _per_number(model: Model, own: int) -> int:
    """Bytes beside the weights themselves: gradient and two moments; an adapter's own value, too."""
    return own * (3 if model.lora_rank is None else 4)


def trained_numbers(part: Part, model: Model) -> int:
    """How many numbers are trained of a denoiser: all of them, or its adapters'."""
    if model.lora_rank is None:
        return part.count
    layers = {name.removesuffix(".weight"): shape for name, shape in part.weights.items() if name.endswith(".weight")}
    linear = {name: shape for name, shape in layers.items() if len(shape) == 2 and "norm" not in name.split(".")[-1]}
    wanted = model.target_modules or ATTENTION
    pool = layers if model.target_modules else linear
    chosen = {n: s for n, s in pool.items() if len(s) > 1 and any(n == t or n.endswith("." + t) for t in wanted)}
    if not chosen and model.target_modules is None:
        chosen = {n: s for n, s in linear.items() if "emb" not in n and "proj_out" not in n}
    return sum(model.lora_rank * (shape[0] + math.prod(shape[1:])) for shape in chosen.values())


def branches(part: Part | None, sampling: Mapping[str, Any]) -> int:
    """Rows of the denoiser per picture: two under classifier-free guidance."""
    if part is None or part.kind in GUIDED_WITHIN:
        return 1
    return 2 if float(sampling.get("guidance_scale", 7.5) or 0) > 1 else 1


def row_cost(files: Files, recipe: Recipe) -> Cost | None:
    """Of one row of the denoiser at the recipe's size."""
    part = files.denoiser
    return denoiser_cost(files, part, picture_size(files, recipe.sampling)) if part and part.weights else None


def _latents(files: Files, recipe: Recipe, size: tuple[int, int]) -> float:
    """Numbers of the paths that an epoch keeps."""
    part, scale = files.denoiser, vae_scale(files)
    channels = int((part.config.get("in_channels") if part else None) or 4)
    steps = int(recipe.sampling.get("num_inference_steps") or 50)
    return recipe.train.samples_per_epoch * (steps + 1) * channels * math.prod(size) / scale**2
