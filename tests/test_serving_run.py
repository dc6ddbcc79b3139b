"""A run whose reward server dies: it waits and goes on with an undisturbed run's numbers, or stops and is resumed."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

import tiny
from tiller.cli import main
from tiller.rewards.serving.server import RewardServer, Service
from tiller.rewards.serving.told import told

FATAL = 5  # calls: the preflight's, the first evaluation's, and one epoch's two are answered
REWARD = """
import os
from pathlib import Path
here = Path(__file__).parent

def red(images, prompts, metadata):
    calls = here / "calls"
    calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
    if len(calls.read_text()) == {fatal} and (here / "deadly").exists():
        os._exit(9)  # as a kill would
    return [float(sum(image.tobytes())) for image in images]
"""


def red(images: Any, prompts: Any, metadata: Any) -> list[float]:
    """The same."""
    return [float(sum(image.tobytes())) for image in images]


class Killed(BaseException):
    """Ends the thread of a server, and the connection with it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.tiny_sd().save_pretrained(folder)
    return folder


def recipe(folder: Path, model: Path, output: str, **reward: Any) -> list[str]:
    """The words of a command that trains for two epochs of two batches of two pictures."""
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    settings = {
        "model": {"name": str(model), "lora_rank": 2},
        "prompts": str(folder / "prompts.txt"),
        "reward": {"name": "remote", "concurrency": 1, "retries": 1, **reward},
        "sampling": {"num_inference_steps": 2, "height": 16, "width": 16},
        "train": {"epochs": 2, "samples_per_epoch": 4, "group_size": 2, "batch_size": 2},
        "evaluation": {"samples_per_prompt": 1},
        "run": {"output_dir": str(folder / output), "checkpoint_every": 1, "sample_prompts": 0},
    }
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    return ["train", str(folder / "recipe.yaml")]


def numbers(folder: Path, output: str) -> list[str]:
    return (folder / output / "metrics.jsonl").read_text().splitlines()


def start(reward: Any, port: int = 0, token: str | None = None) -> RewardServer:
    """A server in a thread."""
    made = RewardServer(Service(reward, "red", token=token), port=port)
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    return made


def url(server: RewardServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The numbers of a run whose server is always there."""
    server, folder = start(red), tmp_path_factory.mktemp("undisturbed")
    assert main(recipe(folder, model, "run", url=url(server))) == 0
    server.shutdown()
    assert len(numbers(folder, "run")) == 2
    return numbers(folder, "run")


class Command:
    """`tiller serve`, in a process of its own."""

    def __init__(self, folder: Path, port: int):
        words = [sys.executable, "-m", "tiller", "serve", f"{folder / 'rewards.py'}:red", "--port", str(port)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ})

    def url(self) -> str:
        """Where it is, once it says so."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()[2]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture
def commands() -> Iterator[list[Command]]:
    started: list[Command] = []
    yield started
    for command in started:
        command.close()


def test_a_server_that_dies_and_comes_back_changes_no_number(
    model: Path, undisturbed: list[str], tmp_path: Path, commands: list[Command], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rewards.py").write_text(REWARD.format(fatal=FATAL))
    (tmp_path / "deadly").touch()
    commands.append(Command(tmp_path, 0))
    address = commands[0].url()

    def restart() -> None:
        assert commands[0].process.wait(120) == 9
        (tmp_path / "deadly").unlink()
        commands.append(Command(tmp_path, int(address.rpartition(":")[2])))

    nurse = threading.Thread(target=restart)
    nurse.start()
    assert main(recipe(tmp_path, model, "run", url=address)) == 0
    nurse.join()
    said = capsys.readouterr().out
    assert f"reward server {address} does not answer" in said
    assert "giving up in 10 min" in said
    assert "answers again, after" in said
    assert numbers(tmp_path, "run") == undisturbed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_after_its_budget_the_run_ends_saved_and_the_same_command_goes_on(
    model: Path,
    undisturbed: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def dying(images: Any, prompts: Any, metadata: Any) -> list[float]:
        calls.append(len(images))
        if len(calls) == FATAL:
            server.server_close()
            raise Killed
        return red(images, prompts, metadata)

    secret = "hidden-from-all-files"
    monkeypatch.setenv("RED_TOKEN", secret)
    server = start(dying, token=secret)
    words = recipe(tmp_path, model, "run", url=url(server), budget=1.0, token_env="RED_TOKEN")
    assert main(words) == 2
    server.shutdown()
    said = capsys.readouterr().err
    assert said.startswith(f"error: reward server {url(server)} gave no answer for 1.0 s")
    assert said.count("\n") == 1
    assert len(numbers(tmp_path, "run")) == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["epoch-000001"]

    again = start(red, token=secret)  # elsewhere, and with more time: neither has a part in what is learned
    assert main(recipe(tmp_path, model, "run", url=url(again), budget=60.0, token_env="RED_TOKEN")) == 0
    again.shutdown()
    assert numbers(tmp_path, "run") == undisturbed
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert secret not in said + "".join(capsys.readouterr())


def test_lines_go_to_the_terminal_with_their_brackets(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []
    logger = logging.getLogger("tiller.rewards.serving.persistence")
    with told(heard.append):
        logger.warning("http://[::1]:8700 does not answer")
        logger.info("a detail")
    logger.warning("after")
    assert [Text.from_markup(line).plain for line in heard] == ["http://[::1]:8700 does not answer"]
    assert caplog.messages[-1] == "after"
