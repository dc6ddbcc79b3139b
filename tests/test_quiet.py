"""A command's output holds only tiller's own lines; a program that imports tiller keeps its settings."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import tiny
from tiller.commands import quiet

PRETRAIN = [
    *("autoencoder.steps=2", "autoencoder.batch=2", "autoencoder.channels=[8,8]", "size=16"),
    *("denoiser.steps=2", "denoiser.batch=2", "denoiser.pool=4", "denoiser.channels=[16]", "denoiser.text_width=48"),
    *("decoder.steps=2", "decoder.batch=2"),
]


def program(code: str, folder: Path) -> tuple[str, str]:
    """What a fresh interpreter prints, and what it says on the other channel, with no verbosity set from outside."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_sample_and_pretrain_print_their_own_lines_only(tmp_path: Path) -> None:
    """The model's scheduler has an outdated steps_offset, which diffusers warns of whenever it is loaded."""
    tiny.tiny_sd().save_pretrained(tmp_path / "model")
    sample = ["sample", "model", "--prompt", "a cat", "num_inference_steps=2", "height=16", "width=16"]
    code = (
        f"from tiller.cli import main\nassert main({sample!r}) == 0\nassert main({['pretrain', *PRETRAIN]!r}) == 0\n"
        "import torch, warnings\nfrom transformers import CLIPImageProcessor"  # says that torchvision is missing
    )
    out, err = program(code, tmp_path)
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "1 pictures in samples, all of them on samples/sheet.png"
    assert [line.split()[0] for line in lines[1:]] == ["autoencoder", "denoiser", "decoder", "model/pipeline"]


def test_importing_tiller_leaves_the_libraries_as_they_are(tmp_path: Path) -> None:
    code = (
        "import os\nbefore = dict(os.environ)\nimport tiller.cli, tiller.commands.quiet\nassert os.environ == before\n"
        "import tiller\ntiller.Policy\nfrom diffusers.utils import logging\n"
        "assert logging.is_progress_bar_enabled()\nprint(logging.get_verbosity())"
    )
    assert program(code, tmp_path)[0].strip() == "30"  # logging.WARNING, diffusers' default


def test_what_the_user_has_set_stays() -> None:
    environment = {"TRANSFORMERS_VERBOSITY": "info"}
    with warnings.catch_warnings():
        quiet.settle(environment)
    assert environment["TRANSFORMERS_VERBOSITY"] == "info"
    assert environment["DIFFUSERS_VERBOSITY"] == "error"


def test_only_warnings_for_programmers_are_hidden() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet.settle({})
        for kind in (FutureWarning, UserWarning):
            warnings.warn_explicit("a", kind, "x.py", 1, module="diffusers.pipelines.sd")
        warnings.warn_explicit("a", FutureWarning, "x.py", 2, module="diffusersmine")
    assert [warning.category for warning in seen] == ([] if sys.warnoptions else [UserWarning, FutureWarning])


@pytest.mark.parametrize("terminal", [True, False])
def test_downloads_keep_their_bars_on_a_terminal(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    environment: dict[str, str] = {}
    with warnings.catch_warnings():
        quiet.settle(environment)
    assert ("HF_HUB_DISABLE_PROGRESS_BARS" in environment) is not terminal
