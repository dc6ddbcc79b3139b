"""The diagnosis: recorded runs that were sick on purpose, healthy ones, and every threshold from both sides."""

import re
from pathlib import Path

import numpy as np
import pytest

from tiller.cli import main
from tiller.report import diagnosis, rules
from tiller.report.diagnosis import Limits, diagnose, trend
from tiller.report.record import Gain, Record, read

RUNS = Path(__file__).parent / "data" / "runs"
DOCS = Path(__file__).parent.parent / "docs" / "diagnosis.md"
BEYOND = {
    "adjoint_dropped": {"gradient_zero"},
    "missing_scores": {"reward_flat"},
}  # what else is wrong with a recorded run
HEALTHY = ("healthy", "emoji_ddpo")
NAMES = sorted(set(re.findall(r'Finding\(\s+"(\w+)"', Path(rules.__file__).read_text())))


@pytest.mark.parametrize(
    "name", [path.name for path in sorted(RUNS.iterdir()) if path.name not in (*HEALTHY, "emoji_awm")]
)
def test_a_sick_run_is_told_what_it_has_and_nothing_else(name: str) -> None:
    """The names in the folder are of the runs in sick_runs.py, which makes them."""
    assert {finding.name for finding in diagnose(read(RUNS / name))} == {name} | BEYOND.get(name, set())


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_left_in_peace(name: str) -> None:
    assert diagnose(read(RUNS / name)) == []


def test_a_run_that_lost_what_it_was_not_trained_on_says_so_with_its_number() -> None:
    (finding,) = diagnose(read(RUNS / "emoji_awm"))
    assert finding.name == "held_out_falls"
    assert "emoji_gold fell by 0.188 on unseen objects (95 % 0.0938 to 0.281)" in finding.sentence


def epochs(**columns: object) -> Record:
    """A record with these metrics; a bare number stands for 30 epochs of it."""
    found = {name.replace("__", "/"): value for name, value in columns.items()}
    length = max((len(value) for value in found.values() if isinstance(value, list | np.ndarray)), default=30)
    rows = []
    for epoch in range(length):
        row = {
            name: float(value[epoch] if isinstance(value, list | np.ndarray) else value)
            for name, value in found.items()
        }
        rows.append({"epoch": epoch + 1, **row})
    return Record(metrics=rows, timings=rows, config={"train": {"samples_per_epoch": 100, "group_size": 10}})


def gain(split: str, reward: str, difference: float, half: float, base: float = 1.0) -> Gain:
    return Gain(split, reward, base, base + difference, difference, difference - half, difference + half, 0.5, 40)


def gains(*found: Gain) -> Record:
    return Record(config={"reward": "r"}, gains=found)


