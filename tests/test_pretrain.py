"""Pretraining on a folder of pictures: it ends in a plain pipeline folder, and an interruption changes no bit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from tiller import config
from tiller.pretrain import (
    AutoencoderConfig,
    DecoderConfig,
    DenoiserConfig,
    PretrainConfig,
    autoencoder,
    data,
    pretrain,
    tokenizer,
)
from tiller.types import ConfigError, RunError

WORDS = ("red", "green", "blue", "dark")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Twelve flat pictures named by their colour."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(12):
        colour = [20, 20, 20]
        if i % 4 < 3:
            colour[i % 4] = 220
        Image.new("RGB", (40, 32), tuple(colour)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"a {WORDS[i % 4]} square\n")
    return folder


def tiny(pictures: Path, output: Path) -> PretrainConfig:
    """Three short phases on 32x32 pictures."""
    return PretrainConfig(
        output=str(output),
        data=str(pictures),
        size=32,
        save_every=3,
        precision="fp32",
        autoencoder=AutoencoderConfig(channels=(8, 16, 16), latent_channels=4, steps=5, batch=2),
        denoiser=DenoiserConfig(channels=(32, 32), text_width=48, text_layers=1, steps=5, batch=4, pool=8, epochs=1),
        decoder=DecoderConfig(steps=5, batch=2),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.relative_to(folder)}/{k}": v for f in files for k, v in load_file(f).items()}


def test_folder_becomes_a_plain_pipeline_and_resumes_bit_for_bit(pictures, tmp_path):
    whole = tiny(pictures, tmp_path / "whole")
    reports = list(pretrain(whole))
    assert [(r.phase, r.step, r.steps) for r in reports] == [
        ("autoencoder", 5, 5),
        ("denoiser", 5, 5),
        ("decoder", 5, 5),
    ]

    broken = tiny(pictures, tmp_path / "broken")
    for phase in ("autoencoder", "denoiser", "decoder"):
        stop_after(broken, phase, step=3)
    list(pretrain(broken))

    one, two = weights(tmp_path / "whole" / "pipeline"), weights(tmp_path / "broken" / "pipeline")
    assert one.keys() == two.keys()
    assert len(one) > 100
    assert all(torch.equal(one[k], two[k]) for k in one)

    suffixes = {p.suffix for p in (tmp_path / "whole").rglob("*") if p.is_file()}
    assert suffixes <= {".safetensors", ".json", ".txt"}  # no pickle

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "whole" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red square", num_inference_steps=2, guidance_scale=3.0).images[0]
    assert image.size == (32, 32)
    settings = json.loads((tmp_path / "whole" / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    assert (settings["clip_sample"], settings["set_alpha_to_one"], settings["steps_offset"]) == (
        False,
        False,
        1,
    )
    assert settings["prediction_type"] == "v_prediction"


def stop_after(settings: PretrainConfig, phase: str, step: int) -> None:
    """Runs until the save at `step` of `phase`, and dies in the step after it."""
    from tiller.pretrain import training

    real = training.Training.update

    def update(self, loss):
        saved = config_path(settings, phase)
        if self.step == step and saved.exists() and training.read_metadata(saved)["step"] == str(step):
            raise KeyboardInterrupt
        real(self, loss)

    training.Training.update = update
    try:
        with pytest.raises(KeyboardInterrupt):
            list(pretrain(settings))
    finally:
        training.Training.update = real


def config_path(settings: PretrainConfig, phase: str) -> Path:
    return Path(settings.output) / "train" / f"{phase}.safetensors"


def test_other_settings_do_not_resume(pictures, tmp_path):
    settings = tiny(pictures, tmp_path / "run")
    stop_after(settings, "autoencoder", step=3)
    longer = replace(settings, autoencoder=replace(settings.autoencoder, steps=9))
    with pytest.raises(RunError, match="other settings"):
        list(pretrain(longer))


def test_every_known_word_is_one_token_and_unknown_ones_are_spelled(tmp_path):
    # "oat" and "at" offer other ways to build "goat"; a left-to-right merge table would take them
    known = ["at", "oat", "goat", "a", "an", "ant", "tan"]
    words = tokenizer.build(known, 16, tmp_path)
    assert [words.tokenize(w) for w in known] == [[w + "</w>"] for w in known]
    assert words.tokenize("A goat, zoat") == ["a</w>", "goat</w>", ",</w>", "z", "oat</w>"]
    ids = words("goat", padding="max_length", max_length=16).input_ids
    assert ids[0] == words.bos_token_id
    assert ids[2:] == [words.eos_token_id] * 14


def test_standardised_latents_have_unit_variance_and_decode_the_same():
    torch.manual_seed(0)
    vae = autoencoder.build(AutoencoderConfig(channels=(8, 16), latent_channels=4), 16)
    pictures = torch.rand(64, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pictures).latent_dist
        decoded = vae.decode(before.mean).sample
        autoencoder.standardise(vae, before.mean)
        after = vae.encode(pictures).latent_dist
        assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
        assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-4)
        scale = before.mean.std((0, 2, 3))[:, None, None]
        assert torch.allclose(after.std, before.std / scale, rtol=1e-3)
        assert torch.allclose(vae.decode(after.mean).sample, decoded, atol=1e-3)
    assert isinstance(vae, AutoencoderKL)


def test_the_recipe_is_the_defaults():
    recipe = config.load(PretrainConfig, Path(config.__file__).parent / "recipes" / "pretrain.yaml")
    assert recipe == PretrainConfig(output="emoji-model")


def test_metadata_jsonl_and_centre_crop(tmp_path):
    picture = Image.new("RGB", (30, 10), "black")
    picture.paste(Image.new("RGB", (10, 10), "white"), (10, 0))
    picture.save(tmp_path / "wide.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "wide.png", "text": "a white square"}\n')
    batch, texts = data.open_source(str(tmp_path), 8).batch(np.random.default_rng(0), 3)
    assert texts == ["a white square"] * 3
    assert torch.equal(batch, torch.ones(3, 3, 8, 8))


def test_bad_input_is_one_sentence(tmp_path, pictures):
    with pytest.raises(ConfigError, match="no such folder"):
        data.open_source(str(tmp_path / "nowhere"), 32)
    with pytest.raises(ConfigError, match="no image with a caption"):
        data.open_source(str(tmp_path), 32)
    with pytest.raises(ConfigError, match="multiple of 16"):
        PretrainConfig(size=40)
    with pytest.raises(ConfigError, match=r"denoiser\.channels is \(100, 160\); choose multiples of 16"):
        PretrainConfig(denoiser=DenoiserConfig(channels=(100, 160)))
    with pytest.raises(ConfigError, match=r"decoder\.steps must be at least 1"):
        PretrainConfig(decoder=DecoderConfig(steps=0))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "bad.txt").write_text("a cat")
    with pytest.raises(ConfigError, match=r"bad\.png is no readable image"):
        data.open_source(str(tmp_path), 32).batch(np.random.default_rng(0), 1)
