"""Scores made of CLIP embeddings, against CLIP written out in plain torch; resizing in torch against PIL."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import plain_clip
import tiny_scorers as tiny
from tiller.rewards import score
from tiller.rewards.gradient import as_tensor, score_with_graph
from tiller.rewards.scorers.aesthetic import Aesthetic, head_layers
from tiller.rewards.scorers.clip_score import ClipScore
from tiller.rewards.scorers.pick_score import PickScore
from tiller.rewards.scorers.pixels import Pixels, resize
from tiller.types import ConfigError, RewardError

SIZES = [(32, 32), (64, 40), (33, 90), (20, 20), (128, 128)]
PROMPTS = ["a cat", "", "two dogs on a sofa that is too long for it", "a cat", "horse"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    tiny.clip(path)
    return path


@pytest.fixture(scope="module")
def weights(folder: Path):
    model = tiny.transformers.CLIPModel.from_pretrained(folder)
    return {name: value.detach() for name, value in model.state_dict().items()}


def cosine(weights, image: Image.Image, prompt: str) -> float:
    tokens = tiny.letters(prompt)
    tokens = tokens if len(tokens) <= 24 else [*tokens[:23], tokens[-1]]  # the end mark is kept
    seen = plain_clip.picture(weights, tiny.clip_pixels(image))
    return float(seen @ plain_clip.text(weights, tokens))


def test_clip_score_is_the_cosine_of_the_two_embeddings(folder, weights) -> None:
    """Five sizes, an empty prompt, one that is cut, one twice, and batches that do not come out even."""
    images = tiny.pictures(*SIZES)
    expected = [cosine(weights, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    assert np.ptp(expected) > 0.1  # the tiny model tells them apart
    for batch_size in (1, 2, 5):
        reward = ClipScore(str(folder), batch_size=batch_size, device="cpu")
        np.testing.assert_allclose(reward(images, PROMPTS, [{}] * 5), expected, atol=2e-6)
    scores = score(ClipScore(str(folder), scale=2.5), images, PROMPTS, [{}] * 5)
    np.testing.assert_allclose(scores.values, 2.5 * np.array(expected), atol=5e-6)


def test_clip_score_is_logits_per_image_over_the_temperature(folder) -> None:
    model = tiny.transformers.CLIPModel.from_pretrained(folder)
    [image] = tiny.pictures((32, 32))
    logits = model(input_ids=torch.tensor([tiny.letters("a cat")]), pixel_values=tiny.clip_pixels(image)[None])
    cosine = logits.logits_per_image.item() / model.logit_scale.exp().item()
    assert ClipScore(str(folder))([image], ["a cat"], [{}]) == pytest.approx([cosine], abs=1e-6)
    assert PickScore(str(folder))([image], ["a cat"], [{}]) == pytest.approx([logits.logits_per_image.item()], abs=1e-5)
    assert PickScore(str(folder), scale=100)([image], ["a cat"], [{}]) == pytest.approx([100 * cosine], abs=1e-4)


def test_transparent_pictures_are_scored_by_their_colours(folder) -> None:
    [image] = tiny.pictures((40, 32))
    clear = image.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    gray = image.convert("L")
    reward = ClipScore(str(folder))
    assert reward([clear], ["a cat"], [{}]) == reward([image], ["a cat"], [{}])
    assert reward([gray], ["a cat"], [{}]) == reward([gray.convert("RGB")], ["a cat"], [{}])


@pytest.mark.parametrize("video", [[Image.new("RGB", (8, 8))] * 3, np.zeros((3, 8, 8, 3))])
def test_a_video_is_refused_with_a_sentence(folder, video) -> None:
    with pytest.raises(
        RewardError, match="clip_score scores single pictures, but was given a video of 3 frames; score"
    ):
        ClipScore(str(folder))([video], ["a cat"], [{}])
    with pytest.raises(RewardError, match="given a str"):
        ClipScore(str(folder))(["picture.png"], ["a cat"], [{}])


# ---- with a gradient ----


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (70, 48), (48, 131), (512, 512)])
def test_resizing_in_torch_is_pils(size) -> None:
    """Bicubic with antialiasing, up and down; PIL rounds to 8 bits after each axis, and may begin with the other."""
    [image] = tiny.pictures(size)
    noisy = np.asarray(image, dtype=np.int16) + np.random.default_rng(1).integers(-40, 41, (size[1], size[0], 3))
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    ours = resize(as_tensor([image]), 41, 37)
    pil = as_tensor([image.resize((37, 41), Image.Resampling.BICUBIC)])
    assert (ours - pil).abs().max() < 2.5 / 255
    assert (ours - pil).abs().mean() < 0.4 / 255


@pytest.mark.parametrize("size", [(32, 32), (64, 40), (33, 90), (20, 20), (41, 41)])
def test_the_crop_in_torch_is_the_processors(size) -> None:
    [image] = tiny.pictures(size)
    pixels = Pixels(32, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    assert (pixels.cropped(as_tensor([image]))[0] - tiny.clip_pixels(image)).abs().max() < 1.5 / 255 / 0.26


def test_black_is_added_around_a_picture_that_is_not_square() -> None:
    """A white picture of 40 x 10 within 16: rows 6 to 9 of 16 are white, the others black, before normalising."""
    pixels = Pixels(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    expected = torch.full((3, 16, 16), -2.0)
    expected[:, 6:10] = 2.0
    white = Image.new("RGB", (40, 10), "white")
    torch.testing.assert_close(pixels.padded(as_tensor([white]))[0], expected)
    torch.testing.assert_close(pixels.padded_picture(white), expected)


@pytest.mark.parametrize("size", [(32, 32), (64, 48)])
def test_scores_of_tensors_are_those_of_pictures_and_carry_a_gradient(folder, weights, size) -> None:
    images = tiny.pictures(size, size, size)
    prompts = ["a cat", "", "horse"]
    reward = ClipScore(str(folder), differentiable=True, batch_size=2)
    pixels = as_tensor(images).requires_grad_()
    scores = score_with_graph(reward, pixels, prompts, [{}] * 3)
    expected = [cosine(weights, image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    np.testing.assert_allclose(scores.detach(), expected, atol=0.01)
    scores.sum().backward()
    if size == (32, 32):  # nothing is resized: the gradient is that of CLIP written out
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
        again = as_tensor(images[:1])[0].requires_grad_()
        seen = plain_clip.picture_with_graph(weights, (again - mean) / std)
        (seen @ plain_clip.text(weights, tiny.letters("a cat"))).backward()
        torch.testing.assert_close(pixels.grad[0], again.grad, atol=1e-6, rtol=1e-4)
    assert pixels.grad.abs().amax((1, 2, 3)).min() > 1e-5
    assert all(weight.grad is None for weight in reward.clip.network.parameters())


def test_pictures_in_half_precision_are_resized_in_full(folder) -> None:
    reward = ClipScore(str(folder), differentiable=True)
    pixels = as_tensor(tiny.pictures((70, 48))).bfloat16()
    expected = reward(pixels.float(), ["a cat"], [{}])
    assert torch.equal(reward(pixels, ["a cat"], [{}]), expected)


def test_a_differentiable_score_serves_plain_training_too(folder) -> None:
    images = tiny.pictures((32, 32), (32, 32))
    graph, plain = ClipScore(str(folder), differentiable=True), ClipScore(str(folder))
    values = [score(reward, images, ["a cat", "horse"], [{}, {}]).values for reward in (graph, plain)]
    np.testing.assert_allclose(*values, atol=1e-6)  # nothing is resized here


# ---- aesthetic ----

WIDTHS = [12, 7, 5, 1]


def head(folder: Path, names: str = "layers.{}.{}", gaps: int = 2) -> tuple[str, list]:
    generator = torch.Generator().manual_seed(3)
    layers = [
        (torch.randn(after, before, generator=generator), torch.randn(after, generator=generator))
        for before, after in pairwise(WIDTHS)
    ]
    tensors = {}
    for index, (weight, bias) in enumerate(layers):
        tensors |= {names.format(gaps * index, "weight"): weight, names.format(gaps * index, "bias"): bias}
    save_file(tensors, folder / "head.safetensors")
    return str(folder / "head.safetensors"), layers


def test_aesthetic_is_the_head_on_the_embedding_at_length_one(folder, weights, tmp_path) -> None:
    """The embedding is normalised before the head, and nothing stands between the layers."""
    path, layers = head(tmp_path)
    images = tiny.pictures(*SIZES)
    expected = []
    for image in images:
        vector = plain_clip.picture(weights, tiny.clip_pixels(image))
        for weight, bias in layers:
            vector = weight @ vector + bias
        expected.append(vector.item())
    reward = Aesthetic(path, model=str(folder), batch_size=2, device="cpu")
    np.testing.assert_allclose(reward(images, PROMPTS, [{}] * 5), expected, atol=1e-4)
    assert np.ptp(expected) > 0.1


def test_aesthetic_of_a_tensor_has_a_gradient(folder, tmp_path) -> None:
    path, _ = head(tmp_path)
    images = tiny.pictures((32, 32), (32, 32))
    pixels = as_tensor(images).requires_grad_()
    reward = Aesthetic(path, model=str(folder), differentiable=True)
    scores = score_with_graph(reward, pixels, ["", ""], [{}, {}])
    np.testing.assert_allclose(scores.detach(), reward(images, ["", ""], [{}, {}]), atol=1e-4)
    scores.sum().backward()
    step = 1e-3 * pixels.grad.sign()
    with torch.no_grad():
        gained = reward(pixels + step, ["", ""], [{}, {}]).sum() - scores.sum()
    assert gained.item() == pytest.approx((pixels.grad * step).sum().item(), rel=0.05)


@pytest.mark.parametrize(("names", "gaps"), [("mlp.layers.{}.{}", 1), ("{}.{}", 2), ("predictor.{}.{}", 3)])
def test_a_heads_keys_may_have_any_prefix_and_gaps(tmp_path, names, gaps) -> None:
    path, layers = head(tmp_path, names, gaps)
    other = {"vision_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(3, 3), "logit_scale": torch.zeros(())}
    found = head_layers(load_file(path) | other)
    assert all(
        torch.equal(a, b) for got, want in zip(found, layers, strict=True) for a, b in zip(got, want, strict=True)
    )


def test_a_head_that_is_none_or_does_not_fit_is_refused(folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"linearMSE' is no folder here, and a model from the hub needs a revision"):
        Aesthetic(model=str(folder)).layers  # noqa: B018
    with pytest.raises(ConfigError, match=r"head.pth is a pickle, which can run code"):
        Aesthetic("head.pth", model=str(folder)).layers  # noqa: B018
    save_file({"weight": torch.zeros(1, 12)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"no stack of linear layers .* it has weight"):
        Aesthetic(str(tmp_path / "other.safetensors"), model=str(folder)).layers  # noqa: B018
    save_file({"layers.0.weight": torch.zeros(1, 9), "layers.0.bias": torch.zeros(1)}, tmp_path / "nine.safetensors")
    with pytest.raises(ConfigError, match=r"takes vectors of 9 numbers, but .* gives 12"):
        Aesthetic(str(tmp_path / "nine.safetensors"), model=str(folder)).layers  # noqa: B018
