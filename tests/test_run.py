"""The run folder: what it writes, what it refuses, what it restores; signals; the last epoch saved."""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiller import config, yaml_text
from tiller.recipe import Recipe
from tiller.run import Interrupted, Interrupts, Run, claim, folder, identity
from tiller.settings import TrainConfig
from tiller.state import TrainState
from tiller.training import Report
from tiller.types import RunError

SETTINGS = TrainConfig(ema_decay=0.5, learning_rate=0.1)
RECIPE = config.to_mapping(Recipe(train=SETTINGS), complete=True)


def changed(**settings: Any) -> dict[str, Any]:
    """The recipe with `section__key=value` exchanged."""
    mapping = json.loads(json.dumps(RECIPE))
    for key, value in settings.items():
        *sections, name = key.split("__")
        inner = mapping
        for section in sections:
            inner = inner[section]
        inner[name] = value
    return mapping


def new_state(epochs: int = 0, layout: torch.memory_format = torch.contiguous_format) -> TrainState:
    """A state of two parameters after some epochs of one made-up update each."""
    random = torch.Generator().manual_seed(0)
    shapes = {"unet.conv": (4, 3, 3, 3), "unet.linear": (5, 2)}
    parameters = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    parameters["unet.conv"] = parameters["unet.conv"].to(memory_format=layout)
    trained = {name: torch.nn.Parameter(value) for name, value in parameters.items()}
    policy: Any = SimpleNamespace(parameters=trained, base=nullcontext)
    state = TrainState(policy, SETTINGS)
    for _ in range(epochs):
        advance(state)
    return state


def advance(state: TrainState) -> None:
    """One epoch: a gradient that depends on the weights, a step, statistics."""
    for number, parameter in enumerate(state.parameters.values()):
        parameter.grad = parameter.detach().sin() + number
    state.step(SETTINGS)
    state.epoch += 1
    state.reward_calls += 8
    state.history.setdefault("a cat", []).append(0.1 * state.epoch)


def report(state: TrainState) -> Report:
    """The report of the state's epoch."""
    return Report(state.epoch, {"reward/mean": state.epoch / 3}, {"time/sample": 0.5}, [], [], [], state)


def equal(one: TrainState, other: TrainState) -> bool:
    """Bit for bit."""
    tensors, others = one.tensors(), other.tensors()
    return (
        one.data() == other.data()
        and tensors.keys() == others.keys()
        and all(torch.equal(value, others[name]) for name, value in tensors.items())
    )


