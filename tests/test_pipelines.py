"""Every kind of pipeline, by one mechanism: record, replay with gradients, and noise 0 is the pipeline itself.

In float32 on one machine a replay does the same arithmetic as its recording, so log-probabilities must agree exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tiny
import tiny_more
import tiny_rare
import tiny_video
from tiller.kernels import CPS, DDIM, ODE, FlowSDE
from tiller.policy import Policy, seam

Call = dict[str, Any]
TEXT: Call = {"prompt": "a cat", "num_inference_steps": 3, "height": 16, "width": 16, "output_type": "pt"}
LARGE: Call = {**TEXT, "height": 32, "width": 32}
VIDEO: Call = {**TEXT, "num_frames": 5, "max_sequence_length": 16}
EMBEDDED: Call = {
    "prompt": None,
    "prompt_embeds": torch.ones(1, 16, 32),
    "negative_prompt_embeds": torch.zeros(1, 16, 32),
}
PICTURE = tiny.picture()
MASK = (PICTURE[:, :1] > 0.5).float()

PIPELINES: dict[str, tuple[Callable[[], Any], Call]] = {
    "sd": (tiny.tiny_sd, TEXT),
    "sd_2": (lambda: tiny.tiny_sd("v_prediction"), TEXT),
    "sd_euler": (lambda: tiny.tiny_sd(scheduler=tiny.scheduler("EulerDiscreteScheduler")), TEXT),
    "sd_euler_a": (lambda: tiny.tiny_sd(scheduler=tiny.scheduler("EulerAncestralDiscreteScheduler")), TEXT),
    "sd_karras": (
        lambda: tiny.tiny_sd(scheduler=tiny.scheduler("DPMSolverMultistepScheduler", use_karras_sigmas=True)),
        TEXT,
    ),
    "sd_sde": (
        lambda: tiny.tiny_sd(scheduler=tiny.scheduler("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")),
        {**TEXT, "num_inference_steps": 4},
    ),
    "sd_unipc": (lambda: tiny.tiny_sd(scheduler=tiny.scheduler("UniPCMultistepScheduler")), TEXT),
    "sd_pndm": (lambda: tiny.tiny_sd(scheduler=tiny.scheduler("PNDMScheduler", skip_prk_steps=True)), TEXT),
    "sd_heun": (lambda: tiny.tiny_sd(scheduler=tiny.scheduler("HeunDiscreteScheduler")), TEXT),
    "sd_ddpm": (lambda: tiny.tiny_sd(scheduler=tiny.scheduler("DDPMScheduler", clip_sample=False)), TEXT),
    "sd_thresholding": (lambda: tiny.tiny_sd(scheduler=tiny.scheduler("DDIMScheduler", thresholding=True)), TEXT),
    "img2img": (tiny.tiny_sd_img2img, {"prompt": "a cat", "image": PICTURE, "num_inference_steps": 4, "strength": 0.6}),
    "inpaint": (tiny.tiny_sd_inpaint, {**TEXT, "image": PICTURE, "mask_image": MASK}),
    "controlnet": (tiny.tiny_sd_controlnet, {**TEXT, "image": PICTURE}),
    "sdxl": (tiny.tiny_sdxl, TEXT),
    "lcm": (tiny.tiny_lcm, TEXT),
    "sd3": (tiny.tiny_sd3, TEXT),
    "flux": (tiny.tiny_flux, TEXT),
    "pixart": (tiny.tiny_pixart, {**TEXT, "use_resolution_binning": False}),
    "sana": (
        tiny_more.tiny_sana,
        {**LARGE, "use_resolution_binning": False, "max_sequence_length": 16, "complex_human_instruction": None},
    ),
    "qwen_image": (tiny_more.tiny_qwen_image, {**LARGE, "negative_prompt": "dog", "true_cfg_scale": 2.0}),
    "z_image": (tiny_more.tiny_z_image, {**LARGE, "guidance_scale": 3.0, "max_sequence_length": 16}),
    "wan": (tiny_video.tiny_wan, VIDEO),
    "wan_two": (tiny_video.tiny_wan_two, {**VIDEO, "num_inference_steps": 4}),
    "skyreels": (tiny_video.tiny_skyreels, {**VIDEO, "num_inference_steps": 2, **EMBEDDED}),
    "ltx": (tiny_video.tiny_ltx, {**VIDEO, "height": 32, "width": 32, "num_frames": 9}),
    "animatediff": (tiny_video.tiny_animatediff, {**TEXT, "num_frames": 2}),
    "stable_audio": (tiny_more.tiny_stable_audio, {"prompt": "a hammer", "num_inference_steps": 3}),
    "kandinsky": (
        tiny_more.tiny_kandinsky,
        {**LARGE, "prior_num_inference_steps": 3},
    ),
    "sag": (tiny_rare.tiny_sag, TEXT),
    "safe": (tiny_rare.tiny_safe, {**TEXT, "sld_warmup_steps": 1}),
    "cycle": (
        tiny_rare.tiny_cycle,
        {"prompt": "a cat", "source_prompt": "a dog", "image": PICTURE, "eta": 0.5, "num_inference_steps": 4},
    ),
    "video_zero": (
        tiny_rare.tiny_video_zero,
        {**TEXT, "num_inference_steps": 4, "video_length": 2, "t0": 1, "t1": 2, "output_type": "np"},
    ),
    "bria": (tiny_rare.tiny_bria, {**TEXT, "max_sequence_length": 16}),
    "if_enlarging": (
        tiny_rare.tiny_if_super_resolution,
        {
            "prompt": "a cat",
            "image": PICTURE,
            "original_image": PICTURE,
            "mask_image": MASK,
            "num_inference_steps": 3,
            "strength": 1.0,
            "output_type": "pt",
        },
    ),
}


def arrays(images: Any) -> list[np.ndarray]:
    """The numbers in whatever a pipeline returns first."""
    if isinstance(images, torch.Tensor):
        return [images.float().numpy()]
    if isinstance(images, (list, tuple)):
        return [array for image in images for array in arrays(image)]
    return [np.asarray(images, dtype=float)]


def counted(stack: ExitStack, modules: dict[str, nn.Module]) -> dict[str, int]:
    """How often each module really ran, from here to the end of the block."""
    calls = dict.fromkeys(modules, 0)

    def hook(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            calls[name] += 1

        return note

    for name, module in modules.items():
        first_layer = next(
            layer for layer in module.modules() if not list(layer.children()) and list(layer.parameters())
        )
        stack.callback(first_layer.register_forward_hook(hook(name)).remove)
    return calls


@pytest.fixture(params=PIPELINES)
def case(request: pytest.FixtureRequest) -> tuple[Any, Call]:
    build, call = PIPELINES[request.param]
    return build(), call


def test_replay_is_exact_and_noise_zero_is_the_pipeline_itself(case: tuple[Any, Call]) -> None:
    pipe, call = case
    policy = Policy(pipe, lora_rank=None)
    stock = arrays(policy.stock(seed=5, **call))
    for kernel in (ODE(), DDIM(eta=0.0), FlowSDE(0.0), CPS(0.0)):
        same = arrays(policy.sample(seed=5, kernel=kernel, **call).images)
        assert all(np.array_equal(a, b) for a, b in zip(same, stock, strict=True)), kernel
    rollout = policy.sample(seed=5, **call)
    assert rollout.steps
    seen = []

    def on_step(step: Any) -> None:
        seen.append(step.index)
        assert torch.equal(step.log_prob.detach(), step.old_log_prob)
        step.backward(step.log_prob.sum())

    policy.replay(rollout, on_step)
    assert seen == rollout.steps
    for part, module in policy.denoisers.items():
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        assert any(bool(g.abs().sum() > 0) for g in grads), f"no gradient in {part}"
    for name, module in seam.parts(pipe, nn.Module).items():
        if name not in policy.denoisers:
            assert all(p.grad is None and not p.requires_grad for p in module.parameters()), name


def test_steps_that_are_not_wanted_run_no_denoiser_and_decode_nothing(case: tuple[Any, Call]) -> None:
    pipe, call = case
    policy = Policy(pipe, lora_rank=2)
    rollout = policy.sample(seed=1, **call)
    wanted = rollout.steps[-1]
    everything = {name: module for name, module in seam.parts(pipe, nn.Module).items() if list(module.parameters())}
    with ExitStack() as stack:
        calls = counted(stack, everything)
        scores: list[torch.Tensor] = []
        policy.replay(rollout, lambda step: scores.append(step.log_prob.detach()), [wanted])
    assert torch.equal(scores[0], rollout.records[wanted].log_prob)
    source = max(index for index, _, _ in rollout.forwards if index <= wanted)
    needed = [name for index, name, kept in rollout.forwards if index == source or (kept is None and index < source)]
    expected = {name: needed.count(name) for name in policy.denoisers}
    assert {name: calls[name] for name in policy.denoisers} == expected
    assert sum(expected.values()) >= 1
    decoders = [name for name, module in everything.items() if hasattr(module, "decode")]
    given = any(name in call for name in ("image", "mask_image"))
    assert decoders or not hasattr(pipe, "vae")
    assert given or not any(calls[name] for name in decoders)
