"""Names outside diffusers, against diffusers' own converters from them: every matrix must come back where it was."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as lora_conversion
from diffusers.loaders import single_file_utils as checkpoints

import tiny
from tiller.export import layouts
from tiller.export.families import ExportError, family_of, need_family
from tiller.export.layouts import Pair
from tiller.export.unet_names import place as unet_place

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class Lenient(dict):
    """A checkpoint in which whatever is not there is zero."""

    def pop(self, key, *default):
        return super().pop(key, torch.zeros(6, 1))

    def __missing__(self, key):
        return torch.zeros(6, 1)


def random_pairs(shapes: dict[str, tuple[int, ...]], rank: int = 2, alpha: float = 3.0) -> dict[str, Pair]:
    """An adapter for each weight (out, in, ...)."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, (out, *rest) in shapes.items():
        down = torch.randn(rank, *rest, generator=generator)
        made[name] = Pair(down, torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator), alpha)
    return made


def as_checkpoint(tensors: dict[str, torch.Tensor]) -> Lenient:
    """A ComfyUI file as the checkpoint that holds only what it adds: alpha / rank · up·down, by hand."""
    found = Lenient()
    for key, down in tensors.items():
        if key.endswith(".lora_down.weight"):
            layer = key.removesuffix(".lora_down.weight")
            up, scale = tensors[f"{layer}.lora_up.weight"], float(tensors[f"{layer}.alpha"]) / len(down)
            product = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)) * scale
            found[f"model.{layer}.weight"] = product.reshape(len(up), *down.shape[1:])
    return found


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: tuple(layer.weight.shape) for name, layer in module.named_modules() if isinstance(layer, kinds)}


def same(found: dict[str, torch.Tensor], pairs: dict[str, Pair]) -> None:
    for name, pair in pairs.items():
        expected = (3.0 / 2) * torch.einsum("or,ri->oi", pair.up.flatten(1), pair.down.flatten(1))
        assert torch.allclose(found[f"{name}.weight"].flatten(1), expected, atol=1e-5), name


@pytest.mark.parametrize("build", [tiny.tiny_sd, tiny.tiny_sdxl])
def test_every_layer_of_a_unet_comes_back_through_the_checkpoint_converter(build):
    unet = build().unet
    pairs = random_pairs(shapes_of(unet))
    family = need_family({"unet": unet}, "comfyui")
    tensors = layouts.tensors(pairs, layouts.rows(unet), family, kohya=False)
    whole = as_checkpoint(tensors)
    whole |= {name.replace(".weight", ".bias"): torch.zeros(1) for name in list(whole)}  # it asks for these, too
    same(checkpoints.convert_ldm_unet_checkpoint(whole, dict(unet.config)), pairs)


def test_every_layer_of_sd3_comes_back_but_those_whose_halves_are_swapped():
    transformer = tiny.tiny_sd3().transformer
    family = need_family({"transformer": transformer}, "comfyui")
    known = {name: shape for name, shape in shapes_of(transformer).items() if family.place(name)}
    assert set(shapes_of(transformer)) - set(known) == {
        "pos_embed.proj",
        "norm_out.linear",
        "transformer_blocks.0.norm1_context.linear",
    }
    pairs = random_pairs(known)
    tensors = layouts.tensors(pairs, layouts.rows(transformer), family, kohya=False)
    same(checkpoints.convert_sd3_transformer_checkpoint_to_diffusers(as_checkpoint(tensors)), pairs)


def test_flux_at_its_true_width_comes_back_through_the_kohya_converter():
    """Adapters on the attention only: the fourth matrix stacked in `linear1` is zeros."""
    layers = [f"transformer_blocks.0.attn.{name}" for name in (*ATTENTION, *ADDED)]
    layers += [f"single_transformer_blocks.0.attn.{name}" for name in ATTENTION[:3]]
    pairs = random_pairs(dict.fromkeys(layers, (3072, 4)))
    heights = dict.fromkeys(layers, 3072) | {"single_transformer_blocks.0.proj_mlp": 12288}
    family = family_of("FluxTransformer2DModel", {})
    file = layouts.tensors(pairs, heights, family, kohya=True)
    assert "lora_unet_single_blocks_0_linear1.lora_down.weight" in file
    back = lora_conversion._convert_kohya_flux_lora_to_diffusers(dict(file))
    for name, pair in pairs.items():
        down, up = (back.pop(f"transformer.{name}.lora_{side}.weight") for side in "AB")
        assert torch.allclose(up @ down, 1.5 * pair.up @ pair.down, atol=1e-5), name
        assert len(down) == 2  # the rank that was trained
    assert {key.split(".lora_")[0] for key in back} == {"transformer.single_transformer_blocks.0.proj_mlp"}
    assert not back["transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight"].any()


SD15 = {
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        ),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("up_blocks.3.attentions.2.proj_out", "output_blocks.11.1.proj_out"),
    ],
)
def test_names_in_stable_diffusion_1_5(layer, name):
    assert unet_place(SD15, layer).name == name
    assert family_of("UNet2DConditionModel", SD15).kohya_place(layer).name == layer  # kohya keeps diffusers' here


def test_the_scale_stays_where_matrices_are_stacked():
    pairs = random_pairs({f"transformer_blocks.0.attn.{name}": (4, 3) for name in ("to_q", "to_v")}, alpha=5.0)
    heights = {f"transformer_blocks.0.attn.{name}": 4 for name in ATTENTION}
    tensors = layouts.tensors(pairs, heights, family_of("SD3Transformer2DModel", {}), kohya=True)
    key = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    assert tensors[f"{key}.lora_down.weight"].shape == (6, 3)
    assert float(tensors[f"{key}.alpha"]) / 6 == 5.0 / 2
    assert not tensors[f"{key}.lora_up.weight"][4:8].any()  # to_k has no adapter


def test_what_has_no_names_is_refused_with_what_works():
    with pytest.raises(ExportError, match=r"PixArt.* has no kohya names .*SDXL.*--format diffusers or merged"):
        need_family({"transformer": tiny.tiny_pixart().transformer}, "kohya")
    with pytest.raises(ExportError, match="a and b are trained together"):
        need_family({"a": None, "b": None}, "comfyui")
    with pytest.raises(ExportError, match=r"norm_out\.linear of FLUX\.1 has no name"):
        family_of("FluxTransformer2DModel", {}).find("norm_out.linear", kohya=True)
