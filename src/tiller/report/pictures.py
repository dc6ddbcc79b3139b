"""Sheets of pictures and reward curves as PNG, and small single pictures for the report."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 160  # pixels of a picture's longer side on a sheet
MARGIN, LINE = 8, 14
CAPTION = 150  # pixels beside a row of a sheet
STAGE = 384  # pixels of the longer side of a picture that is kept for the report
SHOWN = "shown.json"  # what the pictures kept for the report are of


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], path: Path, columns: Sequence[str] = ()) -> Path:
    """One row of pictures per caption, with headings over the columns, written to `path`."""
    font = ImageFont.load_default(12)
    width = max((len(pictures) for _, pictures in rows), default=0)
    head = LINE + MARGIN if columns else 0
    canvas = Image.new(
        "RGB", (CAPTION + width * (CELL + MARGIN) + MARGIN, head + len(rows) * (CELL + MARGIN) + MARGIN), "white"
    )
    pen = ImageDraw.Draw(canvas)
    for column, heading in enumerate(columns):
        pen.text((CAPTION + MARGIN + column * (CELL + MARGIN), MARGIN), heading, "black", font=font)
    for row, (caption, pictures) in enumerate(rows):
        top = head + MARGIN + row * (CELL + MARGIN)
        for number, text in enumerate(textwrap.wrap(caption, 22)):
            pen.text((MARGIN, top + number * LINE), text, "black", font=font)
        for column, picture in enumerate(pictures):
            canvas.paste(_fitted(picture), (CAPTION + MARGIN + column * (CELL + MARGIN), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
    return path


def before_after(
    prompts: Sequence[str], base: Sequence[Image.Image], tuned: Sequence[Image.Image], path: Path, per_prompt: int
) -> Path:
    """A sheet with each prompt's pictures before and after training, from the same noise, in pairs."""
    rows = []
    for start in range(0, len(prompts), per_prompt):
        pairs = zip(base[start : start + per_prompt], tuned[start : start + per_prompt], strict=True)
        rows.append((prompts[start], [picture for pair in pairs for picture in pair]))
    return sheet(rows, path, ["before", "after"] * per_prompt)


def keep_stage(images: Path, epoch: int, prompts: Sequence[str], drawn: Sequence[Image.Image], per_prompt: int) -> None:
    """Keep an epoch's pictures for the report, one file each, no larger than `STAGE`; small ones without loss.

    `drawn` are `per_prompt` of each of the prompts, side by side.
    """
    folder = images / f"epoch-{epoch:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(drawn):
        small = picture.convert("RGB")
        small.thumbnail((STAGE, STAGE), Image.Resampling.LANCZOS)
        small.save(folder / f"{number:03d}.webp", lossless=max(small.size) <= 128, quality=85)
    (images / SHOWN).write_text(json.dumps({"prompts": list(prompts), "per_prompt": per_prompt}, ensure_ascii=False))


def curve(epochs: Sequence[int], means: Sequence[float], stds: Sequence[float], name: str, path: Path) -> Path:
    """The training reward over the reward calls made, with the spread of an epoch's pictures as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    x, mean, std = np.asarray(epochs), np.asarray(means), np.asarray(stds)
    axes.fill_between(x, mean - std, mean + std, alpha=0.15, linewidth=0, label="± one standard deviation")
    axes.plot(x, mean, marker="o", markersize=3, label="mean of an epoch's pictures")
    axes.set(xlabel="reward calls (pictures scored)", ylabel=name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _fitted(picture: Image.Image) -> Image.Image:
    """The picture as large as a cell; small ones keep their pixels visible."""
    scale = CELL / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
