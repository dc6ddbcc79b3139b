"""Models inside rewards: where they come from, and the sentence when they do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants, errors
from transformers import AutoTokenizer, BertConfig, BertModel, CLIPModel

import tiny_parts as parts
import tiny_scorers as tiny
from tiller.rewards import hub, resolve
from tiller.rewards.loading import choose_device, choose_dtype, load_model, load_processor, load_tensors
from tiller.rewards.resolve import BUILT_IN
from tiller.types import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    tiny.clip(path)
    return path


def test_a_folder_is_read_frozen_in_evaluation_mode_and_its_dtype(folder) -> None:
    model = load_model(CLIPModel, str(folder), device="cpu", dtype="bfloat16")
    assert not model.training
    assert {(weight.requires_grad, weight.dtype) for weight in model.parameters()} == {(False, torch.bfloat16)}
    saved = CLIPModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, saved[name].bfloat16()) for name, value in model.state_dict().items())


def test_a_packaged_name_is_a_folder_inside_tiller(folder, monkeypatch) -> None:
    root = Path(hub.__file__).parents[1]
    monkeypatch.setitem(hub.PACKAGED, "tiny-clip", str(Path(*[".."] * len(root.parts[1:])) / folder.relative_to("/")))
    assert load_model(CLIPModel, "tiny-clip", device="cpu").config.projection_dim == 12
    monkeypatch.setitem(hub.PACKAGED, "tiny-clip", "nowhere")
    with pytest.raises(ConfigError, match="'tiny-clip', which comes with tiller, is missing; reinstall"):
        load_model(CLIPModel, "tiny-clip")


def test_a_hub_model_needs_a_revision_and_is_found_in_the_cache_without_a_network(
    folder, tmp_path, monkeypatch
) -> None:
    snapshot = tmp_path / "models--someone--clip" / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for revision in (COMMIT, "main"):
        assert load_model(CLIPModel, "someone/clip", revision, device="cpu").config.projection_dim == 12
        tokens = load_processor(AutoTokenizer, "someone/clip", revision)("a cat")["input_ids"]
        assert tokens == tiny.letters("a cat")
        assert "logit_scale" in load_tensors("someone/clip/model.safetensors", revision)
    with pytest.raises(
        ConfigError, match=r"'someone/clip' is no folder here, .* needs a revision; set revision to the"
    ):
        load_model(CLIPModel, "someone/clip")
    with pytest.raises(ConfigError, match="'someone/clip' is not on this machine and the hub cannot be reached; fetch"):
        load_model(CLIPModel, "someone/clip", "f" * 40)
    monkeypatch.setitem(hub.PINNED, "someone/clip", COMMIT)
    assert load_model(CLIPModel, "someone/clip", device="cpu").config.projection_dim == 12


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (errors.RepositoryNotFoundError, "there is no 'someone/clip', neither a folder here nor on the hub; check"),
        (errors.RevisionNotFoundError, "'someone/clip' has no revision 'abc' on the hub; give one of its commits"),
        (errors.GatedRepoError, "'someone/clip' asks for its licence to be accepted on the hub first"),
        (errors.HfHubHTTPError, "the hub did not give 'someone/clip': 503; try again later"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(monkeypatch, error, sentence) -> None:
    def refuse(*args, **settings):
        raise error("503", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(ConfigError, match=sentence):
        load_model(CLIPModel, "someone/clip", "abc")


def test_from_the_hub_come_neither_pickles_nor_code(monkeypatch, folder) -> None:
    asked = []

    def fetch(model, revision, allow_patterns):
        asked.append((model, revision, tuple(allow_patterns)))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    load_processor(AutoTokenizer, "someone/clip", "abc")
    load_model(CLIPModel, "someone/clip", "abc", device="cpu")
    plain = ("*.json", "*.txt", "*.model", "*.jinja")
    assert asked == [("someone/clip", "abc", plain), ("someone/clip", "abc", (*plain, "model*.safetensors"))]


def test_a_folder_with_a_pickle_only_is_refused_unread(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "pickled")
    weights = tmp_path / "pickled" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ConfigError, match=r"as a pickle only \(pytorch_model.bin\), which can run code"):
        load_model(CLIPModel, str(tmp_path / "pickled"))
    weights.with_name("pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match=r"has no model.safetensors, and tiller reads nothing else"):
        load_model(CLIPModel, str(tmp_path / "pickled"))


def test_another_architecture_or_missing_weights_are_refused(folder, tmp_path) -> None:
    """transformers would fill in random weights, and say so in a warning at most."""
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    parts.seeded(BertModel, BertConfig(vocab_size=9, **size)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"is a model of the kind 'bert', but CLIPModel reads 'clip'"):
        load_model(CLIPModel, str(tmp_path / "bert"))
    shutil.copytree(folder, tmp_path / "deeper")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (tmp_path / "deeper" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"lack vision_model.encoder.layers.2.* \(and 15 more\), so CLIPModel would sc"
    ):
        load_model(CLIPModel, str(tmp_path / "deeper"))
    with pytest.raises(ConfigError, match=r"has no config.json"):
        load_model(CLIPModel, str(tmp_path))


def test_a_file_of_tensors_must_be_safetensors_and_there(tmp_path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    for name, sentence in {
        "head.pth": "head.pth is a pickle, which can run code when it is read; name a copy that ends in .safetensors",
        "head.zip": "head.zip is no safetensors file",
        "./head.safetensors": "there is no file ./head.safetensors; a path starts at the working directory",
        "head.safetensors": "there is no file head.safetensors",
        "someone/clip/head.safetensors": "'someone/clip' is no folder here, and a model from the hub needs a revision",
        str(tmp_path / "broken.safetensors"): "broken.safetensors is damaged, or no safetensors file",
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            load_tensors(name)
    with pytest.raises(ConfigError, match=r"there is no folder ./nowhere; give one that transformers wrote"):
        load_model(CLIPModel, "./nowhere")


SETTINGS = {
    "clip_score": {"scale": 2.5},
    "pick_score": {"scale": 1.0},
    "aesthetic": {"head": "head.safetensors"},
    "hps": {"weights": "hps.safetensors"},
    "hps_v3": {"instruction": "text.txt"},
    "image_reward": {"weights": "reward.safetensors"},
    "vqa_score": {"over": "answers"},
    "ocr": {"question": ""},
    "geneval": {"part": "strict"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_scorers_have_names_and_settings_and_load_nothing_before_the_first_picture(name) -> None:
    reward = resolve(name, SETTINGS[name])
    assert {key: getattr(reward, key) for key in SETTINGS[name]} == SETTINGS[name]
    assert reward.deterministic
    assert not {"clip", "reader", "detector", "network"} & set(vars(reward))
    with pytest.raises(ConfigError, match=r"reward.devcie is unknown; did you mean reward.device\?"):
        resolve(name, {**SETTINGS[name], "devcie": "cpu"})


def test_the_page_of_the_scorers_names_all_of_them_and_every_pinned_revision() -> None:
    page = (Path(__file__).parents[1] / "docs" / "scorers.md").read_text(encoding="utf-8")
    assert set(SETTINGS) == {name for name, target in BUILT_IN.items() if target.startswith("tiller.rewards.scorers.")}
    assert [name for name in SETTINGS if f"| `{name}` |" not in page] == []
    assert [model for model, commit in hub.PINNED.items() if f"{model} `{commit[:7]}`" not in page] == []


def test_devices_and_dtypes_by_name() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_dtype("auto", torch.device("cpu")) is torch.float32
    assert choose_dtype("auto", torch.device("cuda")) is torch.bfloat16
    with pytest.raises(ConfigError, match="there is no device 'gpu'; name auto, cpu"):
        choose_device("gpu")
    with pytest.raises(ConfigError, match="there is no dtype 'half'; name auto, float32, float16, bfloat16"):
        choose_dtype("half", torch.device("cpu"))
