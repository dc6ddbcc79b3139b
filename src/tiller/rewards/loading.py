"""Models inside rewards: one place that loads them, from safetensors only, without remote code, at a pinned revision.

A model is named by a local folder, by the name of one that comes with tiller, or by its name on the hub together with
a revision. From the hub come only configuration, vocabulary and `model*.safetensors`; a pickle or a Python file is
never even fetched. What the hub said at that revision is then read as a local folder, so that there is one path.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tiller import emoji
from tiller.types import ConfigError

PACKAGED: dict[str, str] = {name: f"emoji/{folder}" for name, folder in emoji.READERS.items()}
"""Models that come with tiller: name -> folder inside the package."""

PINNED: dict[str, str] = {
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
    "google-bert/bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594",
    "Qwen/Qwen2-VL-2B-Instruct": "895c3a49bc3fa70a340399125c650a463535e71c",
    "Qwen/Qwen2-VL-7B-Instruct": "eed13092ef92e448dd6875b2a00151bd3f7db0ac",
    "MizzenAI/HPSv3": "4f81e3e09edd82fe3c5f636444c721b592a735ca",
    "microsoft/trocr-base-printed": "93450be3f1ed40a930690d951ef3932687cc1892",
    "google/owlv2-base-patch16-ensemble": "cfd3195ba4ea9592eec887ded089f4c08eff231d",
    "IDEA-Research/grounding-dino-base": "12bdfa3120f3e7ec7b434d90674b3396eccf88eb",
}
"""The revision that is meant where none is given: hub name -> commit."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PLAIN = ["*.json", "*.txt", "*.model", "*.jinja"]  # configuration and vocabulary
_WEIGHTS = ["model*.safetensors"]


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
        model: a local folder, a name in `PACKAGED`, or a name on the hub.
        revision: a commit on the hub, or a branch such as "main"; not needed for a folder or what `PINNED` lists.
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
        path = _hub_file(file, revision)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged, or no safetensors file ({error}); fetch it anew.") from error


def folder_of(model: str, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder of a model; from the hub it is fetched, without its weights unless `weights`.

    Raises:
        ConfigError: there is no such folder or model, no revision was given, or the hub cannot be reached.
    """
    path = Path(__file__).parents[1] / PACKAGED[model] if model in PACKAGED else Path(model).expanduser()
    if path.is_dir():
        return path
    if model in PACKAGED:
        raise ConfigError(f"the model {model!r}, which comes with tiller, is missing; reinstall tiller.")
    revision = _revision(model, revision)
    patterns = _PLAIN + _WEIGHTS * weights
    return Path(_fetch(lambda: snapshot_download(model, revision=revision, allow_patterns=patterns), model, revision))


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


def _hub_file(file: str, revision: str | None) -> Path:
    owner, _, rest = file.partition("/")
    name, _, inside = rest.partition("/")
    if file.startswith((".", "/", "~")) or not inside:
        raise ConfigError(f"there is no file {file}; a path starts at the working directory.")
    model = f"{owner}/{name}"
    revision = _revision(model, revision)
    return Path(_fetch(lambda: hf_hub_download(model, inside, revision=revision), file, revision))


def _revision(model: str, revision: str | None) -> str:
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError(f"there is no folder {model}; give one that transformers wrote, or a name on the hub.")
    revision = revision or PINNED.get(model)
    if revision is None:
        raise ConfigError(
            f"{model!r} is no folder here, and a model from the hub needs a revision; set revision to the commit that "
            "you mean (or to main, whatever that will be)."
        )
    return revision


def _fetch(fetch: Callable[[], str], model: str, revision: str) -> str:
    """What the hub answers, or one sentence on why it does not."""
    try:
        return fetch()
    except GatedRepoError as error:
        why = "asks for its licence to be accepted on the hub first; do so, then log in with `hf auth login`"
        raise ConfigError(f"{model!r} {why}.") from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"{model!r} has no revision {revision!r} on the hub; give one of its commits.") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"there is no {model!r}, neither a folder here nor on the hub; check the name.") from error
    except LocalEntryNotFoundError as error:
        fix = f"fetch it where there is a network (`hf download {model} --revision {revision}`), or name a local folder"
        raise ConfigError(f"{model!r} is not on this machine and the hub cannot be reached; {fix}.") from error
    except EntryNotFoundError as error:
        raise ConfigError(f"there is no file {model!r} on the hub at {revision!r}; check the name.") from error
    except HfHubHTTPError as error:
        raise ConfigError(f"the hub did not give {model!r}: {_first_line(error)}; try again later.") from error


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
        raise ConfigError(f"{model!r} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
