"""Every Python block of the README and of docs/extending.md runs as it stands; every file they name is there."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiller

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "extending.md"]
SHIPPED = ROOT / "src" / "tiller" / "emoji" / "model" / "model_index.json"


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#]+?)\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_the_readme_s_reward_scores_a_darker_picture_higher():
    scope: dict = {}
    exec(blocks(ROOT / "README.md")[0], scope)
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("white", "gray", "black")]
    white, gray, black = scope["darkness"](pictures, ["a cat"] * 3, [{}] * 3)
    assert white < gray < black


@pytest.mark.skipif(not SHIPPED.exists(), reason="the shipped model is not there")
def test_the_readme_s_python_example_trains_and_saves_a_lora(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(blocks(ROOT / "README.md")[1], {})
    assert capsys.readouterr().out.startswith("1 -")
    assert (tmp_path / "my_lora" / "pytorch_lora_weights.safetensors").exists()


def test_the_reward_of_extending_prefers_red():
    scope: dict = {}
    exec(blocks(ROOT / "docs" / "extending.md")[0], scope)
    red, blue = scope["redness"]([Image.new("RGB", (9, 9), c) for c in ("red", "blue")], ["", ""], [{}, {}])
    assert red > blue


def test_the_pairwise_reward_of_extending_prefers_red():
    from tiller.rewards import score

    scope: dict = {}
    exec(next(block for block in blocks(ROOT / "docs" / "extending.md") if "pairwise = True" in block), scope)
    pictures = [Image.new("RGB", (9, 9), (red, 0, 0)) for red in (200, 0, 203)]
    found = score(scope["Redder"](margin=0.02), pictures, ["a"] * 3, [{}] * 3).values
    assert found.tolist() == [0.75, 0, 0.75]


def test_the_reward_with_a_gradient_of_extending_trains_and_prefers_red():
    import tiny

    scope: dict = {}
    exec(next(block for block in blocks(ROOT / "docs" / "extending.md") if "differentiable = True" in block), scope)
    pictures = torch.zeros(2, 3, 4, 4)
    pictures[0, 0], pictures[1, 2] = 1, 1  # red, blue
    assert scope["redness"](pictures, ["", ""], [{}, {}]).tolist() == [1, -1]
    policy = tiller.Policy(tiny.tiny_sd(), lora_rank=2)
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    config = tiller.TrainConfig(epochs=1, samples_per_epoch=4, group_size=1, batch_size=2)
    sampling = {"num_inference_steps": 3, "height": 16, "width": 16}
    list(tiller.train(policy, ["a cat"], scope["redness"], tiller.DRaFT(), config, sampling=sampling))
    assert any(not torch.equal(before[name], p) for name, p in policy.parameters.items())


def test_the_algorithm_of_extending_trains(tmp_path):
    import tiny

    scope: dict = {}
    exec(next(block for block in blocks(ROOT / "docs" / "extending.md") if "class GroupPPO" in block), scope)
    policy = tiller.Policy(tiny.tiny_sd(), lora_rank=2)
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    config = tiller.TrainConfig(epochs=1, samples_per_epoch=8, group_size=8, batch_size=4)
    sampling = {"num_inference_steps": 3, "height": 16, "width": 16}
    reports = list(
        tiller.train(
            policy, ["a cat"], tiller.rewards.jpeg_compressibility, scope["GroupPPO"](), config, sampling=sampling
        )
    )
    assert len(reports) == 1
    assert any(not torch.equal(before[name], p) for name, p in policy.parameters.items())
