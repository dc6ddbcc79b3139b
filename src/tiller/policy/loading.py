"""Loading pipelines: safetensors only, no remote code, and a sentence when something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from tiller import emoji
from tiller.types import PipelineError

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def load_pipeline(name_or_path: str | Path, **loading: Any) -> DiffusionPipeline:
    """`DiffusionPipeline.from_pretrained(...)`; "emoji" and "emoji-flow" are the models that come with tiller.

    Raises:
        PipelineError: the folder holds custom code or only pickled weights, or diffusers cannot load it.
    """
    for name in ("custom_pipeline", "trust_remote_code"):
        if loading.get(name):
            raise PipelineError(f"{name} runs code that comes with a model, which tiller never does; leave it out.")
    if str(name_or_path) in emoji.MODELS:
        name_or_path = emoji.path(str(name_or_path))
    folder = Path(name_or_path)
    if folder.is_dir():
        _inspect(folder)
    try:
        return DiffusionPipeline.from_pretrained(str(name_or_path), use_safetensors=True, **loading)
    except (OSError, ValueError) as error:
        shipped = " and ".join(emoji.MODELS)
        raise PipelineError(
            f"cannot load the pipeline {str(name_or_path)!r} (with tiller come {shipped}): {_first_line(error)}"
        ) from error


def _inspect(folder: Path) -> None:
    """Refuse what would need to run code or to unpickle."""
    if not (folder / "model_index.json").exists():
        raise PipelineError(
            f"{folder} is no pipeline folder: it has no model_index.json; give a folder that diffusers wrote."
        )
    code = next(folder.rglob("*.py"), None)
    if code is not None:
        raise PipelineError(
            f"{folder} holds code ({code.name}), which tiller never runs; use a plain diffusers pipeline."
        )
    for part in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        files = list(part.iterdir())
        pickled = [file for file in files if file.suffix in PICKLED and file.name != "training_args.bin"]
        if pickled and not any(file.suffix == ".safetensors" for file in files):
            raise PipelineError(
                f"{pickled[0]} is a pickle, which can run code when it is read; convert the model to safetensors first."
            )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
