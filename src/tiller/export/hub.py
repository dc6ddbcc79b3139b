"""An export on the hub: only when asked for by name, private unless said otherwise, and never with a secret in it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tiller.export.families import ExportError
from tiller.rewards.redact import SECRET, SHORTEST

NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_name(name: str) -> None:
    """Refuse what cannot be a repository, before any work is done.

    Raises:
        ExportError: the name is none.
    """
    if not NAME.fullmatch(name):
        raise ExportError(f"--push-to-hub is {name!r}; it must be a repository's name, such as me/my-lora.")


def push(card: Path, target: Path, name: str, private: bool = True) -> str:
    """Upload the export's own files, and no others of its folder; returns the repository's address.

    The token is huggingface_hub's own affair: HF_TOKEN, or that of `hf auth login`. It is not read here.

    Raises:
        ExportError: a file holds a secret of the environment, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    names = [*_own(target), card]
    folder = card.parent
    gallery = folder / "before_after.jpg"
    files = sorted({file.relative_to(folder).as_posix() for file in [*names, *([gallery] if gallery.exists() else [])]})
    refuse_secrets([folder / file for file in files])
    api = HfApi()
    try:
        made = api.create_repo(name, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=files,
            commit_message="Upload with tiller export",
            repo_type="model",
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first = str(error).strip().split("\n")[0]
        raise ExportError(
            f"the hub did not take {name}: {first}; the export itself is done and lies in {folder}."
        ) from error
    return str(made)


def _own(target: Path) -> list[Path]:
    return [file for file in target.rglob("*") if file.is_file()] if target.is_dir() else [target]


def refuse_secrets(files: list[Path]) -> None:
    """Refuse to let a file leave that holds the value of an environment variable named like a secret.

    Raises:
        ExportError: one does; the message names the file and the variable, not the value.
    """
    secrets = {
        name: value.encode() for name, value in os.environ.items() if len(value) >= SHORTEST and SECRET.search(name)
    }
    for file in files:
        with file.open("rb") as opened:
            head = opened.read(1 << 20)  # texts whole, and the header of any safetensors file
        for name, value in secrets.items():
            if value in head:
                raise ExportError(
                    f"{file} holds the value of {name}, so nothing was uploaded; remove it from the recipe."
                )
