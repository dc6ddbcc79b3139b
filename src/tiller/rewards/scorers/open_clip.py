"""Weights in open_clip's layout, by the names that transformers gives them in its `CLIPModel`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from tiller.types import ConfigError

PLAIN = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
}
TURNED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}  # x @ W, not W x
NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"^(visual\.)?transformer\.resblocks\.(\d+)\.(.+)$")


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole CLIP of open_clip (a `CLIP` with its text tower at the top level) by the names of `CLIPModel`.

    Raises:
        ConfigError: a key is none of that layout.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        key = key.removeprefix("module.")
        stem, _, leaf = key.rpartition(".")
        if key in PLAIN:
            found[PLAIN[key]] = tensor
        elif key in TURNED:
            found[TURNED[key]] = tensor.T.contiguous()
        elif stem in NORMS:
            found[f"{NORMS[stem]}.{leaf}"] = tensor
        elif match := _BLOCK.match(key):
            tower = "vision_model" if match[1] else "text_model"
            found |= _block(f"{tower}.encoder.layers.{match[2]}", match[3], tensor, key)
        else:
            raise ConfigError(f"{key} is no weight of a CLIP in open_clip's layout; name a file of one.")
    return found


def _block(layer: str, part: str, tensor: Tensor, key: str) -> dict[str, Tensor]:
    """One weight of a layer; the three projections of attention, which open_clip keeps in one, become three."""
    if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
        leaf = part.rpartition("_")[2]
        return {
            f"{layer}.self_attn.{name}_proj.{leaf}": third.clone()
            for name, third in zip("qkv", tensor.chunk(3), strict=True)
        }
    stem, _, leaf = part.rpartition(".")
    if stem not in PARTS:
        raise ConfigError(f"{key} is no weight of a CLIP in open_clip's layout; name a file of one.")
    return {f"{layer}.{PARTS[stem]}.{leaf}": tensor}
