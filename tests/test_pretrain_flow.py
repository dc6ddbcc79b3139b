"""Pretraining a rectified-flow transformer: what it is trained on is what the pipeline later asks of it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import CogView4Pipeline, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from tiller import Policy, config, emoji
from tiller.kernels import FlowSDE
from tiller.pretrain import AutoencoderConfig, DecoderConfig, DenoiserConfig, FlowConfig, PretrainConfig, build
from tiller.pretrain import data as sources
from tiller.pretrain import pretrain as train
from tiller.pretrain.flow import flow_loss, forward_noised, sigma_of, trimmed
from tiller.pretrain.training import Training, read_metadata
from tiller.types import ConfigError

FLOW = FlowConfig(width=32, layers=2, head_width=16, time_width=16)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Four flat pictures named by their colour."""
    folder = tmp_path_factory.mktemp("pictures")
    for word, colour in {"red": "#d00", "green": "#0d0", "blue": "#00d", "dark": "#222"}.items():
        Image.new("RGB", (32, 32), colour).save(folder / f"{word}.png")
        (folder / f"{word}.txt").write_text(f"a {word} square\n")
    return folder


def tiny(pictures: Path, output: Path) -> PretrainConfig:
    """Three short phases on 32x32 pictures: latents of 8x8, tokens of 4x4."""
    return PretrainConfig(
        output=str(output),
        data=str(pictures),
        size=32,
        save_every=2,
        precision="fp32",
        autoencoder=AutoencoderConfig(channels=(8, 16, 16), latent_channels=4, steps=2, batch=2),
        denoiser=DenoiserConfig(flow=FLOW, text_width=48, text_layers=1, steps=4, batch=4, pool=8, epochs=1),
        decoder=DecoderConfig(steps=2, batch=2),
    )


def from_start(settings: PretrainConfig, start: Path) -> PretrainConfig:
    """The same with the autoencoder and the words of a pipeline folder."""
    return replace(settings, start=str(start), autoencoder=AutoencoderConfig(), decoder=DecoderConfig())


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory) -> Path:
    """The folder of a finished tiny training."""
    settings = tiny(pictures, tmp_path_factory.mktemp("flow"))
    reports = list(train(settings))
    assert [(r.phase, r.step) for r in reports] == [("autoencoder", 2), ("denoiser", 4), ("decoder", 2)]
    return Path(settings.output)


def load(folder: Path) -> CogView4Pipeline:
    pipe = DiffusionPipeline.from_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_target_is_noise_minus_picture():
    latents, noise = torch.tensor([2.0]).view(1, 1, 1, 1), torch.tensor([-1.0]).view(1, 1, 1, 1)
    noisy, velocity = forward_noised(latents, noise, torch.tensor([0.25]))
    assert noisy.item() == 0.75 * 2.0 + 0.25 * -1.0
    assert velocity.item() == -3.0  # eps - x0

    x0, eps = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    sigmas = torch.tensor([0.1, 0.5, 0.9])

    class Knows(torch.nn.Module):  # x_sigma - x0 = sigma (eps - x0)
        def forward(self, latents, sigmas, tokens):
            return (latents - x0) / sigmas[:, None, None, None]

    class Silent(torch.nn.Module):
        def forward(self, latents, sigmas, tokens):
            return torch.zeros_like(latents)

    assert flow_loss(Knows(), x0, None, sigmas, eps).item() < 1e-10
    assert flow_loss(Silent(), x0, None, sigmas, eps).item() == pytest.approx((eps - x0).square().mean().item())


def test_noise_levels_are_uniform_or_logit_normal():
    times = torch.tensor([0.0, 0.5, 0.841344746, 0.158655254], dtype=torch.float64)  # the last are one sigma off
    drawn = sigma_of(times, FlowConfig(sigmas="logit_normal"))
    assert drawn[1:].tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])
    assert drawn[0] > 0  # never at the ends
    assert sigma_of(times, FlowConfig(sigmas="uniform")).tolist() == pytest.approx(times.tolist())


def test_blocks_of_padding_are_cut_as_the_pipeline_has_none():
    tokens = torch.full((2, 48), 9)
    tokens[0, 40:], tokens[1, 30:] = 1, 1
    assert torch.equal(trimmed(tokens, 9), tokens[:, 16:])
    assert trimmed(torch.full((2, 48), 9), 9).shape == (2, 16)


def test_the_pipeline_asks_what_training_asks(pictures, trained, tmp_path):
    """Words, noise levels and sizes reach the transformer alike in training and in sampling."""
    settings = from_start(tiny(pictures, tmp_path), trained / "pipeline")
    _, model, words = build(settings, sources.open_source(settings.data, settings.size), tmp_path)
    pipe = load(trained)
    model.text.load_state_dict(pipe.text_encoder.state_dict())
    model.transformer.load_state_dict(pipe.transformer.state_dict())

    asked = {}
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: asked.update(kwargs, output=output[0]), with_kwargs=True
    )
    prompts = ["a red square", "a dark blue square of red"]
    pipe(prompts, num_inference_steps=3, guidance_scale=1.0, output_type="latent")
    assert asked["timestep"].tolist() == [1.0, 1.0]  # of 1000; equal steps down to this one
    with torch.no_grad():
        output = model(asked["hidden_states"], asked["timestep"] / 1000, model.tokenise(words, prompts))
    assert torch.allclose(output, asked["output"], atol=1e-6)
    assert output.abs().max() > 1e-4


