"""Processors of models that also see films, for pictures alone.

Their film part needs torchvision, which tiller does not; without it the whole processor of Qwen-VL or SmolVLM would
not load. Here the film part is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")  # where its class is named


def processor_kind(folder: Path) -> Any:
    """What reads the processor of a model's folder: AutoProcessor, or without torchvision a class for stills alone."""
    import transformers
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return transformers.AutoProcessor
    named = [json.loads((folder / file).read_text("utf-8")) for file in FILES if (folder / file).is_file()]
    name = next((found["processor_class"] for found in named if found.get("processor_class")), "AutoProcessor")
    kind = getattr(transformers, name, None)
    if kind is None or "video_processor" not in kind.get_attributes():
        return transformers.AutoProcessor
    return without_film(kind)


def without_film(kind: Any) -> Any:
    """The processor class `kind`, but its `video_processor` is neither read nor asked for."""

    class Stills(kind):
        video_processor = SimpleNamespace(num_frames=None, fps=None)  # SmolVLM reads these of it, for pictures too

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(cls, *places: Any, **settings: Any) -> list[Any]:
            read = iter(super()._get_arguments_from_pretrained(*places, **settings))
            return [None if name == "video_processor" else next(read) for name in super().get_attributes()]

    Stills.__name__ = kind.__name__
    return Stills
