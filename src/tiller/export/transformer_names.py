"""Names of transformer layers: diffusers' on the left, the published checkpoint's on the right.

Where the checkpoint stacks several of diffusers' matrices into one, all of them are named, in the order of their rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

Rules = Sequence[tuple[tuple[str, ...], str]]


@dataclass(frozen=True)
class Place:
    """Where a layer's weights are in a published checkpoint."""

    name: str  # of the matrix
    stacked: tuple[str, ...]  # diffusers' names of the layers whose rows it holds, from the top


def place_by_rules(rules: Rules, layer: str) -> Place | None:
    """The place of a layer; `#` in a rule is a block's number."""
    for sources, target in rules:
        for source in sources:
            match = re.fullmatch(re.escape(source).replace(r"\#", r"(\d+)"), layer)
            if match:
                number = match[1] if match.groups() else ""
                return Place(target.replace("#", number), tuple(name.replace("#", number) for name in sources))
    return None


def _in_block(block: str, target: str, pairs: Sequence[tuple[str, str]]) -> Rules:
    """`to_q to_k` on the left are stacked."""
    return [(tuple(f"{block}.#.{name}" for name in left.split()), f"{target}.#.{right}") for left, right in pairs]


SD3: Rules = [
    *_in_block(
        "transformer_blocks",
        "joint_blocks",
        [
            ("attn.to_q attn.to_k attn.to_v", "x_block.attn.qkv"),
            ("attn.to_out.0", "x_block.attn.proj"),
            ("attn2.to_q attn2.to_k attn2.to_v", "x_block.attn2.qkv"),
            ("attn2.to_out.0", "x_block.attn2.proj"),
            ("attn.add_q_proj attn.add_k_proj attn.add_v_proj", "context_block.attn.qkv"),
            ("attn.to_add_out", "context_block.attn.proj"),
            ("ff.net.0.proj", "x_block.mlp.fc1"),
            ("ff.net.2", "x_block.mlp.fc2"),
            ("ff_context.net.0.proj", "context_block.mlp.fc1"),
            ("ff_context.net.2", "context_block.mlp.fc2"),
            ("norm1.linear", "x_block.adaLN_modulation.1"),
        ],
    ),
    (("context_embedder",), "context_embedder"),
    (("proj_out",), "final_layer.linear"),
    (("time_text_embed.timestep_embedder.linear_1",), "t_embedder.mlp.0"),
    (("time_text_embed.timestep_embedder.linear_2",), "t_embedder.mlp.2"),
    (("time_text_embed.text_embedder.linear_1",), "y_embedder.mlp.0"),
    (("time_text_embed.text_embedder.linear_2",), "y_embedder.mlp.2"),
]

FLUX: Rules = [
    *_in_block(
        "transformer_blocks",
        "double_blocks",
        [
            ("attn.to_q attn.to_k attn.to_v", "img_attn.qkv"),
            ("attn.to_out.0", "img_attn.proj"),
            ("attn.add_q_proj attn.add_k_proj attn.add_v_proj", "txt_attn.qkv"),
            ("attn.to_add_out", "txt_attn.proj"),
            ("ff.net.0.proj", "img_mlp.0"),
            ("ff.net.2", "img_mlp.2"),
            ("ff_context.net.0.proj", "txt_mlp.0"),
            ("ff_context.net.2", "txt_mlp.2"),
            ("norm1.linear", "img_mod.lin"),
            ("norm1_context.linear", "txt_mod.lin"),
        ],
    ),
    *_in_block(
        "single_transformer_blocks",
        "single_blocks",
        [
            ("attn.to_q attn.to_k attn.to_v proj_mlp", "linear1"),
            ("proj_out", "linear2"),
            ("norm.linear", "modulation.lin"),
        ],
    ),
]

_QWEN_LAYERS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
    *(f"attn.add_{name}_proj" for name in "qkv"),
    *(f"{side}_{layer}" for side in ("img", "txt") for layer in ("mlp.net.0.proj", "mlp.net.2", "mod.1")),
)
QWEN: Rules = [  # published in diffusers' own names
    *_in_block("transformer_blocks", "transformer_blocks", [(name, name) for name in _QWEN_LAYERS]),
    *(((name,), name) for name in ("img_in", "txt_in", "proj_out")),
]

WAN: Rules = _in_block(
    "blocks",
    "blocks",
    [
        *(
            (f"{ours}.{left}", f"{theirs}.{right}")
            for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
            for left, right in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
        ),
        ("attn2.add_k_proj", "cross_attn.k_img"),
        ("attn2.add_v_proj", "cross_attn.v_img"),
        ("ffn.net.0.proj", "ffn.0"),
        ("ffn.net.2", "ffn.2"),
    ],
)
