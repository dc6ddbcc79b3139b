"""Learned rewards as a user meets them: fitted from files by the command, saved, loaded, followed, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
import tiny_scorers
from tiller.cli import main
from tiller.pairs import open_pairs
from tiller.report.listed import write_list
from tiller.rewards import resolve, score
from tiller.rewards.cache import identity_of
from tiller.rewards.gradient import as_tensor, score_with_graph
from tiller.rewards.learned import Learned
from tiller.rewards.scorers.clip import Clip
from tiller.run.identity import files
from tiller.types import ConfigError
from tiller.vote.booth import Booth
from tiller.vote.contest import find
from tiller.vote.ledger import Ledger

PROMPTS = ("a cat", "a dog", "a horse", "a fox", "a bee", "an ant", "a cow", "a pig")
QUICK = (
    "fit.members=2",
    "fit.steps=120",
    "fit.learning_rate=5e-3",
    "head.hidden=[16]",
    "head.dropout=0.0",
    "held_out=0.5",
    "device=cpu",
)


def redness(images: list[Image.Image], prompts: list[str], metadata: list[Any]) -> list[float]:
    """Mean of red in [0, 1]."""
    return [float(np.asarray(image.convert("RGB"))[..., 0].mean() / 255) for image in images]


BY = f"{__file__}:redness"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tiny_scorers.clip(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: Any) -> Path:
    """Six pictures of each of eight prompts, of one colour each, listed as `tiller sample` lists them."""
    folder = tmp_path_factory.mktemp("pictures")
    colours = np.random.default_rng(0).integers([0, 96, 96], [256, 160, 160], (6 * len(PROMPTS), 3))
    entries = []
    for number, colour in enumerate(colours.tolist()):
        Image.new("RGB", (32, 32), tuple(colour)).save(folder / f"{number:03d}.png")
        entries.append((f"{number:03d}.png", PROMPTS[number // 6], ""))
    write_list(folder, entries)
    return folder


@pytest.fixture(scope="module")
def reward(clip: Path, pictures: Path, tmp_path_factory: Any) -> Path:
    """Fitted on what redness prefers, with nobody erring."""
    folder = tmp_path_factory.mktemp("reward")
    assert main(["label", str(pictures), "--by", BY, "--output", str(folder / "pairs.jsonl")]) == 0
    wanted = ["fit-reward", str(folder / "pairs.jsonl"), "--output", str(folder / "reward"), f"clip={clip}", *QUICK]
    assert main(wanted) == 0
    return folder / "reward"


def opened(folder: Path, count: int = 48) -> list[Image.Image]:
    return [Image.open(folder / f"{number:03d}.png") for number in range(count)]


def test_a_folder_is_labelled_into_pairs_that_point_from_better_to_worse(pictures, tmp_path, capsys) -> None:
    output = tmp_path / "answers" / "pairs.jsonl"
    assert main(["label", str(pictures), "--by", BY, "--output", str(output), "margin=0.02"]) == 0
    said = capsys.readouterr().out
    pairs = open_pairs(output, 0).pairs
    red = redness(opened(pictures), [], [])
    gaps = [abs(red[6 * p + a] - red[6 * p + b]) for p in range(8) for a in range(6) for b in range(a)]
    assert len(pairs) == sum(gap > 0.02 for gap in gaps) < 8 * 15
    assert f"{len(pairs)} pairs of 48 pictures" in said
    assert f"left out: {8 * 15 - len(pairs)} ties" in said
    for pair in pairs:
        better, worse = redness([pair.chosen(), pair.rejected()], [], [])
        assert better > worse + 0.02


def test_stand_ins_that_err_do_so_by_the_seed(pictures, tmp_path) -> None:
    def made(name: str, *settings: str) -> list[str]:
        assert main(["label", str(pictures), "--by", BY, "--output", str(tmp_path / name), *settings]) == 0
        return (tmp_path / name).read_text().splitlines()

    sure, erring = made("a.jsonl"), made("b.jsonl", "temperature=0.1")
    assert 0.6 < np.mean([line in sure for line in erring]) < 0.98
    assert erring == made("c.jsonl", "temperature=0.1")
    assert erring != made("d.jsonl", "temperature=0.1", "seed=1")
    assert len(made("e.jsonl", "pairs_per_prompt=2")) == 2 * len(PROMPTS)


def test_a_folder_is_labelled_one_picture_at_a_time(pictures, tmp_path, capsys) -> None:
    output = tmp_path / "labels.jsonl"
    wanted = ["label", str(pictures), "--by", BY, "--output", str(output), "write=labels", "threshold=0.5"]
    assert main(wanted) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["label"] for line in lines] == [float(one >= 0.5) for one in redness(opened(pictures), [], [])]
    assert all((tmp_path / line["image"]).is_file() for line in lines)
    assert [line["prompt"] for line in lines] == [prompt for prompt in PROMPTS for _ in range(6)]
    capsys.readouterr()
    assert main([*wanted[:5], str(output), "write=labels", "threshold=null", "temperature=1.0"]) == 2
    assert "give a threshold" in capsys.readouterr().err


def test_what_was_preferred_is_found_on_prompts_held_out_and_told(reward: Path) -> None:
    said = json.loads((reward / "config.json").read_text())
    found = said["calibration"]
    assert said["kind"] == "preferences"
    assert found["fitted_on"] == found["count"] == 4 * 15  # half of the prompts
    assert found["beats_chance"]
    assert found["accuracy"] > 0.75
    assert found["log_loss"] < 0.6
    assert sum(one["count"] for one in found["bins"]) == 60
    assert sorted(file.name for file in reward.iterdir()) == ["config.json", "heads.safetensors"]  # no pickle


def test_scores_are_those_of_the_heads_in_log_odds(reward: Path, clip: Path, pictures: Path) -> None:
    """By the layers written out: the mean of two members, over the temperature."""
    said, weights = json.loads((reward / "config.json").read_text()), load_file(reward / "heads.safetensors")
    images, prompts = opened(pictures, 5), ["a cat", "a dog", "a cat", "a fox", "never seen"]
    towers = Clip("test", str(clip), device="cpu")
    seen, read = towers.pictures(images), towers.texts(prompts)
    inputs = torch.cat([seen * 12**0.5, read * 12**0.5, seen * read * 12], dim=1)
    members = []
    for member in "01":
        hidden = (inputs @ weights[f"{member}.layers.0.weight"].T + weights[f"{member}.layers.0.bias"]).clamp(min=0)
        cosines = said["head"]["cosine"] * weights[f"{member}.gain"] * (seen * read).sum(1)
        members.append(cosines + hidden @ weights[f"{member}.layers.3.weight"][0] + weights[f"{member}.layers.3.bias"])
    expected = torch.stack(members) / said["temperature"]
    for batch_size in (2, 32):
        learned = Learned(str(reward), device="cpu", batch_size=batch_size)
        np.testing.assert_allclose(score(learned, images, prompts, [{}] * 5).values, expected.mean(0), rtol=1e-4)
    wary = Learned(str(reward), device="cpu", pessimism=2.0)
    spread = (expected[0] - expected[1]).abs() / 2  # the deviation of two
    np.testing.assert_allclose(
        score(wary, images, prompts, [{}] * 5).values, expected.mean(0) - 2 * spread, rtol=1e-3, atol=1e-4
    )


def test_the_recipe_s_form_and_the_notes(reward: Path, pictures: Path) -> None:
    learned = resolve("learned", {"path": str(reward), "device": "cpu"})
    found = score(learned, opened(pictures, 2), ["a cat"] * 2, [{}] * 2)
    assert found.notes[0].startswith("members differ by ")
    assert learned([], [], []) == []


def test_a_tensor_gets_the_same_scores_with_a_gradient(reward: Path, pictures: Path) -> None:
    images, prompts = opened(pictures, 4), ["a cat", "a dog", "a cat", "a cow"]
    learned = resolve("learned", {"path": str(reward), "device": "cpu", "differentiable": True})
    pixels = as_tensor(images).requires_grad_()
    found = score_with_graph(learned, pixels, prompts, [{}] * 4)
    plain = score(Learned(str(reward), device="cpu"), images, prompts, [{}] * 4)
    np.testing.assert_allclose(found.detach(), plain.values, atol=1e-4)
    np.testing.assert_allclose(score(learned, images, prompts, [{}] * 4).values, plain.values, atol=1e-4)
    found.sum().backward()
    assert pixels.grad is not None
    step = 1e-2 * pixels.grad / pixels.grad.norm()
    with torch.no_grad():
        risen = learned(pixels + step, prompts, [{}] * 4).sum() - learned(pixels - step, prompts, [{}] * 4).sum()
    assert risen.item() == pytest.approx(2e-2 * pixels.grad.norm().item(), rel=0.1)


def test_another_clip_than_the_fitted_one_is_refused(reward: Path, clip: Path, tmp_path: Path) -> None:
    said = json.loads((reward / "config.json").read_text())
    other = tmp_path / "other"
    tiny_scorers.clip(other)
    weights = load_file(other / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    moved = copied(reward, tmp_path / "moved", clip=str(other))
    with pytest.raises(ConfigError, match=r"is not the CLIP that .* was fitted on; fit the reward again"):
        Learned(str(moved), device="cpu")(tiny_scorers.pictures((32, 32)), ["a cat"], [{}])
    assert said["clip"] == str(clip)


def copied(reward: Path, folder: Path, without: str = "", **changed: Any) -> Path:
    folder.mkdir()
    (folder / "heads.safetensors").write_bytes((reward / "heads.safetensors").read_bytes())
    said = json.loads((reward / "config.json").read_text()) | changed
    said.pop(without, None)
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def test_another_fit_in_the_same_place_is_another_reward(reward: Path, tmp_path: Path) -> None:
    """So that neither kept scores nor a run that goes on take one for the other."""
    folder = copied(reward, tmp_path / "reward")
    recipe = {"reward": {"name": "learned", "path": str(folder)}}
    before = identity_of(Learned(str(folder))), files(recipe)
    assert set(before[1]) == {"reward.path"}
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("temperature", "temperature "))
    after = identity_of(Learned(str(folder))), files(recipe)
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert Learned("not/there/yet").identity == ""  # a recipe may be read before its reward is fitted


def test_damaged_folders_are_refused_in_one_sentence(reward: Path, tmp_path: Path) -> None:
    def message(folder: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            Learned(str(folder), device="cpu")(tiny_scorers.pictures((32, 32)), ["a cat"], [{}])
        return str(caught.value)

    assert "holds no learned reward" in message(tmp_path)
    assert "is damaged" in message(copied(reward, tmp_path / "lacking", without="temperature"))
    assert "is damaged" in message(copied(reward, tmp_path / "odd", head={"hiden": [16]}))
    cut = copied(reward, tmp_path / "cut")
    (cut / "heads.safetensors").write_bytes((reward / "heads.safetensors").read_bytes()[:-40])
    assert "cannot be read (it is not the file that was written with config.json)" in message(cut)
    (cut / "heads.safetensors").unlink()
    assert "cannot be read" in message(cut)
    with pytest.raises(ConfigError, match="path is empty"):
        Learned()
    with pytest.raises(ConfigError, match="pessimism is -1"):
        Learned("x", pessimism=-1)


def test_votes_of_people_are_taken_as_they_are(clip: Path, pictures: Path, tmp_path: Path) -> None:
    """Through the page's own booth, on the folder that `tiller label` takes; every fifth vote is a tie."""
    ledger = Ledger(tmp_path / "votes.jsonl", lambda sentence: None)
    booth, number = Booth(ledger), 0
    booth.open(find(pictures)[:60])
    while asked := booth.ballots("ann"):
        left, right = redness([Image.open(side.path) for side in asked[0].sides], [], [])
        choice = "tie" if number % 5 == 4 else "left" if left > right else "right"
        booth.vote("ann", asked[0].contest.id, asked[0].id, choice)
        number += 1
    ledger.close()
    output = tmp_path / "reward"
    assert main(["fit-reward", str(ledger.path), "--output", str(output), f"clip={clip}", *QUICK]) == 0
    found = json.loads((output / "config.json").read_text())["calibration"]
    assert found["fitted_on"] + found["count"] == 48  # 12 of 60 are ties
    assert found["accuracy"] > 0.7


