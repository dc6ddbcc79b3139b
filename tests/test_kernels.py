"""Transition kernels against golden numbers, torch.distributions, closed forms and diffusers' own schedulers."""

from __future__ import annotations

import math
import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from tiller.kernels import (
    CPS,
    DDIM,
    DDPM,
    ODE,
    DanceSDE,
    FlowSDE,
    Gaussian,
    Kernel,
    Point,
    log_prob,
    posterior_variance,
)
from tiller.process import read, variance_preserving
from tiller.types import ConfigError

warnings.filterwarnings("ignore")

# An independent table: Stable Diffusion's cumulative products in numpy's float64.
ALPHA_BAR = np.cumprod(1 - np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SEVENTH = {"rel": 0, "abs": 1e-7}


def vp(t: int) -> Point:
    return variance_preserving(float(ALPHA_BAR[t]))


def flow(sigma: float) -> Point:
    return Point(1 - sigma, sigma)


def number(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def from_eps(kernel: Kernel, x: float, eps: float, now: Point, then: Point) -> Gaussian:
    x0 = (x - now.sigma * eps) / now.alpha
    return kernel.transition(number(x), number(x0), number(eps), now, then)


def from_velocity(kernel: Kernel, x: float, v: float, sigma: float, following: float) -> Gaussian:
    x0, eps = number(x - sigma * v), number(x + (1 - sigma) * v)
    return kernel.transition(number(x), x0, eps, flow(sigma), flow(following))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- golden numbers: one scalar worked by hand per kernel ----


def test_the_table_of_stable_diffusion_is_the_one_the_golden_numbers_use() -> None:
    assert ALPHA_BAR[501] == pytest.approx(0.2749990669, abs=1e-10)
    assert ALPHA_BAR[481] == pytest.approx(0.3022956610, abs=1e-10)


def test_ddim_with_full_noise_golden() -> None:
    gaussian = from_eps(DDIM(1.0), 1.3, -0.4, vp(501), vp(481))
    assert float(gaussian.mean) == pytest.approx(1.40746840, **SEVENTH)
    assert gaussian.std == pytest.approx(0.29478454, **SEVENTH)
    assert float(log_prob(number(1.2), gaussian)) == pytest.approx(0.05490710, **SEVENTH)


def test_ddim_with_half_noise_golden() -> None:
    gaussian = from_eps(DDIM(0.5), 1.3, -0.4, vp(501), vp(481))
    assert float(gaussian.mean) == pytest.approx(1.39121284, **SEVENTH)
    assert gaussian.std == pytest.approx(0.14739227, **SEVENTH)


def test_ddim_last_step_of_stable_diffusion_keeps_a_density() -> None:
    gaussian = from_eps(DDIM(1.0), 1.3, -0.4, vp(1), vp(0))  # set_alpha_to_one=False: the final point is ᾱ_0
    assert gaussian.std == pytest.approx(0.02064832, **SEVENTH)
    assert gaussian.has_density


def test_fifty_step_standard_deviations_of_stable_diffusion() -> None:
    steps = [1 + 20 * k for k in range(50)][::-1]
    stds = [math.sqrt(posterior_variance(vp(t), vp(max(t - 20, 0)))) for t in steps]
    assert stds[0] == pytest.approx(0.454, abs=5e-4)
    assert stds[-5:] == pytest.approx([0.132, 0.119, 0.0999, 0.0395, 0.0206], abs=5e-4)


def test_euler_golden() -> None:
    assert float(from_velocity(ODE(), 0.5, -0.3, 0.6, 0.5).mean) == pytest.approx(0.53, abs=1e-12)


def test_ode_is_the_first_step_of_dpm_solver_golden() -> None:
    x, x0, sigma, following = 0.5, 0.2, 0.9, 0.7
    eps = (x - (1 - sigma) * x0) / sigma
    gaussian = ODE().transition(number(x), number(x0), number(eps), flow(sigma), flow(following))
    assert float(gaussian.mean) == pytest.approx(0.43333333, abs=1e-8)


def test_flow_sde_golden() -> None:
    gaussian = from_velocity(FlowSDE(0.7), 0.5, -0.3, 0.6, 0.5)
    assert gaussian.std == pytest.approx(0.85732141 * math.sqrt(0.1), **SEVENTH)  # g·√(-Δσ)
    assert float(gaussian.mean) == pytest.approx(0.50672500, **SEVENTH)
    assert gaussian.std == pytest.approx(0.27110883, **SEVENTH)
    assert float(log_prob(number(0.45), gaussian)) == pytest.approx(0.36440711, **SEVENTH)


def test_flow_sde_at_pure_noise_takes_the_next_sigma_golden() -> None:
    following = 0.9642857142857143
    gaussian = from_velocity(FlowSDE(0.7), 0.5, -0.3, 1.0, following)
    assert gaussian.std == pytest.approx(3.70405184 * math.sqrt(1 - following), **SEVENTH)
    assert float(gaussian.mean) == pytest.approx(0.38821429, **SEVENTH)
    assert gaussian.std == pytest.approx(0.70000000, **SEVENTH)


def test_dance_sde_golden() -> None:
    gaussian = from_velocity(DanceSDE(0.3), 0.5, -0.3, 0.6, 0.5)
    assert float(gaussian.mean) == pytest.approx(0.52715000, **SEVENTH)
    assert gaussian.std == pytest.approx(0.09486833, **SEVENTH)
    assert float(log_prob(number(0.45), gaussian)) == pytest.approx(1.10565335, **SEVENTH)


def test_cps_golden() -> None:
    gaussian = from_velocity(CPS(0.7), 0.5, -0.3, 0.6, 0.5)
    assert float(gaussian.mean) == pytest.approx(0.42625819, **SEVENTH)
    assert gaussian.std == pytest.approx(0.44550326, **SEVENTH)
    assert float(log_prob(number(0.45), gaussian)) == pytest.approx(-0.11180785, **SEVENTH)
    assert -((0.45 - float(gaussian.mean)) ** 2) == pytest.approx(-0.00056367, **SEVENTH)


def test_kl_of_two_flow_sde_transitions_golden() -> None:
    """‖Δmean‖²/(2 std²) for Δv = .2, and its closed form |Δσ|/2·(1/g + g(1-σ)/(2σ))²·Δv²."""
    one, other = (from_velocity(FlowSDE(0.7), 0.5, v, 0.6, 0.5) for v in (-0.3, -0.1))
    assert one.std == other.std
    kl = float((one.mean - other.mean) ** 2) / (2 * one.std**2)
    g = 0.7 * math.sqrt(0.6 / 0.4)
    assert kl == pytest.approx(0.0042177551, **SEVENTH)
    assert kl == pytest.approx(0.1 / 2 * (1 / g + g * 0.4 / 1.2) ** 2 * 0.2**2, rel=1e-12)
    assert float((one.mean - other.mean) ** 2) / (2 * g**2) == pytest.approx(0.0004217755, **SEVENTH)


# ---- T1: the log-probability is the normal distribution's ----


@pytest.mark.parametrize("std", [0.3, torch.linspace(0.1, 2.0, 3, dtype=torch.float64).view(1, 3, 1, 1)])
def test_log_prob_is_that_of_the_normal_distribution(std: Any) -> None:
    mean, action = noise(4, 3, 5, 5), noise(4, 3, 5, 5, seed=1)
    expected = Normal(mean, torch.as_tensor(std, dtype=mean.dtype)).log_prob(action).flatten(1)
    torch.testing.assert_close(log_prob(action, Gaussian(mean, std)), expected.mean(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        log_prob(action, Gaussian(mean, std), reduction="sum"), expected.sum(1), rtol=0, atol=1e-10
    )


def test_frames_folded_into_the_first_axis_belong_to_their_sample() -> None:
    mean, action = noise(6, 2, 3), noise(6, 2, 3, seed=1)  # 2 samples of 3 frames
    expected = Normal(mean, 0.5).log_prob(action)
    by_hand = torch.stack([expected[:3].mean(), expected[3:].mean()])
    torch.testing.assert_close(log_prob(action, Gaussian(mean, 0.5), batch_size=2), by_hand)


def test_log_prob_of_half_precision_is_computed_in_float32() -> None:
    mean, action = noise(2, 64).bfloat16(), (noise(2, 64) + 0.01 * noise(2, 64, seed=1)).bfloat16()
    exact = Normal(mean.double(), 0.02).log_prob(action.double()).mean(1)
    found = log_prob(action, Gaussian(mean, 0.02))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_log_prob_gradient_is_its_finite_difference_and_none_reaches_the_action() -> None:
    eps, action = noise(2, 6).requires_grad_(), noise(2, 6, seed=1).requires_grad_()
    x = noise(2, 6, seed=2)

    def total(output: Tensor) -> Tensor:
        x0 = (x - vp(501).sigma * output) / vp(501).alpha
        return log_prob(action, DDIM(0.8).transition(x, x0, output, vp(501), vp(481)), reduction="sum").sum()

    total(eps).backward()
    assert action.grad is None
    assert eps.grad is not None
    for index in [(0, 0), (1, 3)]:
        shift = torch.zeros_like(eps)
        shift[index] = 1e-5
        difference = (total(eps.detach() + shift) - total(eps.detach() - shift)) / 2e-5
        assert float(eps.grad[index]) == pytest.approx(float(difference), rel=1e-7)


# ---- T2: DDIM with η = 1 is the ancestral posterior, in every process ----

PAIRS = [
    *((vp(t), vp(s)) for t, s in [(999, 979), (501, 481), (21, 1), (1, 0), (600, 100)]),
    *((Point(1.0, a), Point(1.0, b)) for a, b in [(14.6, 9.0), (1.0, 0.7), (0.05, 0.01)]),
    *((flow(a), flow(b)) for a, b in [(0.96, 0.9), (0.6, 0.5), (0.1, 0.0)]),
]


def bayes(x: Tensor, x0: Tensor, now: Point, then: Point) -> tuple[Tensor, float]:
    """q(x' | x, x0) by completing the square: prior N(α'x0, σ'²), likelihood N(x; a·x', σ² - a²σ'²)."""
    a = now.alpha / then.alpha
    forward = now.sigma**2 - (a * then.sigma) ** 2
    if then.sigma == 0:
        return then.alpha * x0, 0.0
    precision = 1 / then.sigma**2 + a**2 / forward
    return (then.alpha * x0 / then.sigma**2 + a * x / forward) / precision, 1 / precision


@pytest.mark.parametrize(("now", "then"), PAIRS)
def test_ddim_with_full_noise_and_ddpm_are_the_posterior(now: Point, then: Point) -> None:
    x, x0 = noise(3, 4), noise(3, 4, seed=1)
    eps = (x - now.alpha * x0) / now.sigma
    mean, variance = bayes(x, x0, now, then)
    for kernel in (DDIM(1.0), DDPM()):
        gaussian = kernel.transition(x, x0, eps, now, then)
        torch.testing.assert_close(gaussian.mean, mean, rtol=1e-9, atol=1e-9)
        assert gaussian.std**2 == pytest.approx(variance, rel=1e-7, abs=1e-15)


def test_the_whole_schedule_of_stable_diffusion_agrees_with_the_formula_of_the_ddpm_paper() -> None:
    for t in range(20, 1000, 20):
        a, b = ALPHA_BAR[t], ALPHA_BAR[t - 20]
        expected = (1 - b) / (1 - a) * (1 - a / b)
        assert posterior_variance(vp(t), vp(t - 20)) == pytest.approx(expected, rel=1e-9)


def test_fixed_large_is_the_forward_variance() -> None:
    gaussian = from_eps(DDPM("fixed_large"), 1.3, -0.4, vp(501), vp(481))
    assert gaussian.std**2 == pytest.approx(1 - ALPHA_BAR[501] / ALPHA_BAR[481], rel=1e-9)


# ---- T3: what becomes of the noise ----


def left_over(kernel: Kernel, now: Point, then: Point) -> float:
    """Variance about α'x0 after one step with exact x0 and ε, from x drawn around it: Var[mean] + std²."""
    x0 = torch.zeros(1, 1, dtype=torch.float64)
    eps = torch.ones_like(x0)
    gaussian = kernel.transition(now.sigma * eps, x0, eps, now, then)  # linear in ε: its mean at ε = 1 is the factor
    return float(gaussian.mean) ** 2 + float(gaussian.std) ** 2


@pytest.mark.parametrize("level", [0.0, 0.1, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(("now", "then"), PAIRS)
def test_cps_and_ddim_leave_exactly_the_noise_that_belongs_there(level: float, now: Point, then: Point) -> None:
    for kernel in (CPS(level), DDIM(level)):
        assert left_over(kernel, now, then) == pytest.approx(then.sigma**2, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(("sigma", "following"), [(0.96, 0.9), (0.6, 0.5), (0.3, 0.25), (0.25, 0.0)])
@pytest.mark.parametrize("kernel", [FlowSDE(0.7), FlowSDE(0.3), DanceSDE(0.3)])
def test_flow_sde_leaves_the_excess_of_its_closed_form(kernel: Any, sigma: float, following: float) -> None:
    g = kernel.eta if isinstance(kernel, DanceSDE) else kernel.noise_level * math.sqrt(sigma / (1 - sigma))
    step = following - sigma
    excess = g**2 * -step * (1 - following / sigma) + (g**2 * step / (2 * sigma)) ** 2
    assert left_over(kernel, flow(sigma), flow(following)) == pytest.approx(following**2 + excess, rel=1e-9)


@pytest.mark.parametrize(
    "kernel", [DDIM(0.0), FlowSDE(0.0), DanceSDE(0.0), CPS(0.0), ODE()], ids=lambda k: type(k).__name__
)
@pytest.mark.parametrize(("now", "then"), PAIRS)
def test_without_noise_every_kernel_is_the_first_order_ode_step(kernel: Kernel, now: Point, then: Point) -> None:
    x0, eps = noise(2, 3), noise(2, 3, seed=1)
    x = now.alpha * x0 + now.sigma * eps
    gaussian = kernel.transition(x, x0, eps, now, then)
    torch.testing.assert_close(gaussian.mean, then.alpha * x0 + then.sigma * eps, rtol=1e-12, atol=1e-12)
    assert not gaussian.has_density
    assert kernel.deterministic


@pytest.mark.parametrize("kernel", [DDIM(0.6), DDPM(), CPS(0.6)], ids=lambda k: type(k).__name__)
def test_variance_exploding_coordinates_give_the_same_transition(kernel: Kernel) -> None:
    """Latents divided by α are those of a variance-exploding process; the kernel must not notice."""
    now, then = vp(501), vp(481)
    x0, eps = noise(2, 3), noise(2, 3, seed=1)
    x = now.alpha * x0 + now.sigma * eps
    here = kernel.transition(x, x0, eps, now, then)
    scaled = [Point(1.0, p.sigma / p.alpha) for p in (now, then)]
    there = kernel.transition(x / now.alpha, x0, eps, *scaled)
    torch.testing.assert_close(here.mean, then.alpha * there.mean, rtol=1e-12, atol=1e-12)
    assert here.std == pytest.approx(then.alpha * there.std, rel=1e-12)


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), DanceSDE(0.3)], ids=lambda k: type(k).__name__)
def test_flow_kernels_do_not_depend_on_the_scale_of_the_process(kernel: Kernel) -> None:
    now, then = vp(501), vp(481)
    x0, eps = noise(2, 3), noise(2, 3, seed=1)
    x = now.alpha * x0 + now.sigma * eps
    here = kernel.transition(x, x0, eps, now, then)
    norm = [p.alpha + p.sigma for p in (now, then)]
    straight = [flow(p.sigma / n) for p, n in zip((now, then), norm, strict=True)]
    there = kernel.transition(x / norm[0], x0, eps, *straight)
    torch.testing.assert_close(here.mean, norm[1] * there.mean, rtol=1e-12, atol=1e-12)
    assert here.std == pytest.approx(norm[1] * there.std, rel=1e-12)


def test_the_last_step_to_clean_latents_has_no_density_under_ddim_and_cps() -> None:
    for kernel in (DDIM(1.0), CPS(0.7), DDPM()):
        assert not from_velocity(kernel, 0.5, -0.3, 0.1, 0.0).has_density


def test_one_step_from_noise_to_data_is_finite() -> None:
    gaussian = from_velocity(FlowSDE(0.7), 0.5, -0.3, 1.0, 0.0)
    assert math.isfinite(float(gaussian.mean))
    assert math.isfinite(gaussian.std)


def test_a_single_element_without_spread_means_no_density() -> None:
    assert not Gaussian(noise(2, 2), torch.tensor([0.1, 0.0])).has_density
    assert Gaussian(noise(2, 2), torch.tensor([0.1, 0.2])).has_density


@pytest.mark.parametrize(
    "make",
    [
        lambda: DDIM(-0.5),
        lambda: DDIM(1.5),
        lambda: FlowSDE(-1.0),
        lambda: DanceSDE(float("nan")),
        lambda: CPS(1.2),
        lambda: DDPM("fixed_smal"),  # type: ignore[arg-type]
    ],
)
def test_a_noise_level_that_is_no_kernel_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="must be"):
        make()


# ---- diffusers' own schedulers as the independent implementation ----


def stepped(scheduler: Any, index: int, steps: int = 10, **arguments: Any) -> tuple[Tensor, Tensor, Any, Any]:
    """Latents, model output, the scheduler's answer at its step `index`, and how the step was read."""
    scheduler.set_timesteps(steps)
    x, output = noise(2, 4, 3, 3), noise(2, 4, 3, 3, seed=1)
    t = scheduler.timesteps[index]
    if hasattr(scheduler, "sigmas"):
        scheduler._step_index = index
        scheduler.is_scale_input_called = True
    answer = scheduler.step(output, t, x, **arguments).prev_sample
    return x, output, answer, read(scheduler, t)


@pytest.mark.parametrize("index", [0, 4, 9])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_draws_what_diffusers_draws(index: int, eta: float, prediction: str, clip: bool) -> None:
    z = noise(2, 4, 3, 3, seed=2)
    scheduler = diffusers.DDIMScheduler(**SD, prediction_type=prediction, clip_sample=clip, set_alpha_to_one=False)
    x, output, theirs, stage = stepped(scheduler, index, eta=eta, variance_noise=z)
    x0, eps = stage.split(x, output)
    gaussian = DDIM(eta).transition(x, x0, eps, stage.now, stage.then)
    torch.testing.assert_close(gaussian.mean + gaussian.std * z, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", [0, 4])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_ancestral_of_diffusers_is_ddim_with_full_noise(index: int, prediction: str, monkeypatch: Any) -> None:
    module = diffusers.schedulers.scheduling_euler_ancestral_discrete
    z = noise(2, 4, 3, 3, seed=2)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: z)
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**SD, prediction_type=prediction)
    x, output, theirs, stage = stepped(scheduler, index)
    x0, eps = stage.split(x, output)
    gaussian = DDIM(1.0).transition(x, x0, eps, stage.now, stage.then)
    torch.testing.assert_close(gaussian.mean + gaussian.std * z, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("index", [0, 4])
def test_ddpm_has_the_mean_and_std_of_diffusers(spacing: str, variance: Any, index: int, monkeypatch: Any) -> None:
    drawn = {"value": 0.0}
    module = diffusers.schedulers.scheduling_ddpm
    constant = lambda shape, **_: torch.full(shape, drawn["value"], dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(module, "randn_tensor", constant)
    scheduler = diffusers.DDPMScheduler(**SD, clip_sample=False, timestep_spacing=spacing, variance_type=variance)
    x, output, mean, stage = stepped(scheduler, index)
    drawn["value"] = 1.0
    std = stepped(scheduler, index)[2] - mean
    x0, eps = stage.split(x, output)
    gaussian = DDPM(variance).transition(x, x0, eps, stage.now, stage.then)
    torch.testing.assert_close(gaussian.mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.full_like(std, gaussian.std), std, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("index", [0, 5, 9])
def test_ode_is_flow_match_euler_of_diffusers(index: int) -> None:
    x, output, theirs, stage = stepped(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), index)
    x0, eps = stage.split(x, output)
    torch.testing.assert_close(
        ODE().transition(x, x0, eps, stage.now, stage.then).mean, theirs.double(), rtol=1e-6, atol=1e-6
    )


def test_the_second_order_solver_of_flow_models_golden_numbers() -> None:
    """DPM-Solver++(2M), σ .9 → .7 → .5 from x = .5, denoised .2 then .3: what `ODE` leaves to such a pipeline."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, lower_order_final=False
    )
    scheduler.set_timesteps(3)
    scheduler.sigmas = torch.tensor([0.9, 0.7, 0.5, 0.3], dtype=torch.float64)
    scheduler.timesteps = scheduler.sigmas[:-1] * 1000
    x, found = torch.full((1, 1), 0.5, dtype=torch.float64), []
    for index, denoised in enumerate((0.2, 0.3)):
        velocity = (x - denoised) / scheduler.sigmas[index]
        x = scheduler.step(velocity, scheduler.timesteps[index], x).prev_sample
        found.append(x.item())
    assert found == pytest.approx([0.43333333, 0.40420470], abs=1e-7)
