"""Algorithms that differentiate the reward: every gradient against a chain written out here, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import erf, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from tiller.algorithms import DDPO, AlignProp, DRaFT, DRaFTLV, ReFL, RewardGradient
from tiller.algorithms.base import Pass
from tiller.collect import Batch, collect
from tiller.commands import building
from tiller.distributed import World
from tiller.emoji import FOLDER
from tiller.kernels import DDIM, ODE
from tiller.metrics import Clock
from tiller.policy import Policy, Rollout
from tiller.policy.forward import ForwardProcess
from tiller.policy.noise import key
from tiller.preflight import preflight
from tiller.recipe import Model
from tiller.rewards import jpeg_compressibility
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.training import train
from tiller.types import ConfigError, PipelineError, Prompt, RewardError
from tiller.update import update
from toy import ToyPipeline, brightness, glow, toy

PROMPTS = [Prompt("a cat"), Prompt("a dog"), Prompt("an owl")]
ALL = [DRaFT(), DRaFT(last_steps=None), DRaFTLV(), AlignProp(coefficient=1.0), ReFL(target=None, coefficient=1.0)]
STEPS = 4
Gradients = dict[str, Tensor]


def config(**changes: Any) -> TrainConfig:
    sizes = {"epochs": 1, "samples_per_epoch": 8, "group_size": 2, "batch_size": 4, "max_grad_norm": 1e9}
    return TrainConfig(**{**sizes, **changes})


def sampled(policy: Policy, algorithm: Any, settings: TrainConfig, reward: Any = glow) -> Batch:
    return collect(policy, PROMPTS, reward, algorithm, settings, {}, TrainState(policy, settings), World(), Clock())


def trained(policy: Policy, algorithm: Any, settings: TrainConfig, reward: Any = glow) -> tuple[Batch, Gradients, dict]:
    """An epoch's samples, the gradient of its one update, and what was logged; no weight moves."""
    batch, state, found = sampled(policy, algorithm, settings, reward), TrainState(policy, settings), list[Gradients]()

    def look(config: TrainConfig) -> float:
        found.append({name: p.grad.clone() for name, p in state.parameters.items() if p.grad is not None})
        return 1.0

    state.step = look  # type: ignore[method-assign]
    numbers = update(policy, batch, algorithm, settings, state, World(), reward)
    for parameter in state.parameters.values():
        parameter.grad = None
    (gradients,) = found
    return batch, gradients, numbers


def assert_close(found: Gradients, expected: Gradients, tolerance: float = 1e-5) -> None:
    """Equal within a part of the largest gradient."""
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=0, atol=tolerance * largest, msg=name)


# ---- the toy's chain, written out once more: weights by name, DDIM without noise, the decoder, the reward ----

TIMES = [751, 501, 251, 1]
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # in float32, as diffusers has them
ALPHAS = [float((1 - BETAS).cumprod(0)[t]) for t in (*TIMES, 0)]


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in policy.parameters.items()}


def predicted(w: dict[str, Tensor], x: Tensor, index: int, condition: Tensor) -> tuple[Tensor, Tensor]:
    """x̂0 and ε̂ at a step."""
    time = torch.full_like(condition, TIMES[index] / 1000)
    features = torch.cat([x.flatten(1), time[:, None], condition[:, None]], 1)
    hidden = (features @ w["denoiser.first.weight"].T + w["denoiser.first.bias"]).tanh()
    eps = (hidden @ w["denoiser.second.weight"].T + w["denoiser.second.bias"]).view_as(x)
    return (x - sqrt(1 - ALPHAS[index]) * eps) / sqrt(ALPHAS[index]), eps


def finished(w: dict[str, Tensor], x: Tensor, start: int, condition: Tensor) -> Tensor:
    """x0 from the latents at step `start`."""
    for index in range(start, STEPS):
        x0, eps = predicted(w, x, index, condition)
        x = sqrt(ALPHAS[index + 1]) * x0 + sqrt(1 - ALPHAS[index + 1]) * eps
    return x


def rewards(x0: Tensor) -> Tensor:
    return 255 * (x0[:, 0].clamp(-3, 3) / 6 + 0.5).mean((1, 2))


def by_hand(policy: Policy, batch: Batch, loss: Callable[[dict[str, Tensor], Rollout, Tensor], Tensor]) -> Gradients:
    """The gradient of the mean over chunks of a loss that gets weights, rollout and condition."""
    w = weights(policy)
    parts = [
        loss(w, chunk.rollout, policy.pipe.encode_prompt(chunk.rollout.prompts).double()) for chunk in batch.chunks
    ]
    torch.stack(parts).mean().backward()
    return {name: value.grad for name, value in w.items() if value.grad is not None}


