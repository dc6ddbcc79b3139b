"""An update whose gradient was not finite, written down to be looked at: safetensors and JSON, whole or not at all.

about.json                what was asked, drawn and trained, the scores and advantages, the recipe
chunk-000004.safetensors  latents (T+1, B, ...), log_probs (B, T), timesteps (T,), scores, advantages and groups (B,)
weights.safetensors       the trained parameters, as the update found them
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tiller.run.files import TEMPORARY, sync, to_json, write_file, writing
from tiller.update import Attempt, NotFinite
from tiller.walks import Chunk

if TYPE_CHECKING:
    from tiller.distributed import World
    from tiller.training import Report


def watch(
    reports: Iterable[Report], folder: Path, recipe: Mapping[str, Any], world: World | None = None
) -> Iterator[Report]:
    """The same reports; if they end because gradients are not finite, the last update is kept in the run folder.

    Raises:
        NotFinite: as it was raised, with the name of what was written in it.
        RunError: it cannot be written.
    """
    try:
        yield from reports
    except NotFinite as error:
        path = write(folder, error.attempt, recipe, world.rank if world and world.size > 1 else None)
        raise NotFinite(f"{str(error).rstrip('.')}; the last such update is in {path}.", error.attempt) from error


def write(folder: Path, attempt: Attempt, recipe: Mapping[str, Any], rank: int | None = None) -> Path:
    """Write the update into a folder of its own inside the run's; one of an earlier try is replaced.

    Args:
        rank: of this process, if there are several; each has chunks of its own.

    Raises:
        RunError: it cannot be written.
    """
    final = folder / (f"not-finite-epoch-{attempt.epoch + 1:06d}" + ("" if rank is None else f"-process-{rank}"))
    temporary = folder / f"{TEMPORARY}{final.name}"
    with writing(final):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            _fill(temporary, attempt, recipe)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            sync(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return final


def _fill(folder: Path, attempt: Attempt, recipe: Mapping[str, Any]) -> None:
    parts = zip(attempt.chunks, attempt.scores, attempt.advantages, strict=True)
    tensors = {
        f"chunk-{chunk.number:06d}.safetensors": _tensors(chunk) | _columns(scores, advantages)
        for chunk, scores, advantages in parts
    }
    tensors["weights.safetensors"] = {name: _kept(value) for name, value in attempt.weights.items()}
    for name, values in tensors.items():
        save_file(values, folder / name)
        sync(folder / name)
    write_file(folder / "about.json", to_json(_about(attempt, recipe)))
    sync(folder)


def _tensors(chunk: Chunk) -> dict[str, Tensor]:
    rollout = chunk.rollout
    found = {
        "log_probs": _kept(rollout.log_probs),
        "timesteps": _kept(rollout.timesteps),
        "groups": torch.as_tensor(chunk.groups).contiguous(),
    }
    if len({latents.shape for latents in rollout.latents}) == 1:
        return found | {"latents": _kept(torch.stack([latents.detach() for latents in rollout.latents]))}
    return found | {f"latents.{step}": _kept(latents) for step, latents in enumerate(rollout.latents)}


def _columns(scores: np.ndarray, advantages: np.ndarray) -> dict[str, Tensor]:
    return {"scores": torch.from_numpy(scores.copy()), "advantages": torch.from_numpy(advantages.copy())}


def _kept(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def _about(attempt: Attempt, recipe: Mapping[str, Any]) -> dict[str, Any]:
    parts = zip(attempt.chunks, attempt.scores, attempt.advantages, strict=True)
    return {
        "epoch": attempt.epoch,
        "inner_epoch": attempt.inner,
        "seed": attempt.seed,
        "steps": [str(step) if not isinstance(step, int) else step for step in attempt.steps],
        "gradients_not_finite": attempt.not_finite,
        "chunks": [_chunk(chunk) | {"scores": _plain(s), "advantages": _plain(a)} for chunk, s, a in parts],
        "recipe": dict(recipe),
    }


def _chunk(chunk: Chunk) -> dict[str, Any]:
    rollout = chunk.rollout
    return {
        "number": chunk.number,
        "prompts": list(chunk.prompts),
        "samples": list(rollout.samples),
        "starts": None if rollout.starts is None else list(rollout.starts),
        "kernel": str(rollout.kernel),
        "latents_not_finite": [at for at, value in enumerate(rollout.latents) if not bool(value.isfinite().all())],
    }


def _plain(values: np.ndarray) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
