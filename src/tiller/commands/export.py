"""`tiller export`: a run's weights in the names that other programs read, read back and compared, with a card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiller.commands import building, quiet
from tiller.export import card, hub, layouts, source, verify, write
from tiller.export.families import ExportError, Family, need_family
from tiller.export.verify import Verified
from tiller.policy.loading import load_pipeline
from tiller.prompts import load


@dataclass(frozen=True)
class Wish:
    """What to export, and how."""

    form: str  # one of write.FORMATS
    output: str | None = None  # a folder, or a .safetensors file; None is RUN/export/FORMAT
    weights: str = "model"  # see source.read_run
    dtype: str = "float32"  # of the numbers in the files
    verify: bool = True
    push_to_hub: str | None = None  # a repository's name
    public: bool = False


def run(folder: Path, wish: Wish) -> int:
    """Write the export and its card, and say what was checked.

    Raises:
        ExportError: the run cannot be exported so, or what was written is not what was trained.
        RunError: the run has no such weights, or the files cannot be written.
    """
    quiet.hide_bars()
    if wish.push_to_hub:
        hub.check_name(wish.push_to_hub)
    trained = source.read_run(folder, wish.weights)
    whole = trained.policy.lora_rank is None
    if whole and wish.form in ("kohya", "comfyui"):
        raise ExportError(
            f"{folder} trained all weights, and a {wish.form} file holds a LoRA; export with --format merged."
        )
    if wish.form in ("kohya", "comfyui"):
        need_family(trained.policy.denoisers, wish.form)  # refused before anything is drawn
    target = _target(folder, wish, merged=whole or wish.form == "merged")
    if whole or wish.form == "merged":
        family, checked = None, _export_merged(trained, wish, target)
    else:
        family, checked = _export_lora(trained, wish, target)
    about = card.About(trained.folder, trained.recipe, trained.weights, trained.epoch, wish.form, target, wish.dtype)
    written = card.write(about, family, checked, wish.push_to_hub)
    print(f"{target}: {trained.weights}, {wish.form}, {wish.dtype}")
    print(str(checked) if checked else "not read back (--no-verify)")
    print(f"card: {written}")
    if wish.push_to_hub:
        print(f"pushed to {hub.push(written, target, wish.push_to_hub, private=not wish.public)}")
    return 0


def _target(folder: Path, wish: Wish, merged: bool) -> Path:
    """The file, or for whole pipelines the folder, to write."""
    given = Path(wish.output) if wish.output else folder / "export" / wish.form
    if given.suffix == ".safetensors":
        if merged:
            raise ExportError(f"{given} is a file, and a whole pipeline is a folder; give a folder as --output.")
        return given
    name = write.LORA_FILE if wish.form == "diffusers" else f"{folder.resolve().name}.safetensors"
    return given if merged else given / name


def _export_lora(trained: source.Trained, wish: Wish, file: Path) -> tuple[Family | None, Verified | None]:
    policy, recipe = trained.policy, trained.recipe
    dtype = write.DTYPES[wish.dtype]
    write.round_adapters(policy, dtype)
    updates = card.updates(trained.folder, trained.epoch)
    if not wish.verify:
        return write.write_lora(trained, wish.form, file, dtype, updates), None
    drawn, wanted = _drawing(trained), {name: layouts.pairs(module) for name, module in policy.denoisers.items()}
    tuned = drawn(policy.pipe)
    with policy.base():
        base = drawn(policy.pipe)
    family = write.write_lora(trained, wish.form, file, dtype, updates)
    del policy.pipe, policy.denoisers  # two big models do not fit beside each other
    pipe = verify.fresh(lambda: load_pipeline(recipe.model.name, **source.loading(recipe)), _device(trained))
    how, found = verify.load_as_written(pipe, wish.form, file, family)
    verify.check_layers(found, wanted)
    return family, verify.compare(how, tuned, drawn(pipe), base, verify.TOLERANCE)


def _export_merged(trained: source.Trained, wish: Wish, folder: Path) -> Verified | None:
    policy, dtype = trained.policy, write.DTYPES[wish.dtype]
    if not wish.verify:
        write.write_merged(policy, folder, dtype)
        return None
    drawn = _drawing(trained)
    tuned = drawn(policy.pipe)
    write.write_merged(policy, folder, dtype)
    how, tolerance = "by from_pretrained", verify.MERGED_TOLERANCE
    if wish.dtype != "float32":  # rounding is asked for, so what is compared is the rounded model
        import torch

        policy.pipe.to(dtype=torch.float32)
        rounded, tolerance = drawn(policy.pipe), verify.TOLERANCE
        how += f" ({wish.dtype} alone moves it by {float(np.abs(tuned - rounded).max()):.1g})"
        tuned = rounded
    del policy.pipe, policy.denoisers
    found = drawn(verify.fresh(lambda: verify.open_folder(folder), _device(trained)))
    recipe = trained.recipe
    base = drawn(verify.fresh(lambda: load_pipeline(recipe.model.name, **source.loading(recipe)), _device(trained)))
    return verify.compare(how, tuned, found, base, tolerance)


def _drawing(trained: source.Trained) -> Callable[[Any], np.ndarray]:
    prompt, call = load(trained.recipe.prompts)[0].text, building.per_picture(trained.recipe.sampling)
    return lambda pipe: verify.draw(pipe, prompt, call)


def _device(trained: source.Trained) -> Any:
    return building.device(trained.recipe.model.device)
