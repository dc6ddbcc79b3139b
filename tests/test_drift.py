"""KL to the base model and diversity, against numbers worked out by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from tiller import Policy
from tiller.evaluation import drift
from tiller.evaluation.drift import diversity, kl_to_base
from tiller.types import Prompt
from toy import toy

PROMPTS = [Prompt("a cat"), Prompt("a dog")]
CALL = {"num_inference_steps": 4}


def test_an_untrained_policy_has_not_moved() -> None:
    found = drift(Policy(toy(), lora_rank=2, target_modules=["first", "second"]), PROMPTS, 2, 0, CALL)
    assert found["kl_to_base"] == 0
    assert found["diversity_base"] == found["diversity_tuned"] > 0


def test_kl_is_the_expected_difference_of_log_probabilities() -> None:
    """KL = E[log p_θ(path) - log p_base(path)]: by sampling, summed over elements, within 4 standard errors."""
    policy = Policy(toy(), lora_rank=2, target_modules=["first", "second"])
    with torch.no_grad():
        for name, parameter in policy.parameters.items():
            parameter += 0.1 if "lora_B" in name else 0.0
    rollout = policy.sample(["a cat"] * 256, seed=5, **CALL)
    base: dict[int, torch.Tensor] = {}
    with torch.no_grad(), policy.base():
        policy.replay(rollout, lambda step: base.update({step.index: step.log_prob}))
    elements = rollout.latents[0][0].numel()
    gaps = elements * sum(rollout.log_probs[:, index] - base[index] for index in rollout.steps)
    closed = kl_to_base(policy, [Prompt("a cat")], 256, 5, CALL)
    assert closed > 0.1
    assert abs(gaps.mean() - closed) < 4 * gaps.std() / 16


def test_diversity_of_flat_pictures() -> None:
    """Grey 0, 51 and 255 of one prompt: pairs differ by .2, 1 and .8; a prompt of equal pictures by 0."""
    flat = [Image.fromarray(np.full((64, 64, 3), value, np.uint8)) for value in (0, 51, 255, 9, 9, 9)]
    assert diversity(flat, 3) == pytest.approx((0.2 + 1.0 + 0.8) / 6)
    assert np.isnan(diversity(flat, 1))
