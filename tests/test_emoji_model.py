"""The shipped models: ordinary, small pipeline folders that draw what they are asked for, most of the time."""

import numpy as np
import pytest
import torch
from diffusers import CogView4Pipeline, DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from tiller import Policy, emoji
from tiller.emoji.judge import Judge
from tiller.emoji.measure import load, measure, paint, prompts_of, sheet
from tiller.kernels import FlowSDE
from tiller.types import TillerError


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", emoji.MODELS)
def test_at_most_25_megabytes_and_no_pickle(name):
    files = [p for p in emoji.path(name).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 25_000_000
    assert {p.suffix for p in files} == {".json", ".safetensors"}


def test_plain_diffusers_loads_it():
    pipe = StableDiffusionPipeline.from_pretrained(emoji.path())
    pipe.set_progress_bar_config(disable=True)
    assert pipe.safety_checker is None
    assert pipe.unet.dtype == torch.float32
    config = pipe.scheduler.config
    assert (config.prediction_type, config.clip_sample, config.set_alpha_to_one) == (
        "v_prediction",
        False,
        False,
    )
    assert pipe("a cat", num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)


def test_plain_diffusers_loads_the_flow_model():
    pipe = DiffusionPipeline.from_pretrained(emoji.path("emoji-flow"))
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is CogView4Pipeline
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.float32
    assert (pipe.scheduler.config.shift, pipe.scheduler.config.use_dynamic_shifting) == (1.0, False)
    assert pipe("a cat", num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)


def test_both_models_have_one_autoencoder():
    one, two = (
        load_file(emoji.path(name) / "vae" / "diffusion_pytorch_model.safetensors") for name in ("emoji", "emoji-flow")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_flow_model_is_a_policy_by_its_name():
    policy = Policy.from_pretrained("emoji-flow", lora_rank=2)
    rollout = policy.sample(["a cat"] * 2, kernel=FlowSDE(0.7), num_inference_steps=3, guidance_scale=4.0)
    ratios = []
    policy.replay(rollout, lambda s: ratios.append((s.log_prob - rollout.log_probs[:, s.index]).exp().detach()))
    assert torch.equal(torch.stack(ratios), torch.ones(3, 2))


@pytest.mark.parametrize("name", emoji.MODELS)
@pytest.mark.parametrize("kind", ["count", "colour"])
def test_the_judge_finds_most_prompts_fully_right(kind, name):
    prompts = prompts_of(kind, 24, seed=2)
    shares = measure(Judge.load(), paint(load(name), prompts, guidance=4.0, steps=10), prompts)
    assert shares["all"] >= 0.5, shares  # chance is below 1 %


def test_measure_counts_each_stated_fact_and_their_conjunction():
    class Reader:
        def facts(self, images):
            first = torch.full((2, 69), -9.0)
            first[:, 0] = 0.0  # both times a cat
            count = torch.full((2, 4), -9.0)
            count[:, 1] = 0.0  # both times two
            return {"first": first, "count": count}

    shares = measure(Reader(), [None, None], ["two cats", "three cats"])
    assert shares == {"all": 0.5, "first": 1.0, "count": 0.5}


def test_prompts_are_the_same_for_the_same_seed_and_the_sheet_holds_all():
    assert prompts_of("count", 3) == prompts_of("count", 3)
    assert all("playing chess" not in p for p in prompts_of("unseen activity", 30))
    images = paint(load("emoji"), ["a cat"] * 3, guidance=1.0, steps=1)
    assert np.asarray(sheet(images, ["a cat"] * 3, columns=2)).shape == (2 * 154, 2 * 132, 3)


def test_a_missing_model_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(emoji, "FOLDER", tmp_path)
    with pytest.raises(TillerError, match="tiller pretrain"):
        emoji.path()


def test_an_unknown_model_is_told_of_both():
    with pytest.raises(TillerError, match="emoji and emoji-flow"):
        emoji.path("emojo")
