"""Weights of BLIP as its authors published it, by the names that transformers gives them in its own BLIP classes.

The network (Li et al. 2022, 2201.12086; ImageReward's trunk): a ViT whose last states are attended to by every layer
of a BERT. All sizes are read off the weights; a head of attention is 64 wide in every size that BLIP comes in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import BlipTextConfig, BlipVisionConfig

from tiller.types import ConfigError

HEAD = 64  # numbers per head of attention
PLAIN = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
PARTS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)\.(weight|bias)$")


@dataclass(frozen=True)
class Blip:
    """BLIP in two halves, each a configuration and its weights."""

    vision_config: BlipVisionConfig
    vision: dict[str, Tensor]  # of a BlipVisionModel
    text_config: BlipTextConfig
    text: dict[str, Tensor]  # of a BlipTextModel without its pooling layer


def from_blip(tensors: Mapping[str, Tensor], prefix: str = "blip.") -> Blip:
    """The two halves of BLIP out of a checkpoint; what else the checkpoint holds is left.

    Raises:
        ConfigError: they are not there.
    """
    eyes, words = f"{prefix}visual_encoder.", f"{prefix}text_encoder."
    vision = {_vision(k.removeprefix(eyes), k): tensor for k, tensor in tensors.items() if k.startswith(eyes)}
    text = {
        key.removeprefix(words): tensor
        for key, tensor in tensors.items()
        if key.startswith(words) and not key.endswith("position_ids") and ".pooler." not in key
    }
    try:
        return Blip(_vision_config(vision), vision, _text_config(text), text)
    except KeyError as error:
        raise ConfigError(f"there is no BLIP under {prefix} in these weights: {error.args[0]} is missing.") from error


def _vision(name: str, key: str) -> str:
    if name in PLAIN:
        return PLAIN[name]
    match = _BLOCK.match(name)
    if match is None or match[2] not in PARTS:
        raise ConfigError(f"{key} is no weight of BLIP's picture tower; name a checkpoint of BLIP's own layout.")
    return f"encoder.layers.{match[1]}.{PARTS[match[2]]}.{match[3]}"


def _vision_config(vision: Mapping[str, Tensor]) -> BlipVisionConfig:
    width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
    places = vision["embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=vision["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_layers(vision, "encoder.layers."),
        num_attention_heads=width // HEAD,
        image_size=patch * round(places**0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def _text_config(text: Mapping[str, Tensor]) -> BlipTextConfig:
    vocabulary, width = text["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=text["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_layers(text, "encoder.layer."),
        num_attention_heads=width // HEAD,
        max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
        hidden_act="gelu",
        is_decoder=True,  # which is what gives its layers their attention to the picture
    )


def _layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})
