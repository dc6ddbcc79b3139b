"""Runs side by side: the same numbers, pictures from the same noise, and only the settings that differ."""

import json
import re
from pathlib import Path

import pytest

from report_folder import colour, run_folder
from test_report_html import Page, picture
from tiller.cli import main
from tiller.report import side_by_side
from tiller.report.record import Gain, Record


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """The second has another clip range and seed of nothing else, and went further."""
    first, second = run_folder(tmp_path / "first"), run_folder(tmp_path / "second", epochs=(0, 2), lift=0.2)
    config = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(config.replace("inner_epochs: 1", "inner_epochs: 2, clip_range: 0.1"))
    gains = json.loads((second / "evaluation" / "comparison.json").read_text())
    for line in gains:
        line |= {"difference": line["difference"] + 0.3, "low": line["low"] + 0.3, "high": line["high"] + 0.3}
    (second / "evaluation" / "comparison.json").write_text(json.dumps(gains))
    return [first, second]


def test_the_command_prints_a_table_and_writes_a_page(two, tmp_path: Path, capsys) -> None:
    assert main(["compare", *map(str, two), "--output", str(tmp_path / "both.html")]) == 0
    said = capsys.readouterr().out
    assert "second is ahead of the others beyond chance: jpeg_compressibility +0.640 kB" in said.replace("\n", " ")
    assert re.search(
        r"unseen animals\s+│\s+\+0\.340 \(\+0\.280 to \+0\.400\) │\s+\+0\.640 \(\+0\.580 to \+0\.700\)", said
    )
    page = Page((tmp_path / "both.html").read_text())
    rows = [text for _, text in page.all("tr")]
    assert "jpeg_compressibility, kB: unseen animals+0.340+0.280 to +0.400+0.640+0.580 to +0.700" in rows
    assert "algorithm.inner_epochs12" in rows
    assert "algorithm.clip_range–0.1" in rows
    assert not any(row.startswith(("train.", "model.", "prompts")) for row in rows)


def test_pictures_stand_beside_each_other_by_prompt_and_noise(two) -> None:
    """Before, the first run's last (epoch 4), the second's last (epoch 2)."""
    page = Page(side_by_side.render(two))
    images = [attributes for attributes, _ in page.all("img")]
    assert len(images) == 4 * 3
    for place, index in enumerate((0, 2, 1, 3)):
        colours = [picture(str(image["src"])).getpixel((5, 5)) for image in images[3 * place : 3 * place + 3]]
        assert colours == [colour(0, index), colour(4, index), colour(2, index)]
    assert str(images[2]["alt"]).endswith("noise 1, second")
    assert any(text == "The same prompt and the same noise." for _, text in page.all("p"))


def test_another_seed_is_not_called_the_same_noise(two) -> None:
    config = (two[1] / "config.yaml").read_text().replace("seed: 0", "seed: 1")
    (two[1] / "config.yaml").write_text(config)
    assert any("not the same noise" in text for _, text in Page(side_by_side.render(two)).all("p"))


def test_curves_share_their_axes(two) -> None:
    """The second's reward is twice the first's at every step, so it is twice as high above zero in the drawing."""
    text = side_by_side.render(two)
    lines = re.findall(r'<polyline points="([^"]+)" class="line c[01]"', text)[:2]
    first, second = ([tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines)
    assert [x for x, _ in first] == [x for x, _ in second]
    rise = [line[-1][1] - line[0][1] for line in (first, second)]
    assert rise[1] == pytest.approx(2 * rise[0], abs=0.2)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / place / "demo") for place in ("a", "b")]
    assert [record.name for record in side_by_side.named(folders)] == [str(folder) for folder in folders]


def test_runs_that_were_measured_by_different_rewards_have_no_winner() -> None:
    lines = [Gain("trained", name, 1, 2, 1, 0.5, 1.5, 1.0, 40) for name in "ab"]
    records = [Record(name=line.reward, config={"reward": line.reward}, gains=[line]) for line in lines]
    assert "not all measured" in side_by_side.headline(records)


def test_settings_are_compared_key_by_key() -> None:
    configs = [
        {"a": {"b": 1, "c": [1, 2]}, "run": {"output_dir": "x"}},
        {"a": {"b": 1, "c": [1, 3]}, "run": {"output_dir": "y"}},
    ]
    assert side_by_side.differences(configs) == {"a.c": ["[1, 2]", "[1, 3]"]}


def test_half_written_runs_are_laid_side_by_side_as_far_as_they_go(two) -> None:
    for name in ("metrics.jsonl", "evaluation/comparison.json", "images/shown.json", "timings.jsonl"):
        (two[1] / name).unlink()
    page = Page(side_by_side.render(two))
    assert any("second: metrics.jsonl is not there" in text for _, text in page.all("li"))


@pytest.mark.parametrize("arguments", [["first"], ["first", "second", "jobs=2"], ["first", "nowhere"]])
def test_what_cannot_be_compared_is_refused_in_a_sentence(two, tmp_path, monkeypatch, capsys, arguments) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    assert "two run folders or more" in capsys.readouterr().err
