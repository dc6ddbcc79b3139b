"""ImageReward, against BLIP written out in plain torch on weights in the checkpoint's own layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertTokenizer

import tiny_scorers as tiny
from plain_clip import linear, norm
from tiller.rewards.gradient import as_tensor, score_with_graph
from tiller.rewards.scorers.blip import from_blip
from tiller.rewards.scorers.image_reward import ImageReward
from tiller.types import ConfigError

VISION, TEXT, LAYERS, SIDE = 64, 128, 2, 32  # widths: one head of attention in the ViT, two in the BERT
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
WORDS += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
SIZES = [(32, 32), (64, 40), (33, 90)]
PROMPTS = ["a cat", "", "two dogs on a sofa that is far too long for it by a lot of letters"]


def published() -> dict[str, Tensor]:
    """Random weights under the keys of ImageReward.pt."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    def layer(name: str, after: int, before: int) -> dict[str, Tensor]:
        return {f"{name}.weight": random(after, before), f"{name}.bias": random(after)}

    def layer_norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + random(width), f"{name}.bias": random(width)}

    eyes = "blip.visual_encoder"
    found = {f"{eyes}.cls_token": random(1, 1, VISION), f"{eyes}.pos_embed": random(1, 17, VISION)}
    found |= {
        f"{eyes}.patch_embed.proj.weight": random(VISION, 3, 8, 8),
        f"{eyes}.patch_embed.proj.bias": random(VISION),
    }
    found |= layer_norm(f"{eyes}.norm", VISION)
    for index in range(LAYERS):
        name = f"{eyes}.blocks.{index}"
        found |= layer_norm(f"{name}.norm1", VISION) | layer_norm(f"{name}.norm2", VISION)
        found |= layer(f"{name}.attn.qkv", 3 * VISION, VISION) | layer(f"{name}.attn.proj", VISION, VISION)
        found |= layer(f"{name}.mlp.fc1", 96, VISION) | layer(f"{name}.mlp.fc2", VISION, 96)
    words = "blip.text_encoder.embeddings"
    found |= {f"{words}.word_embeddings.weight": random(len(WORDS) + 2, TEXT)}
    found |= {f"{words}.position_embeddings.weight": random(40, TEXT), f"{words}.position_ids": torch.arange(40)[None]}
    found |= layer_norm(f"{words}.LayerNorm", TEXT)
    for index in range(LAYERS):
        name = f"blip.text_encoder.encoder.layer.{index}"
        for kind, width in (("attention", TEXT), ("crossattention", VISION)):
            found |= layer(f"{name}.{kind}.self.query", TEXT, TEXT) | layer(f"{name}.{kind}.self.key", TEXT, width)
            found |= layer(f"{name}.{kind}.self.value", TEXT, width) | layer(f"{name}.{kind}.output.dense", TEXT, TEXT)
            found |= layer_norm(f"{name}.{kind}.output.LayerNorm", TEXT)
        found |= layer(f"{name}.intermediate.dense", 160, TEXT) | layer(f"{name}.output.dense", TEXT, 160)
        found |= layer_norm(f"{name}.output.LayerNorm", TEXT)
    found |= layer("blip.vision_proj", 8, VISION) | layer("blip.text_proj", 8, TEXT)  # not used by the reward
    for index, (before, after) in zip((0, 2, 4, 6, 7), [(TEXT, 32), (32, 16), (16, 8), (8, 4), (4, 1)], strict=True):
        found |= layer(f"mlp.layers.{index}", after, before)
    return found


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(L, D) with heads 64 wide."""
    q, k, v = (x.unflatten(-1, (-1, 64)).transpose(0, 1) for x in (q, k, v))
    return ((q @ k.transpose(1, 2) / 8).softmax(-1) @ v).transpose(0, 1).flatten(1)


def see(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    eyes = "blip.visual_encoder"
    x = F.conv2d(pixels[None], weights[f"{eyes}.patch_embed.proj.weight"], weights[f"{eyes}.patch_embed.proj.bias"], 8)
    x = torch.cat([weights[f"{eyes}.cls_token"][0], x[0].flatten(1).T]) + weights[f"{eyes}.pos_embed"][0]
    for index in range(LAYERS):
        name = f"{eyes}.blocks.{index}"
        q, k, v = linear(norm(x, weights, f"{name}.norm1", 1e-6), weights, f"{name}.attn.qkv").chunk(3, -1)
        x = x + linear(attention(q, k, v), weights, f"{name}.attn.proj")
        y = F.gelu(linear(norm(x, weights, f"{name}.norm2", 1e-6), weights, f"{name}.mlp.fc1"))
        x = x + linear(y, weights, f"{name}.mlp.fc2")
    return norm(x, weights, f"{eyes}.norm", 1e-6)


@torch.no_grad()
def reward(weights: dict[str, Tensor], image: Image.Image, prompt: str) -> float:
    """One picture and its prompt, without filling: what is filled up is not attended to."""
    seen = see(weights, tiny.clip_pixels(image, SIDE))
    letters = [f"##{letter}" if i else letter for word in prompt.split() for i, letter in enumerate(word)]
    tokens = [WORDS.index(token) for token in ["[CLS]", *letters[:33], "[SEP]"]]
    words = "blip.text_encoder.embeddings"
    x = (
        weights[f"{words}.word_embeddings.weight"][tokens]
        + weights[f"{words}.position_embeddings.weight"][: len(tokens)]
    )
    x = norm(x, weights, f"{words}.LayerNorm", 1e-12)
    for index in range(LAYERS):
        name = f"blip.text_encoder.encoder.layer.{index}"
        for kind in ("attention", "crossattention"):
            q = linear(x, weights, f"{name}.{kind}.self.query")
            k, v = (
                linear(seen if kind == "crossattention" else x, weights, f"{name}.{kind}.self.{part}")
                for part in ("key", "value")
            )
            y = linear(attention(q, k, v), weights, f"{name}.{kind}.output.dense")
            x = norm(x + y, weights, f"{name}.{kind}.output.LayerNorm", 1e-12)
        y = F.gelu(linear(x, weights, f"{name}.intermediate.dense"))
        x = norm(x + linear(y, weights, f"{name}.output.dense"), weights, f"{name}.output.LayerNorm", 1e-12)
    x = x[0]
    for index in (0, 2, 4, 6, 7):
        x = linear(x, weights, f"mlp.layers.{index}")
    return (x.item() - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image_reward")
    save_file(published(), path / "weights.safetensors")
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(path)
    return path


def scorer(folder: Path, **settings) -> ImageReward:
    return ImageReward(str(folder / "weights.safetensors"), tokenizer=str(folder), device="cpu", **settings)


def test_image_reward_is_blip_and_its_head(folder) -> None:
    weights = published()
    images = tiny.pictures(*SIZES)
    expected = [reward(weights, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    assert np.ptp(expected) > 0.05
    for batch_size in (1, 2, 3):
        np.testing.assert_allclose(
            scorer(folder, batch_size=batch_size)(images, PROMPTS, [{}] * 3), expected, atol=2e-5
        )
    other = scorer(folder)(images, PROMPTS[::-1], [{}] * 3)
    assert abs(other[0] - expected[0]) > 1e-3  # it reads the prompt
    clear = images[1].convert("RGBA")
    clear.putalpha(0)
    assert scorer(folder)([clear], PROMPTS[1:2], [{}]) == pytest.approx(expected[1:2], abs=2e-5)


def test_image_reward_of_a_tensor_has_a_gradient_and_the_same_score(folder) -> None:
    images = tiny.pictures((32, 32), (32, 32), (32, 32))
    judge = scorer(folder, differentiable=True, batch_size=2)
    pictures = as_tensor(images).requires_grad_()
    scores = score_with_graph(judge, pictures, PROMPTS, [{}] * 3)
    np.testing.assert_allclose(scores.detach(), judge(images, PROMPTS, [{}] * 3), atol=1e-5)
    scores.sum().backward()
    step = 1e-3 * pictures.grad.sign()
    with torch.no_grad():
        gained = judge(pictures + step, PROMPTS, [{}] * 3).sum() - scores.sum()
    assert gained.item() == pytest.approx((pictures.grad * step).sum().item(), rel=0.1)


def test_sizes_are_read_off_the_weights() -> None:
    """The published sizes: ViT-L/16 at 224, BERT base with two more words."""
    meta = torch.device("meta")
    big = {key: value for key, value in published().items() if key.startswith("blip.")}
    big["blip.visual_encoder.patch_embed.proj.weight"] = torch.empty(1024, 3, 16, 16, device=meta)
    big["blip.visual_encoder.pos_embed"] = torch.empty(1, 197, 1024, device=meta)
    big["blip.text_encoder.embeddings.word_embeddings.weight"] = torch.empty(30524, 768, device=meta)
    blip = from_blip(big)
    assert (blip.vision_config.num_attention_heads, blip.vision_config.image_size) == (16, 224)
    assert (blip.text_config.num_attention_heads, blip.text_config.vocab_size) == (12, 30524)
    assert (blip.vision_config.layer_norm_eps, blip.text_config.layer_norm_eps) == (1e-6, 1e-12)
    assert len(blip.vision) == 6 + 12 * LAYERS
    assert not any("position_ids" in name for name in blip.text)


def test_other_weights_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="image_reward needs weights, a safetensors file with the keys of its checkp"):
        ImageReward()
    with pytest.raises(
        ConfigError, match=r"no BLIP under blip. in these weights: embeddings.patch_embedding.weight is m"
    ):
        from_blip({"mlp.layers.0.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"blip.visual_encoder.stem.weight is no weight of BLIP's picture tower"):
        from_blip({"blip.visual_encoder.stem.weight": torch.zeros(1)})
    less = {k: v for k, v in published().items() if "encoder.layer.1.crossattention.self.key" not in k}
    save_file(less, tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match=r"lack encoder.layer.1.crossattention.self.key.bias \(and 1 more\)"):
        scorer(tmp_path).network  # noqa: B018
