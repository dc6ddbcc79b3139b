"""Pictures from outside on a pipeline's path: encoded as its own latents, and put into a recorded call's frame."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tiller.policy import calling
from tiller.policy.rollout import Rollout
from tiller.types import PipelineError

PACKING = ("latents", "batch_size", "num_channels_latents", "height", "width")  # what `_pack_latents` may ask for


@torch.no_grad()
def encode(pipe: Any, pictures: Tensor, like: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] as the clean latents of a pipeline, in the layout of `like` (B, ...).

    The latents are the mode of the autoencoder's distribution, shifted and scaled as its configuration says:
    (z - shift_factor)·scaling_factor, or (z - latents_mean)·scaling_factor/latents_std per channel. Where the recorded
    latents have another layout, the pipeline's own `_pack_latents` brings them into it.

    Raises:
        PipelineError: the pipeline has no autoencoder that encodes pictures, or its latents cannot be made from them.
    """
    name = type(pipe).__name__
    vae: Any = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    if not hasattr(vae, "encode"):
        raise PipelineError(f"{name} has no autoencoder (vae) that encodes pictures; train it without data.")
    given = pictures.to(vae.device, vae.dtype)
    flat = not any(weight.ndim == 5 for weight in vae.parameters())  # one that encodes videos gets a single frame
    encoded = vae.encode(given if flat else given[:, :, None])
    latents = _normalised(vae, _mode(encoded, name))
    if latents.shape != like.shape:
        latents = _packed(pipe, latents, like)
    if latents.shape != like.shape:
        raise PipelineError(
            f"the latents of {name} are {tuple(like.shape)}, and its autoencoder makes {tuple(latents.shape)} of a "
            "picture, which tiller cannot bring together; train it without data."
        )
    return latents.to(like)


def framed(rollout: Rollout, clean: Tensor, prompts: Sequence[str], samples: Sequence[int]) -> Rollout:
    """The same call with other prompts and other clean latents (B, ...), to be walked by `Policy.predict`.

    The stages of a call are the same for all prompts; what it encoded of the old ones is made again. There is no path
    in it: its latents are the clean ones at every step, so walk it by a path at the steps that are wanted.
    """
    texts, call = calling.batch(list(prompts), rollout.call)
    if len(texts) != rollout.batch_size:
        raise ValueError(f"got {len(texts)} prompts for a call of {rollout.batch_size} samples")
    records = tuple(
        replace(record, action=clean, sample=clean if record.sample.shape == clean.shape else record.sample)
        for record in rollout.records
    )
    return replace(
        rollout,
        images=None,
        records=records,
        prompts=texts,
        samples=tuple(samples),
        starts=None,
        call=call,
        embeddings={},
    )


def _mode(encoded: Any, name: str) -> Tensor:
    """(B, ...) what an autoencoder's answer holds, under any of the names that diffusers has for it."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    for field in ("latents", "latent"):
        if hasattr(encoded, field):
            return getattr(encoded, field)
    raise PipelineError(f"the autoencoder of {name} returns no latents that tiller knows; train it without data.")


def _normalised(vae: Any, latents: Tensor) -> Tensor:
    config = vae.config
    scale = config.get("scaling_factor") or 1.0
    shift = config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return (latents - shift) * scale
    shape = (1, -1, *[1] * (latents.ndim - 2))
    return (latents - latents.new_tensor(mean).view(shape)) * scale / latents.new_tensor(std).view(shape)


def _packed(pipe: Any, latents: Tensor, like: Tensor) -> Tensor:
    """The latents through the pipeline's own packing, where that asks for sizes only."""
    name = type(pipe).__name__
    pack = getattr(pipe, "_pack_latents", None)
    asked = [] if pack is None else list(inspect.signature(pack).parameters)
    if pack is None or not isinstance(inspect.getattr_static(type(pipe), "_pack_latents"), staticmethod):
        return latents
    if set(asked) - set(PACKING):
        raise PipelineError(
            f"{name} packs its latents by {', '.join(asked)}, which tiller cannot give; train it without data."
        )
    sizes = {
        "latents": latents,
        "batch_size": len(latents),
        "num_channels_latents": latents.shape[1],
        "height": latents.shape[-2],
        "width": latents.shape[-1],
    }
    return pack(**{key: sizes[key] for key in asked})
