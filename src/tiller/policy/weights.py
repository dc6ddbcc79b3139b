"""What is trained: LoRA adapters or whole denoisers; adapters off; saving in diffusers' own formats."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from tiller.policy import seam
from tiller.types import PipelineError

if TYPE_CHECKING:
    from tiller.policy.policy import Policy

ADAPTER = "default"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# how diffusers' pipelines call the models whose output goes to `scheduler.step`
DENOISER = re.compile(r"(prior_|decoder_)?(\w*unet|\w*transformer(_\d+)?|prior|decoder|super_res_\w+|denoiser|dit)")
# and, in a pipeline that calls it by another name, diffusers models that are something else
HELPERS = ("ControlNet", "Adapter", "Projection", "Vocoder", "Renderer", "Connector", "ImageProj", "TimeProj", "Embed")


def denoisers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The models whose output is the prediction that `scheduler.step` gets."""
    modules = {
        name: module
        for name, module in seam.parts(pipe, nn.Module).items()
        if not hasattr(module, "decode") and not hasattr(module, "encode")
    }
    named = {name: module for name, module in modules.items() if DENOISER.fullmatch(name.rsplit(".", 1)[-1])}
    return named or {
        name: module
        for name, module in modules.items()
        if isinstance(module, ModelMixin) and not any(helper in type(module).__name__ for helper in HELPERS)
    }


def loop_modules(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """Every model whose output serves one step only: the denoisers, and the ControlNets that condition them."""
    controls = {n: m for n, m in seam.parts(pipe, nn.Module).items() if n.rsplit(".", 1)[-1].startswith("controlnet")}
    return {**denoisers(pipe), **controls}


def add_lora(
    modules: Mapping[str, nn.Module], rank: int, alpha: float, targets: Sequence[str] | None, seed: int
) -> None:
    """LoRA (Hu et al. 2021) on the named linear layers of each denoiser, float32, starting as the identity.

    By default the attention projections; where a denoiser has none by diffusers' names, all of its linear layers.
    """
    for part, module in modules.items():
        if any(isinstance(layer, BaseTunerLayer) for layer in module.modules()):
            raise PipelineError(f"{part} has adapters already; fuse them (pipe.fuse_lora()) or unload them first.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part, module in modules.items():
            config = LoraConfig(
                r=rank,
                lora_alpha=alpha,  # type: ignore[arg-type]
                init_lora_weights="gaussian",
                target_modules=_targets(part, module, targets),
            )
            if hasattr(module, "add_adapter"):
                module.add_adapter(config, adapter_name=ADAPTER)  # type: ignore[operator]
            else:
                inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    for module in modules.values():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def _targets(part: str, module: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    kinds = nn.Linear if wanted is None else (nn.Linear, nn.Conv2d)  # convolutions only where they are asked for
    linear = [name for name, layer in module.named_modules() if isinstance(layer, kinds)]
    names = [name for name in linear if any(name == t or name.endswith("." + t) for t in wanted or ATTENTION)]
    if not names and wanted is None:
        names = [name for name in linear if "emb" not in name and "proj_out" not in name]
    if not names:
        known = sorted({n.rsplit(".", 1)[-1] for n in linear}, key=lambda n: (n not in ATTENTION, n))[:6]
        raise PipelineError(
            f"no linear layer of {part} ({type(module).__name__}) is called {list(wanted or ATTENTION)}; "
            f"name some of its layers in target_modules, for example {known}."
        )
    return names


@contextmanager
def adapters_off(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The denoisers without their adapters, for the length of the block."""
    layers = [layer for module in modules.values() for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def lora_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors by peft's names, without the adapter's name; in the layout that safetensors asks for."""
    return {
        name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(module, adapter_name=ADAPTER).items()
    }


def save(policy: Policy, path: Path) -> Path:
    """See `Policy.save`."""
    path.mkdir(parents=True, exist_ok=True)
    if policy.lora_rank is None:
        with _plain_layout(policy.denoisers):
            policy.pipe.save_pretrained(path, safe_serialization=True)
        return path
    layers = {f"{part}_lora_layers": lora_state(module) for part, module in policy.denoisers.items()}
    metadata = {f"{part}_lora_adapter_metadata": _metadata(module) for part, module in policy.denoisers.items()}
    saver: Any = getattr(type(policy.pipe), "save_lora_weights", None)
    if saver is not None and set(layers) <= set(_parameters(saver)):
        saver(path, **layers, **{name: value for name, value in metadata.items() if name in _parameters(saver)})
    else:  # this pipeline has no LoRA loader of its own; peft's own layout, one prefix per part
        tensors = {
            f"{part}.{name}": tensor
            for part, module in policy.denoisers.items()
            for name, tensor in lora_state(module).items()
        }
        save_file(tensors, path / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    return path


@contextmanager
def _plain_layout(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Weights that lie in memory with their channels last are copied for safetensors, and put back as they were."""
    strided = [p for module in modules.values() for p in module.parameters() if not p.is_contiguous()]
    before = [parameter.data for parameter in strided]
    for parameter in strided:
        parameter.data = parameter.data.contiguous()
    try:
        yield
    finally:
        for parameter, data in zip(strided, before, strict=True):
            parameter.data = data


def _metadata(module: nn.Module) -> dict[str, Any]:
    config = module.peft_config[ADAPTER].to_dict()  # type: ignore[index, union-attr, operator]
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def load(policy: Policy, path: Path) -> None:
    """Put a LoRA that `save` wrote back into the adapters.

    Raises:
        PipelineError: the file is missing, or belongs to another model or rank.
    """
    file = path / "pytorch_lora_weights.safetensors"
    if not file.exists():
        raise PipelineError(f"there is no {file}; give a folder that tiller saved a LoRA in.")
    tensors = load_file(file)
    for part, module in policy.denoisers.items():
        mine = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
        wanted = {name: tuple(tensor.shape) for name, tensor in lora_state(module).items()}
        if {name: tuple(tensor.shape) for name, tensor in mine.items()} != wanted:
            raise PipelineError(f"{file} does not fit the adapters of {part}; load it with the rank it was made with.")
        set_peft_model_state_dict(module, mine, adapter_name=ADAPTER)
