"""`tiller compare`: what is run, and what is made of it."""

import contextlib
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tiller import cli, config
from tiller.commands import compare
from tiller.comparison import Comparison, variants
from tiller.report.comparison import Row, plot, seconds, summarise, table
from tiller.types import ConfigError

RECIPE = "prompts: animals\ntrain: {samples_per_epoch: 4, group_size: 2, batch_size: 4}\n"


def written(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(RECIPE)
    file = folder / "both.yaml"
    file.write_text(f"recipe: recipe.yaml\noutput_dir: {folder / 'out'}\n{text}")
    return file


def test_every_variant_gets_the_same_budget_and_only_its_own_changes(tmp_path: Path) -> None:
    file = written(
        tmp_path, "reward_calls: 16\nseeds: [0, 7]\nruns:\n  a: {}\n  b: {train.samples_per_epoch: 8, kernel: ddim}\n"
    )
    found = list(variants(config.load(Comparison, file), file))
    assert [(v.name, v.seed) for v in found] == [("a", 0), ("b", 0), ("a", 7), ("b", 7)]
    assert found[2].overrides == ("train.epochs=4", "train.seed=7", f"run.output_dir={tmp_path / 'out' / 'a-7'}")
    assert found[1].overrides[:3] == ("train.samples_per_epoch=8", 'kernel="ddim"', "train.epochs=2")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("reward_calls: 10\nruns: {a: {}}\n", r"reward_calls \(10\) is no multiple of what an epoch of a draws \(4\)"),
        ("reward_calls: 8\nruns: {a: {train.lrr: 1}}\n", "train.lrr is unknown"),
        ("reward_calls: 8\nruns: {a: 3}\n", "runs.a is 3; write"),
        ("reward_calls: 8\n", "there is nothing to compare"),
    ],
)
def test_a_comparison_that_cannot_run_is_refused_before_its_first_run(tmp_path, capsys, text, complaint) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError, match=complaint):
        list(variants(config.load(Comparison, file), file))
    assert cli.main(["compare", str(file)]) == cli.USER_ERROR
    assert not (tmp_path / "out").exists()


def row(name: str, seed: int, gain: float, finished: bool = True) -> Row:
    compared = [
        {"split": split, "reward": "r", "base": 1.0, "tuned": 1.0 + gain * share, "difference": gain * share}
        for split, share in (("trained", 1.0), ("unseen_animals", 0.5), ("unseen_objects", 9.0))
    ]
    return Row(
        name,
        seed,
        [{"reward/mean": 1.0, "reward_calls": 4}, {"reward/mean": 1.0 + gain, "reward_calls": 8}],
        [{"epoch": 1, "time/sample": 20.0, "time/update": 10.0}, {"epoch": 2, "time/sample": 60.0}],
        compared if finished else [],
        {"kl_to_base": 5.0 * gain, "diversity_base": 0.4, "diversity_tuned": 0.3},
    )


def test_the_summary_is_mean_and_deviation_over_finished_seeds(tmp_path: Path) -> None:
    rows = [row("a", 0, 0.2), row("a", 1, 0.4), row("a", 2, 99.0, finished=False), row("b", 0, 0.1)]
    a, b = summarise(rows, "unseen_animals")
    assert (a["seeds"], a["failed"], b["seeds"], b["failed"]) == (2, 1, 1, 0)
    assert a["trained r gain"] == {"mean": pytest.approx(0.3), "std": pytest.approx(0.2 / 2**0.5)}  # of the sample
    assert a["held-out r gain"]["mean"] == pytest.approx(0.15)
    assert a["KL to base"]["mean"] == pytest.approx(1.5)
    assert a["diversity kept"]["mean"] == pytest.approx(0.75)
    assert a["reward calls"]["mean"] == 8
    assert a["minutes"]["mean"] == pytest.approx(1.5)
    np.testing.assert_allclose(seconds(rows[0]), [30, 90])
    lines = table([a, b]).splitlines()
    assert lines[0].startswith("| variant | seeds | trained r gain | held-out r gain | diversity kept | KL")
    assert lines[2] == "| a | 2 (1 failed) | +0.300 ± 0.141 | +0.150 ± 0.071 | 0.75 | 2 ± 1 | 8 | 1.50 |"
    assert lines[3] == "| b | 1 | +0.100 | +0.050 | 0.75 | 0 | 8 | 1.50 |"
    assert b["KL to base"]["std"] is None
    assert plot(rows, tmp_path / "plot.png").stat().st_size > 1000


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of a comparison made here, which saves importing torch for each."""

    def execute(command: list[str], log: Path) -> int:
        with log.open("a") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return cli.main(command[3:])

    monkeypatch.setattr(compare, "execute", execute)


@pytest.mark.usefixtures("in_this_process")
def test_the_command_runs_what_is_missing_and_reports_what_failed(tmp_path: Path, capsys) -> None:
    """One real run of one epoch, and one whose settings only show to be wrong once it has begun."""
    quick = "sampling: {num_inference_steps: 2}, evaluation.samples_per_prompt: 1, run.sample_prompts: 0"
    file = written(
        tmp_path,
        f"reward_calls: 4\nseeds: [0]\nruns:\n  good: {{{quick}, held_out: {tmp_path}/few.txt}}\n"
        f"  bad: {{sampling: {{height_: 3}}, held_out: {tmp_path}/few.txt}}\n",
    )
    (tmp_path / "few.txt").write_text("a cat\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("animals", str(tmp_path / "few.txt")))
    assert cli.main(["compare", str(file)]) == 1
    summary = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [(one["name"], one["seeds"], one["failed"]) for one in summary] == [("good", 1, 0), ("bad", 0, 1)]
    assert summary[0]["reward calls"]["mean"] == 4
    assert "height_" in (tmp_path / "out" / "bad-0.log").read_text()
    assert "bad, seed 0: failed, see" in capsys.readouterr().out
    before = (tmp_path / "out" / "good-0" / "metrics.jsonl").stat().st_mtime_ns
    cli.main(["compare", str(file), "runs={good: {" + quick + f", held_out: {tmp_path}/few.txt" + "}}"])
    assert (tmp_path / "out" / "good-0" / "metrics.jsonl").stat().st_mtime_ns == before


POLITE = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(143)))
print("ready", flush=True)
time.sleep(60)
"""


def test_a_comparison_that_is_stopped_lets_its_run_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while it waits: the run gets SIGTERM, not SIGKILL, and is waited for."""
    log = tmp_path / "log"
    waited = compare.subprocess.Popen.wait

    def interrupted(process, timeout=None) -> int:
        monkeypatch.setattr(compare.subprocess.Popen, "wait", waited)
        until = threading.Event()
        while "ready" not in log.read_text():
            until.wait(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare.subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare.execute([sys.executable, "-c", POLITE], log)
    assert log.read_text() == "ready\nsaved\n"
    assert not compare.RUNNING
