"""Text and conditioning pictures encoded once per rollout: encoding methods, remembered by their arguments."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.utils import _pytree as pytree

from tiller.policy import seam

METHODS = ("encode_prompt", "_encode_prompt", "encode_image", "_encode_image")


@contextmanager
def memoised(pipe: DiffusionPipeline, cache: dict[Any, Any]) -> Iterator[None]:
    """The encoding methods computed once per set of arguments and kept in `cache`, detached.

    A method that takes a generator is left alone: it draws, and what is drawn after it must stay the same.
    """
    with ExitStack() as stack:
        for number, pipeline in enumerate(seam.pipelines(pipe)):
            for name in METHODS:
                method = getattr(pipeline, name, None)
                if method is not None and "generator" not in inspect.signature(method).parameters:
                    stack.enter_context(seam.attribute(pipeline, name, _memo(method, cache, (number, name))))
        yield


def _memo(encode: Callable[..., Any], cache: dict[Any, Any], owner: tuple[int, str]) -> Callable[..., Any]:
    @functools.wraps(encode)
    def remembered(*args: Any, **kwargs: Any) -> Any:
        kept: list[Any] = []  # what is known by its identity must live as long as the cache does
        key = (owner, _fingerprint(args, kept), _fingerprint(kwargs, kept))
        if key not in cache:
            with torch.no_grad():
                cache[key] = encode(*args, **kwargs), kept
        return pytree.tree_map(lambda leaf: leaf, cache[key][0])  # new containers: a pipeline may append to a list

    return remembered


def _fingerprint(value: Any, kept: list[Any]) -> Any:
    """A hashable stand-in for an argument: its content where it is data, its identity otherwise."""
    if isinstance(value, (list, tuple)):
        return tuple(_fingerprint(item, kept) for item in value)
    if isinstance(value, dict):
        return tuple((name, _fingerprint(item, kept)) for name, item in sorted(value.items()))
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() if value.numel() else np.empty(0)
        return (str(value.dtype), str(value.device), tuple(value.shape), _digest(raw.tobytes()))
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, _digest(value.tobytes()))
    if isinstance(value, Image.Image):
        return (value.mode, value.size, _digest(value.tobytes()))
    if isinstance(value, (str, int, float, bool, torch.device, torch.dtype, type(None))):
        return value
    kept.append(value)
    return id(value)


def _digest(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=16).digest()
