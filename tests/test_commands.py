"""The commands as a user meets them, on a tiny pipeline folder: exit codes, files, sentences."""

import json

import pytest
from PIL import Image

import tiny
from tiller.cli import main

RECIPE = """
model: {{name: {model}, lora_rank: 4}}
prompts: {prompts}
reward: {reward}
sampling: {{num_inference_steps: 3, guidance_scale: 2.0, height: 16, width: 16}}
train: {{epochs: 2, samples_per_epoch: 8, group_size: 4, batch_size: 4, learning_rate: 1.0e-3}}
evaluation: {{samples_per_prompt: 1}}
run: {{output_dir: {output}, checkpoint_every: 1, sample_prompts: 2}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.tiny_sd().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")

    def write(reward="jpeg_compressibility", prompts=None, output="run"):
        text = RECIPE.format(
            model=model, prompts=prompts or tmp_path / "prompts.txt", reward=reward, output=tmp_path / output
        )
        (tmp_path / "recipe.yaml").write_text(text)
        return str(tmp_path / "recipe.yaml")

    return write


def test_train_leaves_everything_the_readme_names_and_evaluate_and_sample_read_it(recipe, tmp_path, capsys):
    assert main(["train", recipe()]) == 0
    run = tmp_path / "run"
    for name in ("config.yaml", "metrics.jsonl", "before_after.png", "reward.png", "model", "checkpoints"):
        assert (run / name).exists(), name
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics] == [1, 2]
    comparison = json.loads((run / "evaluation" / "comparison.json").read_text())
    assert comparison[0]["count"] == 2

    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    again = json.loads((run / "evaluation" / "again" / "comparison.json").read_text())
    assert again[0]["tuned"] == pytest.approx(comparison[0]["tuned"], abs=1e-4)
    assert again[0]["base"] == pytest.approx(comparison[0]["base"], abs=1e-4)
    assert "95 % interval" in capsys.readouterr().out

    assert main(["sample", str(run), "--prompt", "a cat", "--output", str(tmp_path / "out")]) == 0
    assert Image.open(tmp_path / "out" / "0000-a-cat-0.png").size == (16, 16)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("raise KeyError('boom')", "boom"),
        ("return [1.0]", "1"),
        ("return ['good'] * len(images)", "good"),
        ("return [1.0] * len(images)", "every one of 32 pictures of 2 prompts"),
        ("return [None] * len(images)", "no score to any of 32 pictures of 2 prompts"),
    ],
)
def test_a_bad_reward_is_refused_before_training_in_one_sentence(recipe, tmp_path, capsys, body, sentence):
    (tmp_path / "rewards.py").write_text(f"def mine(images, prompts, metadata):\n    {body}\n")
    assert main(["train", recipe(reward=f"{tmp_path / 'rewards.py'}:mine")]) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error
    assert "Traceback" not in error
    assert not list((tmp_path / "run" / "checkpoints").glob("epoch-*"))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.lrr=1", "train.lrr is unknown"),
        ("train.group_size=3", "group_size"),
        ("model.device=cuda", "model.device=cpu"),
        ("model.device=tpu9", "model.device"),
        ("sampling.generator=1", "sampling.generator"),
        ("sampling.guidence_scale=2", "guidence_scale"),
        ("model.target_modules=[nothing]", "target_modules"),
        ("model.name=/nowhere/at/all", "/nowhere/at/all"),
        ("prompts=missing.txt", "missing.txt"),
        ("kernel=ode", "log-probabilities"),
    ],
)
def test_a_bad_setting_is_refused_in_one_sentence(recipe, capsys, override, sentence):
    assert main(["train", recipe(), override]) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error
    assert len(error.splitlines()) == 1


def test_a_run_folder_of_another_recipe_is_refused_and_left_alone(recipe, tmp_path, capsys):
    assert main(["train", recipe()]) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert main(["train", recipe(), "train.seed=5"]) == 2
    assert "train.seed" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_evaluate_and_sample_say_what_is_missing(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err
