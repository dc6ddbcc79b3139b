"""A LoRA's tensors under the names of kohya's sd-scripts and of ComfyUI. Nothing is scaled: alpha is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tiller.export.families import ExportError, Family
from tiller.export.transformer_names import Place
from tiller.policy.weights import ADAPTER, lora_state


@dataclass(frozen=True)
class Pair:
    """One layer's adapter: W + alpha/r · up·down."""

    down: Tensor  # (r, in), or (r, in, kh, kw) of a convolution
    up: Tensor  # (out, r), or (out, r, 1, 1)
    alpha: float

    @property
    def delta(self) -> Tensor:
        """What it adds to the layer's weight, in float64, in the weight's shape."""
        flat = self.up.double().flatten(1) @ self.down.double().flatten(1)
        return (flat * (self.alpha / len(self.down))).reshape(len(self.up), *self.down.shape[1:])


def pairs(module: nn.Module) -> dict[str, Pair]:
    """A denoiser's adapters by diffusers' names of the layers, on the CPU."""
    state = {name: tensor.detach().cpu() for name, tensor in lora_state(module).items()}
    config: Any = module.peft_config[ADAPTER]  # type: ignore[index, union-attr]
    layers = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    return {
        layer: Pair(state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"], float(config.lora_alpha))
        for layer in layers
    }


def rows(module: nn.Module) -> dict[str, int]:
    """How many rows the weight of each layer has, by diffusers' names; adapters left out."""
    found = {}
    for name, parameter in module.named_parameters():
        if name.endswith(".weight") and "lora_" not in name:
            found[name.removesuffix(".weight").replace(".base_layer", "")] = len(parameter)
    return found


def tensors(adapters: Mapping[str, Pair], heights: Mapping[str, int], family: Family, kohya: bool) -> dict[str, Tensor]:
    """Every adapter under the names of kohya, or of ComfyUI.

    Args:
        heights: rows of every layer of the model (`rows`), for those that are stacked with an adapted one.

    Raises:
        ExportError: a layer has no name there.
    """
    places: dict[Place, dict[str, Pair]] = {}
    for layer, pair in adapters.items():
        places.setdefault(family.find(layer, kohya), {})[layer] = pair
    found: dict[str, Tensor] = {}
    for place, members in places.items():
        whole = stacked(place, members, heights)
        key = f"lora_unet_{place.name.replace('.', '_')}" if kohya else f"diffusion_model.{place.name}"
        found |= {
            f"{key}.lora_down.weight": whole.down.contiguous(),
            f"{key}.lora_up.weight": whole.up.contiguous(),
            f"{key}.alpha": torch.tensor(whole.alpha, dtype=whole.down.dtype),
        }
    if len(found) != 3 * len(places):
        raise ExportError("two layers got one name; export with --format diffusers.")
    return found


def stacked(place: Place, members: Mapping[str, Pair], heights: Mapping[str, int]) -> Pair:
    """The adapter of a matrix from those of the layers stacked in it: downs on top of each other, ups on a diagonal.

    The rank grows with the number of layers, and alpha with it, so that alpha / r stays. Layers without an adapter
    get zeros: readers that take the matrix apart again then find every part at the rank it was trained with.
    """
    if len(place.stacked) == 1:
        return next(iter(members.values()))
    first = next(iter(members.values()))
    rank = len(first.down)
    parts = [
        members.get(name) or Pair(torch.zeros_like(first.down), first.down.new_zeros(heights[name], rank), 0.0)
        for name in place.stacked
    ]
    down, up = torch.cat([part.down for part in parts]), torch.block_diag(*(part.up for part in parts))
    return Pair(down, up, first.alpha * len(parts))
