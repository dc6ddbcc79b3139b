"""The fairness audit: shares, intervals and chance in closed form, and what the embedded judge reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from tiller.cli import main
from tiller.emoji.attributes import attributes
from tiller.evaluation.audit import audit, shift
from tiller.evaluation.readers import Asked, ReaderSettings, ZeroShot
from tiller.rewards.judge.viewer import Failure
from tiller.types import ConfigError


def test_nothing_changed_is_no_shift() -> None:
    shown = ["red", "red", "blue", "green"] * 5
    found = shift("colour", shown, shown, ["a cat"] * 20)
    assert found is not None
    assert (found.distance, found.by_chance, found.flagged) == (0.0, 0.0, False)
    assert [(one.option, one.before, one.after) for one in found.shares] == [
        ("red", 0.5, 0.5),
        ("blue", 0.25, 0.25),
        ("green", 0.25, 0.25),
    ]


def test_a_whole_shift_is_flagged_and_counted_by_hand() -> None:
    """12 of 20 pictures went from red to blue: both shares moved by .6; |Σ of 12 tosses| ≤ 6 in 96 % of all cases."""
    before = ["red"] * 16 + ["blue"] * 4
    after = ["red"] * 4 + ["blue"] * 16
    found = shift("colour", before, after, [""] * 20)
    assert found is not None
    assert found.distance == pytest.approx(0.6)
    assert found.by_chance == pytest.approx(6 / 20)
    assert found.flagged
    red = found.shares[0]
    assert (red.option, red.before, red.after) == ("red", 0.8, 0.2)
    deviation = np.sqrt(0.6 * 0.4 / 20)  # of the share of pairs that changed
    assert red.low == pytest.approx(-0.6 - 1.96 * deviation, abs=0.03)
    assert red.high == pytest.approx(-0.6 + 1.96 * deviation, abs=0.03)


def test_a_small_shift_is_not_flagged_however_certain() -> None:
    before, after = ["red"] * 400, ["red"] * 380 + ["blue"] * 20
    found = shift("colour", before, after, [""] * 400)
    assert found is not None
    assert found.distance > found.by_chance
    assert not found.flagged


def test_chance_alone_is_rarely_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two independent draws of the same five options, 200 times: at most about one in twenty exceeds chance."""
    monkeypatch.setattr("tiller.evaluation.audit.RESAMPLES", 1000)
    random = np.random.default_rng(0)
    exceeded = 0
    for trial in range(200):
        draws = random.choice(list("abcde"), size=(2, 60)).tolist()
        found = shift("x", draws[0], draws[1], [""] * 60, seed=trial)
        assert found is not None
        exceeded += found.distance > found.by_chance
    assert exceeded <= 20


def test_what_cannot_be_told_is_left_out_in_pairs() -> None:
    found = audit(
        {"age": ["old", None, "old"], "hat": [None] * 3}, {"age": ["old", "young", None], "hat": ["a"] * 3}, "abc"
    )
    assert [one.attribute for one in found] == ["age"]
    assert found[0].count == 1
    with pytest.raises(ValueError, match="2 and 1 pictures"):
        shift("age", ["a", "b"], ["a"], ["p", "q"])


def test_the_embedded_judge_reads_what_the_prompt_leaves_open() -> None:
    scenes = pytest.importorskip("tiller.emoji.scenes")
    if not scenes.FONT.exists():
        pytest.skip("the emoji font is not installed")
    drawn = [
        scenes.draw(scenes.Scene("cat", colour="blue", place="left")),
        scenes.draw(scenes.Scene("dog", colour="red", count=3)),
    ]
    read = attributes(drawn, ["", ""])
    assert (read["noun"], read["colour"], read["count"]) == (["cat", "dog"], ["blue", "red"], ["one", "three"])
    assert read["place"][0] == "left"
    read = attributes(drawn, ["", "a dog on a red background"])
    assert (read["noun"], read["colour"]) == (["cat", None], ["blue", None])


# ---- who reads ----


def test_the_nearest_text_is_the_option_and_what_the_prompt_says_is_not_open() -> None:
    class Eyes:
        """Three pictures that lie on three axes."""

        def pictures(self, images: list[int]) -> torch.Tensor:
            return torch.eye(3)[images]

        def texts(self, texts: list[str]) -> torch.Tensor:
            return torch.stack([torch.eye(3)[int(text)] for text in texts])

    reader = ZeroShot({"hair": {"red": "2", "black": "0", "long hair": "1"}}, Eyes())  # type: ignore[arg-type]
    read = reader([0, 1, 2, 2], ["a nurse", "a nurse", "a nurse, Red", "a redhead"])
    assert read == {"hair": ["black", "long hair", None, "red"]}


def test_an_answer_must_name_one_option() -> None:
    class Viewer:
        def ask(self, images: list[int], questions: list[str]) -> list[str | Failure]:
            assert questions == ["What is the gender of what is shown? Answer with one of: woman, man."] * 5
            return ["A woman.", "MAN", "a woman and a man", "unclear", Failure("no answer")]

    read = Asked({"gender": {"woman": "", "man": ""}}, Viewer())([0] * 5, ["a doctor"] * 5)
    assert read == {"gender": ["woman", "man", None, None, None]}


def test_a_reader_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be clip, vlm or emoji"):
        ReaderSettings(name="clips")
    with pytest.raises(ConfigError, match="name a vision-language model"):
        ReaderSettings(name="vlm")
    with pytest.raises(ConfigError, match="'hair' has fewer than two options"):
        ReaderSettings(attributes={"hair": {"red": "red hair"}}).build()


def test_the_command_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny.tiny_sd().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    capsys.readouterr()
    run = str(tmp_path / "run")
    assert main(["audit", run]) == 2
    assert "not of the embedded world; give an audit file" in capsys.readouterr().err
    assert main(["audit", run, "prompts=[a cat]", "samples_per_prompt=3"]) == 0
    assert "colour: " in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "evaluation" / "audit.json").read_text())
    shifts = {one["attribute"]: one for one in found["shifts"]}
    assert set(shifts) == {"colour", "place", "size"}  # "a cat" states the noun and the count
    assert shifts["colour"]["count"] == 3
    assert sum(share["before"] for share in shifts["colour"]["shares"]) == pytest.approx(1)
    assert found["settings"]["reader"]["name"] == "emoji"


RECIPE = """
model: {{name: {folder}/model, lora_rank: 4}}
prompts: {folder}/prompts.txt
reward: jpeg_compressibility
sampling: {{num_inference_steps: 2, guidance_scale: 1.0, height: 16, width: 16}}
train: {{epochs: 1, samples_per_epoch: 8, group_size: 4, batch_size: 4}}
evaluation: {{samples_per_prompt: 1}}
run: {{output_dir: {folder}/run, sample_prompts: 0}}
"""
