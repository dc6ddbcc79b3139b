"""Data beside a reward, or in its place: captioned pictures, and preference pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tiller.algorithms.base import Algorithm
from tiller.pairs import Pairs, open_pairs
from tiller.policy import Policy, Rollout, Step
from tiller.policy.forward import ForwardProcess
from tiller.policy.frame import encode, framed
from tiller.policy.noise import key
from tiller.pretrain.data import Source, open_source
from tiller.types import ConfigError, PipelineError, Prompt

if TYPE_CHECKING:
    from tiller.reward_spec import RewardSetting
    from tiller.rewards import Reward

Data = str | Path | Source | Pairs
"""A folder of captioned pictures, "emoji" for drawn scenes, a file of pairs; or what these are opened as."""


def check_data(algorithm: Algorithm, reward: Reward | RewardSetting | None, data: Data | None) -> None:
    """Refuse what cannot go together, before anything is opened.

    Raises:
        ConfigError: the algorithm needs data that is not there, has no use for it, or would have no reward.
    """
    name = type(algorithm).__name__
    if data is None and algorithm.data_weight:
        raise ConfigError(
            f"data_weight is {algorithm.data_weight}, and there is no data; name a folder of captioned pictures in "
            "data, or set algorithm.data_weight to 0."
        )
    if data is not None and not algorithm.data_weight and not algorithm.takes_pairs:
        raise ConfigError(
            f"{name} has no use for data; leave data out, or set the data_weight of an algorithm that has one (ppo, "
            "lee)."
        )
    offline = data is not None and algorithm.takes_pairs
    if offline and reward is not None:
        raise ConfigError(
            "data holds preference pairs, which take the place of the reward; set reward to null (evaluation.rewards "
            "are scored all the same), or leave data out."
        )
    if reward is None and not offline:
        raise ConfigError(f"{name} needs a reward; only preference pairs in data, with dpo, do without one.")


def open_data(
    data: Data | None, policy: Policy, algorithm: Algorithm, prompts: Sequence[Prompt], sampling: Mapping[str, Any]
) -> Source | Pairs | None:
    """The data, its pictures cut to the size of those that the pipeline draws; what is open already stays as it is.

    Raises:
        ConfigError: it is not there, or not what it should be.
    """
    if not isinstance(data, (str, Path)):
        return data
    size = _picture_size(policy, prompts[0].text, algorithm, sampling)
    return open_pairs(Path(data), size) if algorithm.takes_pairs else open_source(str(data), size)


def _picture_size(
    policy: Policy, prompt: str, algorithm: Algorithm, sampling: Mapping[str, Any]
) -> int | tuple[int, int]:
    """The edge of the pipeline's pictures, or (width, height): of one that is drawn to see."""
    steps = {"num_inference_steps": 2} if isinstance(sampling.get("num_inference_steps"), int) else {}
    picture = policy.sample(prompt, kernel=algorithm.kernel, **{**sampling, **steps}).images[0]
    if not isinstance(picture, Image.Image):
        raise PipelineError(f"{type(policy.pipe).__name__} draws no pictures, so it cannot learn from any.")
    return picture.width if picture.width == picture.height else picture.size


def data_frame(policy: Policy, data: Source | Pairs, rollout: Rollout, *keys: Any) -> tuple[Rollout, ForwardProcess]:
    """A batch of the data in the frame of a recorded call, and the noise on it: both functions of `keys`."""
    pictures, captions = data.batch(np.random.default_rng(key("data", *keys)), rollout.batch_size)
    clean = encode(policy.pipe, pictures, rollout.latents[-1])
    frame = framed(rollout, clean, captions, range(len(captions)))
    return frame, ForwardProcess(frame, key("noise on data", *keys))


def add_gradient(
    policy: Policy, data: Source, rollout: Rollout, steps: Sequence[int], scale: float, *keys: Any
) -> dict[str, float]:
    """Add `scale` times the gradient of the denoising loss, summed over a batch of data and the steps; its mean."""
    frame, path = data_frame(policy, data, rollout, *keys)
    errors = []

    def on_step(step: Step) -> None:
        distance = step.distance()
        step.backward(distance.sum() * scale)
        errors.append(float(distance.detach().mean()))

    policy.predict(frame, on_step, path, steps)
    return {"data/denoising_error": float(np.mean(errors))}
