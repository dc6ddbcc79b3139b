"""Weights in bfloat16 under a float32 LoRA, checkpointing, one graph at a time: what a small GPU trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from tiller import DDPO, Policy, Rollout, Step, TrainConfig, TrainState, train

PIPELINES = {"sd": tiny.tiny_sd, "sdxl": tiny.tiny_sdxl, "sd3": tiny.tiny_sd3, "flux": tiny.tiny_flux}
PROMPTS = ["a cat", "a dog"]


def halved(build: Callable[[], Any], precision: Any) -> Policy:
    return Policy(build().to(torch.bfloat16), lora_rank=4, mixed_precision=precision)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", PIPELINES)
def test_bf16_weights_replay_to_the_recorded_density_and_train_a_float32_lora(name: str, precision: str) -> None:
    policy = halved(PIPELINES[name], precision)
    rollout = policy.sample(PROMPTS, **tiny.PROMPT)
    errors = []

    def on_step(step: Step) -> None:
        errors.append(float((step.log_prob.detach() - step.old_log_prob).abs().max()))
        step.backward(step.log_prob.sum())

    policy.replay(rollout, on_step)
    assert len(errors) == len(rollout.steps) > 0
    assert max(errors) <= 1e-4
    assert all(p.dtype == torch.float32 for p in policy.parameters.values())
    gradients = [p.grad for p in policy.parameters.values() if p.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert any(bool(gradient.any()) for gradient in gradients)


def test_latents_are_rounded_to_bf16_before_they_are_scored() -> None:
    """The density of the stored latents by hand: mean over elements of -(a - μ)²/2σ² - log σ - log √2π."""
    policy = halved(tiny.tiny_sd, "no")
    rollout = policy.sample(PROMPTS, **tiny.PROMPT)
    assert all(record.action.dtype == torch.bfloat16 for record in rollout.records)

    def on_step(step: Step) -> None:
        std = float(step.std)
        action = rollout.records[step.index].action.double()
        elements = -(((action - step.mean.double()) / std) ** 2) / 2 - math.log(std) - math.log(2 * math.pi) / 2
        torch.testing.assert_close(step.old_log_prob.double(), elements.mean(dim=(1, 2, 3)).detach(), atol=1e-4, rtol=0)

    policy.replay(rollout, on_step)


def test_a_training_run_in_bf16_moves_the_lora_and_keeps_the_weights() -> None:
    policy = halved(tiny.tiny_sd, "bf16")
    frozen = {n: p.detach().clone() for n, p in policy.pipe.unet.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    config = TrainConfig(epochs=2, samples_per_epoch=4, batch_size=2, group_size=2)
    scores = iter(range(100))
    reports = list(
        train(
            policy,
            PROMPTS,
            lambda images, prompts, metadata: [float(next(scores)) for _ in images],
            DDPO(),
            config,
            sampling=tiny.PROMPT,
            state=TrainState(policy, config),
        )
    )
    assert [report.metrics["optim/updates"] for report in reports] == [1, 2]
    assert any(not torch.equal(p, before[name]) for name, p in policy.parameters.items())
    assert all(torch.equal(p, frozen[n]) for n, p in policy.pipe.unet.named_parameters() if n in frozen)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradient_checkpointing_changes_no_gradient(precision: Any) -> None:
    gradients = []
    for checkpointed in (False, True):
        policy = Policy(tiny.tiny_sd(), lora_rank=4, mixed_precision=precision)
        if checkpointed:
            policy.pipe.unet.enable_gradient_checkpointing()
        policy.replay(policy.sample(PROMPTS, **tiny.PROMPT), lambda step: step.backward(step.log_prob.sum()))
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters.values() if p.grad is not None]))
    assert bool(gradients[0].any())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_the_graph_of_one_step_only_is_held() -> None:
    """Bytes saved for backward passes, at most: after 6 steps as after 1; kept to the end, 6 times as many."""
    policy = Policy(tiny.tiny_sd(), lora_rank=4)
    held: dict[tuple[int, bool], int] = {}
    for steps in (1, 6):
        rollout = policy.sample(PROMPTS, **{**tiny.PROMPT, "num_inference_steps": steps})
        held[steps, True] = bytes_held(policy, rollout, lambda step: step.backward(step.log_prob.sum()))
        kept: list[torch.Tensor] = []
        held[steps, False] = bytes_held(policy, rollout, lambda step, kept=kept: kept.append(step.log_prob))
    assert held[6, True] == held[1, True]
    assert held[6, False] == 6 * held[1, False]


def bytes_held(policy: Policy, rollout: Rollout, on_step: Callable[[Step], None]) -> int:
    """Bytes of the tensors that autograd holds at most during a replay; a tensor held twice counts twice."""
    now, most = 0, 0

    class Held:
        def __init__(self, tensor: torch.Tensor):
            nonlocal now, most
            self.tensor = tensor
            now += tensor.nbytes
            most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            now -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        policy.replay(rollout, on_step)
    return most
