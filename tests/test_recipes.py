"""Every recipe that comes with the package is one: its settings are known, its algorithm and kernel can be made."""

from pathlib import Path

import pytest

from tiller import config, recipe
from tiller.commands import building
from tiller.comparison import Comparison, variants
from tiller.pretrain import kinds
from tiller.prompts import load

FILES = sorted((Path(recipe.__file__).parent / "recipes").glob("*.yaml"))
RUNS = [file for file in FILES if not file.stem.startswith(("pretrain", "compare"))]


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_a_run(file: Path, tmp_path: Path) -> None:
    found = config.load(recipe.Recipe, file)
    building.algorithm(found)
    assert load(found.prompts)
    assert building.splits(found)
    assert building.rewards(found, tmp_path)


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.stem.startswith("compare")], ids=lambda file: file.stem
)
def test_a_comparison(file: Path) -> None:
    comparison = config.load(Comparison, file)
    found = list(variants(comparison, file))
    assert len(found) == len(comparison.runs) * len(comparison.seeds)
    for variant in found[: len(comparison.runs)]:
        building.algorithm(config.load(recipe.Recipe, variant.recipe, variant.overrides))


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.stem.startswith("pretrain")], ids=lambda file: file.stem
)
def test_a_pretraining(file: Path) -> None:
    assert kinds.load(file).output
