"""The embedded world: scenes of emoji, exact captions, two models trained on them, and a judge."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
MODELS = {"emoji": "model", "emoji-flow": "flow_model"}
"""The pipelines that come with the package, by name: a U-Net with v-prediction, and a rectified-flow transformer."""


def path(name: str = "emoji") -> Path:
    """The folder of a shipped text-to-image pipeline, for `DiffusionPipeline.from_pretrained`.

    Raises:
        TillerError: it is not there, or there is none of that name.
    """
    from tiller.types import TillerError

    if name not in MODELS:
        raise TillerError(f"no embedded model is called {name!r}; there are {' and '.join(MODELS)}.")
    folder = FOLDER / MODELS[name]
    if not (folder / "model_index.json").exists():
        raise TillerError(
            f"the embedded model {folder} is missing; reinstall tiller or train it with `tiller pretrain`"
        )
    return folder
