"""The six algorithms of `tiller.matching` on real rollouts: gradients, copies of the weights, groups, and learning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from tiller.algorithms import AWM, CRD, D3PO, DGPO, NFT, Algorithm, DiffusionDPO
from tiller.collect import Batch, collect
from tiller.distributed import World
from tiller.kernels import DDIM, ODE
from tiller.metrics import Clock
from tiller.policy import Policy, Step
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.training import train
from tiller.types import ConfigError, Prompt, Scores
from tiller.update import update
from tiller.walks import Walker
from toy import brightness, flow_toy, toy

PROMPTS = [Prompt("a cat"), Prompt("a dog"), Prompt("an owl")]
ALL = [NFT, AWM, DGPO, CRD, DiffusionDPO, D3PO]
TINY = {"num_inference_steps": 3, "height": 16, "width": 16, "guidance_scale": 2.0}


def config(**changes: Any) -> TrainConfig:
    sizes = {"epochs": 1, "samples_per_epoch": 8, "group_size": 4, "batch_size": 4, "max_grad_norm": 1e9}
    return TrainConfig(**{**sizes, **changes})


def in_turn(values: list[float | None]) -> Any:
    """A reward that deals out these values, over and over."""
    return lambda images, prompts, metadata: [values[index % len(values)] for index in range(len(images))]


def sampled(policy: Policy, algorithm: Algorithm, sampling: dict[str, Any] | None = None, reward: Any = None) -> Batch:
    state = TrainState(policy, config(), algorithm)
    reward = reward or in_turn([1.0, 4.0, 2.0, 2.5])
    return collect(policy, PROMPTS, reward, algorithm, config(), sampling or {}, state, World(), Clock())


def updated(
    policy: Policy, batch: Batch, algorithm: Algorithm, moved: float = 0.0
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradient of an epoch's one update, and its metrics; the weights are `moved` away from all of their copies."""
    state, found = TrainState(policy, config(), algorithm), []
    with torch.no_grad():
        for parameter in state.parameters.values():
            parameter += moved

    def look(settings: TrainConfig) -> float:
        found.append({name: p.grad.clone() for name, p in state.parameters.items() if p.grad is not None})
        return 1.0

    state.step = look  # type: ignore[method-assign]
    metrics = update(policy, batch, algorithm, config(), state, World())
    with torch.no_grad():
        for parameter in state.parameters.values():
            parameter.grad = None
            parameter -= moved
    return found[0], metrics


def shown(policy: Policy, batch: Batch, algorithm: Algorithm, steps: list[int]) -> list[tuple[Step, Tensor]]:
    """Steps of the first chunk as the loss sees them, each with the gradient of its summed loss by its prediction."""
    walker, found = Walker(policy, algorithm, TrainState(policy, config(), algorithm), 0), []
    advantages = torch.from_numpy(batch.advantages[:4]).float()

    def look(step: Step) -> None:
        loss, _ = algorithm.loss(step, advantages.nan_to_num())
        found.append((step, torch.autograd.grad(loss.sum(), step.prediction)[0]))

    walker.walk(batch.chunks[0], steps, 0, look)
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 1e-6
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * largest, msg=name)


# ---- T12: one gradient at the start, through a pipeline ----


@dataclass(frozen=True)
class EqualNoise(AWM):
    """AWM under DGPO's noise."""

    shared_noise: ClassVar[bool] = True


PLAIN = {"kl_coefficient": 0.0}
PLAIN_AWM = {
    **PLAIN,
    "weighting": "uniform",
    "ema_coefficient": 0.0,
    "advantage_max": 5.0,
    "train_timesteps": 4,
    "first_timestep": 0,
    "timestep_fraction": 1.0,
}


