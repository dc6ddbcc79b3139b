"""Diffusion-DPO on preference pairs: from a file, without a reward, and what is wrong with a file in a sentence."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny
from test_data_terms import with_vae
from tiller import Policy
from tiller.algorithms import DiffusionDPO
from tiller.cli import main
from tiller.distributed import World
from tiller.metrics import Clock
from tiller.offline import Offline
from tiller.pairs import open_pairs
from tiller.policy.forward import ForwardProcess
from tiller.policy.noise import key
from tiller.pretrain.data import to_tensor
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.training import train
from tiller.types import ConfigError
from tiller.update import update
from toy import brightness

STEPS = {"num_inference_steps": 4}


def config(**changes: Any) -> TrainConfig:
    sizes = {"epochs": 1, "samples_per_epoch": 8, "group_size": 2, "batch_size": 4, "max_grad_norm": 1e9}
    return TrainConfig(**{**sizes, **changes})


def shade(value: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-20, 20, (4, 4, 3))
    return Image.fromarray((value + noise).astype(np.uint8))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Six pairs: the bright picture is chosen."""
    lines = []
    for number in range(6):
        shade(210, number).save(tmp_path / f"{number}-bright.png")
        shade(40, 100 + number).save(tmp_path / f"{number}-dark.png")
        entry = {"prompt": f"shade {number}", "chosen": f"{number}-bright.png", "rejected": f"{number}-dark.png"}
        lines.append(json.dumps(entry))
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n\n")
    return path


# ---- reading ----


def test_pairs_are_read_chosen_first(file: Path) -> None:
    pairs = open_pairs(file, 4)
    assert len(pairs) == 6
    pixels = pairs.pictures([3, 0])
    wanted = [Image.open(file.parent / name) for name in ("3-bright.png", "3-dark.png", "0-bright.png", "0-dark.png")]
    assert torch.equal(pixels, to_tensor(wanted))
    assert pairs.prompts([3, 0]) == ["shade 3", "shade 3", "shade 0", "shade 0"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 7: no JSON"),
        ("[1]", "line 7: prompt is missing; each line needs"),
        ('{"prompt": "a", "chosen": "0-bright.png"}', "line 7: rejected is missing"),
        (
            '{"prompt": "a", "chosen": "0-bright.png", "rejected": "9.png"}',
            "line 7: there is no picture .*9.png'; corr",
        ),
        (
            '{"prompt": "a", "chosen": "0-bright.png", "rejected": "0-bright.png"}',
            "line 7: chosen and rejected are the same picture",
        ),
    ],
)
def test_a_bad_line_is_named(file: Path, line: str, complaint: str) -> None:
    file.write_text(file.read_text().rstrip() + "\n" + line)
    with pytest.raises(ConfigError, match=complaint):
        open_pairs(file, 4)


def test_what_shows_only_in_the_pictures_names_the_line_too(file: Path) -> None:
    Image.open(file.parent / "2-bright.png").save(file.parent / "2-dark.bmp")  # other bytes, the same picture
    (file.parent / "4-dark.png").write_bytes(b"no picture")
    text = file.read_text().replace("2-dark.png", "2-dark.bmp")
    file.write_text(text)
    pairs = open_pairs(file, 4)
    with pytest.raises(ConfigError, match="line 3: chosen and rejected are the same picture"):
        pairs.pictures([0, 2])
    with pytest.raises(ConfigError, match="line 5: a picture cannot be read"):
        pairs.pictures([4])


def test_no_pairs_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="holds no preference pair"):
        open_pairs(tmp_path / "empty.jsonl", 4)
    with pytest.raises(ConfigError, match="there is no such file; give a"):
        open_pairs(tmp_path / "nothing.jsonl", 4)


