"""HPS, against CLIP written out as open_clip computes it, from weights in open_clip's own layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import tiny_scorers as tiny
from tiller.rewards.gradient import as_tensor, score_with_graph
from tiller.rewards.scorers.hps import HPS
from tiller.rewards.scorers.open_clip import from_open_clip
from tiller.types import ConfigError

WIDTH, HEADS, LAYERS, LENGTH = 16, 2, 2, 24
MEAN, STD = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
SIZES = [(32, 32), (64, 40), (33, 90), (20, 20), (32, 16)]
PROMPTS = ["a cat", "", "two dogs on a sofa that is too long for it", "a cat", "horse"]


def random(*shape: int, seed: list[int] = [0]) -> Tensor:  # noqa: B006 counts on
    seed[0] += 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed[0])) * shape[-1] ** -0.5


def blocks(prefix: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for index in range(LAYERS):
        name = f"{prefix}transformer.resblocks.{index}"
        found |= {f"{name}.ln_{i}.weight": 1 + random(WIDTH) for i in (1, 2)}
        found |= {f"{name}.ln_{i}.bias": random(WIDTH) for i in (1, 2)}
        found |= {
            f"{name}.attn.in_proj_weight": random(3 * WIDTH, WIDTH),
            f"{name}.attn.in_proj_bias": random(3 * WIDTH),
        }
        found |= {f"{name}.attn.out_proj.weight": random(WIDTH, WIDTH), f"{name}.attn.out_proj.bias": random(WIDTH)}
        found |= {f"{name}.mlp.c_fc.weight": random(32, WIDTH), f"{name}.mlp.c_fc.bias": random(32)}
        found |= {f"{name}.mlp.c_proj.weight": random(WIDTH, 32), f"{name}.mlp.c_proj.bias": random(WIDTH)}
    return found


def published() -> dict[str, Tensor]:
    """A CLIP in open_clip's layout."""
    found = {"logit_scale": torch.tensor(4.6), "text_projection": random(WIDTH, 12), "visual.proj": random(WIDTH, 12)}
    found |= {"token_embedding.weight": random(tiny.WORDS + 2, WIDTH), "positional_embedding": random(LENGTH, WIDTH)}
    found |= {"visual.class_embedding": random(WIDTH), "visual.positional_embedding": random(17, WIDTH)}
    found |= {"visual.conv1.weight": random(WIDTH, 3, 8, 8)}
    for norm in ("ln_final", "visual.ln_pre", "visual.ln_post"):
        found |= {f"{norm}.weight": 1 + random(WIDTH), f"{norm}.bias": random(WIDTH)}
    return found | blocks("") | blocks("visual.")


