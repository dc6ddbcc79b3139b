"""Exports of tiny runs: what plain diffusers, or matrices added by hand, make of the files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
import tiny_run
from tiller.cli import main
from tiller.export import source, verify
from tiller.export.families import ExportError, need_family
from tiller.policy import Policy

LAYERS = ["to_q", "to_out.0", "proj_in", "conv1", "ff.net.2"]


def draw(pipe) -> np.ndarray:
    """One picture of a cat; by hand, not by tiller."""
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(5)
    return pipe("a cat", num_inference_steps=2, height=16, width=16, generator=noise, output_type="np").images


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run.finished_run(tiny.tiny_sd(), tmp_path_factory.mktemp("sd"), target_modules=LAYERS)


@pytest.fixture(scope="module")
def tuned(run):
    return draw(source.read_run(run).policy.pipe)


def base(run) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(run.parent / "base")


def test_the_base_draws_something_else(run, tuned):
    assert np.abs(draw(base(run)) - tuned).max() > 1e-3


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_plain_diffusers_draws_the_same_picture(run, tuned, form, tmp_path, capsys):
    assert main(["export", str(run), "--format", form, "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "the same picture within" in said
    file = next(tmp_path.glob("*.safetensors"))
    pipe = base(run)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert np.abs(draw(pipe) - tuned).max() <= 1e-6
    config = next(iter(pipe.unet.peft_config.values()))
    assert (config.r, config.lora_alpha) == (2, 3.0)


def test_matrices_by_comfyui_names_added_to_the_weights_draw_the_same_picture(run, tuned, tmp_path):
    """W + alpha/r · up·down, with the names of this U-Net written out here."""
    file = tmp_path / "mine.safetensors"
    assert main(["export", str(run), "--format", "comfyui", "--output", str(file)]) == 0
    tensors, pipe = load_file(file), base(run)
    names = {"0.0": "conv_in", "1.0": "down_blocks.0.resnets.0", "3.0": "down_blocks.1.resnets.0"}
    sites = {f"input_blocks.{key}": value for key, value in names.items()}
    sites |= {"input_blocks.3.1": "down_blocks.1.attentions.0", "middle_block.0": "mid_block.resnets.0"}
    sites |= {"middle_block.1": "mid_block.attentions.0", "middle_block.2": "mid_block.resnets.1"}
    for number in range(4):
        sites[f"output_blocks.{number}.0"] = f"up_blocks.{number // 2}.resnets.{number % 2}"
    for number in range(2):
        sites[f"output_blocks.{number}.1"] = f"up_blocks.0.attentions.{number}"
    used = 0
    for key in [key for key in tensors if key.endswith(".lora_down.weight")]:
        layer = key.removesuffix(".lora_down.weight")
        site, _, rest = layer.removeprefix("diffusion_model.").partition(".transformer_blocks")
        if rest:
            name = f"{sites[site]}.transformer_blocks{rest}"
        else:
            site, inner = ".".join(site.split(".")[: -1 if site.endswith("proj_in") else -2]), site
            name = f"{sites[site]}.{'proj_in' if inner.endswith('proj_in') else 'conv1'}"
        weight = pipe.unet.get_submodule(name).weight
        down, up = tensors[key].flatten(1), tensors[f"{layer}.lora_up.weight"].flatten(1)
        weight.data += (1.5 * up @ down).reshape(weight.shape)
        used += 3
    assert used == len(tensors)
    assert np.abs(draw(pipe) - tuned).max() <= 2e-6  # a sum of weights rounds once more than a sum of outputs


def test_merged_is_a_plain_pipeline_folder(run, tuned, tmp_path):
    assert main(["export", str(run), "--format", "merged", "--output", str(tmp_path / "whole")]) == 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "whole", use_safetensors=True)
    assert np.abs(draw(pipe) - tuned).max() <= 1e-5
    assert not hasattr(pipe.unet, "peft_config")
    half = ["--no-verify", "--dtype", "float16", "--output", str(tmp_path / "half")]
    assert main(["export", str(run), "--format", "merged", *half]) == 0
    weights = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_the_header_says_what_other_programs_show(run, tmp_path):
    file = tmp_path / "mine.safetensors"
    assert main(["export", str(run), "--format", "kohya", "--output", str(file), "--no-verify"]) == 0
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
        alphas = {float(opened.get_tensor(name)) for name in opened.keys() if name.endswith(".alpha")}  # noqa: SIM118
    assert alphas == {3.0}
    assert header["ss_network_dim"] == "2"
    assert header["ss_network_alpha"] == "3.0"
    assert header["ss_steps"] == "4"
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert header["ss_sd_model_name"] == "base"
    assert str(run.parent) not in str(header)


def test_which_weights(run):
    policy = source.read_run(run).policy
    saved = {name: value.detach().clone() for name, value in policy.parameters.items()}
    tiny_run.checkpoint(run, policy, 2)
    tiny_run.disturb(policy, 7)
    tiny_run.checkpoint(run, policy, 3)
    tiny_run.best(run, policy, 3)
    name = next(iter(saved))
    last = policy.parameters[name].detach()

    def found(weights: str) -> torch.Tensor:
        return source.read_run(run, weights).policy.parameters[name]

    assert torch.equal(found("last"), last)
    assert torch.equal(found("best"), last)
    assert torch.equal(found("ema"), 2 * last)
    assert torch.equal(found("2"), 2 * saved[name])  # of an epoch, the running mean where the run keeps one
    with pytest.raises(source.RunError, match=r"--weights is '9'; .*\(kept here: 2, 3\)"):
        found("9")


def test_a_file_that_lost_or_changed_a_matrix_is_noticed(run, tuned, tmp_path, monkeypatch, capsys):
    """What is read back is the file: one matrix less, or another one, is found before anybody trusts it."""
    for change in ("lose", "scale"):

        def spoil(pipe, form, file, family, change=change, keep=verify.load_as_written):
            tensors = load_file(file)
            key = next(key for key in tensors if key.endswith("lora_up.weight"))
            if change == "scale":
                tensors[key] *= 1.001
            else:
                layer = key.removesuffix(".lora_up.weight")
                tensors = {name: value for name, value in tensors.items() if not name.startswith(f"{layer}.")}
            save_file(tensors, file)
            return keep(pipe, form, file, family)

        with monkeypatch.context() as patch:
            patch.setattr(verify, "load_as_written", spoil)
            assert main(["export", str(run), "--format", "comfyui", "--output", str(tmp_path / change)]) == 2
        assert {"lose": "missing or unexpected", "scale": "is another matrix"}[change] in capsys.readouterr().err


def test_all_weights_trained_export_as_a_folder_only(tmp_path, capsys):
    run = tiny_run.finished_run(tiny.tiny_sd(), tmp_path, lora_rank=None, lora_alpha=None)
    expected = draw(DiffusionPipeline.from_pretrained(run / "model"))
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    assert np.array_equal(draw(DiffusionPipeline.from_pretrained(tmp_path / "out")), expected)
    capsys.readouterr()
    assert main(["export", str(run), "--format", "kohya"]) == 2
    assert "trained all weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("build", "form"), [(tiny.tiny_sdxl, "kohya"), (tiny.tiny_sd3, "comfyui"), (tiny.tiny_flux, "kohya")]
)
def test_other_families(build, form, tmp_path, capsys):
    run = tiny_run.finished_run(build(), tmp_path)
    assert main(["export", str(run), "--format", form]) == 0
    said = capsys.readouterr().out
    assert float(said.split("within ")[1].split()[0]) <= 1e-6


def test_the_embedded_model(tmp_path, capsys):
    policy = Policy.from_pretrained("emoji", lora_rank=2)
    tiny_run.disturb(policy, 1)
    run = tmp_path / "run"
    policy.save(run / "model")
    (run / "config.yaml").write_text("model: {name: emoji, lora_rank: 2}\nsampling: {num_inference_steps: 2}\n")
    assert main(["export", str(run), "--format", "comfyui"]) == 0
    assert float(capsys.readouterr().out.split("within ")[1].split()[0]) <= 1e-6
    flow = Policy.from_pretrained("emoji-flow", lora_rank=2)
    with pytest.raises(ExportError, match="CogView4"):
        need_family(flow.denoisers, "kohya")
