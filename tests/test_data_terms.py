"""Captioned pictures in training: encoded as the pipeline's own latents, a term of the loss; Lee et al.'s method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor, nn

import tiny
import tiny_more
from tiller import Policy
from tiller.algorithms import DDPO, PPO, SFT, Lee
from tiller.collect import Batch, collect
from tiller.data import open_data
from tiller.distributed import World
from tiller.metrics import Clock
from tiller.policy.forward import ForwardProcess
from tiller.policy.frame import encode, framed
from tiller.policy.noise import key
from tiller.pretrain.data import fit, to_tensor
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.training import train
from tiller.types import ConfigError, PipelineError, Prompt
from tiller.update import update
from toy import ToyPipeline, brightness, toy

PROMPTS = [Prompt("a cat"), Prompt("a dog")]
SETTINGS = TrainConfig(epochs=1, samples_per_epoch=8, group_size=4, batch_size=4, max_grad_norm=1e9)
STEPS = {"num_inference_steps": 4}


class Thumb(ModelMixin, ConfigMixin):
    """The toy's autoencoder: a picture's grey values are its latents, six times as far apart."""

    @register_to_config
    def __init__(self, scaling_factor: float = 6.0):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def encode(self, pictures: Tensor) -> Any:
        return SimpleNamespace(latents=pictures.mean(1, keepdim=True) / 2)


class Encoding(ToyPipeline):
    """The toy, able to encode pictures of 4x4."""

    def __init__(self, denoiser: Any, scheduler: Any, vae: Any = None):
        super().__init__(denoiser, scheduler)
        self.register_modules(vae=vae or Thumb())


def with_vae() -> Any:
    """Such a toy."""
    return toy(Encoding)


class Shades:
    """Grey pictures and a caption for each, as a `Source` gives them."""

    def __init__(self, value: float = 0.8):
        self.value, self.asked = value, 0

    def batch(self, rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
        self.asked += count
        return torch.full((count, 3, 4, 4), self.value) + 0.01 * torch.from_numpy(
            rng.normal(size=(count, 3, 4, 4))
        ).float(), [f"shade {number}" for number in rng.integers(9, size=count)]

    def texts(self) -> list[str]:
        return []


# ---- encoding ----


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def moments(vae: Any, pictures: Tensor) -> Tensor:
    """The mean of the autoencoder's distribution, by its layers."""
    return vae.quant_conv(vae.encoder(pictures)).chunk(2, 1)[0]


@torch.no_grad()
def test_latents_of_stable_diffusion_are_scaled(pictures: Tensor) -> None:
    pipe = tiny.tiny_sd()
    wanted = moments(pipe.vae, pictures) * 0.18215
    torch.testing.assert_close(encode(pipe, pictures, torch.zeros(2, 4, 8, 8)), wanted)


@torch.no_grad()
def test_latents_of_stable_diffusion_3_are_shifted_and_scaled(pictures: Tensor) -> None:
    pipe = tiny.tiny_flow()
    wanted = (moments(pipe.vae, pictures) - 0.06) * 0.18215
    torch.testing.assert_close(encode(pipe, pictures, torch.zeros(2, 4, 8, 8)), wanted)


@torch.no_grad()
def test_latents_of_flux_are_packed_two_by_two(pictures: Tensor) -> None:
    """Token (i, j) holds channel by channel the 2x2 patch at (2i, 2j)."""
    pipe = tiny.tiny_flux()
    plain = (moments(pipe.vae, pictures) - 0.06) * 0.18215
    found = encode(pipe, pictures, torch.zeros(2, 16, 16))
    for i, j in [(0, 0), (1, 3), (3, 2)]:
        patch = plain[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        torch.testing.assert_close(found[:, 4 * i + j], patch.reshape(2, 16))


@torch.no_grad()
def test_means_and_deviations_of_channels_take_the_place_of_shift_and_scale(pictures: Tensor) -> None:
    """SDXL decodes z = x·std/scale + mean."""
    pipe = tiny.tiny_sdxl()
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]
    pipe.vae.register_to_config(latents_mean=mean, latents_std=std)
    found = encode(pipe, pictures, torch.zeros(2, 4, 8, 8))
    back = found * torch.tensor(std).view(1, 4, 1, 1) / 0.18215 + torch.tensor(mean).view(1, 4, 1, 1)
    torch.testing.assert_close(back, moments(pipe.vae, pictures), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [tiny.tiny_sd, tiny.tiny_flow, tiny.tiny_flux, tiny_more.tiny_qwen_image])