def go(run: Run, state: TrainState, epochs: int, every: int = 1) -> None:
    """Train, log and save."""
    for _ in range(epochs):
        advance(state)
        run.log(report(state))
        if state.epoch % every == 0:
            run.save(state)


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def refusal(path: Path, recipe: Any = RECIPE, **options: Any) -> str:
    """The sentence with which a folder is refused."""
    with pytest.raises(RunError) as caught:
        Run.open(path, recipe, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_run_records_recipe_and_environment_and_holds_no_checkpoint(tmp_path: Path) -> None:
    with Run.open(tmp_path / "deep" / "run", RECIPE) as run:
        assert yaml_text.read(run.folder / "config.yaml") == RECIPE
        environment = json.loads((run.folder / "environment.json").read_text())
        assert environment["threads"] == torch.get_num_threads()
        assert environment["packages"]["torch"] == torch.__version__
        assert run.latest() is None
        assert not run.finished
        assert not run.restore(new_state())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_restored_state_is_the_same_and_goes_on_the_same(tmp_path: Path, layout: torch.memory_format) -> None:
    state, restored = new_state(layout=layout), new_state(layout=layout)
    with Run.open(tmp_path, RECIPE) as run:
        go(run, state, 3)
    with Run.open(tmp_path, RECIPE) as run:
        assert run.restore(restored)
        assert equal(state, restored)
        for name, value in state.tensors().items():
            assert restored.tensors()[name].stride() == value.stride(), name
    advance(state)
    advance(restored)
    assert equal(state, restored)


def test_only_the_last_checkpoints_stay_and_their_names_sort(tmp_path: Path) -> None:
    with Run.open(tmp_path, RECIPE, keep_last=2) as run:
        go(run, new_state(), 4)
        assert [path.name for path in run.checkpoints()] == ["epoch-000003", "epoch-000004"]
        assert run.latest() == tmp_path / "checkpoints" / "epoch-000004"
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["epoch-000003", "epoch-000004"]


def test_a_checkpoint_is_plain_safetensors_and_json(tmp_path: Path) -> None:
    with Run.open(tmp_path, RECIPE) as run:
        state = new_state()
        go(run, state, 1)
        latest = run.latest()
        assert latest is not None
    assert sorted(path.name for path in latest.iterdir()) == ["manifest.json", "state.json", "state.safetensors"]
    assert torch.equal(load_file(latest / "state.safetensors")["ema.unet.linear"], state.tensors()["ema.unet.linear"])
    assert json.loads((latest / "state.json").read_text())["history"] == {"a cat": [0.1]}


def test_metrics_behind_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    with Run.open(tmp_path, RECIPE) as run:
        run.record(0, {"evaluation/mean": 1.0})
        go(run, new_state(), 5, every=3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 6, "torn')
    with Run.open(tmp_path, RECIPE) as run:
        run.restore(new_state())
    assert [line["epoch"] for line in metrics(tmp_path)] == [0, 1, 2, 3]
    assert len((tmp_path / "timings.jsonl").read_text().splitlines()) == 3


def test_without_a_checkpoint_a_run_begins_again(tmp_path: Path) -> None:
    with Run.open(tmp_path, RECIPE) as run:
        go(run, new_state(), 2, every=10)
    with Run.open(tmp_path, RECIPE) as run:
        assert not run.restore(new_state())
    assert metrics(tmp_path) == []


def test_a_line_of_metrics_is_strict_json_without_a_time(tmp_path: Path) -> None:
    with Run.open(tmp_path, RECIPE) as run:
        run.log(report(new_state(2)), {"optim/grad_norm": float("inf"), "reward/std": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"epoch": 2, "reward/mean": 0.6666666666666666, "optim/grad_norm": null, "reward/std": null}\n'
    )


def test_what_was_logged_can_be_saved_although_training_went_on(tmp_path: Path) -> None:
    state = new_state(2)
    with Run.open(tmp_path, RECIPE) as run:
        run.log(report(state))
        advance(state)
        run.save_last()
        restored = new_state()
        run.restore(restored)
    assert equal(restored, new_state(2))


def test_an_error_saves_the_last_epoch(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Run.open(tmp_path, RECIPE) as run:  # noqa: PT012
        go(run, new_state(), 3, every=10)
        raise ZeroDivisionError
    assert [path.name for path in Run.open(tmp_path, RECIPE).checkpoints()] == ["epoch-000003"]


def test_a_large_state_is_not_copied_every_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "LARGEST_KEPT", 10)
    with Run.open(tmp_path, RECIPE) as run:
        run.log(report(new_state(2)))
        run.save_last()
        assert run.latest() is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train__seed": 3}, "train.seed is 0 there and 3 here"),
        ({"reward": "jpeg_incompressibility"}, "reward is jpeg_compressibility there and jpeg_incompressibility here"),
        ({"prompts": "counts"}, "prompts is animals there and counts here"),
        ({"model__revision": "abc"}, "model.revision is None there and abc here"),
        ({"algorithm__clip_range": 0.5}, "algorithm.clip_range is"),
        ({"sampling": {"guidance_scale": 3}}, "sampling.guidance_scale is None there and 3 here"),
    ],
)
def test_another_recipe_is_refused_by_the_setting_that_differs(tmp_path: Path, change: Any, words: str) -> None:
    with Run.open(tmp_path, RECIPE) as run:
        go(run, new_state(), 1)
    before = (tmp_path / "config.yaml").read_bytes()
    assert words in (text := refusal(tmp_path, changed(**change)))
    assert "run.output_dir" in text
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_settings_without_a_part_in_the_result_may_change(tmp_path: Path) -> None:
    with Run.open(tmp_path, RECIPE) as run:
        go(run, new_state(), 1)
    recipe = changed(run__keep_last=5, evaluation__every=2, held_out="counts", train__epochs=40)
    with Run.open(tmp_path, recipe) as run:
        assert run.restore(new_state())
    assert yaml_text.read(tmp_path / "config.yaml") == recipe