@pytest.mark.parametrize(
    ("build", "sampling", "rank"),
    [(toy, {}, None), (flow_toy, {}, None), (tiny.tiny_sd, TINY, 4), (tiny.tiny_flow, TINY, 4)],
)
def test_at_the_start_four_algorithms_have_one_gradient(build: Any, sampling: dict[str, Any], rank: int | None) -> None:
    policy = Policy(build(), lora_rank=rank)
    matching = AWM(**PLAIN_AWM)
    if sampling:
        matching = replace(matching, train_timesteps=3)
    batch = sampled(policy, NFT(), sampling)
    expected, _ = updated(policy, batch, matching)
    for algorithm in (NFT(form="prediction", beta=0.7, **PLAIN), CRD(adaptive=False, beta=0.7, **PLAIN)):
        assert_close(updated(policy, batch, algorithm)[0], expected)
    equal, _ = updated(policy, batch, EqualNoise(**{**PLAIN_AWM, "train_timesteps": matching.train_timesteps}))
    group = DGPO(clip_range=None, train_timesteps=99, timestep_fraction=1.0, **PLAIN)
    found, metrics = updated(policy, batch, group)
    assert_close({name: 2 * value for name, value in found.items()}, equal)
    assert metrics["policy/group_weight"] == 0.5


def test_the_gradient_is_that_of_the_weighted_denoising_error() -> None:
    """Against the denoiser called by hand on states noised by hand."""
    policy = Policy(flow_toy(), lora_rank=None)
    algorithm = AWM(**PLAIN_AWM)
    batch = sampled(policy, NFT())
    found, _ = updated(policy, batch, algorithm)
    losses = []
    for chunk, advantages in zip(batch.chunks, batch.advantages.reshape(2, 4), strict=True):
        walker = Walker(policy, algorithm, TrainState(policy, config(), algorithm), 0)
        states: list[Step] = []
        walker.walk(chunk, [0, 1, 2, 3], 0, states.append)
        for step in states:
            sigma = float(policy.pipe.scheduler.sigmas[step.index])
            x = (1 - sigma) * step.clean + sigma * step.noise
            condition = policy.pipe.encode_prompt(chunk.prompts)
            output = policy.pipe.denoiser(x, step.timestep, condition)
            error = (output - (step.noise - step.clean)).square().flatten(1).mean(1)
            losses.append((torch.tensor(advantages).float() * error).sum() / 32)
    torch.stack(losses).sum().backward()
    assert_close(found, {name: p.grad for name, p in policy.parameters.items() if p.grad is not None}, 1e-4)


# ---- T7 and ratios: what must be nothing before the first update ----


@pytest.mark.parametrize("kind", [NFT, AWM, DGPO, CRD])
@pytest.mark.parametrize("rank", [4, None])
def test_the_penalty_is_zero_at_the_start_and_has_no_gradient(kind: Any, rank: int | None) -> None:
    policy = Policy(flow_toy(), lora_rank=rank)
    batch = sampled(policy, kind())
    free, _ = updated(policy, batch, kind(kl_coefficient=0.0))
    bound, metrics = updated(policy, batch, kind(kl_coefficient=1e6))
    assert metrics["policy/kl_prediction"] == 0
    assert any(float(value.abs().max()) > 0 for value in free.values())
    assert all(torch.equal(bound[name], value) for name, value in free.items())


@pytest.mark.parametrize("kind", [NFT, AWM, DGPO, CRD])
def test_the_penalty_pulls_back_to_the_reference(kind: Any) -> None:
    """With weights away from it: a step against the penalty's gradient makes it smaller."""
    policy = Policy(flow_toy(), lora_rank=4)
    batch = sampled(policy, kind())
    for name, parameter in policy.parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    gradient, before = updated(policy, batch, kind(kl_coefficient=1e6))
    assert before["policy/kl_prediction"] > 0
    with torch.no_grad():
        length = sum(float(value.square().sum()) for value in gradient.values()) ** 0.5
        for name, parameter in policy.parameters.items():
            parameter -= 1e-2 / length * gradient[name]
    _, after = updated(policy, batch, kind(kl_coefficient=1e6))
    assert after["policy/kl_prediction"] < before["policy/kl_prediction"]


