"""`tiller serve REWARD`: any reward behind HTTP."""

from __future__ import annotations

import hashlib
import os
import signal
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tiller.rewards import Reward, resolve
from tiller.rewards.contract import reward_name
from tiller.rewards.gradient import as_tensor, differentiable
from tiller.rewards.serving.server import RewardServer, Service, is_loopback
from tiller.types import ConfigError


def run(
    spec: str,
    settings: Mapping[str, Any],
    host: str,
    port: int,
    token: str | None,
    token_env: str | None,
    hosts: Sequence[str] = (),
    calls: int = 1,
    timeout: float = 240.0,
) -> int:
    """Serve until a signal comes."""
    secret = token or (os.environ.get(token_env, "").strip() if token_env else None)
    if token_env and not secret:
        raise ConfigError(f"the environment variable {token_env} is not set; put the token into it.")
    if not is_loopback(host) and not secret:
        raise ConfigError(
            f"{host} can be reached from other machines, so the server needs a token; put one into an environment "
            "variable and name it: --token-env NAME."
        )
    if calls < 1 or timeout <= 0:
        raise ConfigError("--calls must be at least 1, and --timeout more than 0 seconds.")
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    reward = resolve(spec, dict(settings)) if settings else resolve(spec)
    known = tuple(name.lower() for name in hosts)
    service = Service(
        _on_pictures(reward), spec, _version(spec), secret, known, calls, max(8, 2 * calls), timeout, tell=_say
    )
    try:
        server = RewardServer(service, host, port)
    except OSError as error:
        raise ConfigError(f"{host}:{port} cannot be bound ({error.strerror}); choose another --port.") from error
    except ValueError as error:
        raise ConfigError(f"{error}.") from error
    where = f"[{host}]" if ":" in host else host
    _say(f"{reward_name(reward)} at http://{where}:{server.server_port}{' with a token' if secret else ''}")
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # nothing is to be saved, and a reward may hang
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        os._exit(0)
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _on_pictures(reward: Reward) -> Reward:
    """A reward that takes pictures, also where it would rather have a tensor."""
    if not differentiable(reward):
        return reward

    def scored(images: list[Image.Image], prompts: list[str], about: list[Mapping[str, Any]]) -> Any:
        with torch.no_grad():
            return reward(as_tensor(images), prompts, about)

    for flag in ("groupwise", "deterministic"):
        setattr(scored, flag, getattr(reward, flag, False))
    return scored


def _version(spec: str) -> str:
    """The hash of a reward's file, or the version of the package it comes from."""
    place = spec.rpartition(":")[0]
    if place.endswith(".py"):
        return hashlib.sha256(Path(place).read_bytes()).hexdigest()[:12]
    package = place.partition(".")[0] or "tiller"
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return ""
