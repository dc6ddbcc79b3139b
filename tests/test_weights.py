"""What is trained: the denoisers and nothing else; adapters on the layers they are meant for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
import tiny_more
import tiny_video
from tiller.policy import Policy, weights
from tiller.types import PipelineError

EXPECTED: list[tuple[Callable[[], Any], set[str]]] = [
    (tiny.tiny_sd, {"unet"}),
    (tiny.tiny_sd_controlnet, {"unet"}),
    (tiny.tiny_sdxl, {"unet"}),
    (tiny.tiny_flux, {"transformer"}),
    (tiny_video.tiny_animatediff, {"unet"}),  # the motion adapter is inside the U-Net by then
    (tiny_video.tiny_wan_two, {"transformer", "transformer_2"}),
    (tiny_more.tiny_kandinsky, {"unet", "prior_prior"}),
    (tiny_more.tiny_stable_audio, {"transformer"}),  # its projection model is none
]


@pytest.mark.parametrize(("build", "names"), EXPECTED)
def test_the_denoisers_are_found(build: Callable[[], Any], names: set[str]) -> None:
    assert set(weights.denoisers(build())) == names


def test_only_adapters_are_trained_and_they_start_as_the_identity() -> None:
    policy = Policy(tiny.tiny_sd(), lora_rank=2)
    assert policy.parameters
    assert all("lora_" in name for name in policy.parameters)
    assert all(bool((p == 0).all()) for name, p in policy.parameters.items() if "lora_B" in name)
    trained = [
        p for module in (policy.pipe.text_encoder, policy.pipe.vae) for p in module.parameters() if p.requires_grad
    ]
    assert not trained


def test_the_same_seed_gives_the_same_adapters_and_leaves_the_global_generator() -> None:
    state = torch.get_rng_state()
    one, two = (Policy(tiny.tiny_sd(), lora_rank=2, seed=7).parameters for _ in range(2))
    other = Policy(tiny.tiny_sd(), lora_rank=2, seed=8).parameters
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)


def test_adapters_come_back_after_an_error() -> None:
    policy = Policy(tiny.tiny_sd(), lora_rank=2)
    layers = [layer for layer in policy.pipe.unet.modules() if isinstance(layer, weights.BaseTunerLayer)]

    def fail() -> None:
        with policy.base():
            assert all(layer.disable_adapters for layer in layers)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not any(layer.disable_adapters for layer in layers)


def test_all_weights_are_trained_without_a_rank() -> None:
    policy = Policy(tiny.tiny_sd(), lora_rank=None)
    assert set(policy.parameters) == {f"unet.{name}" for name, _ in policy.pipe.unet.named_parameters()}


@pytest.mark.parametrize("rank", [2, None])
def test_weights_with_channels_last_are_saved_and_keep_their_layout(rank: int | None, tmp_path: Any) -> None:
    """safetensors takes contiguous tensors only; training goes on in the layout that it had."""
    policy = Policy(tiny.tiny_sd(), lora_rank=rank, target_modules=["to_q", "conv1"])
    policy.pipe.unet.to(memory_format=torch.channels_last)
    for parameter in policy.parameters.values():
        torch.nn.init.normal_(parameter, std=0.1)
    strides = [parameter.stride() for parameter in policy.parameters.values()]
    call = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    picture = policy.stock("a cat", **call)
    policy.save(tmp_path)
    assert [parameter.stride() for parameter in policy.parameters.values()] == strides
    if rank is None:
        again = type(policy.pipe).from_pretrained(tmp_path, safety_checker=None)
    else:
        again = tiny.tiny_sd()
        again.load_lora_weights(tmp_path)
    torch.testing.assert_close(
        torch.tensor(Policy(again, lora_rank=None).stock("a cat", **call)), torch.tensor(picture), atol=1e-5, rtol=0
    )


def test_a_pipeline_with_adapters_of_its_own_is_refused(tmp_path: Any) -> None:
    """Fresh adapters would silently switch the others off."""
    Policy(tiny.tiny_sd(), lora_rank=2).save(tmp_path)
    pipe = tiny.tiny_sd()
    pipe.load_lora_weights(tmp_path)
    with pytest.raises(PipelineError, match="unet has adapters already; fuse them"):
        Policy(pipe, lora_rank=2)
