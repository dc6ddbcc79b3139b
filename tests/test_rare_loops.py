"""Loops that do more than denoise: momentum, guidance by gradients, schedulers exchanged and asked for their type."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import tiny
import tiny_parts as parts
import tiny_rare
from tiller.policy import Policy, seam
from tiller.policy.bridge import Gates
from tiller.policy.carried import cut, moment
from tiller.policy.taint import Taint, mark, marked
from tiller.types import PipelineError


class Guided(diffusers.DiffusionPipeline):
    """A loop that moves its latents by the gradient of a loss of its own, and clears the model's gradients."""

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = 3, generator: Any = None) -> Any:
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        text = torch.ones(1, 4, 16)
        for t in self.scheduler.timesteps:
            with torch.enable_grad():
                moved = latents.detach().clone().requires_grad_(True)
                self.unet(moved, t, encoder_hidden_states=text).sample.square().mean().backward()
                self.unet.zero_grad()
            latents = latents - 0.1 * moved.grad
            output = self.unet(latents, t, encoder_hidden_states=text).sample
            latents = self.scheduler.step(output, t, latents).prev_sample
        return (latents,)


class Momentum(diffusers.DiffusionPipeline):
    """A loop whose prediction is the running sum of its model's outputs."""

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = 3, generator: Any = None) -> Any:
        self.scheduler.set_timesteps(num_inference_steps)
        latents, average = torch.randn(1, 4, 8, 8, generator=generator), torch.zeros(1, 4, 8, 8)
        for t in self.scheduler.timesteps:
            output = self.unet(latents, t, encoder_hidden_states=torch.ones(1, 4, 16)).sample
            average = 0.5 * average + output**2
            latents = self.scheduler.step(average, t, latents).prev_sample
        return (latents,)


def gradients(policy: Policy, rollout: Any, steps: list[int]) -> dict[int, Tensor]:
    """What each step adds to the gradient of the first layer, in one replay of all of them."""
    weight = policy.denoisers["unet"].conv_in.weight
    found = {}

    def on_step(step: Any) -> None:
        weight.grad = None
        assert torch.equal(step.log_prob.detach(), step.old_log_prob)
        step.backward(step.log_prob.sum())
        found[step.index] = weight.grad.clone()

    policy.replay(rollout, on_step, steps)
    return found


def test_the_gradient_of_a_step_is_its_own_under_momentum() -> None:
    policy = Policy(Momentum(parts.unet(), tiny.ddim()), lora_rank=None)
    rollout = policy.sample(seed=1)
    together = gradients(policy, rollout, rollout.steps)
    for step in rollout.steps:
        assert torch.allclose(gradients(policy, rollout, [step])[step], together[step], rtol=1e-5, atol=1e-9)
        assert float(together[step].abs().sum()) > 0


def test_momentum_is_seen_without_gradients_too() -> None:
    policy = Policy(Momentum(parts.unet(), tiny.ddim()), lora_rank=None)
    rollout = policy.sample(seed=1)
    seen = []
    with torch.no_grad():
        policy.replay(rollout, lambda step: seen.append(step.log_prob), [rollout.steps[-1]])
    assert torch.equal(seen[0], rollout.records[rollout.steps[-1]].log_prob)


def test_a_pipelines_own_gradients_are_not_the_trainers() -> None:
    policy = Policy(Guided(parts.unet(), tiny.ddim()), lora_rank=None)
    rollout = policy.sample(seed=1)
    assert all(weight.grad is None for weight in policy.parameters.values())
    policy.replay(rollout, lambda step: None)
    assert all(weight.grad is None for weight in policy.parameters.values())
    assert all(weight.requires_grad for weight in policy.parameters.values())