# ---- DRaFT ----


@pytest.mark.parametrize("last_steps", [1, 2, 3, None])
def test_draft_k_is_the_finite_difference_of_the_last_k_steps(last_steps: int | None) -> None:
    """Along a random direction in all weights, with the latents before the last K steps held fast."""
    policy = Policy(toy(), lora_rank=None)
    batch, found, numbers = trained(policy, DRaFT(last_steps=last_steps), config())
    start = STEPS - (last_steps or STEPS)
    random = torch.Generator().manual_seed(1)
    w = {name: value.detach() for name, value in weights(policy).items()}
    direction = {name: torch.randn(v.shape, generator=random, dtype=v.dtype) for name, v in w.items()}

    def mean(size: float) -> float:
        moved = {name: w[name] + size * direction[name] for name in w}
        parts = []
        for chunk in batch.chunks:
            condition = policy.pipe.encode_prompt(chunk.rollout.prompts).double()
            parts.append(rewards(finished(moved, chunk.rollout.latents[start].double(), start, condition)).mean())
        return float(torch.stack(parts).mean())

    slope = -sum(float((found[name].double() * direction[name]).sum()) for name in direction)
    assert slope == pytest.approx((mean(1e-5) - mean(-1e-5)) / 2e-5, rel=1e-4)
    assert abs(slope) > 0.1
    assert numbers["policy/loss"] == pytest.approx(-mean(0.0), rel=1e-5)


def test_more_steps_have_another_gradient() -> None:
    policy = Policy(toy(), lora_rank=None)
    one, two = (trained(policy, DRaFT(last_steps=k), config())[1] for k in (1, 2))
    assert float((one["denoiser.first.weight"] - two["denoiser.first.weight"]).abs().max()) > 1e-2


def test_the_first_noise_gets_no_gradient() -> None:
    seen: list[Tensor] = []

    class Watched(ToyPipeline):
        def draw(self, count: int, generator: Any) -> Tensor:
            seen.append(super().draw(count, generator))
            return seen[-1]

    policy = Policy(toy(Watched), lora_rank=None)
    rollout = policy.sample(["a cat"] * 2, kernel=ODE())
    policy.unroll(rollout, 0).sum().backward()
    assert not any(x.requires_grad or x.grad is not None for x in seen)
    assert not any(x.requires_grad for x in rollout.latents)


@pytest.mark.parametrize("last_steps", [0, -1])
def test_no_steps_at_all_are_refused(last_steps: int) -> None:
    with pytest.raises(ConfigError, match=f"last_steps is {last_steps}; it must be at least 1, or null"):
        DRaFT(last_steps=last_steps)


def test_the_denoiser_runs_in_the_last_k_steps_only() -> None:
    """6 steps, K = 2: two forwards with a graph, where a full pass would have run six."""
    policy, graphs = Policy(toy(), lora_rank=None), list[bool]()
    rollout = policy.sample(["a cat"] * 2, kernel=ODE(), num_inference_steps=6)
    policy.pipe.denoiser.second.register_forward_hook(lambda m, i, output: graphs.append(output.requires_grad))
    policy.unroll(rollout, 4)
    assert graphs == [True, True]
    graphs.clear()
    policy.unroll(rollout, 3, 4)
    assert graphs == [True]


# ---- DRaFT-LV ----


def test_draft_lv_without_noised_passes_is_draft_1() -> None:
    policy = Policy(toy(), lora_rank=None)
    plain, same = (trained(policy, algorithm, config())[1] for algorithm in (DRaFT(), DRaFTLV(noised=0)))
    assert all(torch.equal(plain[name], same[name]) for name in plain)


def test_draft_lv_is_the_mean_over_the_picture_and_its_noised_copies() -> None:
    """x0 has no graph where it is noised again; each pass has noise of its own."""
    policy = Policy(toy(), lora_rank=None)
    batch, found, _ = trained(policy, DRaFTLV(noised=2), config())
    last = STEPS - 1

    def loss(w: dict[str, Tensor], rollout: Rollout, condition: Tensor) -> Tensor:
        noise = [ForwardProcess(rollout, key("live", 0, 0, 0, number)).noise(last).double() for number in (1, 2)]
        assert not torch.equal(*noise)
        clean = rollout.latents[-1].double()
        states = [rollout.latents[last].double()]
        states += [sqrt(ALPHAS[last]) * clean + sqrt(1 - ALPHAS[last]) * eps for eps in noise]
        return -torch.stack([rewards(finished(w, x, last, condition)).mean() for x in states]).mean()

    assert_close(found, by_hand(policy, batch, loss))