def test_a_run_that_never_began_may_have_another_recipe(tmp_path: Path) -> None:
    """Also where a reward hung in preflight, and trackers had begun."""
    Run.open(tmp_path, RECIPE).close()
    (tmp_path / "stacks.txt").write_text("Thread 0x1")
    (tmp_path / "tensorboard").mkdir()
    Run.open(tmp_path, changed(train__seed=3)).close()
    assert yaml_text.read(tmp_path / "config.yaml")["train"]["seed"] == 3
    assert not (tmp_path / "stacks.txt").exists()


def test_a_finished_run_says_so_and_can_be_taken_further(tmp_path: Path) -> None:
    with Run.open(tmp_path, RECIPE) as run:
        go(run, new_state(), 2)
        run.finish()
        assert run.finished
    for resume in (False, True):
        assert "finished (20 epochs); raise train.epochs" in refusal(tmp_path, resume=resume)
    with Run.open(tmp_path, changed(train__epochs=21)) as run:
        assert not run.finished
        assert run.restore(new_state())


def test_resuming_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "holds no checkpoint to resume from" in refusal(tmp_path / "new", resume=True)
    with Run.open(tmp_path / "old", RECIPE) as run:
        go(run, new_state(), 1, every=2)
    assert "holds no checkpoint to resume from" in refusal(tmp_path / "old", resume=True)


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    assert "holds thesis.tex but no run" in refusal(tmp_path / "other")
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == [".lock", "thesis.tex"]


def test_a_folder_that_cannot_be_made_is_refused_with_the_space_there_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = refusal(tmp_path / "file" / "run")
    assert "cannot write" in text
    assert "GB free there" in text


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    first = Run.open(tmp_path, RECIPE)
    assert "in use by another process" in refusal(tmp_path)
    first.close()
    Run.open(tmp_path, RECIPE).close()


def test_a_refused_folder_is_let_go(tmp_path: Path) -> None:
    with Run.open(tmp_path, RECIPE) as run:
        go(run, new_state(), 1)
    refusal(tmp_path, changed(train__seed=3))
    Run.open(tmp_path, RECIPE).close()


def test_changed_prompts_and_rewards_are_refused(tmp_path: Path) -> None:
    prompts, reward = tmp_path / "prompts.txt", tmp_path / "mine.py"
    prompts.write_text("a cat\n")
    reward.write_text("def bright(images, prompts, metadata): ...\n")
    recipe = changed(prompts=str(prompts), reward=f"{reward}:bright")
    with Run.open(tmp_path / "run", recipe) as run:
        go(run, new_state(), 1)
    prompts.write_text("a dog\n")
    assert f"another prompts: {prompts} has changed" in refusal(tmp_path / "run", recipe)
    prompts.write_text("a cat\n")
    reward.write_text("def bright(images, prompts, metadata): return 1\n")
    assert f"another reward: {reward}:bright has changed" in refusal(tmp_path / "run", recipe)


