"""The pictures of a run folder for a page: the same prompts and noise at several epochs, as data URIs."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from tiller.report.pictures import CAPTION, CELL, MARGIN, SHOWN

MOST_EPOCHS, MOST_PICTURES = 12, 16  # on a page
BUDGET = 6_000_000  # bytes of data URIs on a page
SIDES = (384, 256, 160, 96)  # pixels of a picture's longer side: the largest with which all of them fit
STAGE = re.compile(r"epoch-(\d+)(\.png)?")
BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Shot:
    """One prompt and noise, at every epoch of the gallery."""

    prompt: str
    sample: int  # which of the prompt's noises, from 0
    pictures: tuple[str | None, ...]  # data URIs, one per epoch; None where there is none


@dataclass(frozen=True)
class Gallery:
    """What a page shows of a run's pictures."""

    epochs: tuple[int, ...] = ()
    shots: tuple[Shot, ...] = ()
    pixelated: bool = False  # so small that pixels should stay visible
    gaps: Sequence[str] = field(default=())  # sentences about what could not be shown

    def __bool__(self) -> bool:
        return bool(self.shots)


def gallery(folder: Path, most_epochs: int = MOST_EPOCHS, budget: int = BUDGET) -> Gallery:
    """The pictures in a run folder's `images`, of `most_epochs` epochs spread over the run, in `budget` bytes."""
    gaps: list[str] = []
    places = _spread(_stages(folder / "images"), most_epochs)
    loaded = {epoch: pictures for epoch, path in places if (pictures := _load(path, gaps))}
    if not loaded:
        return Gallery(gaps=(*gaps, "There are no pictures in images/, so none are shown."))
    count = min(MOST_PICTURES, max(len(pictures) for pictures in loaded.values()))
    prompts, per_prompt = _asked(folder / "images" / SHOWN, count)
    first = next(picture for pictures in loaded.values() for picture in pictures if picture is not None)
    columns = _fitting(loaded, count, budget)
    shots = tuple(
        Shot(prompts[index // per_prompt], index % per_prompt, tuple(column[index] for column in columns))
        for index in range(count)
        if any(column[index] for column in columns)
    )
    return Gallery(tuple(loaded), shots, max(first.size) <= 128, tuple(gaps))


def _stages(images: Path) -> list[tuple[int, Path]]:
    """By epoch: the folder of its pictures or, of an older version, the sheet of them."""
    found: dict[int, Path] = {}
    for path in sorted(images.glob("epoch-*")):  # a sheet comes after the folder of its epoch
        match = STAGE.fullmatch(path.name)
        if match and (path.is_dir() or int(match[1]) not in found):
            found[int(match[1])] = path
    return sorted(found.items())


def _spread(stages: Sequence[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    if not stages:
        return []
    kept = np.unique(np.linspace(0, len(stages) - 1, min(most, len(stages))).round().astype(int))
    return [stages[index] for index in kept]


def _load(path: Path, gaps: list[str]) -> list[Image.Image | None]:
    """An epoch's pictures in their order; None for one that cannot be read, which `gaps` is told."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if re.fullmatch(r"\d+\.(webp|png)", file.name))
        wanted = {int(file.stem): file for file in files}
        last = min(max(wanted, default=-1), MOST_PICTURES - 1)
        return [_open(wanted[index], gaps) if index in wanted else None for index in range(last + 1)]
    sheet = _open(path, gaps)
    return [] if sheet is None else list(_cut(sheet))


def _open(file: Path, gaps: list[str]) -> Image.Image | None:
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except BROKEN:
        gaps.append(f"{file.parent.name}/{file.name} cannot be read as a picture and is left out.")
        return None


def _cut(sheet: Image.Image) -> list[Image.Image]:
    """The cells of a sheet as `tiller.report.sheet` lays them out."""
    step = CELL + MARGIN
    lefts = range(CAPTION + MARGIN, sheet.width - CELL + 1, step)
    tops = range(MARGIN, sheet.height - CELL + 1, step)
    return [sheet.crop((left, top, left + CELL, top + CELL)) for top in tops for left in lefts][:MOST_PICTURES]


def _asked(file: Path, count: int) -> tuple[list[str], int]:
    """The prompts of the pictures, and how many pictures each has."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        prompts, per_prompt = [str(prompt) for prompt in told["prompts"]], int(told["per_prompt"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        prompts, per_prompt = [], 2 if count % 2 == 0 else 1
    if per_prompt < 1:
        per_prompt = 1
    missing = range(len(prompts), -(-count // per_prompt))
    return [*prompts, *(f"prompt {index + 1}" for index in missing)], per_prompt


def _fitting(loaded: dict[int, list[Image.Image | None]], count: int, budget: int) -> list[list[str | None]]:
    """Per epoch `count` data URIs, at the largest of `SIDES` at which they all fit; else fewer and fewer of them."""
    columns: list[list[str | None]] = []
    for side in SIDES:
        columns = [[_uri(picture, side) for picture in _padded(one, count)] for one in _sample(loaded)]
        spent = sum(len(uri or "") for column in columns for uri in column) * len(loaded) / len(columns)
        if spent <= budget * 0.9 or side == SIDES[-1]:
            columns = [[_uri(picture, side) for picture in _padded(one, count)] for one in loaded.values()]
            break
    left = budget
    for column in columns:
        for index, uri in enumerate(column):
            left -= len(uri or "")
            if left < 0:
                column[index] = None
    return columns


def _sample(loaded: dict[int, list[Image.Image | None]]) -> list[list[Image.Image | None]]:
    """The first and the last epoch, to estimate the size of all."""
    whole = list(loaded.values())
    return whole if len(whole) < 2 else [whole[0], whole[-1]]


def _padded(pictures: Sequence[Image.Image | None], count: int) -> list[Image.Image | None]:
    return [*pictures[:count], *[None] * (count - len(pictures))]


def _uri(picture: Image.Image | None, side: int) -> str | None:
    return None if picture is None else data_uri(picture, side)


def data_uri(picture: Image.Image, side: int) -> str:
    """A picture as WebP, no larger than `side`; small ones without loss."""
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    lossless = max(small.size) <= 128
    small.save(content, "WEBP", lossless=lossless, quality=60 if lossless else 82, method=3)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