def test_data_can_be_walked_in_the_frame_of_a_call(build: Any) -> None:
    """Other prompts, other x0: the states are theirs, and what the model says depends on the new words."""
    policy = Policy(build(), lora_rank=2)
    size = {"height": 16, "width": 16} | STEPS
    rollout = policy.sample(["a cat", "a dog"], **size)
    edge = rollout.images[0].width
    clean = encode(policy.pipe, torch.rand(2, 3, edge, edge) * 2 - 1, rollout.latents[-1])
    seen = {}
    for word in ("a bird", "two birds on a tree"):
        frame = framed(rollout, clean, [word, "a dog"], [0, 1])
        path, steps = ForwardProcess(frame, 3, [7, 7]), []
        with torch.no_grad():
            policy.predict(frame, steps.append, lambda index: clean, [2])
            policy.predict(frame, steps.append, path, [2])
        stage = rollout.records[2].stage
        assert stage is not None
        torch.testing.assert_close(steps[1].sample, stage.noised(clean.float(), steps[1].noise))
        torch.testing.assert_close(steps[1].clean, clean.float())
        seen[word] = steps[0].prediction
    first, other = seen.values()
    assert not torch.equal(first[0], other[0])
    torch.testing.assert_close(first[-1], other[-1])


def test_what_cannot_be_encoded_is_told_in_a_sentence(pictures: Tensor) -> None:
    with pytest.raises(PipelineError, match="ToyPipeline has no autoencoder"):
        encode(toy(), pictures, torch.zeros(2, 1, 4, 4))
    with pytest.raises(PipelineError, match=r"the latents of StableDiffusionPipeline are \(2, 4, 9, 9\), and its"):
        encode(tiny.tiny_sd(), pictures, torch.zeros(2, 4, 9, 9))


def test_a_picture_is_cut_to_its_middle() -> None:
    picture = Image.fromarray(np.repeat(np.arange(8, dtype=np.uint8)[None, :, None] * 30, 4, 0).repeat(3, 2))
    assert [fit(picture, (4, 4)).getpixel((x, 0))[0] for x in range(4)] == [60, 90, 120, 150]
    assert fit(picture, 4).tobytes() == fit(picture, (4, 4)).tobytes()
    assert fit(picture, (4, 2)).size == (4, 2)


# ---- the term ----


def sampled(policy: Policy, algorithm: Any, reward: Any = brightness) -> Batch:
    state = TrainState(policy, SETTINGS, algorithm)
    return collect(policy, PROMPTS, reward, algorithm, SETTINGS, STEPS, state, World(), Clock())


def gradient(policy: Policy, algorithm: Any, batch: Batch, data: Any = None) -> dict[str, Tensor]:
    state, found = TrainState(policy, SETTINGS, algorithm), []

    def look(config: TrainConfig) -> float:
        found.append({name: p.grad.clone() for name, p in state.parameters.items() if p.grad is not None})
        return 1.0

    state.step = look  # type: ignore[method-assign]
    update(policy, batch, algorithm, SETTINGS, state, World(), data=data)
    return found[0]


