"""The lines that load an export, for its card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiller import emoji


def how_to_load(form: str, target: Path, base: str, sampling: Mapping[str, Any], repository: str | None) -> str:
    """Code for diffusers, or the folder that ComfyUI and sd-scripts look into; Markdown."""
    call = "".join(f", {key}={value!r}" for key, value in sampling.items() if isinstance(value, int | float))
    draw = f'pipe("a prompt"{call}).images[0].save("picture.png")'
    if target.suffix != ".safetensors":
        name = repository or target.name
        return _python(f"pipe = DiffusionPipeline.from_pretrained({name!r})\n{draw}")
    if form == "comfyui":
        return (
            f"Put `{target.name}` into ComfyUI's `models/loras` and load it with the node *Load LoRA (Model)* at "
            "strength 1.0, on the base model. It changes the denoiser only; the text encoders stay as they are.\n"
        )
    opened = _base(base)
    lora = f'pipe.load_lora_weights({repository or "."!r}, weight_name="{target.name}")'
    text = _python(f"{opened}\n{lora}\n{draw}")
    if form == "kohya":
        text += (
            f"\nOr put `{target.name}` where your program keeps its LoRA files (sd-scripts, Forge, ComfyUI), at weight "
            "1.0.\n"
        )
    return text


def _base(base: str) -> str:
    if base in emoji.MODELS:
        return f"from tiller import emoji\n\npipe = DiffusionPipeline.from_pretrained(emoji.path({base!r}))"
    return f"pipe = DiffusionPipeline.from_pretrained({base!r})"


def _python(lines: str) -> str:
    return f"```python\nfrom diffusers import DiffusionPipeline\n\n{lines}\n```\n"
