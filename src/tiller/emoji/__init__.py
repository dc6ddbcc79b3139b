"""The embedded world: scenes of emoji, exact captions, a model trained on them, and a judge."""

from __future__ import annotations

from pathlib import Path

MODEL = Path(__file__).parent / "model"


def path() -> Path:
    """The folder of the shipped text-to-image pipeline, for `StableDiffusionPipeline.from_pretrained`."""
    from tiller.types import TillerError

    if not (MODEL / "model_index.json").exists():
        raise TillerError(f"the embedded model {MODEL} is missing; reinstall tiller or train it with `tiller pretrain`")
    return MODEL