def test_the_term_is_the_denoising_loss_of_the_data_by_hand() -> None:
    """weight·Σ|ε̂ - ε|²/(N·T) over as much data as samples, the denoiser called with nothing of tiller around it."""
    policy, data = Policy(with_vae(), lora_rank=None), Shades()
    batch = sampled(policy, PPO(kl_coefficient=0))
    bare = gradient(policy, PPO(kl_coefficient=0), batch)
    found = gradient(policy, PPO(kl_coefficient=0, data_weight=0.3), batch, data)
    assert data.asked == 8
    for parameter in policy.parameters.values():
        parameter.grad = None
    for chunk in batch.chunks:
        keys = (0, 0, 0, 0, chunk.number)
        shades, captions = Shades().batch(np.random.default_rng(key("data", *keys)), 4)
        clean = shades.mean(1, keepdim=True) * 3
        frame = framed(chunk.rollout, clean, captions, range(4))
        path, fresh = ForwardProcess(frame, key("noise on data", *keys)), []
        with torch.no_grad():
            policy.predict(frame, fresh.append, path, [0])
        for index in range(4):
            x = fresh[0].sample if index == 0 else path(index)
            eps = fresh[0].noise if index == 0 else path.noise(index)
            output = policy.pipe.denoiser(x, frame.timesteps[index], policy.pipe.encode_prompt(captions))
            (0.3 * (output - eps).square().flatten(1).mean(1).sum() / (8 * 4)).backward()
    for name, parameter in policy.parameters.items():
        torch.testing.assert_close(found[name] - bare[name], parameter.grad, rtol=1e-4, atol=1e-7)
        assert parameter.grad.abs().max() > 1e-4


def test_processes_share_the_data_out() -> None:
    """The gradients of two processes, each with one of the two batches, add up to that of one with both."""
    policy, algorithm = Policy(with_vae(), lora_rank=None), Lee(data_weight=0.7)
    batch = sampled(policy, algorithm)
    whole = gradient(policy, algorithm, batch, Shades())
    parts = [gradient(policy, algorithm, replace(batch, chunks=[chunk]), Shades()) for chunk in batch.chunks]
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=1e-4, atol=1e-6 * value.abs().max())
        assert not torch.allclose(parts[0][name], parts[1][name])


def test_a_run_with_data_goes_on_bit_for_bit() -> None:
    algorithm = Lee(data_weight=0.5)
    settings = TrainConfig(epochs=3, samples_per_epoch=8, group_size=4, batch_size=4, learning_rate=1e-2)
    whole, state = [], None
    for report in train(
        Policy(with_vae(), None), PROMPTS, brightness, algorithm, settings, sampling=STEPS, data=Shades()
    ):
        whole.append(report.metrics)
        if report.epoch == 1:
            kept = {k: v.clone() for k, v in report.state.tensors().items()}, dict(report.state.data())
        end = report.state
    policy = Policy(with_vae(), None)
    state = TrainState(policy, settings, algorithm)
    state.load(*kept)
    reports = train(policy, PROMPTS, brightness, algorithm, settings, sampling=STEPS, data=Shades(), state=state)
    assert [report.metrics for report in reports] == whole[1:]
    assert whole[0]["data/denoising_error"] != whole[1]["data/denoising_error"]
    for name, value in end.tensors().items():
        assert torch.equal(state.tensors()[name], value), name


def test_data_and_algorithm_must_have_use_for_each_other(tmp_path: Path) -> None:
    policy = Policy(with_vae(), lora_rank=None)
    with pytest.raises(ConfigError, match=r"data_weight is 0\.5, and there is no data"):
        next(train(policy, ["a cat"], brightness, PPO(data_weight=0.5)))
    with pytest.raises(ConfigError, match="DDPO has no use for data"):
        next(train(policy, ["a cat"], brightness, DDPO(), data="emoji"))
    with pytest.raises(ConfigError, match="data_weight is -1; it must be 0 or more"):
        PPO(data_weight=-1)
    with pytest.raises(ConfigError, match="Lee needs a reward"):
        next(train(policy, ["a cat"], None, Lee(), data="emoji"))
    with pytest.raises(ConfigError, match="there is no such folder"):
        next(train(policy, ["a cat"], brightness, Lee(), data=tmp_path / "nothing"))
    with pytest.raises(PipelineError, match="ToyPipeline has no autoencoder"):  # before anything is trained
        next(train(Policy(toy(), None), ["a cat"], brightness, Lee(), sampling=STEPS, data=Shades()))


