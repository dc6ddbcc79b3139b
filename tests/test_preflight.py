"""Preflight: each fault is refused before the first update, in one sentence that names the cure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig, inject_adapter_in_model

from tiller.algorithms import DDPO
from tiller.algorithms.base import Algorithm
from tiller.kernels import DDIM, ODE, FlowSDE
from tiller.policy import Policy
from tiller.preflight import preflight
from tiller.types import PipelineError, Prompt, RewardError, TillerError
from toy import ToyPipeline, brightness, toy


def check(policy: Policy, reward: Any = brightness, algorithm: Algorithm | None = None, **sampling: Any) -> None:
    preflight(policy, [Prompt("a cat")], reward, algorithm or DDPO(), sampling)


def refusal(*arguments: Any, **named: Any) -> TillerError:
    with pytest.raises(TillerError) as caught:
        check(*arguments, **named)
    message = str(caught.value)
    assert message.endswith("."), message
    assert "\n" not in message
    return caught.value


# ---- what is sound passes, and leaves no trace ----


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("algorithm", [DDPO(), DDPO(kernel=FlowSDE(0.5)), DDPO(kernel=DDIM(0.3))])
def test_a_sound_pipeline_passes_and_is_left_as_it_was(rank: int | None, algorithm: Algorithm) -> None:
    policy = Policy(toy(), lora_rank=rank)
    before = {name: value.clone() for name, value in policy.pipe.denoiser.state_dict().items()}
    random = torch.get_rng_state()
    check(policy, algorithm=algorithm)
    assert all(torch.equal(value, before[name]) for name, value in policy.pipe.denoiser.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.parameters.values())
    assert torch.equal(torch.get_rng_state(), random)


def test_one_inference_step_is_enough() -> None:
    check(Policy(toy(), lora_rank=None), num_inference_steps=1)


# ---- rewards ----


class Judge:
    """1 where `succeeds(prompt, k-th picture of all)`, else 0; remembers what it was shown."""

    def __init__(self, succeeds: Callable[[str, int], bool]):
        self.seen: list[str] = []
        self.succeeds = succeeds

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
        first = len(self.seen)
        self.seen += prompts
        return [float(self.succeeds(prompt, first + index)) for index, prompt in enumerate(prompts)]


def test_a_constant_reward_is_refused_after_a_bounded_search() -> None:
    judge = Judge(lambda prompt, number: False)
    said = str(refusal(Policy(toy()), judge))
    assert "gave 0 to every one of 32 pictures of one prompt, so there is nothing to prefer" in said
    assert len(judge.seen) == 4 + 32


def test_a_rare_success_is_found_and_the_search_stops_there() -> None:
    """The ninth picture of the search, of the third prompt, is the first that succeeds."""
    judge = Judge(lambda prompt, number: number == 4 + 8)
    policy, steps = Policy(toy()), list[int]()
    sample = policy.sample

    def counted(*arguments: Any, **call: Any) -> Any:
        rollout = sample(*arguments, **call)
        steps.append(len(rollout.records))
        return rollout

    policy.sample = counted  # type: ignore[method-assign]
    prompts = [Prompt(f"prompt {number}") for number in range(80)]
    preflight(policy, prompts, judge, DDPO(), {"num_inference_steps": 9})
    assert judge.seen == ["prompt 0"] * 4 + ["prompt 0"] * 4 + ["prompt 10"] * 4 + ["prompt 20"] * 4
    assert steps == [4, 4, 9, 9, 9]  # the trial, its picture without noise, and three rounds in full


def test_a_reward_that_knows_only_the_prompt_is_refused() -> None:
    judge = Judge(lambda prompt, number: "cat" in prompt)
    prompts = [Prompt("a cat"), Prompt("a dog"), Prompt("a cat in a hat")]
    with pytest.raises(RewardError, match="same score to all pictures of a prompt, for 32 pictures of 3 prompts"):
        preflight(Policy(toy()), prompts, judge, DDPO(), {})


def test_one_prompt_is_searched_with_new_noise_each_time() -> None:
    seen: list[bytes] = []

    def late(images: Sequence[Any], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
        seen.extend(image.tobytes() for image in images)
        return [0.0] * len(images) if len(seen) <= 28 else [1.0] * len(images)

    check(Policy(toy()), late)  # within the prompt, though not within a round
    assert len(seen) == 32
    assert len(set(seen)) == 28  # the first round repeats the trial's noise, and the toy has four steps anyway


def test_a_judge_that_cannot_score_a_blur_passes_if_it_scores_the_finished_picture() -> None:
    calls: list[int] = []

    def strict(images: Sequence[Any], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float | None]:
        calls.append(len(images))
        return [None] * len(images) if len(calls) == 1 else list(brightness(images, prompts, metadata))

    check(Policy(toy()), strict, num_inference_steps=8)
    assert len(calls) == 2


def test_a_reward_without_any_score_is_refused() -> None:
    said = str(refusal(Policy(toy()), lambda images, prompts, metadata: [None] * len(images)))
    assert "gave no score to any of 32 pictures of one prompt (all None)" in said


def test_a_reward_of_the_wrong_length_is_refused() -> None:
    error = refusal(Policy(toy()), lambda images, prompts, metadata: [1.0])
    assert isinstance(error, RewardError)
    assert "1 score(s) for 4 image(s)" in str(error)


def test_a_reward_that_raises_is_refused_by_name() -> None:
    def broken(images: Any, prompts: Any, metadata: Any) -> Any:
        raise ZeroDivisionError("no pixels")

    error = refusal(Policy(toy()), broken)
    assert isinstance(error, RewardError)
    assert "broken" in str(error)
    assert "ZeroDivisionError: no pixels" in str(error)


# ---- pipelines ----


class Detached(ToyPipeline):
    def denoise(self, latents: Any, t: Any, condition: Any) -> Any:
        return super().denoise(latents, t, condition).detach()


class Forgetful(ToyPipeline):
    calls = 0

    def denoise(self, latents: Any, t: Any, condition: Any) -> Any:
        Forgetful.calls += 1
        return super().denoise(latents, t, condition) + Forgetful.calls


class Suspicious(ToyPipeline):
    """Behaves otherwise as soon as someone stands in its scheduler."""

    def denoise(self, latents: Any, t: Any, condition: Any) -> Any:
        return super().denoise(latents, t, condition) + (0.0 if type(self.scheduler) is DDIMScheduler else 0.5)


class Blind(ToyPipeline):
    """Runs its denoiser, but steps by something else."""

    def denoise(self, latents: Any, t: Any, condition: Any) -> Any:
        return latents * 0.1 + 0 * super().denoise(latents, t, condition)


class Overflowing(ToyPipeline):
    """As a half-precision decoder: finite latents, pictures of NaN."""

    def decode(self, latents: Any) -> Any:
        pixels = super().decode(latents).clone()
        pixels[:, 0, 0] = float("nan")
        return pixels


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Detached, "no gradient reaches the denoiser of Detached at step"),
        (Forgetful, "turn off what is random"),
        (Suspicious, "differs from the pipeline's own picture"),
        (Blind, "no gradient reaches any of the"),
        (Overflowing, "not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_pipeline_that_cannot_be_trained_is_refused(kind: type[ToyPipeline], says: str) -> None:
    error = refusal(Policy(toy(kind), lora_rank=None))
    assert isinstance(error, PipelineError)
    assert says in str(error)


def test_active_dropout_is_refused() -> None:
    """Its masks repeat when a call is repeated as a whole, but not when only some of its steps are."""
    policy = Policy(toy(dropout=0.5), lora_rank=None)
    check(policy)  # a policy's models are in evaluation mode
    policy.pipe.denoiser.train()
    assert "turn off what is random in it, such as dropout" in str(refusal(policy))


def test_a_kernel_without_density_is_refused() -> None:
    error = refusal(
        Policy(toy()), algorithm=cast(Algorithm, SimpleNamespace(kernel=ODE(), walk="recorded", differentiates=False))
    )  # DDPO refuses it itself
    assert "has a density under ODE" in str(error)
    assert "choose a kernel with noise" in str(error)


def test_gradients_that_are_not_finite_are_refused() -> None:
    policy = Policy(toy(), lora_rank=None)
    name, parameter = next(iter(policy.parameters.items()))
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    error = str(refusal(policy))
    assert f"the gradient of {name} is not finite" in error
    assert all(p.grad is None for p in policy.parameters.values())


@pytest.fixture
def adapted() -> Policy:
    """A policy whose pipeline carries an adapter of its own beside the fresh one, both switched on."""
    policy = Policy(toy(), lora_rank=4)
    other = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    inject_adapter_in_model(other, policy.pipe.denoiser, adapter_name="style")
    for layer in policy.pipe.denoiser.modules():
        if hasattr(layer, "set_adapter"):
            layer.set_adapter(["default", "style"])
    return policy


def test_an_adapter_that_is_already_there_is_refused(adapted: Policy) -> None:
    assert "fresh adapters change the picture" in str(refusal(adapted))


def test_adapters_that_have_been_trained_pass() -> None:
    """Going on from a trained adapter is no fault."""
    policy = Policy(toy(), lora_rank=4)
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter.add_(0.05)
    check(policy)
