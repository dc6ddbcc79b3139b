"""The dry run against what really happens: calls counted in a run, numbers of loaded models, torch's own operations."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tiller
import tiny
from tiller import config
from tiller.cli import main
from tiller.dry_run import memory, network, pace, solve, work
from tiller.dry_run.facts import TABLE
from tiller.dry_run.headers import Files, Part, folder_of, read
from tiller.dry_run.machine import Machine, threads
from tiller.recipe import ALGORITHMS, Model, Recipe
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.types import ConfigError

SAMPLING = {"num_inference_steps": 3, "guidance_scale": 2.0, "height": 16, "width": 16}
MACHINE = Machine("a processor", "cpu", 16e9, 1, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.tiny_sd().save_pretrained(folder)
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    return folder


def recipe_of(folder, **changes) -> Recipe:
    train = {"epochs": 1, "samples_per_epoch": 8, "group_size": 4, "batch_size": 4}
    named = {"name": str(folder), "lora_rank": 2, "device": "cpu"}
    whole = {"model": named, "prompts": str(folder / "prompts.txt"), "sampling": SAMPLING, "train": train}
    return config.from_mapping(Recipe, {**whole, **changes})


@pytest.mark.parametrize("name", ALGORITHMS.options)
def test_the_table_says_what_the_classes_say(name):
    facts, built = TABLE[name], config.build(ALGORITHMS.pick(name))
    assert (facts.walk, facts.whole_groups, facts.copies) == (built.walk, built.whole_groups, len(built.copies))
    for key, value in facts.settings.items():
        assert getattr(built, key) == value, key
    assert facts.asked == len(built.needs)
    if hasattr(built, "kl_coefficient"):
        free = dataclasses.replace(facts, settings={**facts.settings, "kl_coefficient": 0.0})
        assert free.asked == len(dataclasses.replace(built, kl_coefficient=0.0).needs)
    if facts.walk != "live":
        window = built.window(0, 10, 0) or range(10)
        eligible = [step for step in range(10) if step in window]
        assert facts.trained(10) == len(built.steps(eligible, np.random.default_rng(0)))


@pytest.mark.parametrize("name", ["ddpo", "nft", "draft"])
def test_the_calls_are_those_of_a_run(model, name):
    recipe = recipe_of(model, algorithm=name, reward="jpeg_compressibility")
    policy = tiller.Policy(tiny.tiny_sd(), lora_rank=2)
    algorithm = config.build(recipe.algorithm)

    def reward(images, prompts, metadata):
        return images.mean((1, 2, 3)) if name == "draft" else list(range(len(images)))

    reward.differentiable = name == "draft"
    calls = {True: 0, False: 0}

    def note(*_):
        calls[torch.is_grad_enabled()] += 1

    state = TrainState(policy, recipe.train, algorithm)
    policy.pipe.unet.conv_in.register_forward_pre_hook(note)  # its own call is made at skipped steps, too
    list(tiller.train(policy, ["a cat", "a dog"], reward, algorithm, recipe.train, sampling=SAMPLING, state=state))
    counted = work.count(recipe, TABLE[name], recipe.train.batch_size)
    assert calls == {True: counted.training, False: counted.drawing + counted.asking}
    assert (counted.updates, counted.pictures) == (state.updates, 8)


@pytest.mark.parametrize("targets", [None, ["to_q", "conv1", "proj_in"]])
def test_numbers_are_those_of_the_loaded_model(model, targets):
    files = read(model)
    policy = tiller.Policy(tiny.tiny_sd(), lora_rank=3, target_modules=targets)
    wish = Model(name=str(model), lora_rank=3, target_modules=targets and tuple(targets))
    assert memory.trained_numbers(files.denoiser, wish) == sum(p.numel() for p in policy.parameters.values())
    whole = dataclasses.replace(wish, lora_rank=None)
    assert memory.trained_numbers(files.denoiser, whole) == sum(p.numel() for p in tiny.tiny_sd().unet.parameters())
    assert files.parts["vae"].count == sum(p.numel() for p in tiny.tiny_sd().vae.parameters())


@pytest.mark.parametrize("name", ["emoji", "emoji-flow"])
def test_operations_and_the_graph_are_near_what_torch_counts(name):
    """Of one row: the very operations; and autograd keeps what the formula says, within a quarter."""
    files = read(folder_of(Model(name=name)))
    part, size = files.denoiser, network.picture_size(files, {})
    assert size == (64, 64)
    policy = tiller.Policy.from_pretrained(name, lora_rank=16)
    denoiser = next(iter(policy.denoisers.values()))
    seen = {}
    handle = denoiser.register_forward_pre_hook(lambda _, a, k: seen.update(a=a, k=k), with_kwargs=True)
    policy.stock(["a cat"], num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    handle.remove()
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter passes over fused attention on a CPU
    with policy.base(), torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        denoiser(*seen["a"], **seen["k"])
    cost = network.denoiser_cost(files, part, size)
    assert cost.operations == pytest.approx(counter.get_total_flops(), rel=1e-3)
    owned = {parameter.untyped_storage().data_ptr() for parameter in denoiser.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        denoiser(*seen["a"], **seen["k"])
    known = config.from_mapping(Recipe, {"model": {"name": name}, "sampling": {"guidance_scale": 1.0}})
    estimated = memory.estimate(files, known, TABLE["ddpo"], "cpu")
    assert estimated.graph == pytest.approx(sum(kept.values()), rel=0.25)


def test_time_is_operations_over_speed(model):
    """One row of x operations at x a second: a second for each row and step, two with a gradient."""
    recipe, files = recipe_of(model), read(model)
    cost = memory.row_cost(files, recipe).operations
    decoding, _ = network.decoder_cost(files, (16, 16))
    speed = pace.Speed(cost, cost / 2, decoding, "given")
    counted = work.count(recipe, TABLE["ddpo"], 4)
    epoch, whole = pace.seconds(counted, files, recipe, speed)
    assert epoch == pytest.approx(8 * 2 * 3 * (1 + 2) + 8)
    assert whole == pytest.approx(epoch + counted.shown * (2 * 3 + 1))


def test_a_calibration_is_kept_and_used(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text(config.to_yaml(recipe_of(model)))
    assert main(["train", str(tmp_path / "r.yaml"), "--calibrate"]) == 0
    assert "measured here on this model" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    (entry,) = json.loads((tmp_path / "tiller" / "speed.json").read_text()).values()
    assert min(next(iter(entry.values())).values()) > 0
    other = recipe_of(model, model={"name": "emoji", "lora_rank": 4, "device": "cpu"})
    machine = Machine(next(iter(json.loads(pace.store().read_text()))).rpartition(", ")[0], "cpu", 1e9, threads(), 1)
    assert "on another model" in pace.speed_of(machine, other).source


def test_no_torch_no_files_and_every_number(tmp_path):
    code = (
        "import sys\nfrom tiller.cli import main\n"
        "code = main(['train', 'recipes/demo.yaml', '--dry-run'])\n"
        "sys.exit(code or (3 if {'torch', 'diffusers', 'transformers'} & set(sys.modules) else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for said in ("30, each of 64 pictures: 8 prompts × 8", "1,920 to learn from", "20 that draw, 10 with a gradient"):
        assert said in done.stdout
    assert "11.55 M numbers, 0.94 M trained" in done.stdout


def test_a_model_that_is_not_here_says_so(capsys, tmp_path):
    (tmp_path / "r.yaml").write_text("model: {name: nobody/nothing}\ntrain: {batch_size: auto}\n")
    assert main(["train", str(tmp_path / "r.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "nobody/nothing is not on this machine" in said
    assert "hf download nobody/nothing" in said
    assert "20" in said
    assert main(["train", str(tmp_path / "r.yaml"), f"run.output_dir={tmp_path / 'run'}"]) == 2
    assert "first: hf download" in capsys.readouterr().err


def test_a_wrong_size_is_refused_with_one_that_works(model, capsys, tmp_path):
    (tmp_path / "r.yaml").write_text(config.to_yaml(recipe_of(model)))
    words = ["train", str(tmp_path / "r.yaml"), "--dry-run", "algorithm=crd", "train.batch_size=2"]
    assert main(words) == 2
    assert "in whole groups of 4" in (said := capsys.readouterr().err)
    assert "train.batch_size=4 works" in said


def test_auto_takes_the_memory_it_may_and_a_begun_run_keeps_its_size(model, tmp_path):
    files = read(model)
    recipe = solve.with_batch(recipe_of(model), 0)
    need = memory.estimate(files, recipe, TABLE["ddpo"], "cpu").needs
    tight = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, memory=f"{need(4) + 10:.0f}B"))
    assert solve.fitted(tight, files, MACHINE).batch_size == 4
    assert solve.fitted(recipe, files, MACHINE).batch_size == 8
    found, reason = solve.solved(tight, tmp_path)
    assert found.train.batch_size == 4
    assert "the next, 8, needs" in reason
    (tmp_path / "config.yaml").write_text(config.to_yaml(found))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    found, reason = solve.solved(recipe, tmp_path)
    assert (found.train.batch_size, reason.split(",")[1]) == (4, " as the run began with (train.batch_size is auto).")
    with pytest.raises(ConfigError, match="auto"):
        list(
            tiller.train(tiller.Policy(tiny.tiny_sd()), ["a"], lambda *_: [], tiller.DDPO(), TrainConfig(batch_size=0))
        )


def test_a_run_with_auto_writes_the_number_down_and_goes_on_with_it(model, tmp_path, capsys):
    small = {"evaluation": {"samples_per_prompt": 1, "every": 0}, "run": {"sample_prompts": 0, "checkpoint_every": 1}}
    small["train"] = {"epochs": 1, "samples_per_epoch": 4, "group_size": 2, "batch_size": 2, "updates_per_epoch": 2}
    (tmp_path / "r.yaml").write_text(config.to_yaml(recipe_of(model, **small)))
    words = ["train", str(tmp_path / "r.yaml"), f"run.output_dir={tmp_path / 'run'}", "train.batch_size=auto"]
    assert main([*words, "train.memory=1B"]) == 0
    assert "batch_size 1 is the smallest that works (4 pictures in 2 updates" in capsys.readouterr().out
    assert config.load(Recipe, tmp_path / "run" / "config.yaml").train.batch_size == 1
    assert main([*words, "train.memory=9GB", "train.epochs=2"]) == 0
    assert "batch_size 1, as the run began with" in capsys.readouterr().out


def test_stable_diffusion_1_5_at_its_true_size():
    """Its U-Net's published 859.5 M numbers, diffusers' 797,184 of a LoRA of rank 4, and 0.4 T multiply-adds at 512."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    shapes = {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
    part = Part("unet", "UNet2DConditionModel", dict(unet.config), shapes)
    vae = Part("vae", "AutoencoderKL", {"block_out_channels": [128, 256, 512, 512]}, {})
    assert part.count == 859_520_964
    assert memory.trained_numbers(part, Model(lora_rank=4)) == 797_184
    files = Files("StableDiffusionPipeline", {"unet": part, "vae": vae})
    assert network.denoiser_cost(files, part, (512, 512)).operations == pytest.approx(0.803e12, rel=0.01)
