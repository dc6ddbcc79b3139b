"""What a recipe may say of its rewards, and what becomes of it: one, several, classes with settings, overrides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiller import config, reward_spec
from tiller.commands import building
from tiller.recipe import Recipe
from tiller.reward_spec import Scale
from tiller.rewards import score
from tiller.rewards.mix import Mix
from tiller.types import ConfigError

IMAGES = [Image.new("RGB", (8, 8), colour) for colour in ("black", "white")]
SCORER = """
from dataclasses import dataclass, field
from typing import Callable, Literal
from tiller.types import Score

@dataclass(frozen=True)
class Bright:
    gain: float = 1.0
    mode: Literal["mean", "max"] = "mean"
    made: Callable = field(default=len)

    def __post_init__(self):
        if self.gain <= 0:
            raise ValueError(f"gain is {self.gain}; it must be above 0.")

    def __call__(self, images, prompts, metadata):
        return [self.gain * image.convert("L").getpixel((0, 0)) for image in images]

@dataclass(frozen=True)
class NoCall:
    gain: float = 1.0

@dataclass(frozen=True)
class Duel:
    pairwise = True

    def __call__(self, images, prompts, metadata):
        return []

def plain(images, prompts, metadata):
    return [1.0, 2.0]
"""


@pytest.fixture
def bright(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(SCORER)
    return f"{tmp_path / 'mine.py'}:Bright"


def load(*overrides: str, text: str = "") -> Recipe:
    from tiller import yaml_text

    mapping = yaml_text.parse(text, "recipe") or {}
    for override in overrides:
        config._override(Recipe, mapping, override)
    return config.from_mapping(Recipe, mapping)


def scored(recipe: Recipe) -> Any:
    found = building.rewards(recipe, Path("unused"))
    return score(next(iter(found.values())), IMAGES, ["a", "b"], [{}, {}])


def test_a_class_gets_the_settings_of_the_recipe_and_of_the_command_line(bright: str) -> None:
    assert scored(load(f"reward={bright}")).values.tolist() == [0, 255]
    assert scored(load(f"reward={bright}", "reward.gain=2")).values.tolist() == [0, 510]
    assert scored(load("reward.gain=3", text=f"reward: {{name: '{bright}', gain: 2}}")).values.tolist() == [0, 765]


def test_a_list_is_a_weighted_sum_whose_entries_an_override_reaches_by_number(bright: str) -> None:
    text = f"reward: [{{name: '{bright}', weight: 0.5}}, {{name: '{bright}', gain: 2}}, jpeg_compressibility]"
    found = scored(load("reward.0.weight=0.25", "reward.2.weight=0", text=text))
    assert found.values.tolist() == [0, 0.25 * 255 + 2 * 255]
    assert list(found.components) == ["Bright", "Bright#2", "jpeg_compressibility"]
    assert found.components["Bright"].tolist() == [0, 255]  # as it came, without its weight


def test_explicit_scales_are_used_as_they_are(bright: str) -> None:
    text = f"reward: {{name: '{bright}', weight: 2, normalise: {{mean: 55, std: 100}}}}"
    recipe = load(text=text)
    assert reward_spec.read(recipe.reward)[0].normalise == Scale(55.0, 100.0)
    np.testing.assert_allclose(scored(recipe).values, [2 * -0.55, 2 * 2.0])


def test_one_plain_reward_stays_what_it_is() -> None:
    (reward,) = building.rewards(Recipe(), Path("unused")).values()
    assert not isinstance(reward, Mix)
    assert building.record(Recipe())["reward"] == "jpeg_compressibility"


def test_what_is_reported_is_beside_the_trained_one(bright: str) -> None:
    recipe = load(f"evaluation.rewards=[jpeg_incompressibility, {{name: '{bright}', gain: 2}}]")
    assert list(building.rewards(recipe, Path("unused"))) == ["jpeg_compressibility", "jpeg_incompressibility", bright]
    recipe = load("evaluation.rewards=[jpeg_compressibility, jpeg_incompressibility]")
    assert list(building.rewards(recipe, Path("unused"))) == ["jpeg_compressibility", "jpeg_incompressibility"]
    recipe = load(f"reward={bright}", f"evaluation.rewards=[{{name: '{bright}', gain: 2}}]")
    assert list(building.rewards(recipe, Path("unused"))) == [bright, f"{bright} (reported)"]
    recipe = load("reward=[jpeg_compressibility, jpeg_incompressibility]", "evaluation.rewards=jpeg_incompressibility")
    assert list(building.rewards(recipe, Path("unused"))) == ["total", "jpeg_incompressibility"]
    assert reward_spec.title(recipe.reward) == "jpeg_compressibility + jpeg_incompressibility"


def test_a_run_records_the_defaults_of_a_scorer_and_reads_them_back(bright: str) -> None:
    recipe = load(f"reward=[{{name: '{bright}', gain: 2, weight: 0.5}}, jpeg_compressibility]")
    record = building.record(recipe)
    assert record["reward"] == [
        {"name": bright, "gain": 2.0, "weight": 0.5, "mode": "mean"},
        "jpeg_compressibility",
    ]
    again = config.from_mapping(Recipe, record)
    assert building.record(again) == record
    assert scored(again).values.tolist() == scored(recipe).values.tolist()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["reward.gian=1"], "config error: reward.gian is unknown; did you mean reward.gain?"),
        (["reward.wieght=1"], "config error: reward.wieght is unknown; did you mean reward.weight?"),
        (["reward.xyz=1"], "reward.xyz is unknown"),
        (["reward.gain=fast"], "config error: reward.gain is 'fast'; it must be a number."),
        (["reward.gain=-1"], "config error: reward: gain is -1.0; it must be above 0."),
        (["reward.mode=men"], "config error: reward.mode is 'men'; it must be one of mean, max; did you mean mean?"),
        (["reward.made=1"], "reward.made cannot be set in a recipe"),
        (["reward.weight=heavy"], "config error: reward.weight is 'heavy'; it must be a number."),
        (["reward.weight=0"], "config error: all weights in reward are 0"),
        (["reward.normalise=1"], "config error: reward.normalise is 1; it must be true or false or a mapping"),
        (["reward.normalise={mean: 1, std: 0}"], "reward.normalise"),
        (["reward.max_missing=2"], "config error: reward: max_missing is 2.0; it must be a share from 0 to 1."),
        (["run.max_missing=-1"], "max_missing is -1.0; it must be a share from 0 to 1."),
        (["reward=[]"], "config error: reward is an empty list"),
        (["reward=[{weight: 1}]"], "config error: reward[0].name is missing"),
        (["reward=[jpeg_compressibility, {name: emoji_gold, gian: 1}]"], "reward[1].gian is unknown"),
        (["reward=[jpeg_compressibility, 3]"], "config error: reward"),
        (["reward=3"], "config error: reward is 3"),
        (["reward={name: jpeg_compressibility, model: x}"], "jpeg_compressibility takes no settings"),
        (["evaluation.rewards=[{name: jpeg_compressibility, weight: 2}]"], "evaluation.rewards[0] has a weight"),
        (["reward=[jpeg_compressibility]", "reward.model=x"], "reward is ['jpeg_compressibility'], so reward.model"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_that_names_the_key(bright: str, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        building.rewards(load(f"reward={bright}", *overrides), Path("unused"))
    assert says in str(caught.value)
    assert str(caught.value).count("config error") == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("NoCall", "is not a function but a NoCall; name a function, a dataclass whose instances can be called"),
        ("Duel", "a pairwise reward takes (first, second, prompts, metadata)"),
    ],
)
def test_a_class_whose_instances_are_no_rewards(bright: str, name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        building.rewards(load(f"reward={bright.replace('Bright', name)}"), Path("unused"))
    assert says in str(caught.value)


def test_reading_a_recipe_with_settings_of_a_scorer_imports_no_torch() -> None:
    code = (
        "import sys\nfrom tiller import config\nfrom tiller.recipe import Recipe\n"
        "config.load(Recipe, None, ['reward=[{name: clip_score, model: x}, emoji_gold]', 'reward.0.k=1'])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
