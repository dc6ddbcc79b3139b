"""Where a reward's model comes from: a folder, the package, or the hub at a pinned revision.

From the hub come only configuration, vocabulary and `model*.safetensors`; a pickle or a Python file is never even
fetched. What the hub holds at that revision is then a local folder like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

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

_PLAIN = ["*.json", "*.txt", "*.model", "*.jinja"]  # configuration and vocabulary
_WEIGHTS = ["model*.safetensors"]


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


def hub_file(file: str, revision: str | None = None) -> Path:
    """One file of the hub, `owner/name/path/in/it`, as a local one.

    Raises:
        ConfigError: there is none, no revision was given, or the hub cannot be reached.
    """
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
        raise ConfigError(f"the hub did not give {model!r}: {first_line(error)}; try again later.") from error


def first_line(error: Exception) -> str:
    """What an error says, short enough for a sentence."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]
