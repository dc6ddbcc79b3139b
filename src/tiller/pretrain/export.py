"""Writes a plain diffusers `StableDiffusionPipeline` folder, safetensors only."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from tiller.pretrain.denoiser import Denoiser, schedule


def pipeline(vae: AutoencoderKL, model: Denoiser, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The parts as one pipeline, sharing their weights."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=schedule(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def export(
    vae: AutoencoderKL, model: Denoiser, tokenizer: CLIPTokenizer, folder: Path, half: bool = True
) -> None:
    """Writes the folder beside and renames it into place; weights in fp16."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as beside:
        new, old = Path(beside) / "new", Path(beside) / "old"
        _halved(pipeline(vae, model, tokenizer)).save_pretrained(new, safe_serialization=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def _halved(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A copy of the pipeline with fp16 weights."""
    parts = {}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            half = type(part)(part.config) if name == "text_encoder" else type(part).from_config(part.config)
            half.load_state_dict(part.state_dict())
            parts[name] = half.half()
        else:
            parts[name] = part
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)