def test_awms_ratio_is_one_before_any_update_and_its_loss_is_minus_the_advantage() -> None:
    policy = Policy(toy(), lora_rank=4)
    batch = sampled(policy, AWM())
    plain = AWM(kl_coefficient=0.0, ema_coefficient=0.0)
    on, metrics = updated(policy, batch, plain)
    off, other = updated(policy, batch, replace(plain, off_policy=True))
    assert other["policy/approx_kl"] == other["policy/clip_fraction"] == 0
    assert metrics["policy/loss"] == pytest.approx(-batch.advantages.mean(), abs=1e-6)
    assert all(torch.equal(off[name], value) for name, value in on.items())
    assert float(np.abs(batch.advantages).max()) <= 1  # ±5 scaled to ±1


def test_awms_ratio_is_taken_to_the_weights_that_drew_the_samples() -> None:
    policy = Policy(toy(), lora_rank=None)
    settings = config(epochs=2, learning_rate=1e-3)
    algorithm = AWM(off_policy=True, inner_epochs=2)
    states = [(r.metrics["policy/approx_kl"], r.state) for r in train(policy, PROMPTS, brightness, algorithm, settings)]
    assert all(kl > 0 for kl, _ in states)
    state = states[-1][1]
    assert all(torch.equal(state.copies["old"][name], p) for name, p in policy.parameters.items())


@pytest.mark.parametrize("kind", [DiffusionDPO, D3PO])
@pytest.mark.parametrize("build", [toy, flow_toy])
def test_pairs_start_at_log_two_and_teach_by_the_best_and_the_worst_alone(kind: Any, build: Any) -> None:
    policy = Policy(build(), lora_rank=4)
    batch = sampled(policy, kind())
    assert updated(policy, batch, kind())[1]["policy/loss"] == pytest.approx(math.log(2), abs=1e-6)
    steps = shown(policy, batch, kind(), batch.chunks[0].rollout.steps if kind is D3PO else [0, 1, 2, 3])
    assert len(steps) >= 3
    for _, gradient in steps:  # of the rewards 1, 4, 2, 2.5
        assert [bool(row.any()) for row in gradient] == [True, True, False, False]


def test_d3pos_ratio_is_to_the_model_before_training() -> None:
    """Against the log-probabilities recorded with the adapters off."""
    policy = Policy(toy(), lora_rank=4)
    batch = sampled(policy, D3PO())
    recorded = batch.chunks[0].rollout.log_probs
    for name, parameter in policy.parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01, generator=torch.Generator().manual_seed(0))
    walker, found = Walker(policy, D3PO(), TrainState(policy, config(), D3PO()), 0), []

    def look(step: Step) -> None:
        _, numbers = D3PO().loss(step, torch.arange(4.0))
        ratio = step.log_prob - recorded[:, step.index]
        found.append((float(numbers["policy/margin"]), float((ratio[3] - ratio[0]).detach())))

    walker.walk(batch.chunks[0], batch.chunks[0].rollout.steps, 0, look)
    assert max(abs(expected) for _, expected in found) > 1e-4
    for margin, expected in found:
        assert margin == pytest.approx(expected, abs=1e-6)


def test_nft_of_the_reference_code_weighs_steps_by_their_noise() -> None:
    """With r = 1 and β = 1, x0's error is σ·(v - V): the loss is 5·σ·mean(e²)/mean|e| of the velocity's error e."""
    policy = Policy(flow_toy(), lora_rank=None)
    algorithm = NFT(kl_coefficient=0.0)
    batch = sampled(policy, algorithm)
    walker = Walker(policy, algorithm, TrainState(policy, config(), algorithm), 0)

    def look(step: Step) -> None:
        found, _ = algorithm.loss(step, torch.full((4,), 5.0))
        error = (step.prediction - step.target).flatten(1)
        sigma = float(policy.pipe.scheduler.sigmas[step.index])
        torch.testing.assert_close(found, 5 * sigma * error.square().mean(1) / error.abs().mean(1))

    walker.walk(batch.chunks[0], [0, 1, 2, 3], 0, look)


# ---- who is compared with whom ----


