"""Live steps: the pictures of a rollout with a graph, and states of the forward process along it."""

import pytest
import torch
from torch import Tensor

import tiny
from tiller import Policy
from tiller.kernels import DDIM, ODE, FlowSDE, Window
from tiller.policy.forward import ForwardProcess

CALL = {"num_inference_steps": 4, "guidance_scale": 2.0}
PAIR = ["a cat", "a dog"]


def pictures(policy, **changes) -> tuple:
    """A rollout, and its pictures as numbers in [0, 1], (B, C, H, W)."""
    rollout = policy.sample(PAIR, seed=3, output_type="pt", **{**CALL, **changes})
    return rollout, rollout.images


@pytest.mark.parametrize("kernel", [DDIM(1.0), DDIM(0.5), ODE()])
@pytest.mark.parametrize("start", [0, 2, 3])
def test_live_pictures_are_the_recorded_ones(kernel, start) -> None:
    policy = Policy(tiny.tiny_sd(), lora_rank=2)
    rollout, images = pictures(policy, kernel=kernel)
    live = policy.unroll(rollout, start)
    torch.testing.assert_close(live.detach(), images, atol=1e-6, rtol=0)
    assert live.requires_grad


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"])
def test_a_solver_with_a_memory_goes_on_where_the_recording_was(name) -> None:
    policy = Policy(tiny.tiny_sd(scheduler=tiny.scheduler(name)), lora_rank=2)
    rollout, images = pictures(policy, kernel=None if name != "DPMSolverMultistepScheduler" else ODE())
    torch.testing.assert_close(policy.unroll(rollout, 2).detach(), images, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kernel", [None, DDIM(1.0), ODE()])
def test_a_pipeline_that_decodes_the_denoised_latents_has_their_gradient(kernel) -> None:
    """Latent consistency: the picture is the last step's denoised prediction, a linear map of the U-Net's output."""
    policy = Policy(tiny.tiny_lcm(), lora_rank=None)
    rollout, images = pictures(policy, kernel=kernel, height=16, width=16)
    live = policy.unroll(rollout, 3)
    torch.testing.assert_close(live.detach(), images, atol=1e-6, rtol=0)
    live.mean().backward()
    bias = policy.parameters["unet.conv_out.bias"]
    slope, values = bias.grad.sum(), []
    for sign in (1, -1):
        with torch.no_grad():
            bias += sign * 1e-2
            values.append(float(policy.unroll(rollout, 3).double().mean()))
            bias -= sign * 1e-2
    assert float(slope) == pytest.approx((values[0] - values[1]) / 2e-2, rel=2e-2)
    assert abs(float(slope)) > 1e-4


def test_live_flow_pictures_are_the_recorded_ones() -> None:
    policy = Policy(tiny.tiny_sd3(), lora_rank=2)
    rollout, images = pictures(policy, kernel=FlowSDE(0.7))
    torch.testing.assert_close(policy.unroll(rollout, 1).detach(), images, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("start", "stop"), [(0, None), (2, None), (3, None), (1, 2)])
def test_gradient_through_the_live_steps_is_the_finite_difference(start, stop) -> None:
    """Directional derivative of a picture's mean in float64, steps before `start` held at the recorded path."""
    pipe = tiny.tiny_sd()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.double()
    policy = Policy(pipe, lora_rank=None)
    rollout, _ = pictures(policy, kernel=DDIM(1.0))

    def mean() -> Tensor:
        return (policy.unroll(rollout, start, stop) ** 2).mean()

    weight = policy.parameters["unet.conv_out.weight"]
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
    mean().backward()
    slope = float((weight.grad * direction).sum())
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 1e-3 * direction
            values.append(float(mean()))
            weight -= sign * 1e-3 * direction
    assert slope == pytest.approx((values[0] - values[1]) / 2e-3, rel=2e-2)
    assert abs(slope) > 1e-9


def test_with_stop_the_picture_is_decoded_from_the_denoised_latents() -> None:
    policy = Policy(tiny.tiny_sd(), lora_rank=2)
    rollout, _ = pictures(policy, kernel=DDIM(1.0))
    found: dict[int, Tensor] = {}
    policy.replay(rollout, lambda s: found.update({s.index: s.stage.split(s.sample, s.prediction)[0].detach()}), [1])
    vae = policy.pipe.vae
    with torch.no_grad():
        wanted = (vae.decode(found[1] / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(policy.unroll(rollout, 1, 2).detach(), wanted, atol=1e-5, rtol=0)


def test_noise_inside_a_window_only() -> None:
    policy = Policy(tiny.tiny_sd3(), lora_rank=2)
    rollout = policy.sample(PAIR, kernel=Window(FlowSDE(0.7), 1, 2), num_inference_steps=4, guidance_scale=1.0)
    assert rollout.steps == [1, 2]
    everywhere = policy.sample(PAIR, kernel=Window(FlowSDE(0.7), 0, 4), num_inference_steps=4, guidance_scale=1.0)
    plain = policy.sample(PAIR, kernel=FlowSDE(0.7), num_inference_steps=4, guidance_scale=1.0)
    assert torch.equal(everywhere.latents[-1], plain.latents[-1])
    ode = policy.sample(PAIR, kernel=ODE(), num_inference_steps=4, guidance_scale=1.0)
    assert torch.equal(rollout.latents[1], ode.latents[1])
    assert not torch.equal(rollout.latents[2], ode.latents[2])


def test_equal_starts_give_a_group_one_initial_noise_and_noises_of_their_own_after_it() -> None:
    policy = Policy(tiny.tiny_sd(), lora_rank=2)
    rollout = policy.sample(["a cat"] * 2, starts=[7, 7], kernel=DDIM(1.0), **CALL)
    assert torch.equal(rollout.latents[0][0], rollout.latents[0][1])
    assert not torch.equal(rollout.latents[1][0], rollout.latents[1][1])
    errors = []
    policy.replay(rollout, lambda step: errors.append(float((step.log_prob - step.old_log_prob).detach().abs().max())))
    assert max(errors) == 0


def test_kept_means_are_the_means_of_the_recorded_transitions() -> None:
    policy = Policy(tiny.tiny_sd(), lora_rank=2)
    rollout = policy.sample(PAIR, kernel=DDIM(1.0), keep_means=True, **CALL)
    policy.replay(rollout, lambda step: torch.testing.assert_close(step.mean, step.old_mean, atol=0, rtol=0))
    plain = policy.sample(PAIR, kernel=DDIM(1.0), **CALL)
    assert all(record.mean is None for record in plain.records)


@pytest.mark.parametrize("make", [tiny.tiny_sd, tiny.tiny_sd3])
def test_forward_process_noises_the_clean_latents(make) -> None:
    """x_t = αx0 + σε at every step, and the target is what an exact model of (x0, ε) would say there."""
    policy = Policy(make(), lora_rank=2)
    rollout = policy.sample(PAIR, kernel=ODE(), num_inference_steps=4, guidance_scale=1.0)
    forward = ForwardProcess(rollout, fresh=11)
    seen = []
    policy.predict(rollout, seen.append, forward, [0, 1, 3])
    assert [step.index for step in seen] == [0, 1, 3]
    for step in seen:
        alpha, sigma = step.stage.now
        torch.testing.assert_close(step.sample, alpha * rollout.latents[-1] + sigma * step.noise, atol=1e-5, rtol=1e-5)
        x0, eps = step.stage.split(step.sample, step.target)
        torch.testing.assert_close(x0, step.clean, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(eps, step.noise, atol=1e-4, rtol=1e-4)
        assert step.distance().shape == (2,)
    assert not torch.equal(seen[0].sample, rollout.latents[0])  # fresh noise, of which x0 knows nothing
    assert not torch.equal(seen[1].noise, seen[2].noise)


def test_the_distance_is_the_models_own_error_at_the_noised_state() -> None:
    """Against the U-Net called by hand on x_t."""
    policy = Policy(tiny.tiny_sd(), lora_rank=2)
    rollout = policy.sample(PAIR, kernel=ODE(), num_inference_steps=4, guidance_scale=1.0)
    seen = []
    policy.predict(rollout, seen.append, ForwardProcess(rollout, 5), [2])
    (step,) = seen
    embeds, _ = policy.pipe.encode_prompt(PAIR, "cpu", 1, False)
    output = policy.pipe.unet(step.sample, step.timestep, embeds).sample
    torch.testing.assert_close(step.distance(), (output - step.noise).square().flatten(1).mean(1))


def test_noise_of_the_forward_process_does_not_depend_on_the_batch() -> None:
    policy = Policy(tiny.tiny_sd(), lora_rank=2)
    both = policy.sample(PAIR, kernel=ODE(), samples=[4, 9], **CALL)
    one = policy.sample(PAIR[1:], kernel=ODE(), samples=[9], **CALL)
    assert torch.equal(ForwardProcess(both, 2).noise(1)[1:], ForwardProcess(one, 2).noise(1))
    assert not torch.equal(ForwardProcess(both, 2).noise(1), ForwardProcess(both, 3).noise(1))
    shared = ForwardProcess(policy.sample(["a cat"] * 2, kernel=ODE(), **CALL), 2, samples=[0, 0]).noise(1)
    assert torch.equal(shared[0], shared[1])
