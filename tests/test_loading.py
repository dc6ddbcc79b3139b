"""Loading: nothing that comes with a model is run, and what is wrong is said in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny
from tiller.policy import Policy
from tiller.types import PipelineError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny.tiny_sd().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def index(folder: Path, **changes: object) -> None:
    """Change entries of a pipeline's `model_index.json`."""
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(folder: Path | str, says: str, **loading: object) -> None:
    with pytest.raises(PipelineError, match=says) as caught:
        Policy.from_pretrained(folder, **loading)
    assert "\n" not in str(caught.value)


def test_a_plain_folder_loads(saved: Path) -> None:
    policy = Policy.from_pretrained(saved, lora_rank=2, torch_dtype=torch.bfloat16)
    assert policy.pipe.unet.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in policy.parameters.values())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "nothing")


def test_a_folder_without_an_index(tmp_path: Path) -> None:
    refused(tmp_path, r"model_index\.json")


@pytest.mark.parametrize("name", ["trust_remote_code", "custom_pipeline"])
def test_code_from_a_hub_is_not_asked_for(saved: Path, name: str) -> None:
    refused(saved, name, **{name: "x"})


def test_code_in_the_folder_is_not_run(saved: Path, tmp_path: Path) -> None:
    (saved / "pipeline.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused(saved, r"pipeline\.py")
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_read(saved: Path) -> None:
    weights = next((saved / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    refused(saved, "safetensors")


def test_a_library_of_the_models_own_is_not_imported(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Net: pass")
    monkeypatch.syspath_prepend(tmp_path)
    index(saved, unet=["evil", "Net"])
    refused(saved, "evil")
    assert not (tmp_path / "ran").exists()