@pytest.mark.parametrize("build", [toy, flow_toy])
def test_a_groups_members_share_their_noise(build: Any) -> None:
    """Bit for bit where x_t is made of x0 and ε; at the first step the pipeline's whole state is shared."""
    policy = Policy(build(), lora_rank=4)
    for steps in ([0, 1, 2, 3], [2]):
        for step, _ in shown(policy, sampled(policy, DGPO()), DGPO(), steps):
            values = step.sample if step.index == 0 else step.noise
            assert all(torch.equal(values[0], row) for row in values)
    apart = shown(policy, sampled(policy, CRD()), CRD(), [0, 1])
    assert not torch.equal(apart[0][0].sample[0], apart[0][0].sample[1])
    assert not torch.equal(apart[1][0].noise[0], apart[1][0].noise[1])


@dataclass(frozen=True)
class Watched(DiffusionDPO):
    """Writes down the groups it is shown, and the gradient of each prediction."""

    seen: list[tuple[list[int], list[bool]]] = field(default_factory=list)

    def loss(self, step: Step, advantages: Tensor) -> Any:
        loss, numbers = super().loss(step, advantages)
        assert step.groups is not None
        known = step.groups >= 0
        (gradient,) = torch.autograd.grad(loss[known].sum(), step.prediction, retain_graph=True)
        self.seen.append((step.groups.tolist(), [bool(row.any()) for row in gradient]))
        return loss, numbers


def test_a_sample_without_a_score_is_in_no_pair() -> None:
    """The other way round it would be the worst of its group: its advantage is put down as 0."""
    policy, algorithm = Policy(toy(), lora_rank=4), Watched()
    batch = sampled(policy, algorithm, reward=in_turn([None, 4.0, 2.0, 2.5]))
    updated(policy, batch, algorithm)
    assert {tuple(groups) for groups, _ in algorithm.seen} == {(-1, 0, 0, 0), (-1, 1, 1, 1)}
    assert all(used == [False, True, True, False] for _, used in algorithm.seen)


@pytest.mark.parametrize("kind", [CRD, DGPO])
def test_a_sample_without_a_score_changes_nobody_elses_loss(kind: Any) -> None:
    policy, found = Policy(flow_toy(), lora_rank=None), []
    algorithm = kind(**PLAIN)
    batch = sampled(policy, algorithm)
    batch.advantages[:] = [np.nan, 1.0, -0.4, -0.6] * 2
    expected, _ = updated(policy, batch, algorithm, moved=0.05)
    for chunk in batch.chunks:  # whatever its picture is
        last = chunk.rollout.records[-1]
        changed = last.action.clone()
        changed[0] += 100
        found.append(
            replace(
                chunk,
                rollout=replace(chunk.rollout, records=(*chunk.rollout.records[:-1], replace(last, action=changed))),
            )
        )
    assert_close(updated(policy, replace(batch, chunks=found), algorithm, moved=0.05)[0], expected)


@pytest.mark.parametrize("kind", [DiffusionDPO, D3PO])
def test_prompts_whose_pictures_all_score_alike_are_left_out(kind: Any) -> None:
    values = np.array([3.0, 3.0, 1.0, 2.0, np.nan, 5.0])
    found = kind().advantages(Scores(values), ["a", "a", "b", "b", "c", "c"], {})
    assert np.isnan(found).tolist() == [True, True, False, False, True, True]
    assert found[3] > 0 > found[2]


@pytest.mark.parametrize("kind", [NFT, AWM, DGPO, CRD])
def test_advantages_are_relative_to_the_group_and_clipped(kind: Any) -> None:
    values = np.array([0.0] * 63 + [1000.0] + [7.0] * 4 + [np.nan] * 2)
    found = kind().advantages(Scores(values), ["a"] * 64 + ["b"] * 6, {})
    assert found[63] == (1.0 if kind is AWM else 5.0)
    assert (found[64:68] == 0).all()
    assert np.isnan(found[68:]).all()


# ---- which steps ----