def test_interrupted_training_ends_in_the_same_bits(pictures, trained, tmp_path, monkeypatch):
    settings, update, done = tiny(pictures, tmp_path), Training.update, []

    def failing(self, loss):
        if len(done) == 5:  # after the autoencoder's 2 steps and the denoiser's 3, of which 2 are saved
            raise KeyboardInterrupt
        done.append(loss)
        update(self, loss)

    monkeypatch.setattr(Training, "update", failing)
    with pytest.raises(KeyboardInterrupt):
        list(train(settings))
    monkeypatch.undo()
    assert read_metadata(tmp_path / "train" / "denoiser.safetensors")["step"] == "2"
    list(train(settings))
    files = sorted((trained / "pipeline").rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        one, two = load_file(file), load_file(tmp_path / "pipeline" / file.relative_to(trained / "pipeline"))
        assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_plain_folder_that_records_and_replays(trained):
    assert {p.suffix for p in trained.rglob("*") if p.is_file()} <= {".safetensors", ".json", ".txt"}
    pipe = load(trained)
    assert type(pipe) is CogView4Pipeline
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.float32
    policy = Policy(pipe, lora_rank=2)
    rollout = policy.sample(["a red square"] * 2, kernel=FlowSDE(0.7), num_inference_steps=4, guidance_scale=3.0)
    assert rollout.images[0].size == (32, 32)
    ratios = []
    policy.replay(rollout, lambda s: ratios.append((s.log_prob - rollout.log_probs[:, s.index]).exp().detach()))
    assert len(ratios) == 4
    assert torch.equal(torch.stack(ratios), torch.ones(4, 2))


def test_a_prompt_means_the_same_in_any_company(trained):
    pipe = load(trained)
    kept = json.loads((trained / "pipeline" / "tokenizer" / "tokenizer_config.json").read_text())
    assert (kept["padding_side"], kept["model_max_length"], "is_local" in kept) == ("left", 1024, False)
    alone = pipe.encode_prompt("a red square", do_classifier_free_guidance=False)[0]
    among = pipe.encode_prompt(["a red square", "a dark blue square of red"], do_classifier_free_guidance=False)[0]
    assert torch.allclose(alone[0], among[0], atol=1e-6)


def test_a_start_lends_its_autoencoder_and_its_words(pictures, trained, tmp_path):
    settings = from_start(tiny(pictures, tmp_path), trained / "pipeline")
    _, model, _ = build(settings, sources.open_source(settings.data, settings.size), tmp_path / "train")
    given = load_file(trained / "pipeline" / "text_encoder" / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(model.text.embed_tokens.weight, given.float())
    assert {r.phase for r in train(settings)} == {"denoiser"}
    name = Path("vae") / "diffusion_pytorch_model.safetensors"
    one, two = load_file(trained / "pipeline" / name), load_file(tmp_path / "pipeline" / name)
    assert all(torch.equal(one[k], two[k]) for k in one)
    written = [p.read_text() for p in (tmp_path / "pipeline").rglob("*.json")]
    assert not any(str(trained) in text for text in written)  # the folder stands alone


def test_bad_settings_are_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="multiple of head_width"):
        FlowConfig(width=100)
    with pytest.raises(ConfigError, match=r"denoiser\.channels belongs to the U-Net"):
        PretrainConfig(denoiser=DenoiserConfig(flow=FLOW, channels=(64,)))
    with pytest.raises(ConfigError, match="leave out autoencoder and decoder"):
        PretrainConfig(start="emoji", decoder=DecoderConfig(steps=1))
    with pytest.raises(ConfigError, match="multiple of 16"):
        PretrainConfig(size=40, denoiser=DenoiserConfig(flow=FLOW))
    with pytest.raises(ConfigError, match="no pipeline folder; give one, or emoji or emoji-flow"):
        list(train(PretrainConfig(output=str(tmp_path), start=str(tmp_path))))


def test_the_recipe_is_that_of_the_shipped_model():
    recipe = config.load(PretrainConfig, Path(config.__file__).parent / "recipes" / "pretrain-flow.yaml")
    flow, kept = (
        recipe.denoiser.flow,
        json.loads((emoji.path("emoji-flow") / "transformer" / "config.json").read_text()),
    )
    assert (recipe.start, recipe.data, recipe.size) == ("emoji", "emoji", 64)
    assert (kept["num_layers"], kept["patch_size"], kept["time_embed_dim"]) == (
        flow.layers,
        flow.patch,
        flow.time_width,
    )
    assert kept["num_attention_heads"] * kept["attention_head_dim"] == flow.width
    assert kept["attention_head_dim"] == flow.head_width
    assert kept["text_embed_dim"] == recipe.denoiser.text_width
    assert recipe.denoiser.steps * recipe.denoiser.batch <= recipe.denoiser.pool * recipe.denoiser.epochs  # one pool