def test_gradients_of_earlier_steps_outlive_a_pipeline_that_clears_them() -> None:
    policy = Policy(Guided(parts.unet(), tiny.ddim()), lora_rank=None)
    rollout = policy.sample(seed=1)
    weight = policy.denoisers["unet"].conv_in.weight
    apart = gradients(policy, rollout, rollout.steps)
    weight.grad = None
    policy.replay(rollout, lambda step: step.backward(step.log_prob.sum()))
    assert torch.allclose(weight.grad, sum(apart.values()), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("build", [tiny_rare.tiny_video_zero, tiny_rare.tiny_sag])
def test_what_a_pipeline_exchanges_in_itself_is_put_back(build: Any) -> None:
    pipe = build()
    policy = Policy(pipe, lora_rank=2)
    scheduler, processors = pipe.scheduler, dict(pipe.unet.attn_processors)
    call = {"video_length": 2, "t0": 1, "t1": 2} if build is tiny_rare.tiny_video_zero else {}
    rollout = policy.sample("a cat", num_inference_steps=3, height=16, width=16, **call)
    policy.replay(rollout, lambda step: None, rollout.steps[:1])  # left in the middle of the loop
    assert pipe.scheduler is scheduler
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in processors.items())


def test_a_handled_scheduler_is_still_of_its_own_type() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with seam.step_handled(scheduler, lambda call: None):
        assert type(scheduler) == diffusers.FlowMatchEulerDiscreteScheduler  # noqa: E721
        assert diffusers.FlowMatchEulerDiscreteScheduler == type(scheduler)  # noqa: E721
        assert type(scheduler) != diffusers.DDIMScheduler  # noqa: E721
        assert type(scheduler) in {diffusers.FlowMatchEulerDiscreteScheduler}


def test_gates_cut_by_hand() -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    gates = Gates()
    gates.begin(0, moment())
    earlier = gates.through(weight * 2)
    gates.begin(1, moment())
    now = gates.through(weight * 5)
    alone = gates.alone(earlier * now)  # 6 · 15
    assert float(alone) == 90.0
    alone.backward()
    assert float(weight.grad) == 30.0  # d(6 · 5w)/dw; the whole derivative would be 60
    assert not gates.alone(earlier * 2).requires_grad


def test_marks_follow_arithmetic() -> None:
    first, second, other = torch.ones(3), torch.ones(3), torch.zeros(3)
    mark(first, 4)
    mark(second, 2)
    with Taint() as taint:
        both = torch.cat([first, second * 2]).chunk(2)[0]
        other[:1] = first[:1]
        with taint.off():
            unseen = first + 1
    assert marked(both) == 2
    assert marked(other) == 4
    assert marked(unseen) is None
    assert marked(torch.ones(3)) is None


class Deep:
    """A cache in a cache."""

    def __init__(self, tensor: Tensor):
        self.layers = [{"inner": [(Holder(tensor),)]}]


class Holder:
    """A tensor, and the way back."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.owner = tensor, self


def test_caches_are_cut_however_deep_they_lie() -> None:
    cache = Deep(torch.ones(2, requires_grad=True) * 2)
    cut(({"cache": cache},))
    assert not cache.layers[0]["inner"][0][0].tensor.requires_grad


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_noise_in_a_part_of_the_latents_is_no_density(eta: float) -> None:
    unet = parts.seeded(
        diffusers.UNet2DModel,
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    policy = Policy(diffusers.RePaintPipeline(unet, diffusers.RePaintScheduler()), lora_rank=None)
    picture = tiny.picture(8)
    call = {"image": picture, "mask_image": (picture[:, :1] > 0.5).float(), "num_inference_steps": 3, "eta": eta}
    call |= {"jump_length": 1, "jump_n_sample": 1, "generator": torch.Generator().manual_seed(0)}
    if eta == 0:
        with pytest.raises(PipelineError, match=r"RePaintScheduler adds noise to a part of the latents only.*eta=1\.0"):
            policy.sample(**call)
    else:
        rollout = policy.sample(**call)
        policy.replay(
            rollout, lambda step: torch.testing.assert_close(step.log_prob, step.old_log_prob, rtol=0, atol=0)
        )
        assert rollout.steps