def test_awm_trains_one_step_from_each_part_of_the_schedule_but_the_first_step() -> None:
    """14 steps, 6 parts of steps 1 to 11: the reference's set-up."""
    random = np.random.default_rng(0)
    drawn = [AWM().steps(range(14), random) for _ in range(200)]
    edges = np.linspace(1, 12, 7).astype(int)
    for steps in drawn:
        assert [edges[part] <= step < edges[part + 1] for part, step in enumerate(steps)] == [True] * 6
    assert {step for steps in drawn for step in steps} == set(range(1, 12))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_awm_makes_do_with_short_schedules(count: int) -> None:
    random = np.random.default_rng(0)
    drawn = {step for _ in range(50) for step in AWM().steps(range(count), random)}
    assert drawn == {1: {0}, 2: {1}, 3: {1}, 4: {1, 2}}[count]


def test_dgpo_trains_four_of_the_seven_noisiest_of_ten() -> None:
    random = np.random.default_rng(0)
    drawn = [DGPO().steps(range(10), random) for _ in range(200)]
    assert all(len(set(steps)) == 4 and steps == sorted(steps) for steps in drawn)
    assert {step for steps in drawn for step in steps} == set(range(7))


# ---- copies of the weights ----


def test_nft_samples_from_the_copy_that_follows_once_per_epoch() -> None:
    """decay 0 after the first epoch, then min(0.25·n, 0.5): copy ← decay·copy + (1 - decay)·weights."""
    policy = Policy(toy(), lora_rank=None)
    algorithm = NFT(decay_slope=0.25, decay_most=0.5)
    expected = {name: p.detach().clone() for name, p in policy.parameters.items()}
    settings = config(epochs=4, learning_rate=1e-2, updates_per_epoch=2)
    for report, decay in zip(train(policy, PROMPTS, brightness, algorithm, settings), (0, 0.25, 0.5, 0.5), strict=True):
        for name, p in policy.parameters.items():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
            torch.testing.assert_close(report.state.copies["old"][name], expected[name], rtol=1e-5, atol=1e-6)
    state = report.state
    batch = collect(policy, PROMPTS, brightness, algorithm, settings, {}, state, World(), Clock())
    with state.using("old"):
        again = policy.sample(batch.chunks[0].prompts, kernel=ODE(), samples=batch.chunks[0].rollout.samples)
    assert torch.equal(again.latents[-1], batch.chunks[0].rollout.latents[-1])
    other = policy.sample(batch.chunks[0].prompts, kernel=ODE(), samples=batch.chunks[0].rollout.samples)
    assert not torch.equal(other.latents[-1], batch.chunks[0].rollout.latents[-1])


@pytest.mark.parametrize(
    "algorithm", [NFT(), AWM(off_policy=True, inner_epochs=2), CRD(), DGPO()], ids=lambda a: type(a).__name__
)
def test_a_run_that_was_put_back_goes_on_bit_for_bit(algorithm: Algorithm) -> None:
    settings = config(epochs=4, learning_rate=1e-2)
    policy, metrics, checkpoint = Policy(toy(), lora_rank=4), [], None
    for report in train(policy, PROMPTS, brightness, algorithm, settings):
        metrics.append(report.metrics)
        if report.epoch == 2:
            checkpoint = {k: v.clone() for k, v in report.state.tensors().items()}, report.state.data()
    assert checkpoint is not None
    policy = Policy(toy(), lora_rank=4)
    state = TrainState(policy, settings, algorithm)
    state.load(*checkpoint)
    again = train(policy, PROMPTS, brightness, algorithm, settings, state=state)
    assert [report.metrics for report in again] == metrics[2:]


def test_only_the_copies_that_a_loss_reads_are_asked_for() -> None:
    assert NFT(kl_coefficient=0.0).needs == ("old",)
    assert CRD(kl_coefficient=0.0).needs == ("old",)
    assert AWM(kl_coefficient=0.0, ema_coefficient=0.0).needs == ()
    assert AWM(off_policy=True).needs == ("old", "ema", "reference")
    assert DGPO(clip_range=None).needs == ("reference",)
    assert DGPO(anchor="ema", kl_coefficient=0.0).needs == ("ema",)
    assert DGPO(clip_range=None).copies == AWM(ema_coefficient=0.0).copies == {}