def tower(x: Tensor, weights: dict[str, Tensor], prefix: str, causal: bool) -> Tensor:
    """(L, D) through the layers, with torch's own multi-head attention on the joint projection."""
    mask = torch.full((len(x), len(x)), -torch.inf).triu(1) if causal else None
    for index in range(LAYERS):
        own = {
            key.removeprefix(f"{prefix}transformer.resblocks.{index}."): value
            for key, value in weights.items()
            if key.startswith(f"{prefix}transformer.resblocks.{index}.")
        }
        attention = torch.nn.MultiheadAttention(WIDTH, HEADS).eval()
        attention.load_state_dict({k.removeprefix("attn."): v for k, v in own.items() if k.startswith("attn.")})
        y = F.layer_norm(x, (WIDTH,), own["ln_1.weight"], own["ln_1.bias"])
        x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = F.layer_norm(x, (WIDTH,), own["ln_2.weight"], own["ln_2.bias"])
        y = F.gelu(F.linear(y, own["mlp.c_fc.weight"], own["mlp.c_fc.bias"]))
        x = x + F.linear(y, own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
    return x


def pixels(image: Image.Image) -> Tensor:
    """The longer edge to 32, black on both sides, normalised."""
    scale = 32 / max(image.size)
    small = image.resize([round(length * scale) for length in image.size], Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (32, 32))
    canvas.paste(small, ((32 - small.width) // 2, (32 - small.height) // 2))
    return (torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255 - MEAN[:, None, None]) / STD[:, None, None]


@torch.no_grad()
def cosine(weights: dict[str, Tensor], image: Image.Image, prompt: str) -> float:
    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = F.conv2d(pixels(image)[None], weights["visual.conv1.weight"], stride=8)[0].flatten(1).T
    x = torch.cat([weights["visual.class_embedding"][None], x]) + weights["visual.positional_embedding"]
    x = tower(norm(x, "visual.ln_pre"), weights, "visual.", causal=False)
    seen = norm(x[0], "visual.ln_post") @ weights["visual.proj"]
    tokens = tiny.letters(prompt)
    tokens = tokens if len(tokens) <= LENGTH else [*tokens[: LENGTH - 1], tokens[-1]]
    x = weights["token_embedding.weight"][tokens] + weights["positional_embedding"][: len(tokens)]
    x = tower(x, weights, "", causal=True)
    read = norm(x[-1], "ln_final") @ weights["text_projection"]
    return F.cosine_similarity(seen, read, dim=0).item()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that HPS was trained from: a configuration with GELU, a processor, and other weights."""
    path = tmp_path_factory.mktemp("base")
    tiny.clip(path, act="gelu")
    return path


@pytest.fixture(scope="module")
def weights(base: Path) -> dict[str, Tensor]:
    found = published()
    save_file({key: value.half() for key, value in found.items()}, base / "hps.safetensors")  # published in half
    return {key: value.half().float() for key, value in found.items()}


def test_hps_is_the_cosine_of_weights_in_open_clips_layout(base, weights) -> None:
    images = tiny.pictures(*SIZES)
    expected = [cosine(weights, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    assert np.ptp(expected) > 0.1
    for batch_size in (2, 5):
        reward = HPS(str(base / "hps.safetensors"), model=str(base), batch_size=batch_size, device="cpu")
        np.testing.assert_allclose(reward(images, PROMPTS, [{}] * 5), expected, atol=1e-5)
    clear = images[1].convert("RGBA")
    clear.putalpha(9)
    assert HPS(str(base / "hps.safetensors"), model=str(base), scale=100)([clear], PROMPTS[1:2], [{}]) == pytest.approx(
        [100 * expected[1]], abs=1e-3
    )


def test_a_model_in_the_layout_of_transformers_is_the_same(base, weights, tmp_path) -> None:
    model = tiny.transformers.CLIPModel(tiny.clip_config(act="gelu"))
    model.load_state_dict(from_open_clip(weights))  # every name and shape
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    images = tiny.pictures(*SIZES)
    filled = HPS(str(base / "hps.safetensors"), model=str(base))(images, PROMPTS, [{}] * 5)
    np.testing.assert_allclose(HPS(model=str(tmp_path))(images, PROMPTS, [{}] * 5), filled, atol=1e-6)


def test_hps_of_a_tensor_has_a_gradient_and_the_same_score(base, weights) -> None:
    images = tiny.pictures((64, 40), (64, 40))
    prompts = ["a cat", "horse"]
    reward = HPS(str(base / "hps.safetensors"), model=str(base), differentiable=True)
    pictures = as_tensor(images).requires_grad_()
    scores = score_with_graph(reward, pictures, prompts, [{}, {}])
    expected = [cosine(weights, image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    np.testing.assert_allclose(scores.detach(), expected, atol=0.01)
    scores.sum().backward()
    step = 1e-3 * pictures.grad.sign()
    with torch.no_grad():
        gained = reward(pictures + step, prompts, [{}, {}]).sum() - scores.sum()
    assert gained.item() == pytest.approx((pictures.grad * step).sum().item(), rel=0.1)


def test_what_is_no_clip_of_open_clip_is_refused(base, weights, tmp_path) -> None:
    with pytest.raises(ConfigError, match="hps needs weights, a safetensors file in open_clip's layout"):
        HPS()
    for key in ("text.transformer.resblocks.0.ln_1.weight", "transformer.resblocks.0.attn.in_proj"):
        with pytest.raises(ConfigError, match=f"{key} is no weight of a CLIP in open_clip's layout"):
            from_open_clip({key: torch.zeros(1)})
    assert list(from_open_clip({"module.logit_scale": torch.zeros(())})) == ["logit_scale"]
    less = {key: value for key, value in weights.items() if ".1." not in key}
    save_file(less, tmp_path / "less.safetensors")
    with pytest.raises(ConfigError, match=r"less.safetensors' lack text_model.encoder.layers.1.*, so CLIPModel would"):
        HPS(str(tmp_path / "less.safetensors"), model=str(base))(tiny.pictures((32, 32)), ["a"], [{}])
    save_file(weights | {"visual.proj": torch.zeros(WIDTH, 9)}, tmp_path / "thin.safetensors")
    with pytest.raises(
        ConfigError, match=r"have visual_projection.weight as \(9, 16\), but CLIPModel wants \(12, 16\)"
    ):
        HPS(str(tmp_path / "thin.safetensors"), model=str(base))(tiny.pictures((32, 32)), ["a"], [{}])