def test_draft_lv_needs_a_step_before_the_last() -> None:
    with pytest.raises(ConfigError, match="num_inference_steps of 2 or more"):
        DRaFTLV().passes(1, np.random.default_rng(0))


# ---- ReFL ----


def test_refl_by_hand() -> None:
    """coefficient·max(0, target - r) of x̂0 at one step; the target lies in the middle of the rewards."""
    policy = Policy(toy(), lora_rank=None)
    algorithm = ReFL(earliest=0.5, target=126.0, coefficient=0.5, kernel=ODE())
    (one,) = algorithm.passes(STEPS, np.random.default_rng((0, 0, 0)))
    batch, found, numbers = trained(policy, algorithm, config())
    losses: list[Tensor] = []

    def loss(w: dict[str, Tensor], rollout: Rollout, condition: Tensor) -> Tensor:
        x0, _ = predicted(w, rollout.latents[one.start].double(), one.start, condition)
        losses.append(0.5 * (126.0 - rewards(x0)).clamp(min=0))
        return losses[-1].mean()

    assert_close(found, by_hand(policy, batch, loss))
    values = torch.cat(losses).detach()
    assert 0 < int((values > 0).sum()) < len(values)
    assert numbers["policy/loss"] == pytest.approx(float(values.mean()), rel=1e-4)
    assert numbers["policy/below_target"] == float((values > 0).double().mean())


def test_refl_takes_each_of_the_late_steps_equally_often() -> None:
    """30 to 39 of 40, as in the reference; within five standard errors."""
    random = np.random.default_rng(0)
    passes = [one for _ in range(5000) for one in ReFL().passes(40, random)]
    assert all(one == Pass(one.start, one.start + 1) for one in passes)
    counts = np.bincount([one.start for one in passes], minlength=40)
    assert counts[:30].sum() == 0
    assert np.abs(counts[30:] - 500).max() < 5 * np.sqrt(5000 * 0.1 * 0.9)
    assert ReFL().passes(1, random) == [Pass(0, 1)]


# ---- AlignProp ----


def test_align_prop_draws_the_number_of_steps_uniformly() -> None:
    random = np.random.default_rng(0)
    passes = [one for _ in range(5000) for one in AlignProp().passes(10, random)]
    assert all(one == Pass(one.start) for one in passes)
    counts = np.bincount([10 - one.start for one in passes], minlength=11)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 500).max() < 5 * np.sqrt(5000 * 0.1 * 0.9)


def test_align_prop_draws_the_number_of_steps_from_a_clipped_normal() -> None:
    """N(8, 5) of 50 steps: the mass below 1.5 goes to 1, and 8 has that between 7.5 and 8.5."""
    random, algorithm = np.random.default_rng(0), AlignProp(truncation="normal")
    lasts = np.array([50 - algorithm.passes(50, random)[0].start for _ in range(5000)])
    assert lasts.min() == 1
    for last, below, above in ((1, -np.inf, 1.5), (8, 7.5, 8.5), (13, 12.5, 13.5)):
        mass = 0.5 * (erf((above - 8) / 5 / sqrt(2)) - erf((below - 8) / 5 / sqrt(2)))
        assert (lasts == last).mean() == pytest.approx(mass, abs=5 * sqrt(mass * (1 - mass) / 5000))