# ---- bad input ----


@pytest.mark.parametrize("kind", ALL)
def test_groups_of_one_are_refused(kind: Any) -> None:
    settings = config(group_size=1)
    with pytest.raises(
        ConfigError, match=r"compares pictures of one prompt, and train.group_size is 1; make it at least 2"
    ):
        next(train(Policy(toy()), PROMPTS, brightness, kind(), settings))


@pytest.mark.parametrize("kind", [DGPO, CRD, DiffusionDPO, D3PO])
def test_batches_that_split_a_group_are_refused(kind: Any) -> None:
    with pytest.raises(ConfigError, match=r"make train.batch_size \(2\) a multiple of train.group_size \(4\)"):
        next(train(Policy(toy()), PROMPTS, brightness, kind(), config(batch_size=2)))


def test_awm_on_policy_takes_one_update_per_epoch() -> None:
    with pytest.raises(ConfigError, match="AWM with off_policy"):
        next(train(Policy(toy()), PROMPTS, brightness, AWM(), config(updates_per_epoch=2)))
    with pytest.raises(ConfigError, match="inner_epochs is 2; it must be 1, or off_policy true"):
        AWM(inner_epochs=2)


def test_d3po_needs_a_density() -> None:
    with pytest.raises(ConfigError, match="D3PO needs log-probabilities"):
        D3PO(kernel=ODE())
    assert D3PO(kernel=DDIM(0.5)).kernel == DDIM(0.5)


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        (NFT, "beta", 0.0),
        (NFT, "kl_coefficient", -1.0),
        (NFT, "timestep_fraction", 0.0),
        (AWM, "power", 0.0),
        (AWM, "train_timesteps", 0),
        (DGPO, "clip_range", 0.0),
        (DGPO, "train_timesteps", 0),
        (CRD, "temperature", 0.0),
        (CRD, "kl_floor", 1.5),
        (DiffusionDPO, "beta", 0.0),
        (D3PO, "clip_range", 1.0),
        (D3PO, "inner_epochs", 0),
    ],
)
def test_settings_that_cannot_train_are_refused(kind: Any, setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{setting} is {value}; it must be"):
        kind(**{setting: value})


# ---- it learns ----

LEARNING = [  # pipeline, algorithm, learning rate, epochs
    (toy, NFT(), 0.03, 15),
    (toy, AWM(first_timestep=0), 0.03, 15),  # of the toy's four steps the first decides most
    (toy, DGPO(), 0.03, 15),
    (toy, CRD(), 0.03, 15),
    (toy, DiffusionDPO(), 0.03, 15),
    (toy, D3PO(clip_range=0.5), 0.01, 30),
    (flow_toy, NFT(), 0.03, 15),
    (flow_toy, NFT(form="prediction"), 0.03, 15),
    (flow_toy, AWM(), 0.03, 15),
    (flow_toy, DGPO(), 0.03, 15),
    (flow_toy, CRD(), 0.03, 15),
    (flow_toy, DiffusionDPO(), 0.03, 15),
    (flow_toy, D3PO(), 0.03, 15),
]


@pytest.mark.parametrize(("build", "algorithm", "rate", "epochs"), LEARNING)
def test_the_reward_rises(build: Any, algorithm: Algorithm, rate: float, epochs: int) -> None:
    """On the same initial noise, drawn from nothing seen in training, by far more than chance."""
    policy = Policy(build(), lora_rank=None)

    def scores() -> np.ndarray:
        return np.array(brightness(policy.sample(["a cat"] * 32, seed=9, kernel=algorithm.kernel).images, [], []))

    before = scores()
    sizes = {"samples_per_epoch": 64, "group_size": 8, "batch_size": 64, "max_grad_norm": 1.0}
    settings = config(epochs=epochs, learning_rate=rate, **sizes)
    for _ in train(policy, ["a cat", "a dog"], brightness, algorithm, settings):
        pass
    gain = scores() - before
    assert gain.mean() > 5
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5
