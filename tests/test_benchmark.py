"""Prompt suites by a fixed protocol: the shapes of the field, the numbers by hand, and what a user reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import tiny
import tiny_scorers
from tiller.cli import main
from tiller.commands.benchmark import _summary
from tiller.evaluation.features import Features
from tiller.prompts import suites
from tiller.types import ConfigError

REWARDS = """
def length(images, prompts, metadata):
    assert all(one["tag"] in ("counting", "colors") for one in metadata)
    return [None if "dog" in prompt else float(len(prompt)) for prompt in prompts]
"""
SUITE = """
{"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"}

{"tag": "colors", "include": [{"class": "dog"}], "prompt": "a dog"}
{"tag": "colors", "include": [{"class": "car", "color": "red"}], "prompt": "a red car"}
"""
CALL = "sampling={num_inference_steps: 2, guidance_scale: 1.0, height: 16, width: 16}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    tiny.tiny_sd().save_pretrained(folder / "model")
    tiny_scorers.clip(folder / "clip")
    (folder / "suite.jsonl").write_text(SUITE)
    (folder / "my.py").write_text(REWARDS)
    (folder / "real").mkdir()
    for number, picture in enumerate(tiny_scorers.pictures(*[(20, 24)] * 100)):
        picture.save(folder / "real" / f"{number:03d}.png")
    return folder


@pytest.mark.parametrize(
    ("line", "text", "category"),
    [
        ({"Prompts": "A red car.", "Category": "Colors"}, "A red car.", "Colors"),
        ({"Prompt": "bond", "Category": "Abstract", "Challenge": "Basic"}, "bond", "Abstract"),
        ({"tag": "counting", "include": [], "prompt": "two cats"}, "two cats", "counting"),
        ({"prompt": " a cat "}, "a cat", "all"),
    ],
)
def test_the_shapes_of_the_field(line: dict[str, Any], text: str, category: str, tmp_path: Path) -> None:
    (tmp_path / "suite.jsonl").write_text(json.dumps(line) + "\n")
    (found,) = suites.read(tmp_path / "suite.jsonl")
    assert (found.prompt.text, found.category) == (text, category)
    assert found.prompt.metadata == line


@pytest.mark.parametrize(
    ("contents", "words"),
    [("{", "suite.jsonl:1 is not JSON"), ('\n{"a": 1}', "suite.jsonl:2 has no prompt"), ("\n", "has no prompts")],
)
def test_a_suite_that_cannot_be_read_is_named(contents: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "suite.jsonl").write_text(contents)
    with pytest.raises(ConfigError, match=words):
        suites.read(tmp_path / "suite.jsonl")


def test_means_by_category_and_over_all(place: Path) -> None:
    rows = [one for one in suites.read(place / "suite.jsonl") for _ in range(2)]
    found = _summary(np.array([1.0, 0.0, np.nan, np.nan, 1.0, 1.0]), rows)
    assert found["counting"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "count": 2}
    assert found["colors"]["mean"] == 1.0
    assert found["mean of categories"]["mean"] == 0.75
    assert (found["all"]["mean"], found["all"]["count"]) == (0.75, 4)
    assert _summary(np.full(6, np.nan), rows)["all"] == {"mean": None, "count": 0}


def test_features_are_the_networks_own(place: Path, tmp_path: Path) -> None:
    pictures = tiny_scorers.pictures((40, 30), (25, 64))
    network = transformers.CLIPModel.from_pretrained(place / "clip").eval()
    pixels = torch.stack([tiny_scorers.clip_pixels(picture) for picture in pictures]).float()
    with torch.no_grad():
        wanted = network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output)
    found = Features(str(place / "clip"), device="cpu", batch_size=1)(pictures)
    torch.testing.assert_close(found, wanted / wanted.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    settings = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=5, **sizes)
    torch.manual_seed(0)
    classifier = transformers.ViTForImageClassification(settings).eval()
    classifier.save_pretrained(tmp_path)
    transformers.CLIPImageProcessorPil.from_pretrained(place / "clip").save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = classifier(pixel_values=pixels).logits
    found = Features(str(tmp_path), output="logits", device="cpu")(pictures)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_suite_is_measured_and_the_protocol_is_in_the_result(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "result.json"
    command = ["benchmark", str(place / "model"), str(place / "suite.jsonl"), "--output", str(out), CALL]
    settings = [f"rewards={place}/my.py:length", f"reference={place}/real", f"features={place}/clip"]
    assert main([*command, *settings, "samples_per_prompt=40", "batch_size=40"]) == 0
    found = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(name))
    (name,) = found["scores"]
    assert found["scores"][name]["counting"] == {"mean": 8.0, "low": 8.0, "high": 8.0, "count": 40}
    assert found["scores"][name]["colors"]["count"] == 40
    assert found["scores"][name]["mean of categories"]["mean"] == 8.5
    assert found["missing"] == {name: 40}
    assert set(found["distances"]) == {"kernel distance", "its deviation", "precision", "recall", "frechet distance"}
    assert found["distances"]["frechet distance"] > 0
    protocol = found["protocol"]
    assert (protocol["samples_per_prompt"], protocol["seed"], protocol["prompts"]) == (40, 0, 3)
    assert len(protocol["suite_sha256"]) == 64
    assert "mean of categories" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "nothing to measure"),
        (["features=x"], "reference and features belong together"),
        (["rewards=jpeg_compressibility", "sampling.steps=3"], "sampling.steps is no call argument"),
        (["features={place}/clip", "reference={place}/clip"], "there are no pictures"),
        (["features={place}/clip", "reference={place}/real"], "at least 100 drawn pictures, and there are 3"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    settings: list[str], words: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = [setting.format(place=place) for setting in settings]
    call = [CALL, "samples_per_prompt=1"] if "sampling.steps=3" not in given else []
    command = ["benchmark", str(place / "model"), str(place / "suite.jsonl"), "--output", str(tmp_path / "r.json")]
    assert main([*command, *call, *given]) == 2
    assert words in capsys.readouterr().err


def test_a_file_that_is_no_picture_is_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"GIF89a")
    command = ["benchmark", str(place / "model"), str(place / "suite.jsonl"), f"reference={tmp_path}", "features=x"]
    assert main(command) == 2
    assert "b.png cannot be read as a picture" in capsys.readouterr().err