@pytest.mark.parametrize("target", [None, 126.0])
def test_align_prop_by_hand(target: float | None) -> None:
    policy, algorithm = Policy(toy(), lora_rank=None), AlignProp(target=target)
    (one,) = algorithm.passes(STEPS, np.random.default_rng((0, 0, 0)))
    batch, found, _ = trained(policy, algorithm, config())

    def loss(w: dict[str, Tensor], rollout: Rollout, condition: Tensor) -> Tensor:
        r = rewards(finished(w, rollout.latents[one.start].double(), one.start, condition))
        return 0.01 * (-r if target is None else (r - target).abs()).mean()

    assert_close(found, by_hand(policy, batch, loss))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AlignProp(truncation="half"), "truncation is 'half'; it must be uniform or normal"),  # type: ignore[arg-type]
        (lambda: AlignProp(mean=50), "mean is 50; it must be between 0 and 1, a share of the steps"),
        (lambda: ReFL(earliest=1.0), "earliest is 1.0; it must be at least 0 and less than 1"),
        (lambda: ReFL(coefficient=0.0), "coefficient is 0.0; it must be more than 0"),
        (lambda: DRaFTLV(noised=-1), "noised is -1; it must be 0 or more"),
    ],
)
def test_settings_are_checked(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


# ---- all of them ----


@pytest.mark.parametrize("algorithm", ALL, ids=lambda a: type(a).__name__)
def test_the_reward_rises(algorithm: RewardGradient) -> None:
    """On the same initial noise, drawn from nothing seen in training; by more than the spread of the pictures."""
    policy = Policy(toy(), lora_rank=None)

    def held_out() -> np.ndarray:
        return np.array(brightness(policy.sample(["a cat"] * 16, seed=9, kernel=ODE()).images, [], []))

    before = held_out()
    for _ in train(policy, ["a cat", "a dog"], glow, algorithm, config(epochs=12, learning_rate=3e-2, batch_size=8)):
        pass
    assert (held_out() - before).mean() > 2 * before.std()


@pytest.mark.parametrize("algorithm", [*ALL, DRaFT(last_steps=2, kernel=DDIM(1.0))], ids=lambda a: type(a).__name__)
def test_the_gradient_does_not_depend_on_the_batch_size(algorithm: RewardGradient) -> None:
    policy = Policy(toy(), lora_rank=None)
    whole, halves = (trained(policy, algorithm, config(batch_size=size))[1] for size in (8, 2))
    assert_close(whole, halves)


def test_a_picture_without_a_score_weighs_nothing() -> None:
    """Even where the reward's own graph answers a gradient of 0 with NaN, as 0/0 does."""

    def patchy(pictures: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
        there = torch.tensor([prompt != "a dog" for prompt in prompts]).float()
        return glow(pictures * there[:, None, None, None], prompts, metadata) / there

    patchy.differentiable = True  # type: ignore[attr-defined]
    policy = Policy(toy(), lora_rank=None)
    batch, found, numbers = trained(policy, DRaFT(), config(), patchy)
    kept = torch.tensor([prompt != "a dog" for prompt in batch.prompts])
    assert 0 < int(kept.sum()) < 8
    assert numbers["policy/loss"] == numbers["policy/loss"]
    w, parts = weights(policy), []
    for chunk in batch.chunks:
        condition = policy.pipe.encode_prompt(chunk.rollout.prompts).double()
        parts.append(rewards(finished(w, chunk.rollout.latents[3].double(), 3, condition)))
    (-torch.cat(parts)[kept].mean()).backward()
    assert_close(found, {name: value.grad for name, value in w.items() if value.grad is not None})


def test_a_live_picture_may_lack_the_score_that_the_recorded_one_had() -> None:
    def strict(pictures: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
        values = glow(pictures, prompts, metadata)
        return values.masked_fill(torch.arange(len(values)) == 1, torch.nan) if torch.is_grad_enabled() else values

    strict.differentiable = True  # type: ignore[attr-defined]
    policy, settings = Policy(toy(), lora_rank=None), config(samples_per_epoch=4)
    batch, found, _ = trained(policy, DRaFT(), settings, strict)
    assert batch.scores.valid.all()
    expected = by_hand(
        policy,
        batch,
        lambda w, rollout, c: -rewards(finished(w, rollout.latents[3].double(), 3, c))[[0, 2, 3]].sum() / 4,
    )
    assert_close(found, expected)


# ---- what is refused, and when ----


class Unused(ToyPipeline):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing may be drawn")


@pytest.mark.parametrize("algorithm", ALL, ids=lambda a: type(a).__name__)
def test_a_reward_without_a_gradient_is_refused_before_anything_is_drawn(algorithm: RewardGradient) -> None:
    with pytest.raises(ConfigError, match="differentiates the reward, and jpeg_compressibility is not differentiable;"):
        next(train(Policy(toy(Unused)), PROMPTS, jpeg_compressibility, algorithm, config()))


def detached(pictures: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return glow(pictures.detach(), prompts, metadata)


def flat(pictures: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return (pictures * 255).round().mean((1, 2, 3))


def one_number(pictures: Tensor, prompts: Any, metadata: Any) -> Any:
    return pictures.mean((1, 2, 3)) if not torch.is_grad_enabled() else pictures.mean()


def broken(pictures: Tensor, prompts: Any, metadata: Any) -> Any:
    return pictures.mean((1, 2, 3)) if not torch.is_grad_enabled() else pictures.mean(9)


def steep(pictures: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return (pictures - pictures.detach()).sqrt().mean((1, 2, 3))


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (detached, "reward detached has no gradient with respect to the pictures; compute it with torch alone"),
        (flat, "the gradient of reward flat is 0 in every pixel of 4 picture"),
        (one_number, r"reward one_number must return a tensor of shape \(1,\), one number per picture"),
        (broken, "reward broken failed on 1 picture.* with a gradient: IndexError: .*; mend it"),
        (steep, "the gradient of reward steep is not finite; mend it"),
    ],
)
def test_preflight_refuses_a_reward_that_has_no_use(reward: Any, says: str) -> None:
    reward.differentiable = True
    policy = Policy(toy(), lora_rank=None)
    with pytest.raises(RewardError, match=says):
        next(train(policy, PROMPTS, reward, DRaFT(), config()))


def test_preflight_refuses_what_is_random_and_a_graph_that_ends() -> None:
    policy = Policy(toy(dropout=0.5), lora_rank=None)
    policy.pipe.denoiser.train()
    with pytest.raises(
        PipelineError, match=r"gives another picture .*; turn off what is random in it, such as dropout"
    ):
        preflight(policy, PROMPTS, glow, DRaFT(last_steps=2, kernel=DDIM(1.0)), {})

    class Cut(ToyPipeline):
        def decode(self, latents: Tensor) -> Tensor:
            return super().decode(latents).detach()

    with pytest.raises(PipelineError, match="returns no pictures that a gradient can flow through"):
        preflight(Policy(toy(Cut), lora_rank=None), PROMPTS, glow, DRaFT(), {})


@pytest.mark.parametrize("algorithm", ALL, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("rank", [None, 2])
def test_preflight_passes_what_is_sound_and_leaves_no_trace(algorithm: RewardGradient, rank: int | None) -> None:
    policy = Policy(toy(), lora_rank=rank)
    before = {name: value.clone() for name, value in policy.pipe.denoiser.state_dict().items()}
    preflight(policy, PROMPTS, glow, algorithm, {})
    assert all(torch.equal(value, before[name]) for name, value in policy.pipe.denoiser.state_dict().items())
    assert all(p.grad is None for p in policy.pipe.denoiser.parameters())


def test_preflight_of_noised_states_asks_for_no_density_but_for_a_gradient() -> None:
    class Denoising(DDPO):
        walk = "noised"

    algorithm = replace(Denoising())
    object.__setattr__(algorithm, "kernel", ODE())
    policy = Policy(toy(), lora_rank=2)
    preflight(policy, PROMPTS, brightness, algorithm, {})
    assert all(p.grad is None for p in policy.parameters.values())

    class Stopped(ToyPipeline):
        def denoise(self, latents: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return super().denoise(latents, t, condition).detach()

    with pytest.raises(PipelineError, match="no gradient reaches the denoiser of Stopped at step 0"):
        preflight(Policy(toy(Stopped), lora_rank=2), PROMPTS, brightness, algorithm, {})


# ---- real pipelines: guidance, bfloat16, gradient checkpointing ----

PIPELINES = [tiny.tiny_sd, tiny.tiny_sdxl, tiny.tiny_sd3, tiny.tiny_flux, tiny.tiny_pixart]
CALL = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 16, "width": 16}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("make", PIPELINES, ids=lambda make: make.__name__)
def test_gradients_reach_the_adapters_alone_and_checkpointing_changes_nothing(make: Any, precision: Any) -> None:
    policy = Policy(make(), lora_rank=2, mixed_precision=precision)
    call = {**CALL, "use_resolution_binning": False} if make is tiny.tiny_pixart else CALL
    rollout = policy.sample(["a cat", "a dog"], kernel=ODE(), output_type="pt", **call)
    found = []
    for _ in range(2):
        pictures = policy.unroll(rollout, 1)
        torch.testing.assert_close(pictures.detach(), rollout.images.float(), atol=1e-6, rtol=0)
        glow(pictures, [], []).mean().backward()
        found.append({name: p.grad.clone() for name, p in policy.parameters.items() if p.grad is not None})
        for parameter in policy.parameters.values():
            parameter.grad = None
        for module in policy.denoisers.values():
            module.enable_gradient_checkpointing()
        policy.pipe.vae.enable_gradient_checkpointing()
    assert_close(found[1], found[0])
    parts = [part for part in policy.pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert not any(p.grad is not None for part in parts for p in part.parameters())


@pytest.mark.skipif(not (FOLDER / "model" / "model_index.json").exists(), reason="the shipped model is not there")
def test_a_recipe_checkpoints_the_decoder_too() -> None:
    policy = building.policy(Model(gradient_checkpointing=True, device="cpu"), seed=0)
    assert policy.pipe.unet.is_gradient_checkpointing
    assert policy.pipe.vae.is_gradient_checkpointing
