"""CLIP written out in plain torch from its weights: an independent computation for the scorers' tests."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(x: Tensor, weights: Weights, name: str, epsilon: float = 1e-5) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + epsilon).sqrt()
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def block(x: Tensor, weights: Weights, name: str, heads: int, act: str, causal: bool) -> Tensor:
    """One layer on (L, D)."""
    attend = f"{name}.self_attn"
    y = norm(x, weights, f"{name}.layer_norm1")
    q, k, v = (linear(y, weights, f"{attend}.{part}_proj").unflatten(-1, (heads, -1)).transpose(0, 1) for part in "qkv")
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    if causal:
        scores = scores + torch.full(scores.shape[1:], -torch.inf).triu(1)
    x = x + linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), weights, f"{attend}.out_proj")
    y = linear(norm(x, weights, f"{name}.layer_norm2"), weights, f"{name}.mlp.fc1")
    y = y * (1.702 * y).sigmoid() if act == "quick_gelu" else F.gelu(y)
    return x + linear(y, weights, f"{name}.mlp.fc2")


def layers(x: Tensor, weights: Weights, tower: str, causal: bool, act: str) -> Tensor:
    count = len({key.split(".")[3] for key in weights if key.startswith(f"{tower}.encoder.layers.")})
    for index in range(count):
        x = block(x, weights, f"{tower}.encoder.layers.{index}", 2, act, causal)
    return x


@torch.no_grad()
def picture(weights: Weights, pixels: Tensor, act: str = "quick_gelu") -> Tensor:
    """Pixels (3, S, S) to the embedding at length 1."""
    return _picture(weights, pixels, act)


def _picture(weights: Weights, pixels: Tensor, act: str) -> Tensor:
    embed = "vision_model.embeddings"
    kernel = weights[f"{embed}.patch_embedding.weight"]
    patches = F.unfold(pixels[None], kernel.shape[-1], stride=kernel.shape[-1])[0].T @ kernel.flatten(1).T
    x = torch.cat([weights[f"{embed}.class_embedding"][None], patches]) + weights[f"{embed}.position_embedding.weight"]
    x = layers(norm(x, weights, "vision_model.pre_layrnorm"), weights, "vision_model", causal=False, act=act)
    x = norm(x[0], weights, "vision_model.post_layernorm") @ weights["visual_projection.weight"].T
    return x / x.square().sum().sqrt()


picture_with_graph = partial(_picture, act="quick_gelu")


@torch.no_grad()
def text(weights: Weights, tokens: list[int], act: str = "quick_gelu") -> Tensor:
    """Tokens, the last of them the end mark, to the embedding at length 1."""
    embed = "text_model.embeddings"
    x = weights[f"{embed}.token_embedding.weight"][tokens]
    x = x + weights[f"{embed}.position_embedding.weight"][: len(tokens)]
    x = layers(x, weights, "text_model", causal=True, act=act)
    x = norm(x[-1], weights, "text_model.final_layer_norm") @ weights["text_projection.weight"].T
    return x / x.square().sum().sqrt()