def test_labels_are_fitted_from_a_file(clip: Path, pictures: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "labels.jsonl"
    asked = ["label", str(pictures), "--by", BY, "--output", str(output), "write=labels", "threshold=0.5"]
    assert main(asked) == 0
    assert main(["fit-reward", str(output), "--output", str(tmp_path / "reward"), f"clip={clip}", *QUICK]) == 0
    said = json.loads((tmp_path / "reward" / "config.json").read_text())
    assert said["kind"] == "labels"
    assert said["head"]["bounded"] is True
    learned = Learned(str(tmp_path / "reward"), device="cpu")
    values = score(learned, opened(pictures), [prompt for prompt in PROMPTS for _ in range(6)], [{}] * 48).values
    assert 0 <= values.min() < values.max() <= 1
    red = np.array(redness(opened(pictures), [], []))
    assert np.corrcoef(values, red)[0, 1] > 0.4
    assert "fitted on 24 labels" in capsys.readouterr().out


def test_answers_by_coins_come_with_a_warning(clip: Path, pictures: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "pairs.jsonl"
    assert main(["label", str(pictures), "--by", BY, "--output", str(output), "temperature=1000"]) == 0
    assert main(["fit-reward", str(output), "--output", str(tmp_path / "reward"), f"clip={clip}", *QUICK]) == 0
    assert "warning: no better than always saying the same (50.0%)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([{"image": "gone.png", "prompt": "a cat", "label": 1}], "line 1: there is no picture"),
        (
            [{"image": "000.png", "prompt": "a cat", "label": 2}],
            "line 1: the label is 2; it must be a number from 0 to 1",
        ),
        ([{"image": "000.png", "prompt": "a cat", "label": True}], "the label is True"),
        ([{"image": "000.png", "prompt": "a cat", "label": 1}, {"label": 1}], "line 2: each line needs image, prompt"),
        ([{"image": "000.png", "prompt": "a cat", "label": 1}], "holds 1 rows, and a reward takes at least 20"),
        ([{"image": "pictures.jsonl", "prompt": "a cat", "label": 1}], "cannot be read as a picture"),
        ([{"image": f"{n:03d}.png", "prompt": f"p{n}", "label": 1} for n in range(24)], "every label is 1"),
        ([{"prompt": "a cat", "chosen": "000.png", "rejected": "gone.png"}], "line 1: there is no picture"),
    ],
)
def test_bad_data_is_refused_in_one_sentence(clip, pictures, capsys, lines, sentence) -> None:
    file = pictures / "bad.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert main(["fit-reward", str(file), "--output", str(pictures / "no"), f"clip={clip}", *QUICK]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not (pictures / "no").exists()


