"""Names of U-Net layers in the checkpoints of Stable Diffusion 1, 2 and XL: blocks are numbered straight through."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tiller.export.transformer_names import Place

TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
MIDDLE = {("resnets", 0): 0, ("attentions", 0): 1, ("resnets", 1): 2}


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether a U-Net's blocks are of the kinds that those checkpoints have, so that their numbers are known."""
    kinds = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    plain = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
    return kinds <= plain and isinstance(config.get("layers_per_block"), int)


def place(config: Mapping[str, Any], layer: str) -> Place | None:
    """The place of a layer by diffusers' name; None where there is none."""
    name = TOP.get(layer) or _in_block(config, layer)
    return None if name is None else Place(name, (layer,))


def _in_block(config: Mapping[str, Any], layer: str) -> str | None:
    match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", layer)
    if match is None:
        return None
    side, block, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    each = config["layers_per_block"] + 1
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * each}.0.op" if rest == "conv" else None
    if kind == "upsamplers":
        behind = 2 if "CrossAttn" in config["up_block_types"][block] else 1
        return f"output_blocks.{block * each + each - 1}.{behind}.conv" if rest == "conv" else None
    inner = RESNET.get(rest) if kind == "resnets" else rest
    if inner is None:
        return None
    if side == "mid":
        return f"middle_block.{MIDDLE[kind, number]}.{inner}" if (kind, number) in MIDDLE else None
    start = f"input_blocks.{1 + block * each + number}" if side == "down" else f"output_blocks.{block * each + number}"
    return f"{start}.{0 if kind == 'resnets' else 1}.{inner}"
