"""The embedded world: scenes of emoji, exact captions, models trained on them, and a judge."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
MODELS = {"emoji": "model", "emoji-flow": "flow_model"}
"""The pipelines that come with the package, by name: a U-Net with v-prediction, and a rectified-flow transformer."""

READERS = {"emoji-clip": "clip_model", "emoji-llava": "llava_model"}
"""The models that read pictures, by name, in transformers' format: a CLIP and a LLaVA."""


def path(name: str = "emoji") -> Path:
    """The folder of a shipped model: of `MODELS` for `DiffusionPipeline.from_pretrained`, of `READERS` for its class.

    Raises:
        TillerError: it is not there, or there is none of that name.
    """
    from tiller.types import TillerError

    folders = MODELS | READERS
    if name not in folders:
        raise TillerError(f"no embedded model is called {name!r}; there are {' and '.join(folders)}.")
    folder = FOLDER / folders[name]
    if not (folder / ("model_index.json" if name in MODELS else "config.json")).exists():
        raise TillerError(
            f"the embedded model {folder} is missing; reinstall tiller or train it with `tiller pretrain`"
        )
    return folder