def test_a_folder_is_cut_to_the_size_of_the_pipelines_own_pictures(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (40, 30), (number * 60,) * 3).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"grey {number}")
    policy = Policy(tiny.tiny_sd(), lora_rank=2)
    source = open_data(tmp_path, policy, Lee(), PROMPTS, {**STEPS, "height": 16, "width": 16})
    assert source is not None
    pixels, captions = source.batch(np.random.default_rng(0), 5)
    assert pixels.shape == (5, 3, 16, 16)
    for row, caption in zip(pixels, captions, strict=True):
        assert torch.equal(row, to_tensor([Image.new("RGB", (16, 16), (int(caption[-1]) * 60,) * 3)])[0])


# ---- Lee et al. ----


def accepted(images: Any, prompts: Any, metadata: Any) -> list[float]:
    """1 for the brightest of every four, 0 for the rest."""
    values = np.array(brightness(images, prompts, metadata)).reshape(-1, 4)
    return (values == values.max(1, keepdims=True)).astype(float).ravel().tolist()


def test_rewards_of_0_and_1_without_data_are_filtered_fine_tuning() -> None:
    """A mean over all pictures, where SFT's is over the accepted: a quarter of its gradient."""
    policy = Policy(with_vae(), lora_rank=None)
    lee = gradient(policy, Lee(data_weight=0), sampled(policy, Lee(), accepted))
    for name, value in gradient(policy, SFT(), sampled(policy, SFT(), accepted)).items():
        torch.testing.assert_close(4 * lee[name], value, rtol=1e-5, atol=1e-9)
        assert value.abs().max() > 0


def test_a_reward_of_1_for_everything_is_plain_denoising_of_own_samples() -> None:
    policy = Policy(with_vae(), lora_rank=None)
    batch = sampled(policy, Lee(), lambda images, *_: [1.0] * len(images))
    found = gradient(policy, Lee(data_weight=0), batch)
    for parameter in policy.parameters.values():
        parameter.grad = None
    for chunk in batch.chunks:
        path = ForwardProcess(chunk.rollout, key("noised", 0, 0, 0))
        policy.predict(chunk.rollout, lambda step: step.backward(step.distance().sum() / (8 * 4)), path, range(4))
    for name, parameter in policy.parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-9)


def test_a_negative_reward_is_refused() -> None:
    policy = Policy(with_vae(), lora_rank=None)
    with pytest.raises(ConfigError, match=r"lee weighs pictures by their reward, and one is -2; give"):
        sampled(policy, Lee(), lambda images, *_: [-2.0, 1.0] * (len(images) // 2))


def scores(policy: Policy) -> np.ndarray:
    return np.array(brightness(policy.sample(["a cat"] * 32, seed=9, **STEPS).images, [], []))


def test_the_reward_rises() -> None:
    """Weights in [0, 1], nothing but own pictures."""

    def bright(images: Any, prompts: Any, metadata: Any) -> list[float]:
        return [max(0.0, (value - 100) / 155) for value in brightness(images, prompts, metadata)]

    policy = Policy(with_vae(), lora_rank=None)
    before = scores(policy)
    settings = TrainConfig(epochs=40, samples_per_epoch=64, group_size=4, batch_size=32, learning_rate=0.02)
    for _ in train(policy, ["a cat", "a dog"], bright, Lee(data_weight=0), settings, sampling=STEPS):
        pass
    gain = scores(policy) - before
    assert gain.mean() > 10
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5


def test_data_alone_draws_the_model_to_it() -> None:
    """With rewards of 0 nothing but β's term is left: pictures become as bright as the data."""
    policy = Policy(with_vae(), lora_rank=None)
    before = scores(policy)
    settings = TrainConfig(epochs=40, samples_per_epoch=32, group_size=4, batch_size=32, learning_rate=0.02)
    state = TrainState(policy, settings, Lee())
    nothing = lambda images, *_: [0.0] * len(images)  # noqa: E731
    for _ in train(policy, ["a cat"], nothing, Lee(), settings, sampling=STEPS, data=Shades(0.8), state=state):
        pass
    assert abs(before.mean() - 229.5) > 60  # 0.8 of [-1, 1] is 229.5 of 255
    assert abs(scores(policy).mean() - 229.5) < 30
