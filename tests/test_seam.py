"""The seam: nothing of a pipeline stays changed, and loops of an unusual kind are driven as well."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import tiny
import tiny_more
import tiny_parts as parts
from tiller.kernels import ODE
from tiller.policy import Policy, seam
from tiller.policy.carried import moment, since

CALL: dict[str, Any] = {"num_inference_steps": 3, "height": 16, "width": 16, "output_type": "latent"}


def attributes(pipe: Any) -> dict[str, Any]:
    """What must be the same before and after: classes, methods set on instances, schedulers."""
    objects = {"pipe": pipe, **seam.schedulers(pipe), **seam.parts(pipe, nn.Module)}
    return {name: (id(type(item)), id(vars(item).get("forward")), id(item)) for name, item in objects.items()}


@pytest.mark.parametrize("fails", [False, True])
def test_the_pipeline_is_as_it_was(fails: bool) -> None:
    pipe = tiny.tiny_sd(scheduler=tiny.scheduler("HeunDiscreteScheduler"))
    policy = Policy(pipe, lora_rank=2)
    before = attributes(pipe)
    rollout = policy.sample("cat", **CALL)

    def on_step(step: Any) -> None:
        if fails:
            raise RuntimeError("stop")

    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            policy.replay(rollout, on_step)
    else:
        policy.replay(rollout, on_step)
    assert attributes(pipe) == before
    assert "encode_prompt" not in vars(pipe)


def test_every_scheduler_of_nested_pipelines_is_found_once() -> None:
    found = seam.schedulers(tiny_more.tiny_kandinsky())
    assert len(found) == 2
    assert len({id(scheduler) for scheduler in found.values()}) == 2


def test_the_first_stages_denoiser_is_not_run_for_the_second_stages_step() -> None:
    policy = Policy(tiny_more.tiny_kandinsky(), lora_rank=2)
    rollout = policy.sample("cat", prior_num_inference_steps=3, **{**CALL, "height": 32, "width": 32})
    ran: list[str] = []
    for name, module in policy.denoisers.items():
        module.time_embedding.register_forward_hook(lambda *_, name=name: ran.append(name))
    policy.replay(rollout, lambda step: None, [rollout.steps[-1]])
    assert set(ran) == {"unet"}


class Peeking(diffusers.DiffusionPipeline):
    """A loop that asks its scheduler for x̂0 first, turns its index back, and steps then (Cosmos)."""

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = 3, generator: Any = None) -> Any:
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(1, 4, 8, 8, generator=generator) * self.scheduler.init_noise_sigma
        text = torch.ones(1, 4, 16)
        for t in self.scheduler.timesteps:
            scaled = self.scheduler.scale_model_input(latents, t)
            output = self.unet(scaled, t, encoder_hidden_states=text).sample
            denoised = self.scheduler.step(output, t, latents, return_dict=False)[1]
            self.scheduler._step_index -= 1
            latents = self.scheduler.step(denoised, t, latents, return_dict=False, pred_original_sample=denoised)[0]
        return (latents,)


def test_a_scheduler_may_be_asked_for_x0_before_the_step() -> None:
    scheduler = diffusers.EDMEulerScheduler(sigma_max=80.0, prediction_type="epsilon")
    policy = Policy(Peeking(parts.unet(), scheduler), lora_rank=None)
    stock = policy.stock(seed=2)
    assert torch.equal(policy.sample(seed=2, kernel=ODE()).images, stock)
    rollout = policy.sample(seed=2)
    assert len(rollout.records) == 3
    gaps, gradients = [], []

    def on_step(step: Any) -> None:
        gaps.append(float((step.log_prob - step.old_log_prob).abs()))
        step.backward(step.log_prob.sum())
        gradients.append(float(policy.denoisers["unet"].conv_in.weight.grad.abs().sum()))

    policy.replay(rollout, on_step)
    assert gaps == [0.0] * len(rollout.steps)
    assert gradients[0] > 0


class Remembering(nn.Module):
    """A denoiser that hands its first step's keys to the later ones."""

    def __init__(self, unet: Any):
        super().__init__()
        self.unet, self.calls = unet, 0

    def forward(self, sample: Tensor, t: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.calls += 1
        output = self.unet(sample, t, encoder_hidden_states=torch.ones(1, 4, 16)).sample
        cache = output.mean() if cache is None else cache
        return output + cache, cache


class Caching(diffusers.DiffusionPipeline):
    """A loop with a cache from its first step (FLUX.2 klein with cached keys and values)."""

    def __init__(self, scheduler: Any):
        super().__init__()
        self.register_modules(scheduler=scheduler)
        self.transformer = Remembering(parts.unet())

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = 3, generator: Any = None) -> Any:
        self.scheduler.set_timesteps(num_inference_steps)
        latents, cache = torch.randn(1, 4, 8, 8, generator=generator), None
        for t in self.scheduler.timesteps:
            output, cache = self.transformer(latents, t, cache=cache)
            latents = self.scheduler.step(output, t, latents).prev_sample
        return (latents,)


@pytest.mark.parametrize("steps", [None, [1], [0, 1]])
def test_a_denoiser_that_carries_a_cache_runs_at_every_step(steps: list[int] | None) -> None:
    pipe = Caching(tiny.ddim())
    policy = Policy(pipe, lora_rank=None)
    rollout = policy.sample(seed=1)
    pipe.transformer.calls = 0

    def on_step(step: Any) -> None:
        assert torch.equal(step.log_prob.detach(), step.old_log_prob)
        step.backward(step.log_prob.sum())

    policy.replay(rollout, on_step, steps)
    assert pipe.transformer.calls == (max(steps) if steps else rollout.steps[-1]) + 1


def test_a_graph_older_than_the_step_is_cut() -> None:
    weight = torch.ones(2, requires_grad=True)
    old = weight * 2
    start = moment()
    assert not since(old, start).requires_grad
    assert not since(torch.cat([old, weight * 3]), start).requires_grad
    assert since(weight * 3, start).requires_grad
