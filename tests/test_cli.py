"""The command line: what it answers without the heavy imports, its errors and its exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest

from tiller import cli, doctor
from tiller.types import RewardError


def tiller(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tiller", *words], capture_output=True, text=True, **options)


@pytest.fixture
def command(monkeypatch):
    """Put a `tiller.commands.NAME` with this `run` in place."""

    def put(name: str, run) -> None:
        package = sys.modules.get("tiller.commands") or ModuleType("tiller.commands")
        monkeypatch.setitem(sys.modules, "tiller.commands", package)
        module = ModuleType(f"tiller.commands.{name}")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(package, name, module, raising=False)

    return put


def test_help_names_every_command() -> None:
    done = tiller("--help")
    assert done.returncode == 0
    for name in ("train", "demo", "sample", "evaluate", "pretrain", "compare", "doctor"):
        assert f"    {name}" in done.stdout


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["train", "missing.yaml"]])
def test_these_need_no_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom tiller.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        "sys.exit(3 if {'torch', 'diffusers', 'transformers'} & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_version() -> None:
    assert tiller("--version").stdout == "tiller 0.1.0\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "missing.yaml"], "config error: there is no recipe missing.yaml"),
        (["sample", "emoji", "--prompts", "missing.txt"], "error: there is no prompt file missing.txt"),
        (["sample", "emoji", "--prompt", "a", "--prompts", "b"], "error: give --prompt or --prompts"),
        (["sample", "emoji", "--prompt", "a", "=1"], "config error: '=1' is no setting"),
    ],
)
def test_an_error_with_a_cure_is_one_line_and_exit_code_2(words, says, capsys) -> None:
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(says)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_an_unknown_setting_is_told_before_the_run_begins(tmp_path, capsys, command) -> None:
    command("train", lambda *_, **__: pytest.fail("the run began"))
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {epochs: 2}\n")
    assert cli.main(["train", str(recipe), "train.lrr=1"]) == 2
    expected = "config error: train.lrr is unknown; did you mean train.learning_rate?\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("words", [[], ["fly"], ["train"], ["train", "r.yaml", "--fast"], ["doctor", "a=1"]])
def test_wrong_usage_is_exit_code_2(words: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert "usage: tiller" in capsys.readouterr().err


def test_train_gets_the_recipe_its_name_and_resume(tmp_path, command) -> None:
    seen = SimpleNamespace()
    command("train", lambda recipe, **rest: seen.__dict__.update(recipe=recipe, rest=rest))
    (tmp_path / "paper.yaml").write_text("reward: jpeg_incompressibility\n")
    words = ["train", str(tmp_path / "paper.yaml"), "train.seed=3", "--resume", "train.epochs=2"]
    assert cli.main(words) == 0
    assert (seen.recipe.reward, seen.recipe.train.seed, seen.recipe.train.epochs) == ("jpeg_incompressibility", 3, 2)
    assert seen.rest == {"name": "paper", "resume": True}


def test_sample_reads_prompts_and_call_arguments(command) -> None:
    seen = SimpleNamespace()
    command("sample", lambda *words, **rest: seen.__dict__.update(words=words, rest=rest))
    assert cli.main(["sample", "emoji", "--prompt", "a cat", "--seed", "7", "guidance_scale=3"]) == 0
    model, prompts = seen.words
    assert (model, [prompt.text for prompt in prompts]) == ("emoji", ["a cat"])
    assert (seen.rest["seed"], seen.rest["sampling"]) == (7, {"guidance_scale": 3})


def test_evaluate_and_demo_pass_their_arguments(command, tmp_path) -> None:
    seen = {}
    command("evaluate", lambda folder, **rest: seen.update(folder=folder, **rest))
    command("demo", lambda **rest: seen.update(demo=rest) or 5)
    assert cli.main(["evaluate", str(tmp_path), "samples_per_prompt=8"]) == 0
    assert seen == {"folder": tmp_path, "overrides": ["samples_per_prompt=8"]}
    assert cli.main(["demo", "--output", "here", "train.epochs=1"]) == 5
    assert seen["demo"] == {"overrides": ["train.epochs=1"], "output": "here"}


def _raise(error: BaseException):
    raise error


def test_exit_codes_of_what_can_happen_in_a_command(command, capsys) -> None:
    command("demo", lambda **_: _raise(RewardError("reward f failed; mend it.")))
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == "error: reward f failed; mend it.\n"
    command("demo", lambda **_: _raise(KeyboardInterrupt()))
    assert cli.main(["demo"]) == 130
    command("demo", lambda **_: _raise(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


def test_debug_shows_the_traceback(command) -> None:
    command("demo", lambda **_: _raise(RewardError("x")))
    with pytest.raises(RewardError):
        cli.main(["--debug", "demo"])


def test_sigterm_is_143_and_the_old_handler_comes_back(command) -> None:
    before = signal.getsignal(signal.SIGTERM)
    command("demo", lambda **_: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(5)))
    with pytest.raises(SystemExit) as caught:
        cli.main(["demo"])
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


# ---- doctor ----


def test_doctor_reports_every_requirement_and_what_is_missing(monkeypatch) -> None:
    requirements = ["numpy>=1", "pillow>=99", "not-there-xyz>=2", "wandb>=1; extra == 'wandb'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: requirements)
    checks = {check.name: check for check in doctor._packages()}
    assert list(checks) == ["numpy", "pillow", "not-there-xyz"]
    assert checks["numpy"].problem == ""
    assert checks["pillow"].problem == "pip install 'pillow>=99'"
    assert checks["not-there-xyz"].found == "missing"
    text = doctor.report(list(checks.values()))
    assert text.splitlines()[-2:] == [
        "! pillow: pip install 'pillow>=99'",
        "! not-there-xyz: pip install 'not-there-xyz>=2'",
    ]


def test_doctor_exit_code_follows_the_problems(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check("a", "1")])
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == "a  1\nall that is needed is here\n"
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check("a", "1", "buy one")])
    assert cli.main(["doctor"]) == 2
    assert "! a: buy one" in capsys.readouterr().out


def test_doctor_looks_at_the_whole_machine() -> None:
    names = {check.name for check in doctor.examine()}
    assert {"tiller", "python", "processor", "memory", "disk", "torch", "device", "threads"} < names
    assert {"emoji font", "emoji model"} < names
