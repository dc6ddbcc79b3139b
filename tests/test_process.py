"""Stages of a noise process: what a model's output says, what it should say, and what a scheduler does with it."""

from __future__ import annotations

import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from tiller.kernels import DDIM, Point
from tiller.process import Stage, read, variance_preserving

warnings.filterwarnings("ignore")

POINTS = {"vp": variance_preserving(0.3), "ve": Point(1.0, 7.0), "flow": Point(0.35, 0.65), "odd": Point(0.8, 1.3)}
CASES = [(point, kind) for point in POINTS.values() for kind in ("epsilon", "v_prediction", "sample")]
CASES += [(POINTS["flow"], "flow")]  # a velocity ε - x0 fixes x0 and ε only where α + σ = 1


def noise(seed: int) -> Tensor:
    return torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("point", "prediction"), CASES)
def test_a_perfect_prediction_gives_back_data_and_noise(point: Point, prediction: str, sign: float) -> None:
    """split(noised(x0, ε), target(x0, ε)) = (x0, ε), for all parametrisations."""
    stage = Stage(point, Point(1.0, 0.0), prediction, sign)
    x0, eps = noise(0), noise(1)
    found = stage.split(stage.noised(x0, eps), stage.target(x0, eps))
    torch.testing.assert_close(found[0], x0, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found[1], eps, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("point", "prediction"), CASES)
def test_any_output_splits_into_parts_that_make_up_the_latents(point: Point, prediction: str) -> None:
    """noised(split(x, output)) = x and target(split(x, output)) = output, whatever the model says."""
    stage = Stage(point, Point(1.0, 0.0), prediction)
    x, output = noise(0), noise(1)
    parts = stage.split(x, output)
    torch.testing.assert_close(stage.noised(*parts), x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(stage.target(*parts), output, rtol=1e-11, atol=1e-11)


def test_v_is_the_definition_of_salimans_and_ho() -> None:
    """v = αε - σx0 (Salimans & Ho 2022, appendix D), and x̂0 = αx - σv."""
    point = variance_preserving(0.3)
    stage = Stage(point, point, "v_prediction")
    x0, eps = noise(0), noise(1)
    torch.testing.assert_close(stage.target(x0, eps), point.alpha * eps - point.sigma * x0)
    torch.testing.assert_close(stage.split(x0, eps)[0], point.alpha * x0 - point.sigma * eps)


def test_pure_noise_can_be_read_from_v_and_from_the_sample() -> None:
    """Zero terminal SNR: α = 0, where ε says nothing but v and x0 still do."""
    for prediction in ("v_prediction", "sample"):
        stage = Stage(Point(0.0, 1.0), Point(0.3, 0.9), prediction)
        x0, eps = stage.split(noise(0), stage.target(noise(1), noise(0)))
        torch.testing.assert_close(x0, noise(1))
        torch.testing.assert_close(eps, noise(0))


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="no rule"):
        Stage(POINTS["vp"], POINTS["vp"], "score").split(noise(0), noise(1))


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V, ZERO_SNR = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
FIRST_ORDER: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {**SD, "clip_sample": False, "set_alpha_to_one": False}),
    ("DDIMScheduler", {**SD, **V, **ZERO_SNR, "clip_sample": False}),
    ("DDIMScheduler", {**SD, "prediction_type": "sample", "clip_sample": True}),
    ("DDIMParallelScheduler", {**SD, "clip_sample": False}),
    ("CogVideoXDDIMScheduler", {}),
    ("EulerDiscreteScheduler", SD),
    ("EulerDiscreteScheduler", {**SD, **V, "use_karras_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
    ("EDMEulerScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", SD),
    ("DPMSolverMultistepScheduler", {**SD, **V, "use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ("DPMSolverSinglestepScheduler", SD),
    ("DEISMultistepScheduler", SD),
    ("UniPCMultistepScheduler", SD),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
    ("SASolverScheduler", {**SD, "tau_func": lambda t: 0}),
]


@pytest.mark.parametrize(("name", "settings"), FIRST_ORDER, ids=[name for name, _ in FIRST_ORDER])
def test_the_reading_of_a_scheduler_is_its_own_first_step(name: str, settings: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(7)
    x, output, t = noise(0), noise(1), scheduler.timesteps[0]
    scheduler.is_scale_input_called = True
    theirs = scheduler.step(output, t, x)[0].double()
    stage = read(scheduler, t)
    assert stage is not None
    ours = DDIM(0.0).transition(x, *stage.split(x, output), stage.now, stage.then).mean
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("name", "settings"),
    [row for row in FIRST_ORDER if "sigmas" not in row[1] and row[0].startswith(("DDIM", "Euler", "Flow", "Cog"))],
)
def test_the_reading_of_a_first_order_scheduler_is_its_every_step(name: str, settings: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(7)
    scheduler.is_scale_input_called = True
    for number, t in enumerate(scheduler.timesteps):
        x, output = noise(number), noise(number + 10)
        theirs = scheduler.step(output, t, x)[0].double()
        stage = read(scheduler, t)
        assert stage is not None
        ours = DDIM(0.0).transition(x, *stage.split(x, output), stage.now, stage.then).mean
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    "scheduler", [diffusers.DDIMScheduler(**SD), diffusers.DDPMScheduler(**SD), diffusers.DDIMParallelScheduler(**SD)]
)
def test_latents_noised_by_the_scheduler_are_noised_by_the_stage(scheduler: Any) -> None:
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[2]
    arguments = {"generator": torch.Generator()} if "generator" in inspect.signature(scheduler.step).parameters else {}
    scheduler.step(noise(0), t, noise(1), **arguments)
    stage = read(scheduler, t)
    assert stage is not None
    torch.testing.assert_close(
        stage.noised(noise(2), noise(3)), scheduler.add_noise(noise(2), noise(3), t[None]), rtol=1e-6, atol=1e-6
    )


def test_ddpm_with_timesteps_of_ones_own_goes_to_the_next_of_them() -> None:
    scheduler = diffusers.DDPMScheduler(**SD)
    scheduler.set_timesteps(timesteps=[900, 400, 50])
    stage = read(scheduler, 400)
    assert stage is not None
    assert stage.now.alpha**2 == pytest.approx(float(scheduler.alphas_cumprod[400]))
    assert stage.then.alpha**2 == pytest.approx(float(scheduler.alphas_cumprod[50]))
    last = read(scheduler, 50)
    assert last is not None
    assert last.then == Point(1.0, 0.0)


def test_a_scheduler_of_no_known_family_has_no_reading() -> None:
    assert read(SimpleNamespace(config={}), 0) is None