def test_bad_requests_are_refused(pictures, tmp_path, capsys) -> None:
    def error(*arguments: str) -> str:
        assert main([*arguments]) == 2
        return capsys.readouterr().err

    assert "there is no such file" in error("fit-reward", str(tmp_path / "gone.jsonl"))
    assert "held_out must be between" in error("fit-reward", str(pictures), "held_out=0")
    assert "margin" in error("label", str(pictures), "--by", BY, "margin=-1")
    assert "reward 'redness' is unknown" in error("label", str(pictures), "--by", "redness")
    assert "there is no" in error("label", str(tmp_path / "gone"), "--by", BY)
    everything = ("label", str(pictures), "--by", BY, "--output", str(tmp_path / "x.jsonl"))
    assert "no two pictures" in error(*everything, "margin=9")
    assert "holds no pictures with prompts" in error(*everything[:1], str(tmp_path), *everything[2:], "write=labels")


RECIPE = """
model: {{name: {folder}/model, lora_rank: 4}}
prompts: {folder}/prompts.txt
reward: {{name: learned, path: {folder}/reward, device: cpu}}
algorithm: {{name: awm, train_timesteps: 2, first_timestep: 0, timestep_fraction: 1.0}}
sampling: {{num_inference_steps: 3, guidance_scale: 1.0, height: 16, width: 16}}
train: {{epochs: 2, samples_per_epoch: 8, group_size: 4, batch_size: 8, learning_rate: 1.0e-3}}
evaluation: {{samples_per_prompt: 2, rewards: ['{by}'], every: 1, monitor: {{action: roll_back}}}}
run: {{output_dir: {folder}/run, sample_prompts: 1}}
"""


def test_the_whole_circle(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of a model, compared, a reward fitted on that, and the model trained by it with a KL term."""
    tiny.tiny_sd().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path, by=BY))
    monkeypatch.chdir(tmp_path)
    drawn = ["sample", "model", "--prompts", "prompts.txt", "--per-prompt", "6", "--output", "pictures"]
    assert main([*drawn, "num_inference_steps=3", "guidance_scale=1.0", "height=16", "width=16"]) == 0
    assert main(["label", "pictures", "--by", BY, "--output", "pairs.jsonl"]) == 0
    assert main(["fit-reward", "pairs.jsonl", "--output", "reward", f"clip={clip}", *QUICK]) == 0
    assert main(["train", "recipe.yaml"]) == 0
    rows = json.loads((tmp_path / "run" / "evaluation" / "comparison.json").read_text())
    assert {row["reward"] for row in rows} == {"learned", BY}
    assert all(np.isfinite(row["tuned"]) and row["count"] == 4 for row in rows)
    epochs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert epochs[-1]["policy/kl_prediction"] > 0  # the KL term is at work
    assert main(["evaluate", "run", "samples_per_prompt=1"]) == 0
