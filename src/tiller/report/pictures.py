"""Sheets of pictures and reward curves as PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 160  # pixels of a picture's longer side on a sheet
MARGIN, LINE = 8, 14


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], path: Path, columns: Sequence[str] = ()) -> Path:
    """One row of pictures per caption, with headings over the columns, written to `path`."""
    font = ImageFont.load_default(12)
    width = max((len(pictures) for _, pictures in rows), default=0)
    captions = 150
    head = LINE + MARGIN if columns else 0
    canvas = Image.new(
        "RGB", (captions + width * (CELL + MARGIN) + MARGIN, head + len(rows) * (CELL + MARGIN) + MARGIN), "white"
    )
    pen = ImageDraw.Draw(canvas)
    for column, heading in enumerate(columns):
        pen.text((captions + MARGIN + column * (CELL + MARGIN), MARGIN), heading, "black", font=font)
    for row, (caption, pictures) in enumerate(rows):
        top = head + MARGIN + row * (CELL + MARGIN)
        for number, text in enumerate(textwrap.wrap(caption, 22)):
            pen.text((MARGIN, top + number * LINE), text, "black", font=font)
        for column, picture in enumerate(pictures):
            canvas.paste(_fitted(picture), (captions + MARGIN + column * (CELL + MARGIN), top))
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