LINE = np.arange(30.0)
CASES = {
    "no_spread": (epochs(reward__zero_spread_groups=5), epochs(reward__zero_spread_groups=6)),
    "missing_scores": (epochs(reward__missing=2), epochs(reward__missing=3)),
    "skipped_updates": (
        epochs(optim__skipped=1, optim__updates=99),
        epochs(optim__skipped=1, optim__updates=90),
    ),
    "gradient_zero": (epochs(optim__grad_norm=1e-9), epochs(optim__grad_norm=0)),
    "gradient_explodes": (
        epochs(optim__grad_norm=np.where(LINE < 10, 0.1, 1.9)),
        epochs(optim__grad_norm=np.where(LINE < 10, 0.1, 2.1)),
    ),
    "clipped": (epochs(policy__clip_fraction=0.79), epochs(policy__clip_fraction=0.81)),
    "reward_flat": (
        epochs(reward__mean=LINE / 10 + LINE % 2),  # t = 9.2
        epochs(reward__mean=LINE / 1000 + LINE % 2),
    ),
    "reward_falls": (
        epochs(reward__mean=-LINE / 32 + LINE % 2),  # t = -2.6
        epochs(reward__mean=-LINE / 26 + LINE % 2),  # t = -3.2
    ),
    "saturated": (
        epochs(reward__std=np.where(LINE < 10, 1, 0.06)),
        epochs(reward__std=np.where(LINE < 10, 1, 0.04)),
    ),
    "value_network": (epochs(value__explained=-0.2), epochs(value__explained=-0.3)),
    "adjoint_dropped": (epochs(policy__dropped=0.4), epochs(policy__dropped=0.6)),
    "above_target": (epochs(policy__below_target=0.06), epochs(policy__below_target=0.04)),
    "reward_waits": (
        epochs(time__sample=2, time__reward=0.9, time__update=1),
        epochs(time__sample=2, time__reward=1.1, time__update=1),
    ),
    "memory_creeps": (epochs(memory__gb=10 + LINE / 16), epochs(memory__gb=10 + LINE / 8)),
    "held_out_falls": (
        gains(gain("trained", "r", 1, 0.1), gain("trained", "gold", -0.3, 0.31)),
        gains(gain("trained", "r", 1, 0.1), gain("trained", "gold", -0.3, 0.29)),
    ),
    "not_general": (
        gains(gain("trained", "r", 1, 0.1), gain("unseen_objects", "r", 0.5, 0.6)),  # it may have gained as much
        gains(gain("trained", "r", 1, 0.1), gain("unseen_objects", "r", 0.1, 0.2)),
    ),
    "diversity_lost": (
        Record(drift={"diversity_base": 0.2, "diversity_tuned": 0.11}),
        Record(drift={"diversity_base": 0.2, "diversity_tuned": 0.09}),
    ),
    "broken_off": (Record(broken_off="x", finished=True), Record(broken_off="a reward did not answer")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_speaks_beyond_its_threshold_and_not_before(name: str) -> None:
    below, beyond = CASES[name]
    assert diagnose(below) == []
    assert [finding.name for finding in diagnose(beyond)] == [name]


@pytest.mark.parametrize(("slope", "speaks"), [(0.001, False), (-0.01, True)])
def test_a_run_under_way_is_told_that_a_held_out_reward_falls(slope: float, speaks: bool) -> None:
    seen = np.where(LINE % 4 == 0, 0.9 + slope * LINE + 0.01 * (LINE % 8 == 0), np.nan)
    rising = epochs(reward__mean=LINE + LINE % 2, reward__std=1, eval__unseen_objects__gold=seen)
    found = diagnose(Record(config={"reward": "r"}, metrics=rising.metrics))
    assert [finding.name for finding in found] == ["held_out_falls"] * speaks
    if speaks:
        assert "gold falls on unseen objects, from 0.91 to 0.62" in found[0].sentence


def test_a_run_that_evaluation_says_rose_is_not_called_flat() -> None:
    flat = epochs(reward__mean=LINE % 2)
    assert [finding.name for finding in diagnose(flat)] == ["reward_flat"]
    assert diagnose(Record(metrics=flat.metrics, config={"reward": "r"}, gains=[gain("trained", "r", 1, 0.5)])) == []


def test_with_two_updates_per_epoch_half_of_the_samples_is_all_that_can_be_clipped() -> None:
    half = epochs(policy__clip_fraction=0.45)
    assert diagnose(half) == []
    twice = {**half.config, "train": {"updates_per_epoch": 2}}
    assert "0.45, where 0.50 is the most" in diagnose(Record(config=twice, metrics=half.metrics))[0].sentence


def test_the_kl_term_is_weighed_against_what_the_ratios_move() -> None:
    """β·KL = 0.5·1 and √(2·approx_kl) = 0.02: 25 times; judged by the loss's own value where that is larger."""
    columns = {"policy__kl_gaussian": 1.0, "policy__approx_kl": 0.0002}
    config = {"algorithm": {"kl_coefficient": 0.5}}
    small, large = (Record(config=config, metrics=epochs(**columns, policy__loss=loss).metrics) for loss in (0.5, 0.56))
    (finding,) = diagnose(small)
    assert "The KL term is 25 times the policy term (0.5 to 0.02)" in finding.sentence
    assert diagnose(large) == []
    alone = epochs(policy__kl_gaussian=1.0, policy__approx_kl=0.0, policy__loss=0.5)
    assert diagnose(Record(config=config, metrics=alone.metrics)) == []


def test_the_trend_is_the_t_of_least_squares() -> None:
    """y = 1, 3, 2, 4 over 0..3: slope 0.8, residual variance 0.9, so t = 0.8/√(0.9/5) by hand."""
    assert trend(np.array([1.0, 3, 2, 4])) == pytest.approx(0.8 / np.sqrt(0.9 / 5))
    assert np.isnan(trend(np.array([1.0, np.nan, 2])))
    gappy = np.array([1.0, np.nan, 2, 5, np.nan, 4])
    x, y = np.array([0.0, 2, 3, 5]), np.array([1.0, 2, 5, 4])
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    assert trend(gappy) == pytest.approx(slope / np.sqrt(covariance[0, 0]))


def test_records_with_nothing_or_nonsense_in_them_are_no_reason_to_fall_over() -> None:
    assert diagnose(Record()) == []
    words = Record(metrics=[{"epoch": epoch, "reward/mean": "high", "optim/grad_norm": None} for epoch in range(30)])
    assert diagnose(words) == []
    assert diagnose(Record(metrics=words.metrics, config={"train": 3, "algorithm": "ddpo", "reward": {"a": 1}})) == []


def test_findings_come_gravest_first_and_three_lines_are_the_most() -> None:
    found = diagnose(epochs(optim__grad_norm=0, policy__clip_fraction=1, policy__dropped=1, time__reward=9))
    assert [finding.level for finding in found] == ["problem", "warning", "warning", "note"]
    lines = diagnosis.lines(found)
    assert len(lines) == 3
    assert lines[0].startswith("problem: The gradient is zero in all of the last 10 epochs")
    assert "and 2 findings more" in lines[2]
    assert len(diagnosis.lines(found[:3])) == 3


def test_limits_are_settings() -> None:
    record = epochs(policy__clip_fraction=0.85)
    assert diagnose(record, Limits(clip_fraction=0.9)) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_finding_has_its_place_in_the_documentation(name: str) -> None:
    assert f'<a id="{name.replace("_", "-")}"></a>' in DOCS.read_text()


def test_every_rule_is_tested_here() -> None:
    recorded = {path.name for path in RUNS.iterdir()}
    assert len(NAMES) >= 19  # they are read from the source
    assert set(NAMES) <= set(CASES) | recorded


def test_the_command_says_what_it_found_and_what_is_not_there(tmp_path: Path, capsys) -> None:
    assert main(["diagnose", str(RUNS / "clipped")]) == 0
    said = capsys.readouterr().out
    assert "warning: The clip fraction is 0." in said
    assert "docs/diagnosis.md#clipped" in said
    assert "not there: evaluation/comparison.json" in said
    assert main(["diagnose", str(RUNS / "emoji_ddpo")]) == 0
    assert "none of the rules found anything wrong in 10 epochs" in capsys.readouterr().out
    assert main(["diagnose", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
