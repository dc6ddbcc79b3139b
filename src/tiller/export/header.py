"""What is written into the header of a safetensors file, under the names that other programs show.

`modelspec.*` is Stability AI's model specification, `ss_*` are kohya's. All values are texts. No path of this
machine and no secret goes in: a local model is named by its folder alone, and texts pass `redacted`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiller import reward_spec
from tiller.export.families import Family
from tiller.recipe import Recipe
from tiller.rewards.redact import redacted


def model_name(recipe: Recipe) -> str:
    """The base model: its name on the hub, the name it has in tiller, or a local folder's own name."""
    return shown_name(recipe.model.name)


def shown_name(name: str) -> str:
    """A source's name without the folders above it; a name on the hub as it is."""
    path = Path(name)
    local = path.is_absolute() or path.exists() or name.startswith((".", "~")) or name.count("/") > 1
    return redacted(path.name or name if local else name)


def without_folders(text: str) -> str:
    """A setting's text; a path becomes its last part, with `:name` if it has one, an address loses its query."""
    file, colon, rest = text.rpartition(":")
    if colon and "://" not in text and ("/" in file or file.endswith(".py")):
        return f"{shown_name(file)}:{rest}"
    if "://" in text:
        scheme, _, place = text.partition("://")
        return redacted(f"{scheme}://{place.rpartition('@')[2].split('?')[0]}")
    return shown_name(text) if text.startswith(("/", "~", ".")) or Path(text).exists() else redacted(text)


def shown_title(recipe: Recipe) -> str:
    """What is rewarded, in words, without a path; empty for preference pairs."""
    specs = [spec for spec in reward_spec.read(recipe.reward) if spec.weight]
    names = [without_folders(spec.label) for spec in specs]
    weighted = [
        name if spec.weight == 1 else f"{spec.weight:g} {name}" for name, spec in zip(names, specs, strict=True)
    ]
    return " + ".join(names if len(specs) == 1 else weighted)


def hub_name(recipe: Recipe) -> str | None:
    """The base model's name on the hub; None for a local or an embedded one."""
    name = recipe.model.name
    return name if name.count("/") == 1 and shown_name(name) == name else None


def header(
    recipe: Recipe, name: str, updates: int, family: Family | None, tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """The header of a LoRA file."""
    towards = f"{recipe.algorithm.name} towards {shown_title(recipe)}"
    train, model, sampling = recipe.train, recipe.model, recipe.sampling
    size = f"{sampling['width']}x{sampling['height']}" if {"width", "height"} <= set(sampling) else ""
    found: dict[str, Any] = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": name,
        "modelspec.architecture": f"{family.architecture}/lora" if family else "",
        "modelspec.implementation": "diffusers",
        "modelspec.description": f"{model_name(recipe)} fine-tuned by {towards}",
        "modelspec.resolution": size,
        "modelspec.hash_sha256": f"0x{digest(tensors)}",
        "ss_output_name": name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": model.lora_rank,
        "ss_network_alpha": model.lora_alpha or model.lora_rank,
        "ss_base_model_version": family.base_version if family else "",
        "ss_sd_model_name": model_name(recipe),
        "ss_seed": train.seed,
        "ss_learning_rate": train.learning_rate,
        "ss_num_epochs": train.epochs,
        "ss_steps": updates,
        "ss_batch_size_per_device": train.batch_size,
        "ss_max_grad_norm": train.max_grad_norm,
        "ss_mixed_precision": model.mixed_precision,
        "ss_gradient_checkpointing": model.gradient_checkpointing,
        "ss_optimizer": f"torch.optim.AdamW(weight_decay={train.weight_decay},betas={train.betas},eps={train.eps})",
        "ss_resolution": size,
        "ss_training_comment": f"tiller: {towards}",
    }
    return {key: redacted(str(value)) for key, value in found.items() if value not in (None, "")}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors' names and bytes, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
