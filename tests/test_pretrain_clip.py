"""The embedded CLIP: its loss against closed forms, what counts as a false caption, and a training from end to end."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor

from tiller import cli
from tiller.emoji import scenes, wording
from tiller.emoji.judge import stated
from tiller.emoji.scenes import Scene
from tiller.emoji.words import COLOURS, NOUNS, plural
from tiller.pretrain import PretrainConfig, clip, kinds, training
from tiller.pretrain.reader_config import ClipConfig
from tiller.pretrain.scene_pool import ScenePool
from tiller.types import ConfigError

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def all_negative(count: int, captions: int) -> torch.Tensor:
    return torch.ones(count, captions, dtype=torch.bool)


def test_info_nce_of_orthogonal_pairs_is_the_closed_form():
    # scores are 5 on the diagonal and 0 elsewhere: each softmax gives its partner e^5 / (e^5 + 3)
    units = torch.eye(4, dtype=torch.float64)
    loss = clip.info_nce(units, units, units.new_tensor(5.0).log(), all_negative(4, 4))
    assert loss.item() == pytest.approx(math.log1p(3 * math.exp(-5)), rel=1e-12)


def test_info_nce_is_the_mean_of_both_directions_and_reads_no_true_caption_as_false():
    generator = torch.Generator().manual_seed(0)
    pictures = F.normalize(torch.randn(3, 5, generator=generator, dtype=torch.float64), dim=-1)
    captions = F.normalize(torch.randn(5, 5, generator=generator, dtype=torch.float64), dim=-1)
    negative = all_negative(3, 5)
    negative[0, 2] = negative[2, 4] = negative[1, 1] = False  # the last is a partner, which stays in
    scores = np.exp(7.0 * pictures.numpy() @ captions.numpy().T)
    rows = [(0, 1, 3, 4), (0, 1, 2, 3, 4), (0, 1, 2, 3)]
    columns = [(0, 1, 2), (0, 1, 2), (1, 2)]  # caption 2 may be said of picture 0
    by_picture = np.mean([-np.log(scores[i, i] / scores[i, list(rows[i])].sum()) for i in range(3)])
    by_caption = np.mean([-np.log(scores[i, i] / scores[list(columns[i]), i].sum()) for i in range(3)])
    loss = clip.info_nce(pictures, captions, torch.tensor(7.0, dtype=torch.float64).log(), negative)
    assert loss.item() == pytest.approx((by_picture + by_caption) / 2, rel=1e-12)


def test_what_a_scene_states_is_what_its_caption_is_read_as():
    rng = np.random.default_rng(3)
    for _ in range(400):
        scene = wording.said(wording.any_scene(rng), rng)
        assert wording.statement(scene) == stated(scenes.parse(scenes.caption(scene)))


def test_true_captions_contradict_nothing_and_wrong_ones_their_picture():
    rng = np.random.default_rng(4)
    true = [wording.said(wording.any_scene(rng), rng) for _ in range(300)]
    false = [wording.wrong(scene, rng) for scene in true]
    assert not wording.contradictions(true, true).diagonal().any()
    assert wording.contradictions(true, false).diagonal().all()


def test_contradictions_by_hand():
    cat = Scene("cat", colour="blue")
    washing = Scene("cat", activity="washing dishes", colour="red")
    captions = [
        Scene("cat"),
        Scene("cat", count=2),
        Scene("cat", colour="red", colour_said=True),
        Scene("cat", activity="washing dishes"),
        Scene("dog"),
        Scene("cat", size="small"),
    ]
    assert wording.contradictions([cat, washing], captions).tolist() == [
        [False, True, True, True, True, True],
        [False, True, False, False, True, False],  # nothing is known of the size of a cat that is busy
    ]


def test_every_word_of_the_world_is_one_token(tmp_path):
    words = clip.tokenizer.build(clip.vocabulary(), clip.CAPTION_TOKENS, tmp_path)
    for word in (*NOUNS, *map(plural, NOUNS), *COLOURS, "one", "four", "small", "bottom", "umbrella", "picture"):
        assert len(words(word).input_ids) == 3, word  # with start and end


def test_the_autoencoder_blurs_a_share_of_the_pool_and_a_kept_pool_is_read_again(tmp_path):
    plain, coded = ScenePool(8, 0.0, 0, tmp_path / "plain"), ScenePool(8, 0.5, 0, tmp_path / "coded")
    changed = (plain.pictures != coded.pictures).flatten(1).any(1)
    assert changed.tolist() == [True] * 4 + [False] * 4
    difference = (plain.pictures[:4].float() - coded.pictures[:4].float()).abs().mean().item()
    assert 1 < difference < 25  # of 255: other, but the same scene
    stamp = (tmp_path / "coded").stat().st_mtime_ns
    again = ScenePool(8, 0.5, 0, tmp_path / "coded")
    assert (tmp_path / "coded").stat().st_mtime_ns == stamp
    assert torch.equal(again.pictures, coded.pictures)


def tiny(output: Path) -> list[str]:
    """Overrides of the recipe: a tiny model, four steps."""
    small = "width=32 text_width=32 layers=1 text_layers=1 head_width=32 joint_width=16 steps=4 batch=8 pool=32 coded=0"
    return [*small.split(), "save_every=2", "precision=fp32", f"output={output}"]


def test_the_command_trains_resumes_bit_for_bit_and_writes_a_plain_folder(tmp_path, monkeypatch, capsys):
    recipe = ["pretrain", "--config", str(RECIPES / "pretrain-clip.yaml")]
    assert cli.main([*recipe, *tiny(tmp_path / "whole")]) == 0
    assert "clip 4/4  loss" in capsys.readouterr().out

    real = training.Training.update

    def dying(self, loss):
        if self.step == 3:
            raise KeyboardInterrupt
        real(self, loss)

    monkeypatch.setattr(training.Training, "update", dying)
    assert cli.main([*recipe, *tiny(tmp_path / "broken")]) == cli.INTERRUPTED
    monkeypatch.setattr(training.Training, "update", real)
    assert cli.main([*recipe, *tiny(tmp_path / "broken")]) == 0
    whole, broken = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert {tensor.dtype for tensor in whole.values()} == {torch.float16}

    model = CLIPModel.from_pretrained(tmp_path / "whole" / "model")
    processor = CLIPProcessor.from_pretrained(tmp_path / "whole" / "model")
    assert model.dtype == torch.float32
    picture = scenes.draw(Scene("cat"))
    inputs = processor(text=["a cat", "two dogs"], images=picture.resize((128, 128)), return_tensors="pt", padding=True)
    assert inputs.pixel_values.min() >= -1
    assert inputs.pixel_values.max() > 0.5  # on [-1, 1], as in training
    vectors = clip.unit_vectors(model, inputs.pixel_values, {k: inputs[k] for k in ("input_ids", "attention_mask")})
    expected = model.logit_scale.exp() * vectors[0] @ vectors[1].T
    torch.testing.assert_close(model(**inputs).logits_per_image, expected)


def test_a_start_brings_its_weights_and_must_be_of_the_same_sizes(tmp_path):
    config = kinds.load(RECIPES / "pretrain-clip.yaml", [*tiny(tmp_path / "first"), "steps=1"])
    list(clip.pretrain(config))
    # learning rate 0: the weights that it starts from are those that it ends with
    again = replace(config, output=str(tmp_path / "again"), start=str(tmp_path / "first" / "model"), lr=0.0, seed=1)
    list(clip.pretrain(again))
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("first", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ConfigError, match="other sizes or words"):
        list(clip.pretrain(replace(again, output=str(tmp_path / "wider"), width=64)))
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        list(clip.pretrain(replace(again, output=str(tmp_path / "none"), start=str(tmp_path))))


def test_the_temperature_stays_above_a_hundredth(tmp_path):
    config = kinds.load(RECIPES / "pretrain-clip.yaml", tiny(tmp_path))
    words = clip.tokenizer.build(clip.vocabulary(), clip.CAPTION_TOKENS, tmp_path)
    model = clip.build(config, words)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    torch.nn.init.constant_(model.logit_scale, 9.0)
    list(clip.train(model, words, config, tmp_path))
    assert model.logit_scale.exp().item() < 101


def test_the_key_model_chooses_the_settings(tmp_path):
    assert type(kinds.load(None)) is PretrainConfig
    assert kinds.load(None, ["model=clip", "steps=7"]) == ClipConfig(steps=7)
    file = tmp_path / "settings.yaml"
    file.write_text("model: clip\nsteps: 9\n")
    assert kinds.load(file) == ClipConfig(steps=9)
    with pytest.raises(ConfigError, match="did you mean clip"):
        kinds.load(None, ["model=clap"])
    with pytest.raises(ConfigError, match=r"denoiser"):
        kinds.load(None, ["model=clip", "denoiser.steps=3"])
    with pytest.raises(ConfigError, match="must divide 64"):
        kinds.load(None, ["model=clip", "patch=7"])
