"""An export is read back into a fresh copy of the base model, and must draw the very pictures that the run draws.

diffusers' files go through `load_lora_weights`, kohya's through diffusers' own converter of them, where it has one for
the model, ComfyUI's by adding up·down to the weights that the file names. A merged folder is loaded as any pipeline is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tiller.export import layouts
from tiller.export.families import ExportError, Family
from tiller.export.write import read_lora
from tiller.policy.loading import load_pipeline
from tiller.policy.weights import denoisers

TOLERANCE = 1e-6  # of a picture's values, which are in [0, 1]
MERGED_TOLERANCE = 1e-5  # a sum of weights is rounded where a sum of outputs is not
STEPS = 2  # of the drawing, where the pipeline lets one choose
FLUX_WIDTH = 3072  # the only one that diffusers' converter of kohya files reads

Deltas = Mapping[str, Mapping[str, Tensor]]  # part -> layer -> what is added to its weight


@dataclass(frozen=True)
class Verified:
    """What a comparison came to."""

    how: str  # the export was read
    difference: float  # the largest, of any value of the picture
    moved: float  # the largest difference between the tuned picture and the base model's

    def __str__(self) -> str:
        still = " (and so does the base model: these weights change nothing)" if not self.moved else ""
        return f"read back {self.how}: the same picture within {self.difference:.1g}{still}"


def draw(pipe: Any, prompt: str | None, call: Mapping[str, Any]) -> np.ndarray:
    """One short drawing, as an array; the same noise whenever it is called."""
    known = inspect.signature(type(pipe).__call__).parameters
    asked = {**call, **({"num_inference_steps": STEPS} if "num_inference_steps" in known else {}), "output_type": "np"}
    if "timesteps" in asked or "sigmas" in asked:
        asked = {**call, "output_type": "np"}
    if prompt is not None and "prompt" in known:
        asked["prompt"] = prompt
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        output = pipe(**asked, generator=torch.Generator().manual_seed(0), return_dict=False)
    return np.asarray(output[0], np.float64)


def compare(how: str, tuned: np.ndarray, found: np.ndarray, base: np.ndarray, tolerance: float) -> Verified:
    """Two pictures that must be one.

    Raises:
        ExportError: they differ.
    """
    difference = float(np.abs(tuned - found).max())
    if not difference <= tolerance:
        raise ExportError(
            f"read back {how}, the export draws another picture than the run's model: they differ by "
            f"{difference:.2g}, and {tolerance:.0g} is allowed; this is tiller's fault, please report it."
        )
    return Verified(how, difference, float(np.abs(tuned - base).max()))


def load_as_written(pipe: Any, form: str, file: Path, family: Family | None) -> tuple[str, Deltas]:
    """Put a LoRA file into a fresh pipeline; returns how, in words, and what each layer of each part got."""
    part, module = next(iter(denoisers(pipe).items()))
    reads = hasattr(pipe, "load_lora_weights")
    if form == "diffusers" and not reads:
        raise ExportError(
            f"{type(pipe).__name__} has no load_lora_weights, so plain diffusers cannot load a LoRA into it; export "
            "with --format merged."
        )
    if form == "diffusers" or (form == "kohya" and reads and _converter(module)):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
        how = "by load_lora_weights" + (" (diffusers' converter)" if form == "kohya" else "")
        return how, {name: dict(_loaded(one)) for name, one in denoisers(pipe).items()}
    assert family is not None
    found = apart(module, read_lora(file), family, form == "kohya")
    for layer, pair in found.items():
        module.get_submodule(layer).register_forward_hook(_adding(pair))
    how = "by adding its matrices to the layers they name"
    return how, {part: {layer: pair.delta for layer, pair in found.items()}}


def _converter(module: nn.Module) -> bool:
    """Whether diffusers can read kohya files for this model: not for SD3, in part for Wan, FLUX of the true width."""
    name = type(module).__name__
    if name == "FluxTransformer2DModel":
        config: Any = module.config
        return bool(config.num_attention_heads * config.attention_head_dim == FLUX_WIDTH)
    return name in ("UNet2DConditionModel", "QwenImageTransformer2DModel")


def apart(module: nn.Module, found: Mapping[str, layouts.Pair], family: Family, kohya: bool) -> dict[str, layouts.Pair]:
    """The adapters of a file by diffusers' names of the layers, stacked ones cut into rows; all must be known.

    Raises:
        ExportError: the file names a matrix that the model does not have.
    """
    heights, left = layouts.rows(module), dict(found)
    cut: dict[str, layouts.Pair] = {}
    for layer in heights:
        place = family.kohya_place(layer) if kohya else family.place(layer)
        if place is None or layer != place.stacked[0]:
            continue
        pair = left.pop(f"lora_unet_{place.name.replace('.', '_')}" if kohya else f"diffusion_model.{place.name}", None)
        if pair is not None:
            ups = torch.split(pair.up, [heights[name] for name in place.stacked])
            cut |= {name: _own(pair, up) for name, up in zip(place.stacked, ups, strict=True) if bool(up.any())}
    if left:
        raise ExportError(f"the file names {next(iter(left))}, which the model does not have; please report it.")
    return cut


def _own(whole: layouts.Pair, up: Tensor) -> layouts.Pair:
    """The part of a stacked adapter that reaches some of its rows."""
    used = up.flatten(1).any(0)
    return layouts.Pair(whole.down[used], up[:, used], whole.alpha * int(used.sum()) / len(whole.down))


def _adding(pair: layouts.Pair) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that adds alpha/r · up(down(x)) to a layer's output."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        down, up = pair.down.to(output), pair.up.to(output)
        if isinstance(layer, nn.Conv2d):
            inner = nn.functional.conv2d(inputs[0], down, None, layer.stride, layer.padding, layer.dilation)  # type: ignore[arg-type]
            return output + nn.functional.conv2d(inner, up) * (pair.alpha / len(down))
        inner = nn.functional.linear(inputs[0], down)
        return output + nn.functional.linear(inner, up) * (pair.alpha / len(down))

    return hook


def check_layers(found: Deltas, wanted: Mapping[str, Mapping[str, layouts.Pair]]) -> None:
    """What was read is what was trained: the same layers, and up·down within rounding; layers of zeros may be more.

    Raises:
        ExportError: a layer is missing, unexpected or different.
    """
    for part, pairs in wanted.items():
        loaded = {name: delta for name, delta in found[part].items() if bool(delta.any())}
        expected = {name: pair.delta for name, pair in pairs.items() if bool(pair.up.any())}
        if loaded.keys() != expected.keys():
            odd = sorted(loaded.keys() ^ expected.keys())
            raise ExportError(
                f"read back, {len(odd)} layers of {part} are missing or unexpected ({odd[0]}); please report it."
            )
        for name, delta in expected.items():
            if not torch.allclose(loaded[name], delta, rtol=1e-5, atol=1e-6 * float(delta.abs().max())):
                raise ExportError(f"read back, {name} of {part} is another matrix; please report it.")


def _loaded(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, found in module.named_modules():
        layer: Any = found
        if isinstance(found, LoraLayer) and layer.lora_A:
            adapter = next(iter(layer.lora_A))
            down, up = layer.lora_A[adapter].weight.detach().cpu(), layer.lora_B[adapter].weight.detach().cpu()
            yield name, layouts.Pair(down, up, float(layer.scaling[adapter]) * len(down)).delta


def fresh(open_base: Callable[[], DiffusionPipeline], device: torch.device) -> Any:
    """The base model, loaded anew as any program would."""
    pipe: Any = open_base()
    pipe.to(device)
    return pipe


def open_folder(folder: Path) -> DiffusionPipeline:
    """A merged folder in float32."""
    return load_pipeline(folder, dtype=torch.float32)
