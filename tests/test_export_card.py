"""The card, and what leaves by --push-to-hub: nothing secret, no path of this machine, no mark-up of others."""

from __future__ import annotations

from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from PIL import Image

import tiny
import tiny_run
from tiller import config
from tiller.cli import main
from tiller.export import card, hub
from tiller.export.licence import licence_of
from tiller.export.markdown import escape
from tiller.recipe import Recipe

SECRET = "hf_0123456789abcdef"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with its kohya export, made while secrets are in the environment and in the recipe."""
    folder = tmp_path_factory.mktemp("card")
    run = tiny_run.finished_run(tiny.tiny_sd(), folder)
    (folder / "base" / "README.md").write_text("---\nlicense: openrail++\n---\nA base model.\n")
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    reward = {"name": f"{folder}/mine.py:Judge", "api_key": SECRET, "revision": "abc123", "model": f"{folder}/judge"}
    recipe["reward"] = reward
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        assert main(["export", str(run), "--format", "kohya", "--no-verify"]) == 0
    return run, run / "export" / "kohya"


def test_the_card_says_what_was_done(made):
    text = (made[1] / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "diffusers"
    assert front["license"] == "openrail++"
    assert {"lora", "tiller", "ddpo", "text-to-image"} <= set(front["tags"])
    for said in ("revision abc123", "41.5 nats", "+0.2 (+0.1, +0.3)", "90%", "edges changed by -60%", "epoch 2"):
        assert said in text, said
    assert "fell on held out by 0.2" in text
    assert "pipe.load_lora_weights('.', weight_name=\"run.safetensors\")" in text
    assert Image.open(made[1] / card.GALLERY).width == card.WIDEST


def test_neither_secrets_nor_paths_are_in_any_file(made):
    run, folder = made
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) == 3
    for file in files:
        data = file.read_bytes()
        assert SECRET.encode() not in data, file
        assert str(run.parent).encode() not in data, file


def test_texts_of_others_do_nothing(made):
    text = (made[1] / "README.md").read_text()
    assert "<gold>" not in text
    assert "&lt;gold&gt; \\| judge" in text
    assert escape("![x](http://a) <script>\n# b `c`") == ("\\!\\[x\\]\\(http://a\\) &lt;script&gt; \\# b \\`c\\`")


def test_somebody_elses_readme_is_left_alone(made, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    output = str(tmp_path / "a.safetensors")
    assert main(["export", str(made[0]), "--format", "kohya", "--no-verify", "--output", output]) == 0
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "a.README.md").exists()


def test_a_licence_that_nobody_states_is_unknown(tmp_path):
    assert licence_of(str(tmp_path)) == ("unknown", "")
    assert licence_of("nobody/never-downloaded") == ("unknown", "")
    assert licence_of("emoji")[0] == "apache-2.0"


def test_settings_lose_folders_and_secrets_only(tmp_path):
    recipe = config.from_mapping(
        Recipe,
        {"reward": {"name": "clip_score", "model": str(tmp_path / "m"), "url": "http://u:p@h/s?key=1", "token": "abc"}},
    )
    shown = card.settings(recipe)
    assert shown["train"]["learning_rate"] == 3e-4
    assert shown["reward"]["model"] == "m"
    assert "u:p" not in str(shown)
    assert "key=1" not in str(shown)


class Stub:
    """What the hub is asked, written down."""

    calls: list[tuple[str, dict]] = []  # noqa: RUF012

    def create_repo(self, name, **rest):
        self.calls.append(("create_repo", {"name": name, **rest}))
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, **rest):
        self.calls.append(("upload_folder", rest))


@pytest.fixture
def stub(monkeypatch):
    Stub.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Stub)
    return Stub.calls


def test_a_push_is_private_and_takes_the_export_only(made, stub, tmp_path):
    (tmp_path / "diary.txt").write_text("private")
    words = ["--format", "kohya", "--no-verify", "--output", str(tmp_path / "a.safetensors")]
    assert main(["export", str(made[0]), *words, "--push-to-hub", "mine"]) == 0
    (_, created), (_, uploaded) = stub
    assert created == {"name": "mine", "private": True, "exist_ok": True, "repo_type": "model"}
    assert uploaded["allow_patterns"] == ["README.md", "a.safetensors", "before_after.jpg"]
    assert "token" not in str(stub)
    assert "load_lora_weights('mine'" in (tmp_path / "README.md").read_text()


def test_without_the_flag_nothing_is_asked_of_the_hub(made, stub, tmp_path):
    assert main(["export", str(made[0]), "--format", "kohya", "--no-verify", "--output", str(tmp_path)]) == 0
    assert stub == []


def test_a_file_with_a_secret_does_not_leave(tmp_path, monkeypatch, stub):
    monkeypatch.setenv("MY_API_KEY", SECRET)
    (tmp_path / "a.safetensors").write_bytes(b"{}" + SECRET.encode())
    (tmp_path / "README.md").write_text("card")
    with pytest.raises(hub.ExportError, match="holds the value of MY_API_KEY") as caught:
        hub.push(tmp_path / "README.md", tmp_path / "a.safetensors", "me/mine")
    assert SECRET not in str(caught.value)
    assert stub == []


def test_a_name_that_is_none_is_refused_before_any_work(made, capsys):
    assert main(["export", str(made[0]), "--push-to-hub", "https://x/y z"]) == 2
    assert "--push-to-hub" in capsys.readouterr().err
