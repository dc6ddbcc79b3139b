"""The group-relative methods: golden numbers, truth tables, windows, and the KL to the model before training."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiller import Policy, losses
from tiller.algorithms import DDPO, DanceGRPO, FlowGRPO, FlowGRPOFast, MixGRPO
from tiller.algorithms.kl import divergence
from tiller.collect import Batch, collect
from tiller.distributed import World
from tiller.kernels import ODE, DanceSDE, FlowSDE, Point, Window
from tiller.metrics import Clock
from tiller.policy.rollout import Seen
from tiller.process import Stage
from tiller.schedules import constant, moving_window, ramp, random_window, warm_up
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.training import check
from tiller.types import ConfigError, Prompt
from tiller.update import update
from tiller.walks import Walker
from toy import ToyPipeline, brightness, toy

PROMPTS = [Prompt("a cat"), Prompt("a dog")]
SETTINGS = TrainConfig(epochs=1, samples_per_epoch=8, group_size=4, batch_size=4, max_grad_norm=1e9)
SAMPLING = {"num_inference_steps": 6}


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- pure functions ----


def test_flow_sde_kl_golden_numbers() -> None:
    """σ .6 → .5, a = .7, v - v_ref = .2: the true KL .0042177551, and .0004217755 without the step's length."""
    kernel, now, then = FlowSDE(0.7), Point(0.4, 0.6), Point(0.5, 0.5)
    x, v = tensor(0.5).view(1, 1), tensor(-0.3).view(1, 1)

    def mean(velocity: Tensor) -> Tensor:
        x0, eps = x - 0.6 * velocity, x + 0.4 * velocity
        return kernel.transition(x, x0, eps, now, then).mean

    std = kernel.transition(x, x, x, now, then).std
    step: Any = SimpleNamespace(
        others={"reference": Seen(v - 0.2, mean(v - 0.2))},
        mean=mean(v),
        std=std,
        prediction=v,
        stage=Stage(now, then, "flow"),
        squared=lambda d: d.square().flatten(1).mean(1),
    )
    assert divergence(step, "gaussian").item() == pytest.approx(0.0042177551, abs=1e-9)
    assert divergence(step, "flow_grpo").item() == pytest.approx(0.0004217755, abs=1e-9)
    assert divergence(step, "unscaled").item() == pytest.approx(2 * std**2 * 0.0042177551, abs=1e-9)
    assert divergence(step, "prediction").item() == pytest.approx(0.04, rel=1e-5)
    g, length, sigma = 0.7 * math.sqrt(0.6 / 0.4), 0.1, 0.6
    closed = length / 2 * (1 / g + g * (1 - sigma) / (2 * sigma)) ** 2 * 0.04
    assert divergence(step, "gaussian").item() == pytest.approx(closed, rel=1e-9)


def test_guard_golden_numbers() -> None:
    """S = .2, z = .5, Δμ = .1: the raw log-ratio is .125 away from the guarded .05."""
    std, z, shift = 0.2, 0.5, 0.1
    action, old_mean = std * z, 0.0
    raw = -((action - (old_mean + shift)) ** 2) / (2 * std**2) + (action - old_mean) ** 2 / (2 * std**2)
    assert raw == pytest.approx(0.5 * 0.5 - 0.125)  # z·Δμ/S - Δμ²/(2S²)
    found = losses.guarded_log_ratio(tensor(raw), tensor(0.0), tensor(shift**2), std)
    assert found.item() == pytest.approx(0.05)


def test_the_guarded_ratio_has_mean_zero_where_the_raw_one_has_not() -> None:
    """T10: over actions of the old policy, for any shift of the mean; 4 standard errors."""
    std, n = 0.3, 200_000
    shift = torch.tensor([0.1, -0.4, 0.05], dtype=torch.float64)
    z = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    raw = ((std * z) ** 2 - (std * z - shift) ** 2).mean(1) / (2 * std**2)
    guarded = losses.guarded_log_ratio(raw, torch.zeros(n), shift.square().mean().expand(n), std)
    assert abs(guarded.mean()) < 4 * guarded.std() / math.sqrt(n)
    assert raw.mean() == pytest.approx(-shift.square().mean().item() / (2 * std**2), rel=0.05)
    torch.testing.assert_close(guarded, (z * shift).mean(1))