class Rows(list[dict[str, Any]]):
    """What `datasets.load_from_disk` returns, as far as it is asked."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def test_a_saved_dataset_in_the_columns_of_pick_a_pic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """label_0 is 1 where jpg_0 is preferred, 0 where jpg_1 is, .5 for a tie, which is left out."""

    def raw(value: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (value,) * 3).save(buffer, "png")
        return buffer.getvalue()

    rows = Rows(
        {"caption": f"c{label}", "jpg_0": raw(50), "jpg_1": {"bytes": raw(200)}, "label_0": label}
        for label in (1.0, 0.5, 0.0)
    )
    module = ModuleType("datasets")
    module.load_from_disk = lambda path: {"train": rows}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    pairs = open_pairs(tmp_path, 4)
    assert [pair.prompt for pair in pairs.pairs] == ["c1.0", "c0.0"]
    means = ((pairs.pictures([0, 1]) + 1) * 127.5).mean((1, 2, 3))
    torch.testing.assert_close(means, torch.tensor([50.0, 200, 200, 50]))
    del rows[0]["label_0"]
    with pytest.raises(ConfigError, match="lacks the columns label_0"):
        open_pairs(tmp_path, 4)


# ---- training ----


def test_every_pair_comes_once_before_any_comes_again(file: Path) -> None:
    policy = Policy(with_vae(), lora_rank=None)
    offline = Offline(policy, open_pairs(file, 4), DiffusionDPO(), config(), STEPS)
    state, dealt = TrainState(policy, config(), DiffusionDPO()), []
    for _ in range(3):
        dealt += offline.collect(state, World(), Clock()).prompts[::2]
        state.epoch += 1
    assert sorted(dealt[:6]) == sorted(dealt[6:]) == [f"shade {number}" for number in range(6)]
    assert dealt[:6] != dealt[6:]


class LaterSteps(DiffusionDPO):
    """All but the first, whose noise the pipeline draws."""

    def steps(self, eligible: Sequence[int], random: np.random.Generator) -> list[int]:
        return [1, 2, 3]


def test_the_gradient_by_hand(file: Path) -> None:
    """-log σ(-β/2·((d_w - d_l) - (d_w' - d_l'))), both pictures of a pair under one noise, away from the reference."""
    policy, algorithm, settings = Policy(with_vae(), lora_rank=None), LaterSteps(beta=3.0), config(samples_per_epoch=4)
    state = TrainState(policy, settings, algorithm)
    base = {name: p.detach().clone() for name, p in policy.parameters.items()}
    with torch.no_grad():
        policy.parameters["denoiser.second.bias"] += torch.linspace(-0.5, 0.5, 16)
    moved = {name: p.detach().clone() for name, p in policy.parameters.items()}
    pairs = open_pairs(file, 4)
    batch = Offline(policy, pairs, algorithm, settings, STEPS).collect(state, World(), Clock())
    found: dict[str, Tensor] = {}

    def look(config: TrainConfig) -> float:
        found.update({name: p.grad.clone() for name, p in state.parameters.items() if p.grad is not None})
        return 1.0

    state.step = look  # type: ignore[method-assign]
    update(policy, batch, algorithm, settings, state, World())

    rollout, captions = batch.chunks[0].rollout, batch.prompts
    clean = torch.stack([pairs.pictures([int(text[-1])])[row % 2].mean(0) for row, text in enumerate(captions)]) * 3
    torch.testing.assert_close(rollout.latents[-1], clean[:, None])
    path = ForwardProcess(rollout, key("noised", 0, 0, 0), batch.chunks[0].shared())

    def errors(weights: dict[str, Tensor], index: int) -> Tensor:
        eps, condition = path.noise(index), policy.pipe.encode_prompt(captions)
        assert torch.equal(eps[::2], eps[1::2])
        inputs = (path(index), rollout.timesteps[index], condition)
        named = {name.removeprefix("denoiser."): value for name, value in weights.items()}
        output = torch.func.functional_call(policy.pipe.denoiser, named, inputs)
        return (output - eps).square().flatten(1).mean(1)

    leaves = {name: value.requires_grad_() for name, value in moved.items()}
    total = torch.zeros(())
    for index in (1, 2, 3):
        risen = errors(leaves, index) - errors(base, index)
        total = total - torch.nn.functional.logsigmoid(-1.5 * (risen[::2] - risen[1::2])).mean() / 3
    wanted = torch.autograd.grad(total, list(leaves.values()))
    for name, value in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)
        assert value.abs().max() > 1e-4


def test_training_prefers_the_chosen_and_calls_no_reward(file: Path) -> None:
    """log 2 at first; then pictures grow brighter, as the chosen ones are."""
    policy = Policy(with_vae(), lora_rank=None)

    def scores() -> np.ndarray:
        return np.array(brightness(policy.sample(["shade 1"] * 32, seed=9, **STEPS).images, [], []))

    before = scores()
    settings = config(epochs=40, samples_per_epoch=12, batch_size=12, learning_rate=1e-2, max_grad_norm=1.0)
    pairs = open_pairs(file, 4)
    reports = train(policy, ["shade 1"], None, DiffusionDPO(beta=1.0), settings, sampling=STEPS, data=pairs)
    metrics = [report.metrics for report in reports]
    assert metrics[0]["policy/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert metrics[-1]["policy/preference_accuracy"] > 0.9
    assert metrics[-1]["reward_calls"] == 0
    assert not any(name.startswith("reward/") for name in metrics[0])
    gain = scores() - before
    assert gain.mean() > 10


def test_a_run_on_pairs_goes_on_bit_for_bit(file: Path) -> None:
    algorithm, settings = DiffusionDPO(beta=1.0), config(epochs=4, learning_rate=1e-2)
    whole = []
    pairs = open_pairs(file, 4)
    for report in train(Policy(with_vae(), None), ["a"], None, algorithm, settings, sampling=STEPS, data=pairs):
        whole.append(report.metrics)
        if report.epoch == 2:
            kept = {k: v.clone() for k, v in report.state.tensors().items()}, dict(report.state.data())
        end = report.state
    policy = Policy(with_vae(), None)
    state = TrainState(policy, settings, algorithm)
    state.load(*kept)
    again = train(policy, ["a"], None, algorithm, settings, sampling=STEPS, data=pairs, state=state)
    assert [report.metrics for report in again] == whole[2:]
    for name, value in end.tensors().items():
        assert torch.equal(state.tensors()[name], value), name


def test_pairs_and_a_reward_exclude_each_other(file: Path) -> None:
    policy = Policy(with_vae(), None)
    with pytest.raises(
        ConfigError, match="data holds preference pairs, which take the place of the reward; set reward"
    ):
        next(train(policy, ["a"], brightness, DiffusionDPO(), config(), data=file))
    with pytest.raises(ConfigError, match="DiffusionDPO needs a reward; only preference pairs"):
        next(train(policy, ["a"], None, DiffusionDPO(), config()))
    with pytest.raises(ConfigError, match=r"a group of two pictures, and train\.group_size is 4"):
        next(train(policy, ["a"], None, DiffusionDPO(), config(group_size=4), data=open_pairs(file, 4), sampling=STEPS))


# ---- from a recipe ----

RECIPE = """
model: {{name: {model}, lora_rank: 4, target_modules: null, mixed_precision: "no", device: cpu}}
prompts: {prompts}
sampling: {{num_inference_steps: 3, height: 16, width: 16}}
train: {{epochs: 2, samples_per_epoch: 8, group_size: 2, batch_size: 4, learning_rate: 1.0e-3}}
evaluation: {{samples_per_prompt: 1}}
run: {{output_dir: {output}, checkpoint_every: 1, sample_prompts: 2}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    tiny.tiny_sd().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    text = RECIPE.format(model=tmp_path / "model", prompts=tmp_path / "prompts.txt", output=tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(text)
    return str(tmp_path / "recipe.yaml")


def epochs(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_recipe_with_pairs_runs_and_goes_on(recipe: str, file: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["train", recipe, "algorithm.name=dpo", f"data={file}", "reward=null"]
    assert main(words) == 0
    found = epochs(tmp_path / "run")
    assert [line["epoch"] for line in found] == [1, 2]
    assert found[0]["policy/loss"] == pytest.approx(np.log(2), abs=1e-6)
    said = capsys.readouterr()
    assert "model: " in said.out + said.err
    assert "curve" not in said.out + said.err  # there is no reward to draw one of
    assert main([*words, "train.epochs=3", "--resume"]) == 0
    assert [line["epoch"] for line in epochs(tmp_path / "run")] == [1, 2, 3]
    file.write_text(file.read_text().replace("shade", "tone"))
    assert main([*words, "train.epochs=4", "--resume"]) == 2
    assert "was begun with another data" in capsys.readouterr().err


def test_a_recipe_with_captioned_pictures_has_a_term_on_them(recipe: str, tmp_path: Path) -> None:
    assert (
        main(["train", recipe, "algorithm.name=ppo", "algorithm.data_weight=0.5", "data=emoji", "train.epochs=1"]) == 0
    )
    (line,) = epochs(tmp_path / "run")
    assert line["data/denoising_error"] > 0
    assert line["value/loss"] > 0


def test_pairs_with_a_reward_are_refused_before_the_model_is_loaded(recipe: str, file: Path, capsys: Any) -> None:
    assert main(["train", recipe, "algorithm.name=dpo", f"data={file}", "model.name=/nowhere"]) == 2
    error = capsys.readouterr().err.strip()
    assert "set reward to null" in error
    assert len(error.splitlines()) == 1
