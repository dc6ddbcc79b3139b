"""Where pictures and captions come from: the emoji world, a folder, or a Hugging Face dataset."""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tiller.emoji import scenes
from tiller.types import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Source(Protocol):
    """Random batches of pictures with captions."""

    def batch(self, rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
        """Pictures (count, 3, size, size) float32 in [-1, 1], and their captions."""
        ...

    def texts(self) -> list[str]:
        """Captions enough to collect the vocabulary from."""
        ...


def open_source(data: str, size: int | tuple[int, int]) -> Source:
    """The source that `PretrainConfig.data` names, its pictures at an edge, or at (width, height)."""
    if data == "emoji":
        if not isinstance(size, int):
            raise ConfigError(f"scenes are square, and pictures of {size[0]} x {size[1]} are asked for; give a folder")
        return Scenes(size)
    if data.startswith("hub:"):
        return Hub(data.removeprefix("hub:"), size)
    return Folder(Path(data), size)


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    """RGB pictures of one size as (N, 3, H, W) float32 in [-1, 1], channels last in memory."""
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures]))  # (N, H, W, 3) uint8
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)


class Scenes:
    """Scenes of the embedded world, drawn as they are asked for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def batch(self, rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
        drawn = [scenes.sample(rng) for _ in range(count)]
        return to_tensor([scenes.draw(s, self.size) for s in drawn]), [scenes.caption(s) for s in drawn]

    def texts(self) -> list[str]:
        rng = np.random.default_rng(0)
        return [scenes.caption(scenes.sample(rng)) for _ in range(20_000)]


class Folder:
    """Image files, each with a caption in a .txt of the same name or in metadata.jsonl (file_name, text)."""

    def __init__(self, folder: Path, size: int | tuple[int, int]) -> None:
        if not folder.is_dir():
            raise ConfigError(f"data is {str(folder)!r}, but there is no such folder; give emoji, a folder or hub:NAME")
        self.size, self.items = size, _captions(folder)
        if not self.items:
            raise ConfigError(
                f"{folder} has no image with a caption; put NAME.txt beside NAME.png, or write a "
                "metadata.jsonl with file_name and text"
            )
        self.read = lru_cache(maxsize=50_000)(self._read)

    def _read(self, index: int) -> Image.Image:
        path = self.items[index][0]
        try:
            with Image.open(path) as picture:
                return fit(picture, self.size)
        except OSError as error:
            raise ConfigError(f"{path} is no readable image; repair or remove it") from error

    def batch(self, rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
        chosen = rng.integers(len(self.items), size=count).tolist()
        return to_tensor([self.read(i) for i in chosen]), [self.items[i][1] for i in chosen]

    def texts(self) -> list[str]:
        return [text for _, text in self.items]


class Hub:
    """The train split of a Hugging Face dataset with a column `image` and one of `text` or `caption`."""

    def __init__(self, name: str, size: int | tuple[int, int]) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ConfigError(
                "data is a Hugging Face dataset; install it with pip install 'tiller[datasets]'"
            ) from error
        self.size, self.rows = size, datasets.load_dataset(name, split="train")
        columns = self.rows.column_names
        self.column = next((c for c in ("text", "caption") if c in columns), "")
        if "image" not in columns or not self.column:
            raise ConfigError(f"dataset {name} has the columns {columns}, but image and text (or caption) are needed")

    def batch(self, rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
        rows = [self.rows[i] for i in rng.integers(len(self.rows), size=count).tolist()]
        return to_tensor([fit(r["image"], self.size) for r in rows]), [r[self.column] for r in rows]

    def texts(self) -> list[str]:
        return list(self.rows[self.column])


def fit(picture: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """The middle of a picture at size x size, or at (width, height), RGB."""
    width, height = (size, size) if isinstance(size, int) else size
    part = min(picture.width / width, picture.height / height)
    across, down = round(part * width), round(part * height)
    left, top = (picture.width - across) // 2, (picture.height - down) // 2
    box = (left, top, left + across, top + down)
    return picture.convert("RGB").crop(box).resize((width, height), Image.Resampling.LANCZOS)


def _captions(folder: Path) -> list[tuple[Path, str]]:
    """(image, caption) of a folder, sorted by name."""
    listed = folder / "metadata.jsonl"
    if listed.exists():
        rows = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
        try:
            return [(folder / row["file_name"], row["text"]) for row in rows]
        except KeyError as error:
            raise ConfigError(f"a line of {listed} lacks {error}; each needs file_name and text") from error
    images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    return [
        (p, p.with_suffix(".txt").read_text(encoding="utf-8").strip()) for p in images if p.with_suffix(".txt").exists()
    ]


def vocabulary(texts: list[str], limit: int) -> list[str]:
    """The most frequent words of the captions, most frequent first."""
    counts = Counter(word for text in texts for word in text.lower().split() if word.isalpha())
    return [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]]