def test_truth_tables_of_the_three_trust_regions() -> None:
    """T9: sign of A × side of the ratio, ε = .1."""
    advantages, ratio = tensor(1, 1, -1, -1), tensor(1.2, 0.8, 1.2, 0.8)
    new, old = ratio.log().requires_grad_(), torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(losses.clipped_surrogate(new, old, advantages, 0.1), tensor(-1.1, -0.8, 1.2, 0.9))
    (gradient,) = torch.autograd.grad(losses.clipped_surrogate(new, old, advantages, 0.1).sum(), new)
    assert (gradient != 0).tolist() == [False, True, True, False]
    torch.testing.assert_close(losses.clamped_ratio(new, old, advantages, 0.1), tensor(-1.1, -0.9, 1.1, 0.9))
    (gradient,) = torch.autograd.grad(losses.clamped_ratio(new, old, advantages, 0.1).sum(), new)
    assert (gradient != 0).tolist() == [False] * 4  # DPOK's clamp knows no way back
    far, near = torch.full((4,), 2e-5), torch.full((4,), 5e-6)
    masked = losses.divergence_masked(ratio, advantages, far, 1e-5)
    torch.testing.assert_close(masked, tensor(0, -0.8, 1.2, 0))  # corrective moves are never dropped
    torch.testing.assert_close(losses.divergence_masked(ratio, advantages, near, 1e-5), -advantages * ratio)
    infinite = losses.divergence_masked(tensor(math.inf), tensor(1), tensor(1), 1e-5)
    assert infinite.tolist() == [0.0]


def test_decays_are_those_of_the_reference_codes() -> None:
    assert [round(ramp(0.001, 0.5)(n), 4) for n in (0, 100, 500, 900)] == [0, 0.1, 0.5, 0.5]
    assert [round(ramp(0.0075, 0.999, 75)(n), 4) for n in (0, 74, 75, 175, 400)] == [0, 0, 0, 0.75, 0.999]
    assert [round(warm_up(0.9)(n), 4) for n in (0, 10, 1000)] == [0.1, 0.55, 0.9]
    assert constant(0.3)(7) == 0.3
    with pytest.raises(ConfigError, match="must be between 0 and 1"):
        constant(1.5)


def test_windows_move_and_are_the_same_for_the_same_epoch() -> None:
    assert [moving_window(4, 10, epoch, 25, 1).start for epoch in (0, 24, 25, 149, 150, 175)] == [0, 0, 1, 5, 6, 0]
    assert moving_window(2, 10, 3, 1, 2) == range(6, 8)
    starts = {random_window(2, 1, 5, (0, epoch)).start for epoch in range(100)}
    assert starts == {1, 2, 3, 4, 5}
    assert random_window(2, 1, 5, (3, 4)) == random_window(2, 1, 5, (3, 4))
    with pytest.raises(ConfigError, match="a window of 11 steps does not fit into 10"):
        moving_window(11, 10, 0, 25, 1)


# ---- on rollouts ----


def sampled(policy: Policy, algorithm: Any, state: TrainState | None = None, sampling: Any = SAMPLING) -> Batch:
    state = state or TrainState(policy, SETTINGS, algorithm)
    return collect(policy, PROMPTS, brightness, algorithm, SETTINGS, sampling, state, World(), Clock())


def gradient(policy: Policy, algorithm: Any, batch: Batch) -> dict[str, Tensor]:
    """What one update would be given, and how far its loss saw (the steps)."""
    state, found = TrainState(policy, SETTINGS, algorithm), []

    def look(config: TrainConfig) -> float:
        found.append({name: p.grad.clone() for name, p in state.parameters.items() if p.grad is not None})
        return 1.0

    state.step = look  # type: ignore[method-assign]
    update(policy, batch, algorithm, SETTINGS, state, World())
    return found[0]


