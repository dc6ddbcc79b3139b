"""LLaVA written out in plain torch from its weights: an independent computation for the scorers' tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import plain_clip
from plain_clip import Weights, linear, norm

HEADS, WIDTH = 2, 8  # of the tiny Llama's attention; one head of keys and values serves both


def rms(x: Tensor, weight: Tensor, epsilon: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def turned(x: Tensor) -> Tensor:
    """Rotary positions: of (L, heads, WIDTH), number i with number i + WIDTH/2 by an angle of 10000^(-2i/WIDTH) l."""
    half = WIDTH // 2
    angle = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def projected(x: Tensor, weights: Weights, name: str) -> Tensor:
    """A linear layer, with a bias if it has one."""
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def llama(x: Tensor, weights: Weights, tower: str = "model.language_model") -> Tensor:
    """(L, D) embeddings to (L, D) states, through two layers."""
    for index in range(2):
        name = f"{tower}.layers.{index}"
        y = rms(x, weights[f"{name}.input_layernorm.weight"])
        q, k, v = (projected(y, weights, f"{name}.self_attn.{part}_proj").unflatten(-1, (-1, WIDTH)) for part in "qkv")
        scores = torch.einsum("qhd,kd->hqk", turned(q), turned(k)[:, 0]) / WIDTH**0.5
        scores = scores + torch.full(scores.shape[1:], -torch.inf).triu(1)
        mixed = torch.einsum("hqk,kd->qhd", scores.softmax(-1), v[:, 0]).flatten(1)
        x = x + mixed @ weights[f"{name}.self_attn.o_proj.weight"].T
        y = rms(x, weights[f"{name}.post_attention_layernorm.weight"])
        gate, up = (y @ weights[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ weights[f"{name}.mlp.down_proj.weight"].T
    return rms(x, weights[f"{tower}.norm.weight"])


@torch.no_grad()
def log_probs(weights: Weights, pixels: Tensor, tokens: list[int], mark: int) -> Tensor:
    """(L, V) log-probabilities of the next token after each token; the picture stands where the mark does."""
    tower = "model.vision_tower"
    seen = {name.removeprefix(f"{tower}."): value for name, value in weights.items() if name.startswith(tower)}
    kernel = seen["embeddings.patch_embedding.weight"]
    patches = F.unfold(pixels[None], 8, stride=8)[0].T @ kernel.flatten(1).T
    x = torch.cat([seen["embeddings.class_embedding"][None], patches]) + seen["embeddings.position_embedding.weight"]
    x = norm(x, seen, "pre_layrnorm")
    for index in range(2):  # all layers but the last, and without the first token
        x = plain_clip.block(x, seen, f"encoder.layers.{index}", 2, "quick_gelu", causal=False)
    x = F.gelu(linear(x[1:], weights, "model.multi_modal_projector.linear_1"))
    picture = linear(x, weights, "model.multi_modal_projector.linear_2")
    at = tokens.index(mark)
    words = weights["model.language_model.embed_tokens.weight"]
    x = torch.cat([words[tokens[:at]], picture, words[tokens[at + 1 :]]])
    logits = llama(x, weights) @ weights["lm_head.weight"].T
    logs = logits.log_softmax(-1)
    return torch.cat([logs[:at], logs[at + len(picture) - 1 :]])  # one row per token again