def a_policy(weight: float = 0.5) -> Any:
    """As much of a policy as a fingerprint looks at."""
    layer = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(layer.weight, weight)
    torch.nn.init.constant_(layer.bias, 0)
    layer.register_parameter("lora_A", torch.nn.Parameter(torch.rand(2)))
    return SimpleNamespace(pipe=SimpleNamespace(unet=layer))


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    with Run.open(tmp_path, RECIPE) as run:
        run.check_model(a_policy())
        go(run, new_state(), 1)
    with Run.open(tmp_path, RECIPE) as run:
        run.check_model(a_policy())
        with pytest.raises(RunError, match=r"another model.name: emoji has changed"):
            run.check_model(a_policy(0.5001))


def test_a_fingerprint_sees_values_and_shapes_in_any_layout() -> None:
    def of(tensor: torch.Tensor) -> str:
        return identity.fingerprint(
            SimpleNamespace(pipe=SimpleNamespace(unet=torch.nn.ParameterList([tensor])))  # type: ignore[arg-type]
        )

    value = torch.arange(48.0).view(2, 4, 3, 2)
    assert of(value) == of(value.to(memory_format=torch.channels_last))
    assert of(value) != of(value + 1e-5)
    assert of(value) != of(value.view(4, 2, 3, 2))
    assert of(torch.zeros(())) != of(torch.ones(()))


def test_another_number_of_threads_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with Run.open(tmp_path, RECIPE) as run:
        go(run, new_state(), 1)
    Run.open(tmp_path, RECIPE, tell=told.append).close()
    assert told == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    Run.open(tmp_path, RECIPE, tell=told.append).close()
    assert "and is 77: the run goes on, but not bit for bit" in told[0]


def test_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run.open(tmp_path, RECIPE) as run:
        run.check_model(a_policy())
        go(run, new_state(), 1)
    monkeypatch.setattr(claim, "FORMAT", 0)
    assert "update tiller" in refusal(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    with Run.open(tmp_path, RECIPE) as run:
        go(run, new_state(), 1)
        other = new_state()
        del other.parameters["unet.linear"]
        with pytest.raises(RunError, match="does not fit this model"):
            run.restore(other)


def stop(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_an_epoch_saves_the_last_one(tmp_path: Path, number: int, code: int) -> None:
    def epochs(state: TrainState) -> Any:
        for _ in range(2):
            advance(state)
            yield report(state)
        advance(state)
        stop(number)
        raise AssertionError("the epoch went on")

    before = signal.getsignal(number)
    with (  # noqa: PT012
        pytest.raises(Interrupted) as caught,
        Run.open(tmp_path, RECIPE) as run,
        Interrupts(run.save_last) as interrupts,
    ):
        for item in interrupts.over(epochs(new_state())):
            run.log(item)
    assert caught.value.code == code
    assert signal.getsignal(number) is before
    restored = new_state()
    Run.open(tmp_path, RECIPE).restore(restored)
    assert equal(restored, new_state(2))


def test_a_signal_in_the_body_waits_for_its_end() -> None:
    done = []
    with pytest.raises(Interrupted), Interrupts() as interrupts:  # noqa: PT012
        for item in interrupts.over([1, 2, 3]):
            stop(signal.SIGTERM)
            done.append(item)
    assert done == [1]


def test_a_signal_outside_the_loop_is_taken_at_once() -> None:
    saved: list[int] = []
    with pytest.raises(Interrupted), Interrupts(lambda: saved.append(1)) as interrupts:  # noqa: PT012
        assert list(interrupts.over([1, 2])) == [1, 2]
        stop(signal.SIGINT)
        saved.append(0)
    assert saved == [1]


def test_a_signal_in_a_body_that_breaks_off_is_not_lost() -> None:
    with pytest.raises(Interrupted), Interrupts() as interrupts:  # noqa: PT012
        for _ in interrupts.over([1, 2, 3]):
            stop(signal.SIGTERM)
            break


def test_the_echo_of_a_launcher_is_no_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(Interrupted), Interrupts() as interrupts:  # noqa: PT012
        for _ in interrupts.over([1]):
            stop(signal.SIGINT)
            stop(signal.SIGTERM)