def test_at_the_old_policy_all_trust_regions_have_one_gradient() -> None:
    """And it is PPO's, which at ratio 1 is the score function's."""
    policy = Policy(toy(), lora_rank=None)
    plain = FlowGRPO(kl_coefficient=0.0, train_last_step=True)
    batch = sampled(policy, FlowGRPO(trust_region="guard"))
    wanted = gradient(policy, plain, batch)
    for changed in (FlowGRPO(kl_coefficient=0.0, train_last_step=True, trust_region="dppo"), DDPO()):
        for name, value in gradient(policy, changed, batch).items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-9)
    guarded = gradient(policy, FlowGRPO(kl_coefficient=0.0, train_last_step=True, trust_region="guard"), batch)
    assert any(not torch.allclose(guarded[name], wanted[name], rtol=1e-3) for name in wanted)  # its steps weigh S


def test_kl_and_its_gradient_are_zero_at_first_and_pull_back_later() -> None:
    """T7; and after a change of the weights the KL's gradient is that of the formula by autograd."""
    policy = Policy(toy(), lora_rank=2, target_modules=["first", "second"])
    without, strong = FlowGRPO(kl_coefficient=0.0), FlowGRPO(kl_coefficient=1e3, kl_estimator="gaussian")
    batch = sampled(policy, without)
    bare, pulled = gradient(policy, without, batch), gradient(policy, strong, batch)
    for name in bare:
        torch.testing.assert_close(pulled[name], bare[name], rtol=1e-4, atol=1e-9)
    with torch.no_grad():
        for name, parameter in policy.parameters.items():
            parameter += 0.05 if "lora_B" in name else 0.0
    rows = {step: [] for step in range(6)}
    for chunk in batch.chunks:
        with torch.no_grad(), policy.base():
            policy.replay(chunk.rollout, lambda step: rows[step.index].append(step.mean))
    difference = {name: gradient(policy, strong, batch)[name] - gradient(policy, without, batch)[name] for name in bare}
    for parameter in policy.parameters.values():
        parameter.grad = None
    for number, chunk in enumerate(batch.chunks):

        def kl(step: Any, number: int = number) -> None:
            shift = (step.mean - rows[step.index][number]).square().flatten(1).mean(1)
            step.backward(1e3 * (shift / (2 * step.std**2)).sum() / (8 * 5))

        policy.replay(chunk.rollout, kl, range(5))
    for name, parameter in policy.parameters.items():
        torch.testing.assert_close(difference[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_the_reference_is_asked_once_for_all_inner_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(toy(), lora_rank=2, target_modules=["first", "second"])
    algorithm = FlowGRPO(inner_epochs=3)
    batch = sampled(policy, algorithm)
    forwards = []
    policy.pipe.denoiser.first.register_forward_hook(lambda *_: forwards.append(1))
    update(policy, batch, algorithm, SETTINGS, TrainState(policy, SETTINGS, algorithm), World())
    assert len(forwards) == 2 * 5 * (1 + 3)  # chunks × steps × (reference + inner epochs)


def test_outside_the_window_nothing_is_trained_and_no_denoiser_runs() -> None:
    """T18: a window of 2 of 6 steps: its gradient is that of these steps alone, at a third of the calls."""
    policy = Policy(toy(), lora_rank=None)
    algorithm = MixGRPO(window_size=2, window_every=1)
    state = TrainState(policy, SETTINGS, algorithm)
    state.epoch = 3
    batch = sampled(policy, algorithm, state)
    assert batch.window == range(3, 5)
    assert [chunk.rollout.steps for chunk in batch.chunks] == [[3, 4]] * 2
    forwards = []
    hook = policy.pipe.denoiser.first.register_forward_hook(lambda *_: forwards.append(1))
    found = gradient(policy, algorithm, batch)
    hook.remove()
    assert len(forwards) == 2 * 2
    for parameter in policy.parameters.values():
        parameter.grad = None
    for number, chunk in enumerate(batch.chunks):
        weights = torch.tensor(batch.advantages[number * 4 : number * 4 + 4]).float()
        policy.replay(
            chunk.rollout, lambda step, w=weights: step.backward(-(w * step.log_prob).sum() / (8 * 2)), [3, 4]
        )
    for name, parameter in policy.parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-9)


def test_a_window_of_all_steps_is_no_window() -> None:
    policy = Policy(toy(), lora_rank=None)
    plain = policy.sample("a cat", kernel=DanceSDE(0.3), **SAMPLING)
    all_of_it = policy.sample("a cat", kernel=Window(DanceSDE(0.3), 0, 6), **SAMPLING)
    assert torch.equal(plain.latents[-1], all_of_it.latents[-1])
    assert torch.equal(plain.log_probs, all_of_it.log_probs)


def test_a_fast_group_shares_its_path_up_to_the_window() -> None:
    policy = Policy(toy(), lora_rank=None)
    batch = sampled(policy, FlowGRPOFast(window_first=2, window_last=2))
    for chunk in batch.chunks:
        latents = chunk.rollout.latents
        assert torch.equal(latents[2], latents[2][:1].expand_as(latents[2]))
        assert not torch.equal(latents[3], latents[3][:1].expand_as(latents[3]))
        assert chunk.rollout.steps == [2, 3]


def test_dance_groups_share_the_initial_noise_and_leave_the_last_step_out() -> None:
    policy, algorithm = Policy(toy(), lora_rank=None), DanceGRPO(timestep_fraction=1.0)
    batch = sampled(policy, algorithm)
    first = batch.chunks[0].rollout.latents[0]
    assert torch.equal(first, first[:1].expand_as(first))
    assert algorithm.steps(batch.chunks[0].rollout.steps, np.random.default_rng(0)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("algorithm", "changes", "complaint"),
    [
        (FlowGRPO(), {"group_size": 1}, "FlowGRPO compares pictures of one prompt, and train.group_size is 1"),
        (FlowGRPOFast(window_last=6), {}, "ends after the last of the 6 denoising steps"),
        (MixGRPO(window_size=9), {}, "does not fit into 6 denoising steps"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_drawn(algorithm, changes, complaint) -> None:
    settings = TrainConfig(**{"samples_per_epoch": 8, "group_size": 4, "batch_size": 4, **changes})
    if isinstance(algorithm, FlowGRPOFast):
        algorithm = FlowGRPOFast(window_first=5, window_last=5)
    with pytest.raises(ConfigError, match=complaint):
        check(Policy(toy(), lora_rank=None), brightness, algorithm, settings, SAMPLING, World())


def test_a_ratio_method_on_a_kernel_without_density_cannot_be_written_down() -> None:
    for cls in (DDPO, FlowGRPO, FlowGRPOFast, DanceGRPO, MixGRPO):
        with pytest.raises(ConfigError, match="needs log-probabilities, and ODE"):
            cls(kernel=ODE())
    with pytest.raises(ConfigError, match="kl_estimator is 'k3'; it must be one of gaussian"):
        FlowGRPO(kl_estimator="k3")  # type: ignore[arg-type]


def test_what_other_copies_said_is_forgotten_when_they_move() -> None:
    policy = Policy(toy(), lora_rank=None)
    algorithm = FlowGRPO(inner_epochs=2)
    walker = Walker(policy, algorithm, TrainState(policy, SETTINGS, algorithm), 0)
    batch = sampled(policy, algorithm)
    walker.walk(batch.chunks[0], [0, 1], 0, lambda step: None)
    assert len(walker._seen) == 2  # the reference stays where it is


def test_a_window_without_a_known_number_of_steps_is_refused_and_not_dropped() -> None:
    class Endless(ToyPipeline):
        def __call__(self, prompt, generator=None):  # type: ignore[override]
            return super().__call__(prompt, 6, generator)

    policy = Policy(toy(Endless), lora_rank=None)
    with pytest.raises(ConfigError, match="MixGRPO has a window of steps, and Endless does not say how many"):
        check(policy, brightness, MixGRPO(), SETTINGS, {}, World())
    check(policy, brightness, FlowGRPO(), SETTINGS, {}, World())
