"""What one call of a denoiser costs, from the shapes of its weights: where each matrix is applied, and how often.

A matrix of m numbers that is applied at p positions takes 2·m·p floating-point operations. The positions of a U-Net's
layers are those of their level, a transformer's are its tokens. Attention over n tokens adds 4·n²·width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tiller.dry_run.headers import Files, Part

TEXT_TOKENS = {
    "FluxTransformer2DModel": 512,
    "SD3Transformer2DModel": 333,
    "PixArtTransformer2DModel": 300,
    "CogView4Transformer2DModel": 16,
}
USUAL_TEXT = 77
JOINED = ("CogView4Transformer2DModel",)  # text and picture go through the same layers
PACKED = ("FluxTransformer2DModel", "QwenImageTransformer2DModel")  # 2x2 latents are one token
GUIDED_WITHIN = ("FluxTransformer2DModel",)  # guidance is an input, not a second branch


@dataclass(frozen=True)
class Cost:
    """Of one row (one picture, one branch of guidance) through the denoiser, once."""

    operations: float  # floating-point, of the forward pass
    inputs: float  # numbers that its matrices and convolutions take in, all together
    tokens: int  # of the picture


def picture_size(files: Files, sampling: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels that a recipe asks for, or the model's own."""
    scale, denoiser = vae_scale(files), files.denoiser
    own = int((denoiser.config.get("sample_size") if denoiser else None) or 64)
    side = own * scale
    return int(sampling.get("height") or side), int(sampling.get("width") or side)


def vae_scale(files: Files) -> int:
    """Pixels per latent, along one side."""
    vae = files.parts.get("vae") or files.parts.get("movq") or files.parts.get("vqvae")
    return int(2 ** (len(vae.config.get("block_out_channels") or [0] * 4) - 1)) if vae else 1


def denoiser_cost(files: Files, part: Part, size: tuple[int, int]) -> Cost:
    """Of one row at a picture's size."""
    scale = vae_scale(files)
    latent = (math.ceil(size[0] / scale), math.ceil(size[1] / scale))
    unet = any(name.startswith("down_blocks.") for name in part.weights)
    patch = 1 if unet else int(part.config.get("patch_size") or 1) * (2 if part.kind in PACKED else 1)
    tokens = max(1, math.prod(latent) // patch**2)
    text = TEXT_TOKENS.get(part.kind) or _text_tokens(files)
    operations = inputs = 0.0
    for name, shape in part.weights.items():
        if len(shape) < 2 or not name.endswith(".weight") or "embedding.weight" in name:
            continue
        joined = part.kind in JOINED
        where = _in_unet(name, latent, part.config, text) if unet else _in_transformer(name, tokens, text, joined)
        operations += 2 * math.prod(shape) * where
        inputs += shape[1] * where
    return Cost(operations + sum(_attention(part, unet, latent, tokens, text)), inputs, tokens)


def _text_tokens(files: Files) -> int:
    """Of a prompt, padded as CLIP's pipelines pad it."""
    encoder = files.parts.get("text_encoder")
    return min(USUAL_TEXT, int((encoder.config.get("max_position_embeddings") if encoder else None) or USUAL_TEXT))


def decoder_cost(files: Files, size: tuple[int, int]) -> tuple[float, float]:
    """(operations, largest activation in numbers) of decoding one picture."""
    vae = files.parts.get("vae")
    if vae is None:
        return 0.0, 0.0
    channels = list(vae.config.get("block_out_channels") or [64])
    scale, operations, largest = vae_scale(files), 0.0, 0.0
    for name, shape in vae.weights.items():
        if not name.startswith("decoder.") or len(shape) < 2:
            continue
        level = re.match(r"decoder\.up_blocks\.(\d+)", name)
        zoom = scale if name.startswith(("decoder.conv_out", "decoder.conv_norm")) else 1
        if level:
            zoom = min(scale, 2 ** (int(level[1]) + ("upsamplers" in name)))
        positions = math.prod(size) * (zoom / scale) ** 2
        operations += 2 * math.prod(shape) * positions
        largest = max(largest, shape[0] * positions)
    return operations, max(largest, channels[0] * math.prod(size))


def _in_unet(name: str, latent: tuple[int, int], config: Mapping[str, Any], text: int) -> float:
    if "time_emb" in name or "add_embedding" in name or "class_embedding" in name:
        return 1
    if re.search(r"attn2\.to_[kv]\.|add_[kv]_proj", name):
        return text
    return math.prod(latent) / 4 ** _level(name, len(config.get("block_out_channels") or [0]))


def _level(name: str, levels: int) -> int:
    """How often the latents were halved where a layer stands."""
    match = re.match(r"(down|up)_blocks\.(\d+)\.", name)
    if match is None:
        return levels - 1 if name.startswith("mid_block") else 0
    number = int(match[2])
    if match[1] == "down":
        return min(number + ("downsamplers" in name), levels - 1)
    return max(0, levels - 1 - number - ("upsamplers" in name))


def _in_transformer(name: str, tokens: int, text: int, joined: bool) -> float:
    if re.search(r"time|norm\w*\.linear|adaln|adaLN|pooled|guidance|\bmod\b|_mod\.", name):
        return 1
    if re.search(r"context|caption|text_proj|txt_|add_[qkv]_proj|to_add_out|attn2\.to_[kv]\.", name):
        return text
    both = name.startswith("single_") or (joined and name.startswith("transformer_blocks"))
    return tokens + text if both else tokens


def _attention(part: Part, unet: bool, latent: tuple[int, int], tokens: int, text: int) -> Iterator[float]:
    """Of the products of queries with keys, and of the weights with values."""
    levels = len(part.config.get("block_out_channels") or [0])
    for name, shape in part.weights.items():
        if not name.endswith("to_q.weight"):
            continue
        queries = math.prod(latent) / 4 ** _level(name, levels) if unet else tokens + text
        keys = text if "attn2" in name else queries
        yield 4 * queries * keys * shape[0]
