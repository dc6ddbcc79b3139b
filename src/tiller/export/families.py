"""Which models have names of their own in kohya's sd-scripts and in ComfyUI, and what those names are.

Both name a layer after the checkpoint its authors published, which is not how diffusers names it. kohya writes the
layer's path with underscores behind `lora_unet_`, ComfyUI the path itself behind `diffusion_model.`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tiller.export import unet_names
from tiller.export.transformer_names import FLUX, QWEN, SD3, WAN, Place, Rules, place_by_rules
from tiller.types import TillerError


class ExportError(TillerError):
    """A run cannot be exported so; the message says what can be done instead."""


@dataclass(frozen=True)
class Family:
    """A denoiser that other programs have names for."""

    title: str
    architecture: str  # modelspec.architecture, without /lora
    base_version: str  # ss_base_model_version
    place: Callable[[str], Place | None]  # a layer's place in the published checkpoint; None: it has none
    kohya_place: Callable[[str], Place | None]  # the place that kohya's names are made of

    def find(self, layer: str, kohya: bool) -> Place:
        """Where a layer by diffusers' name is.

        Raises:
            ExportError: it has no name there.
        """
        found = self.kohya_place(layer) if kohya else self.place(layer)
        if found is None:
            raise ExportError(
                f"the layer {layer} of {self.title} has no name outside diffusers; export with --format diffusers or "
                "merged, or train without it (model.target_modules)."
            )
        return found


def _as_in_diffusers(layer: str) -> Place:
    return Place(layer, (layer,))


def _transformer(title: str, architecture: str, rules: Rules) -> Family:
    place = partial(place_by_rules, rules)
    return Family(title, architecture, architecture, place, place)


TRANSFORMERS: Mapping[str, Family] = {
    "SD3Transformer2DModel": _transformer("Stable Diffusion 3", "stable-diffusion-3", SD3),
    "FluxTransformer2DModel": _transformer("FLUX.1", "flux-1-dev", FLUX),
    "QwenImageTransformer2DModel": _transformer("Qwen-Image", "qwen-image", QWEN),
    "WanTransformer3DModel": _transformer("Wan", "wan2.1", WAN),
}
KNOWN = "Stable Diffusion 1 and 2, SDXL, Stable Diffusion 3, FLUX.1, Qwen-Image and Wan"


def family_of(class_name: str, config: Mapping[str, Any]) -> Family | None:
    """The family of a denoiser, by its class and diffusers' config of it; None where there is none."""
    if class_name == "UNet2DConditionModel" and unet_names.is_plain(config):
        place = partial(unet_names.place, config)
        if config.get("addition_embed_type") == "text_time":
            return Family("SDXL", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", place, place)
        if config.get("cross_attention_dim") == 1024:
            return Family("Stable Diffusion 2", "stable-diffusion-v2-768-v", "sd_v2_v", place, _as_in_diffusers)
        return Family("Stable Diffusion 1", "stable-diffusion-v1", "sd_v1", place, _as_in_diffusers)
    return TRANSFORMERS.get(class_name)


def need_family(denoisers: Mapping[str, Any], wanted: str) -> Family:
    """The family of a policy's one denoiser.

    Raises:
        ExportError: there are several, or it has no names but diffusers' own.
    """
    if len(denoisers) > 1:
        raise ExportError(
            f"{' and '.join(denoisers)} are trained together, and a {wanted} file holds one model; export with "
            "--format diffusers or merged."
        )
    module = next(iter(denoisers.values()))
    found = family_of(type(module).__name__, module.config)
    if found is None:
        raise ExportError(
            f"{type(module).__name__} has no {wanted} names (there are some for {KNOWN}); export with --format "
            "diffusers or merged."
        )
    return found
