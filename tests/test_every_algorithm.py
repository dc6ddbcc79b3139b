"""Every algorithm that a recipe may name raises the reward, on an epsilon model and on a flow model."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tiller import Policy, TrainConfig, config, train
from tiller.recipe import ALGORITHMS
from toy import brightness, flow_toy, glow, toy

SETTINGS: dict[str, dict[str, Any]] = {  # what suits a denoiser of 600 weights and four steps; else the defaults
    "ddpo": {"clip_range": 1e-2, "min_count": 8},
    "ddpo_sf": {"min_count": 8},
    "rwr": {"beta": 2.0, "standardise": True, "inner_epochs": 2},
    "rwr_sparse": {"share": 0.25, "inner_epochs": 2},
    "sft": {"inner_epochs": 2},
    "flow_grpo": {"clip_range": 1e-2, "kl_coefficient": 0.01},
    "flow_grpo_fast": {"clip_range": 1e-2, "window_last": 1},
    "dance_grpo": {"clip_range": 1e-2},
    "mix_grpo": {"clip_range": 1e-2, "window_size": 2, "window_every": 2, "inner_epochs": 2},
    "refl": {"target": 300.0, "coefficient": 1.0},  # above any brightness
    "adjoint_matching": {"reward_weight": 0.1},  # brightness goes to 255
    "dpok": {"clip_range": 1e-2, "inner_epochs": 2, "timestep_fraction": 1.0},
    "ppo": {"clip_range": 1e-2},
    "lee": {"data_weight": 0.0, "inner_epochs": 4},  # own pictures only
    "awm": {"first_timestep": 0, "timestep_fraction": 1.0},  # of four steps, the first counts most
}
RUN = TrainConfig(epochs=20, samples_per_epoch=32, group_size=16, batch_size=32, learning_rate=0.02)


@pytest.mark.parametrize("make", [toy, flow_toy], ids=["epsilon", "flow"])
@pytest.mark.parametrize("name", ALGORITHMS.options)
def test_the_reward_rises(name: str, make: Callable[[], Any]) -> None:
    """On noise that was never trained on, by more than three standard errors of the paired difference."""
    algorithm = config.build(ALGORITHMS.pick(name, **SETTINGS.get(name, {})))
    reward = glow if algorithm.differentiates else brightness
    policy = Policy(make(), lora_rank=None)

    def scores() -> np.ndarray:
        return np.array(brightness(policy.sample(["a cat"] * 64, seed=9, num_inference_steps=4).images, [], []))

    before = scores()
    for _ in train(policy, ["a cat", "a dog"], reward, algorithm, RUN, sampling={"num_inference_steps": 4}):
        pass
    gain = scores() - before
    assert gain.mean() > 3 * gain.std() / 8 > 0
