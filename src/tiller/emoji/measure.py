"""Measures a model of the embedded world by the gold judge, and paints a sheet of its samples.

python -m tiller.emoji.measure [--model emoji-flow] [--count 64] [--guidance 4] [--steps 20] [--sheet FILE.png]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from tiller import emoji
from tiller.emoji import scenes
from tiller.emoji.judge import Judge, stated
from tiller.emoji.words import UNSEEN_ACTIVITIES

KINDS = (*scenes.KINDS, "unseen activity")


def prompts_of(kind: str, count: int, seed: int = 1) -> list[str]:
    """Random captions of one kind, the same for the same seed."""
    rng = np.random.default_rng((seed, KINDS.index(kind)))
    if kind == "unseen activity":
        return [scenes.caption(scenes.sample(rng, "activity", UNSEEN_ACTIVITIES)) for _ in range(count)]
    return [scenes.caption(scenes.sample(rng, kind)) for _ in range(count)]


def load(model: str | Path) -> Any:
    """The pipeline in fp32, silent: one that comes with tiller, by name, or a folder."""
    folder = emoji.path(str(model)) if str(model) in emoji.MODELS else model
    pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(
    pipe: Any,
    prompts: Sequence[str],
    guidance: float,
    steps: int,
    seed: int = 0,
    batch: int = 32,
) -> list[Image.Image]:
    """One picture per prompt, in bf16 autocast; picture i starts from noise `seed + i`."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        chunk = list(prompts[start : start + batch])
        noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
        with torch.autocast("cpu", torch.bfloat16):
            images += pipe(chunk, num_inference_steps=steps, guidance_scale=guidance, generator=noise).images
    return images


def measure(judge: Judge, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, float]:
    """Share of pictures in which each stated fact is right, and ("all") in which all of them are."""
    read = {fact: logs.argmax(-1).tolist() for fact, logs in judge.facts(images).items()}
    hits: dict[str, list[bool]] = {"all": []}
    for i, prompt in enumerate(prompts):
        wanted = stated(scenes.parse(prompt))
        right = {fact: read[fact][i] == index for fact, index in wanted.items()}
        hits["all"].append(all(right.values()))
        for fact, value in right.items():
            hits.setdefault(fact, []).append(value)
    return {fact: float(np.mean(values)) for fact, values in hits.items()}


def sheet(images: Sequence[Image.Image], prompts: Sequence[str], columns: int, zoom: int = 2) -> Image.Image:
    """The pictures in rows, each over its prompt."""
    side = 64 * zoom
    cell, rows = side + 26, -(-len(images) // columns)
    page = Image.new("RGB", (columns * (side + 4), rows * cell), "white")
    pen = ImageDraw.Draw(page)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        x, y = i % columns * (side + 4), i // columns * cell
        page.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        middle = prompt.rfind(" ", 0, 23) if len(prompt) > 22 else len(prompt)
        pen.text((x + 1, y + side), prompt[:middle] + "\n" + prompt[middle:].strip(), fill="black", font_size=10)
    return page


def main() -> None:
    """Prints the table; writes the sheet if asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji", help="emoji, emoji-flow or a pipeline folder")
    parser.add_argument("--count", type=int, default=64, help="prompts of each kind")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sheet", type=Path, default=None)
    options = parser.parse_args()
    pipe, judge = load(options.model), Judge.load()
    shown: list[tuple[Image.Image, str]] = []
    for kind in KINDS:
        prompts = prompts_of(kind, options.count)
        images = paint(pipe, prompts, options.guidance, options.steps)
        shares = measure(judge, images, prompts)
        print(
            f"{kind:16}" + "  ".join(f"{fact} {100 * share:.1f} %" for fact, share in shares.items()),
            flush=True,
        )
        shown += list(zip(images, prompts, strict=True))[:8]
    if options.sheet:
        sheet([image for image, _ in shown], [prompt for _, prompt in shown], columns=8).save(options.sheet)


if __name__ == "__main__":
    main()
