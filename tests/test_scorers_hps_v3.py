"""HPSv3, against its language model and head written out in plain torch, one picture at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLConfig, Qwen2VLImageProcessorPil, Qwen2VLModel

import plain_llava
import tiny_parts as parts
import tiny_scorers as tiny
from tiller.rewards.scorers import hps_v3
from tiller.rewards.scorers.hps_v3 import HPSv3, from_hps_v3
from tiller.types import ConfigError, RewardError

SIZES = [(56, 56), (112, 28), (64, 90)]
PROMPTS = ["a cat", "", "two dogs on a long <|Reward|> sofa"]
CHAT = tiny.CHAT.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-VL of two layers, whose weights lie in the names of HPSv3's checkpoint beside the folder's own."""
    path = tmp_path_factory.mktemp("qwen")
    tokenizer = parts.qwen_tokenizer(CHAT)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": len(tokenizer) + 1, "use_sliding_window": False}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
    text |= {"rms_norm_eps": 1e-6, "bos_token_id": 0, "eos_token_id": 0}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
    )
    model = tiny.spread(parts.seeded(Qwen2VLModel, config))
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, value in model.state_dict().items():
        tensors[name if name.startswith("visual.") else f"model.{name.removeprefix('language_model.')}"] = value
    for index, after, before in ((0, 12, 16), (3, 6, 12), (5, 2, 6)):
        tensors[f"rm_head.{index}.weight"] = torch.randn(after, before, generator=generator) / before**0.5
        tensors[f"rm_head.{index}.bias"] = torch.rand(after, generator=generator)
    tensors["lm_head.weight"] = torch.zeros(len(tokenizer) + 1, 16)
    save_file(tensors, path / "hps.safetensors")
    config.text_config.vocab_size = len(tokenizer)  # the trunk's own: the mark was added later
    config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    Qwen2VLImageProcessorPil().save_pretrained(path)
    (path / "instruction.txt").write_text("Rate it.\nPrompt: {text_prompt}\nHere: <|Reward|> END")
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hps_v3, "PIXELS", 4 * 28 * 28)  # four tokens a picture


def scorer(folder: Path, **settings) -> HPSv3:
    files = {"weights": str(folder / "hps.safetensors"), "model": str(folder)}
    return HPSv3(str(folder / "instruction.txt"), **files, device="cpu", **settings)


@torch.no_grad()
def expected(reward: HPSv3, image: Image.Image, prompt: str) -> tuple[float, int]:
    """mu of one picture, and how many tokens it took; the ViT is transformers' own."""
    network, _ = reward.network
    tokenizer = parts.qwen_tokenizer()
    seen = Qwen2VLImageProcessorPil(min_pixels=4 * 28 * 28, max_pixels=4 * 28 * 28)(images=[image], return_tensors="pt")
    patches = network.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).pooler_output
    text = f"Rate it.\nPrompt: {prompt.replace('<|Reward|>', '')}\nHere: "
    before = tokenizer.encode("user: <|vision_start|>")
    after = tokenizer.encode(f"<|vision_end|>{text}")
    words = network.language_model.embed_tokens.weight
    x = torch.cat([words[before], patches, words[after], words[[len(tokenizer)]]])  # ends with the mark
    state = plain_llava.llama(x, network.state_dict(), tower="language_model")[-1]
    tensors = load_file(reward.weights)
    for index in (0, 3, 5):
        state = tensors[f"rm_head.{index}.weight"] @ state + tensors[f"rm_head.{index}.bias"]
        state = state.relu() if index < 5 else state
    return state[0].item(), len(patches)


def test_the_score_is_mu_read_at_the_mark_with_plain_positions(folder) -> None:
    """Three shapes, an empty prompt, one that holds the mark itself, batches in which shorter texts are filled up."""
    images = tiny.pictures(*SIZES)
    reward = scorer(folder)
    found = [expected(reward, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    values = [value for value, _ in found]
    assert [count for _, count in found] == [4, 4, 2]  # 56 x 56, 112 x 28, 28 x 56
    assert np.ptp(values) > 0.01
    for batch_size in (1, 2, 3):
        scores = scorer(folder, batch_size=batch_size)(images, PROMPTS, [{}] * 3)
        np.testing.assert_allclose(scores, values, atol=2e-4)
    clear = images[0].convert("RGBA")
    clear.putalpha(0)
    assert reward([clear], PROMPTS[:1], [{}]) == pytest.approx(values[:1], abs=2e-4)
    with pytest.raises(RewardError, match="hps_v3 scores single pictures, but was given a video of 2 frames"):
        reward([images[:2]], ["a cat"], [{}])


def test_keys_of_older_and_newer_releases_give_the_same_weights(folder) -> None:
    old = load_file(folder / "hps.safetensors")
    new = {}
    for name, value in old.items():
        if name.startswith("model."):
            name = f"model.language_model.{name.removeprefix('model.')}"
        new[f"model.{name}" if name.startswith("visual.") else name] = value
    trunks, heads = zip(from_hps_v3(old), from_hps_v3(new), strict=True)
    assert set(trunks[0]) == set(trunks[1])
    assert {name.split(".")[0] for name in trunks[0]} == {"visual", "language_model"}
    assert [tuple(weight.shape) for weight, _ in heads[0]] == [(12, 16), (6, 12), (2, 6)]


def test_what_is_missing_is_said(folder, tmp_path) -> None:
    with pytest.raises(
        ConfigError, match="hps_v3 needs instruction, a text file with what the model was trained to re"
    ):
        HPSv3()
    with pytest.raises(ConfigError, match=r"there is no file nowhere.txt"):
        HPSv3("nowhere.txt").text  # noqa: B018
    (tmp_path / "text").write_text("Rate {text_prompt}")
    with pytest.raises(ConfigError, match=r"must have \{text_prompt\} in it, and <\|Reward\|> once"):
        HPSv3(str(tmp_path / "text")).text  # noqa: B018
    with pytest.raises(ConfigError, match=r"no weights of HPSv3: rm_head.0.weight is missing"):
        from_hps_v3({"model.embed_tokens.weight": torch.zeros(2, 2)})
