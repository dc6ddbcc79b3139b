"""The policy's own promises: batches, encodings, files, adapters, precision, graphs, predictions along a path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import tiny
import tiny_video
from tiller.kernels import CPS, DDIM, DDPM, ODE, DanceSDE, FlowSDE, Kernel, Stock
from tiller.policy import Policy
from tiller.types import PipelineError

CALL: dict[str, Any] = {"num_inference_steps": 3, "height": 16, "width": 16, "output_type": "np"}


def moved(policy: Policy, size: float = 0.3) -> Policy:
    """The same policy after a step of training, so to speak."""
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters.values()):
            source = torch.Generator().manual_seed(number)
            parameter += size * torch.randn(parameter.shape, generator=source)
    return policy


@pytest.mark.parametrize("build", [tiny.tiny_sd, tiny.tiny_flow])
def test_a_picture_does_not_depend_on_its_batch(build: Any) -> None:
    policy = Policy(build())
    three = policy.sample(["cat", "dog", "cat"], seed=3, **CALL)
    assert three.samples == (0, 0, 1)
    for row, (prompt, sample) in enumerate(zip(three.prompts, three.samples, strict=True)):
        alone = policy.sample([str(prompt)], seed=3, samples=[sample], **CALL)
        assert np.abs(alone.images[0] - three.images[row]).max() <= 1e-5
    assert np.abs(three.images[0] - three.images[2]).max() > 1e-3


def test_text_is_encoded_once_for_all_replays() -> None:
    pipe = tiny.tiny_sd()
    policy, calls = Policy(pipe), []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    rollout = policy.sample(["cat"], **CALL)
    encoded = len(calls)
    for _ in range(3):
        policy.replay(rollout, lambda step: None)
    assert len(calls) == encoded
    assert encoded == 2  # the prompt, and the empty one of guidance
    policy.sample(["dog"], **CALL)
    assert len(calls) == 2 * encoded


def test_a_saved_lora_is_loaded_by_plain_diffusers(tmp_path: Path) -> None:
    policy = moved(Policy(tiny.tiny_sd(), lora_rank=2))
    policy.save(tmp_path)
    plain = tiny.tiny_sd()
    base = plain("cat", generator=torch.Generator().manual_seed(0), **CALL).images
    plain.load_lora_weights(tmp_path)
    tuned = plain("cat", generator=torch.Generator().manual_seed(0), **CALL).images
    ours = policy.sample("cat", kernel=ODE(), generator=torch.Generator().manual_seed(0), **CALL).images
    assert np.abs(tuned - ours).max() <= 1e-5
    assert np.abs(tuned - base).max() > 1e-3


def test_a_saved_model_is_loaded_by_plain_diffusers(tmp_path: Path) -> None:
    policy = moved(Policy(tiny.tiny_sd(), lora_rank=None), 0.02)
    policy.save(tmp_path)
    plain = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    plain.set_progress_bar_config(disable=True)
    tuned = plain("cat", generator=torch.Generator().manual_seed(0), **CALL).images
    ours = policy.sample("cat", kernel=ODE(), generator=torch.Generator().manual_seed(0), **CALL).images
    assert np.array_equal(tuned, ours)


def test_without_its_adapters_the_policy_is_the_base_model() -> None:
    base = Policy(tiny.tiny_sd(), lora_rank=None).sample("cat", seed=1, **CALL)
    policy = moved(Policy(tiny.tiny_sd(), lora_rank=2))
    tuned = policy.sample("cat", seed=1, **CALL)
    with policy.base():
        assert np.array_equal(policy.sample("cat", seed=1, **CALL).images, base.images)
    assert np.array_equal(policy.sample("cat", seed=1, **CALL).images, tuned.images)
    assert np.abs(tuned.images - base.images).max() > 1e-3


SD_KERNELS = [None, DDIM(), DDIM(0.3), DDPM(), DDPM("fixed_large"), CPS(), FlowSDE(), DanceSDE(), Stock()]
FLOW_KERNELS = [None, FlowSDE(), DanceSDE(), CPS(), DDIM()]
CASES = [(tiny.tiny_sd, k) for k in SD_KERNELS] + [(tiny.tiny_flow, k) for k in FLOW_KERNELS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("build", "kernel"), CASES)
def test_the_first_ratio_is_exactly_one(build: Any, kernel: Kernel | None, dtype: torch.dtype) -> None:
    scheduler = tiny.scheduler("DDPMScheduler", clip_sample=False) if kernel == Stock() else None
    policy = Policy(build(scheduler=scheduler).to(dtype), lora_rank=2)
    rollout = policy.sample(["cat", "dog"], kernel=kernel, **{**CALL, "output_type": "latent"})
    assert rollout.latents[1].dtype == dtype  # as it is stored, so it is scored
    ratios = []
    policy.replay(rollout, lambda step: ratios.append((step.log_prob - step.old_log_prob).exp().detach()))
    assert ratios
    assert all(torch.equal(ratio, torch.ones(2)) for ratio in ratios)


@pytest.mark.parametrize("build", [tiny.tiny_sd, tiny.tiny_flow])
def test_autocast_replays_what_it_recorded(build: Any) -> None:
    policy = Policy(build(), lora_rank=2, mixed_precision="bf16")
    rollout = policy.sample("cat", **CALL)
    assert rollout.latents[1].dtype == torch.float32
    policy.replay(rollout, lambda step: torch.testing.assert_close(step.log_prob, step.old_log_prob, atol=0, rtol=0))


def test_one_graph_is_alive_at_a_time() -> None:
    policy = Policy(tiny.tiny_sd(), lora_rank=None)
    alive, most = 0, []

    class Saved:
        def __init__(self, tensor: torch.Tensor):
            nonlocal alive
            self.tensor, alive = tensor, alive + 1

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def on_step(step: Any) -> None:
        loss = step.log_prob.mean()
        most.append(alive)
        step.backward(loss)

    for steps in (2, 6):
        rollout = policy.sample("cat", **{**CALL, "num_inference_steps": steps})
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            policy.replay(rollout, on_step)
    assert len(set(most)) == 1  # at every step of every replay the same number of tensors waits for backward
    assert most[0] > 50


def test_gradients_of_steps_add_up() -> None:
    policy = Policy(tiny.tiny_sd(), lora_rank=2)
    rollout = policy.sample("cat", **CALL)

    def gradient(steps: list[int]) -> torch.Tensor:
        policy.replay(rollout, lambda step: step.backward(step.log_prob.mean()), steps)
        parameters = policy.parameters.values()
        found = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters])
        for parameter in parameters:
            parameter.grad = None
        return found

    one_by_one = sum(gradient([step]) for step in rollout.steps)
    torch.testing.assert_close(gradient(rollout.steps), one_by_one, rtol=1e-5, atol=1e-7)


def test_steps_on_one_denoiser_call_share_its_graph() -> None:
    policy = Policy(tiny_video.tiny_skyreels(), lora_rank=None)
    embeddings = {"prompt_embeds": torch.ones(1, 16, 32), "negative_prompt_embeds": torch.zeros(1, 16, 32)}
    call = {**CALL, "num_inference_steps": 2, "num_frames": 5, "output_type": "latent", **embeddings}
    rollout = policy.sample(None, **call)
    shared = []
    policy.replay(rollout, lambda step: (shared.append(step.shared), step.backward(step.log_prob.mean())))
    assert shared == [True, False, True, False]  # two frames at each of two denoiser calls


def test_under_no_grad_there_is_no_graph() -> None:
    policy = Policy(tiny.tiny_sd(), lora_rank=2)
    rollout = policy.sample("cat", **CALL)
    with torch.no_grad():
        policy.replay(rollout, lambda step: torch.testing.assert_close(step.log_prob, step.old_log_prob))
        policy.replay(rollout, lambda step: pytest.fail("a graph") if step.prediction.requires_grad else None)


def test_a_prediction_along_a_path_is_the_denoiser_at_that_state() -> None:
    pipe = tiny.tiny_sd()
    policy = Policy(pipe, lora_rank=2)
    rollout = policy.sample(["cat"], guidance_scale=1.0, **CALL)
    state = torch.randn(rollout.latents[1].shape, generator=torch.Generator().manual_seed(9))
    seen = {}
    policy.predict(rollout, lambda step: seen.update({step.index: step.prediction}), lambda index: state, [1])
    text, _ = pipe.encode_prompt("cat", "cpu", 1, False)
    direct = pipe.unet(state, int(rollout.timesteps[1]), encoder_hidden_states=text).sample
    torch.testing.assert_close(seen[1], direct, rtol=0, atol=0)
    assert seen[1].requires_grad


def test_a_generator_of_the_callers_own_gives_the_pipelines_own_picture() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)  # draws from the global generator
    pipe = tiny.tiny_flow(scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(4)
    stock = pipe("cat", generator=torch.Generator().manual_seed(0), **CALL).images
    torch.manual_seed(4)
    ours = Policy(pipe).sample("cat", kernel=ODE(), generator=torch.Generator().manual_seed(0), **CALL).images
    assert np.array_equal(stock, ours)


def test_steps_outside_the_rollout_are_an_error() -> None:
    policy = Policy(tiny.tiny_sd())
    rollout = policy.sample("cat", **CALL)
    with pytest.raises(ValueError, match=r"\[3\] are outside"):
        policy.replay(rollout, lambda step: None, [3])


def test_what_cannot_be_driven_is_refused_by_name() -> None:
    pipe = tiny.tiny_sd()
    pipe.scheduler = diffusers.AmusedScheduler(mask_token_id=0)
    with pytest.raises(PipelineError, match="AmusedScheduler"):
        Policy(pipe)
    pipe.scheduler = None
    with pytest.raises(PipelineError, match="has no scheduler"):
        Policy(pipe)
    pipe = tiny.tiny_sd()
    pipe.unet = None
    with pytest.raises(PipelineError, match="has no denoiser"):
        Policy(pipe)


def test_target_modules_that_are_not_there_are_refused_with_some_that_are() -> None:
    with pytest.raises(PipelineError, match="to_q"):
        Policy(tiny.tiny_sd(), target_modules=["nothing"])
