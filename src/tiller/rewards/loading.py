"""Models inside rewards: one place that loads them, from safetensors only, without remote code, at a pinned revision.

A model is named by a local folder, by the name of one that comes with tiller, or by its name on the hub together with
a revision; `tiller.rewards.hub` makes a folder of all three.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tiller.rewards.hub import first_line, folder_of, hub_file
from tiller.types import ConfigError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def choose_device(device: str = "auto") -> torch.device:
    """The device of that name; "auto" is this process's GPU if there is one, then Apple's, then the CPU."""
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ConfigError(f"there is no device {device!r}; name auto, cpu, cuda, cuda:1 or mps.") from error
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16 on a GPU and float32 on the CPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ConfigError(f"there is no dtype {dtype!r}; name auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def load_model(
    kind: Any, model: str, revision: str | None = None, device: str = "auto", dtype: str = "float32", **settings: Any
) -> Any:
    """`kind.from_pretrained` of a model's folder: frozen, in evaluation mode, on its device, every weight read.

    Args:
        kind: a class of transformers, such as `CLIPModel` or `AutoModelForImageTextToText`.
        model: a local folder, a name in `hub.PACKAGED`, or a name on the hub.
        revision: a commit on the hub, or a branch such as "main"; not needed for a folder or what `hub.PINNED` lists.
        settings: handed to `from_pretrained` as they are.

    Raises:
        ConfigError: it is not there, cannot be reached, has only pickled weights, is of another architecture, or lacks
            weights that the architecture has.
    """
    folder = folder_of(model, revision)
    place = choose_device(device)
    _check_kind(kind, folder, model)
    if not any(folder.glob("model*.safetensors")):
        raise ConfigError(_no_weights(folder, model))
    network, report = _read(
        lambda: kind.from_pretrained(
            folder, use_safetensors=True, dtype=choose_dtype(dtype, place), output_loading_info=True, **settings
        ),
        model,
    )
    _check_whole(report, kind, model)
    return network.to(place).eval().requires_grad_(False)


def fill_model(
    kind: Any, config: Any, tensors: Mapping[str, Tensor], file: str, device: str, dtype: str, **settings: Any
) -> Any:
    """The same from a configuration and tensors by the names of transformers, where the weights have another home.

    Args:
        kind: a class of transformers.
        tensors: name -> weight, every one that the architecture has and no other.
        file: where they come from, for messages.

    Raises:
        ConfigError: a weight is missing, is too many, or has another shape.
    """
    place = choose_device(device)
    network, report = _read(
        lambda: kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=choose_dtype(dtype, place),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **settings,
        ),
        file,
    )
    _check_whole(report, kind, file)
    return network.to(place).eval().requires_grad_(False)


def load_processor(kind: Any, model: str, revision: str | None = None, **settings: Any) -> Any:
    """`kind.from_pretrained` of a tokenizer, image processor or processor; pictures go through PIL everywhere.

    Raises:
        ConfigError: as `load_model`.
    """
    folder = folder_of(model, revision, weights=False)
    return _read(lambda: kind.from_pretrained(folder, **settings), model)


def load_tensors(file: str, revision: str | None = None) -> dict[str, Tensor]:
    """The tensors of one safetensors file: a local path, or `owner/name/path/in/it.safetensors` on the hub.

    Raises:
        ConfigError: there is no such file, or it is not one of safetensors.
    """
    if not file.endswith(".safetensors"):
        what = (
            "is a pickle, which can run code when it is read" if file.endswith(_PICKLED) else "is no safetensors file"
        )
        raise ConfigError(f"{file} {what}; name a copy that ends in .safetensors.")
    path = Path(file).expanduser()
    if not path.is_file():
        path = hub_file(file, revision)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged, or no safetensors file ({error}); fetch it anew.") from error


def kind_of(model: str, revision: str | None = None) -> str:
    """What transformers calls the architecture in a model's folder, such as "clip".

    Raises:
        ConfigError: there is no such folder or model, or it is none of transformers.
    """
    return _kind_in(folder_of(model, revision, weights=False), model)


def _kind_in(folder: Path, model: str) -> str:
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{model!r} has no config.json, so it is no model of transformers; check the name.")
    return str(json.loads(path.read_text(encoding="utf-8")).get("model_type"))


def _check_kind(kind: Any, folder: Path, model: str) -> None:
    """Refuse a folder that holds another architecture, which transformers would fill with random weights."""
    held = _kind_in(folder, model)
    wanted = getattr(getattr(kind, "config_class", None), "model_type", held)
    if held != wanted:
        raise ConfigError(f"{model!r} is a model of the kind {held!r}, but {kind.__name__} reads {wanted!r}; name one.")


def _check_whole(report: Mapping[str, Any], kind: Any, model: str) -> None:
    """Refuse weights that do not fill the architecture: transformers would fill the rest with random ones."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            f"the weights of {model!r} lack {missing[0]} (and {len(missing) - 1} more), so {kind.__name__} would score "
            "with random ones; name a model of that architecture."
        )
    for name, held, wanted in sorted(report.get("mismatched_keys") or ()):
        raise ConfigError(
            f"the weights of {model!r} have {name} as {tuple(held)}, but {kind.__name__} wants {tuple(wanted)}; name a "
            "model of that size."
        )


def _no_weights(folder: Path, model: str) -> str:
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled:
        return (
            f"{model!r} has its weights as a pickle only ({pickled[0]}), which can run code when it is read; name a "
            "copy in safetensors."
        )
    return f"{model!r} has no model.safetensors, and tiller reads nothing else; name a copy that has one."


def _read(read: Callable[[], Any], model: str) -> Any:
    try:
        return read()
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{model!r} cannot be loaded: {first_line(error)}") from error
