"""What makes a run itself: its recipe, the files it names, the base model; and where it was made."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiller import reward_spec
from tiller.policy import Policy, seam
from tiller.run.files import sha256

# what may change when a run goes on: it has no part in what is learned
ASKING = ("url", "token_env", "concurrency", "timeout", "connect_timeout", "read_timeout", "retries", "budget")
FREE = (
    "run",
    "evaluation",
    "held_out",
    "train.epochs",
    "train.memory",
    "model.device",
    *(f"reward.{name}" for name in ASKING),  # how a server is asked
)
PACKAGES = ("tiller", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")
SAMPLE = 64  # numbers per tensor that a model is known by


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that matters and differs, as (key, before, now)."""
    old, new = dict(_flat(before)), dict(_flat(now))
    for key in [*new, *old]:
        free = any(key == name or key.startswith(f"{name}.") for name in FREE)
        if not free and old.get(key) != new.get(key):
            return key, old.get(key), new.get(key)
    return None


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def files(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The hash of every file that decides what is learned: prompts, preference pairs, the rewards' sources and fits."""
    paths = {name: str(recipe.get(name) or "") for name in ("prompts", "data")}
    specs = reward_spec.read(recipe.get("reward"))
    paths |= {spec.key: str(spec.settings.get("reward", spec.name)).rpartition(":")[0] for spec in specs}  # in_venv's
    paths |= {
        f"{spec.key}.path": f"{spec.settings.get('path')}/config.json" for spec in specs if spec.name == "learned"
    }
    return {name: sha256(Path(path)) for name, path in paths.items() if Path(path).suffix and Path(path).is_file()}


def fingerprint(policy: Policy) -> str:
    """A hash that tells a base model from any other: of names, shapes and some numbers of every tensor.

    Adapters are left out. Cheap for a model of any size; call it before training.
    """
    digest = hashlib.sha256(type(policy.pipe).__name__.encode())
    for part, module in seam.parts(policy.pipe, nn.Module).items():
        for name, tensor in sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items()):
            if "lora_" not in name:
                digest.update(f"{part}.{name.replace('base_layer.', '')}{tuple(tensor.shape)}".encode())
                digest.update(_some(tensor))
    return digest.hexdigest()


def _some(tensor: torch.Tensor) -> bytes:
    """Evenly spaced elements, exact, wherever the tensor lies."""
    if not tensor.numel() or tensor.is_meta:
        return b""
    chosen = torch.linspace(0, tensor.numel() - 1, min(SAMPLE, tensor.numel()), dtype=torch.float64).long()
    where = torch.unravel_index(chosen.to(tensor.device), tensor.shape) if tensor.ndim else ()
    return tensor.detach()[where].to("cpu", torch.float64).numpy().tobytes()


def environment(processes: int) -> dict[str, Any]:
    """What the numbers of a run may depend on besides its recipe. Holds nothing from the environment variables."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is no longer as it was, in words."""
    old, new = dict(_flat(before)), dict(_flat(now))
    return [f"{key} was {old.get(key)} and is {new.get(key)}" for key in new if old.get(key) != new[key]]
