"""Writes plain folders of diffusers or transformers, safetensors only."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from transformers import PreTrainedModel

from tiller import emoji
from tiller.types import ConfigError


def export(pipe: DiffusionPipeline, folder: Path) -> None:
    """Writes the folder beside and renames it into place."""
    with replace_folder(folder) as new:
        pipe.save_pretrained(new, safe_serialization=True)
        load_in_fp32(new / "text_encoder" / "config.json")


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside, to write into; it takes the place of `folder` once that is done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as beside:
        new, old = Path(beside) / "new", Path(beside) / "old"
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def halved(part: Any) -> Any:
    """A copy of a diffusers or transformers model with fp16 weights."""
    if hasattr(type(part), "from_config"):
        copy = type(part).from_config({k: v for k, v in part.config.items() if k != "_name_or_path"})
    else:  # transformers' models take the configuration itself
        copy = type(part)(part.config)
    copy.load_state_dict(part.state_dict())
    return copy.half()


def take_weights(model: PreTrainedModel, name: str) -> None:
    """Puts the weights of a model folder, or of a model that comes with tiller, into `model`.

    Raises:
        ConfigError: there are none, or they are of another model.
    """
    folder = emoji.path(name) if name in emoji.READERS else Path(name)
    if not (folder / "model.safetensors").exists():
        raise ConfigError(f"start is {name!r}, where there is no model.safetensors; give a model folder")
    held, wanted = type(model).from_pretrained(folder, dtype=torch.float32).state_dict(), model.state_dict()
    if {k: v.shape for k, v in held.items()} != {k: v.shape for k, v in wanted.items()}:
        raise ConfigError(f"start is {name!r}, a model of other sizes or words; set the sizes that it was made with")
    model.load_state_dict(held)


def load_in_fp32(path: Path) -> None:
    """Has transformers load these weights in fp32, as diffusers does its own, where no type is asked for."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["dtype"] = "float32"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
