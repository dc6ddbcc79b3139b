"""A pipeline folder's configurations and the headers of its weights: shapes without a single weight, without torch."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiller import emoji
from tiller.recipe import Model

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True)
class Part:
    """One model of a pipeline."""

    name: str
    kind: str  # its class
    config: Mapping[str, Any]
    weights: Mapping[str, tuple[int, ...]]  # name -> shape

    @property
    def count(self) -> int:
        """How many numbers its weights are."""
        return sum(math.prod(shape) for shape in self.weights.values())


@dataclass(frozen=True)
class Files:
    """What is known of a pipeline before it is loaded."""

    kind: str  # the pipeline's class
    parts: Mapping[str, Part]

    @property
    def denoiser(self) -> Part | None:
        """The largest of the parts that denoise."""
        pattern = re.compile(r"(prior_|decoder_)?(\w*unet|\w*transformer(_\d+)?|prior|decoder|denoiser|dit)")
        found = [part for part in self.parts.values() if pattern.fullmatch(part.name)]
        return max(found, key=lambda part: part.count, default=None)


def folder_of(model: Model) -> Path | None:
    """Where a model's files are on this machine; None for one on the hub that has not been downloaded."""
    if model.name in emoji.MODELS:
        return emoji.FOLDER / emoji.MODELS[model.name]
    if (Path(model.name) / "model_index.json").exists():
        return Path(model.name)
    if model.name.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.name, "model_index.json", revision=model.revision)
    return Path(found).parent if isinstance(found, str) else None


def read(folder: Path, variant: str | None = None) -> Files:
    """The configurations and shapes of a pipeline's parts; a part whose weights are not there has none."""
    index = json.loads((folder / "model_index.json").read_text())
    parts = {}
    for name in index:
        inner = folder / name / "config.json"
        if not name.startswith("_") and inner.exists():
            config = json.loads(inner.read_text())
            kind = config.get("_class_name") or (config.get("architectures") or [""])[0]
            parts[name] = Part(name, kind, config, dict(_shapes(folder / name, variant)))
    return Files(index.get("_class_name", "a pipeline"), parts)


def _shapes(folder: Path, variant: str | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    files = sorted(folder.glob("*.safetensors"))
    marked = [file for file in files if variant and f".{variant}" in file.name]
    plain = [file for file in files if not re.search(r"\.(fp16|bf16|ema|non_ema)\b", file.name)]
    for file in marked or plain or files:
        for name, entry in header(file).items():
            yield name, tuple(entry["shape"])


def header(file: Path) -> dict[str, Any]:
    """The entries of a safetensors file: dtype and shape by name."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > LARGEST_HEADER:
            raise ValueError(f"{file} has a header of {length} bytes, which no safetensors file has")
        entries = json.loads(opened.read(length))
    entries.pop("__metadata__", None)
    return dict(entries)
