"""The files of an export."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiller.export import layouts
from tiller.export.families import ExportError, Family, family_of, need_family
from tiller.export.header import header
from tiller.export.source import Trained
from tiller.policy import Policy
from tiller.policy.weights import ADAPTER
from tiller.run.files import TEMPORARY, writing

LORA_FILE = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder
LORA_FORMATS = ("diffusers", "kohya", "comfyui")
FORMATS = (*LORA_FORMATS, "merged")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def write_lora(trained: Trained, form: str, file: Path, dtype: torch.dtype, updates: int) -> Family | None:
    """One safetensors file in the names of a format, its header filled; returns the model's family, where it has one.

    Raises:
        ExportError: the model has no such names.
        RunError: the file cannot be written.
    """
    denoisers = trained.policy.denoisers
    if form == "diffusers":
        module = next(iter(denoisers.values()))
        family = family_of(type(module).__name__, module.config) if len(denoisers) == 1 else None  # type: ignore[arg-type]
        tensors, metadata = _as_diffusers_saves(trained.policy)
    else:
        family = need_family(denoisers, form)
        module = next(iter(denoisers.values()))
        metadata = {"format": "pt"}
        tensors = layouts.tensors(layouts.pairs(module), layouts.rows(module), family, form == "kohya")
    tensors = {name: tensor if name.endswith(".alpha") else tensor.to(dtype) for name, tensor in tensors.items()}
    about = header(
        trained.recipe, file.stem if file.name != LORA_FILE else trained.folder.name, updates, family, tensors
    )
    temporary = file.with_name(TEMPORARY + file.name)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={**about, **metadata})
        temporary.replace(file)
    return family


def _as_diffusers_saves(policy: Policy) -> tuple[dict[str, Tensor], dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        file = policy.save(folder) / LORA_FILE
        with safe_open(file, "pt") as opened:
            metadata = dict(opened.metadata() or {})
        return {name: tensor.clone() for name, tensor in load_file(file).items()}, metadata


def write_merged(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """The whole pipeline in diffusers' folder format, the adapters added into the weights. The policy is spent.

    Raises:
        ExportError: the folder holds something else already.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").exists():
        raise ExportError(f"{folder} holds something that is no pipeline; give another --output.")
    merge(policy)
    policy.pipe.to(dtype=dtype)
    temporary = folder.with_name(TEMPORARY + folder.name)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            policy.pipe.save_pretrained(temporary, safe_serialization=True)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def merge(policy: Policy) -> None:
    """W ← W + alpha/r · up·down in every denoiser, and the adapters gone."""
    for module in policy.denoisers.values():
        layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
        for layer in layers:
            layer.merge(safe_merge=True, adapter_names=[ADAPTER])
        if layers:
            recurse_remove_peft_layers(module)
            del module.peft_config  # type: ignore[union-attr]
            module._hf_peft_config_loaded = False  # type: ignore[assignment]


def round_adapters(policy: Policy, dtype: torch.dtype) -> None:
    """Round the trained weights to a type, in place, so that a file of that type holds exactly them."""
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter.copy_(parameter.to(dtype))


def read_lora(file: Path) -> Mapping[str, layouts.Pair]:
    """The adapters of a kohya or ComfyUI file, by the file's own names of the layers."""
    tensors = load_file(file)
    names = [name.removesuffix(".lora_down.weight") for name in tensors if name.endswith(".lora_down.weight")]
    return {
        name: layouts.Pair(
            tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"], float(tensors[f"{name}.alpha"])
        )
        for name in names
    }
