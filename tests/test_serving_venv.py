"""A reward in an environment of its own: another version of a module there, and a child that dies, hangs or fails."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import PIL
import pytest
from PIL import Image

from tiller.rewards import resolve, score, within
from tiller.rewards.serving import child
from tiller.rewards.serving.venv import InVenv
from tiller.types import ConfigError, ServiceError

PICTURES = [Image.new("RGB", (4, 4), (index, 0, 0)) for index in range(3)]
REWARD = """
import os, sys, threading, time
import fickle

def version(images, prompts, metadata):
    print("a line on stdout")
    return [fickle.VERSION + image.getpixel((0, 0))[0] for image in images]

def process(images, prompts, metadata):
    return [os.getpid()] * len(images)

def isolated(images, prompts, metadata):
    return [float("tiller" in sys.modules or os.getcwd() in sys.path), float(os.environ["EXTRA"]), 0.0]

def dies_on_3(images, prompts, metadata):
    if "3" in prompts:
        print("out of memory, says the reward", file=sys.stderr)
        os._exit(9)
    return [1.0] * len(images)

class Scaled:
    def __init__(self, by):
        self.by = by
    def __call__(self, images, prompts, metadata):
        return [self.by] * len(images)

def broken(images, prompts, metadata):
    raise ValueError("no idea")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment made by `python -m venv`, with version 2 of a module that is version 1 here."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "other")], check=True)
    (packages,) = (folder / "other" / "lib").glob("python*/site-packages")
    (packages / "fickle.py").write_text("VERSION = 2\n")
    pillow = Path(PIL.__file__).parents[1]
    (packages / "PIL").symlink_to(pillow / "PIL")
    for libraries in pillow.glob("pillow.libs"):
        (packages / "pillow.libs").symlink_to(libraries)
    (folder / "rewards.py").write_text(REWARD)
    (folder / "here").mkdir()
    (folder / "here" / "fickle.py").write_text("VERSION = 1\n")
    return folder


def reward(place: Path, name: str, **settings: Any) -> Any:
    settings = {"python": str(place / "other" / "bin" / "python"), "timeout": 5.0, "start_timeout": 20.0, **settings}
    return resolve(f"{place / 'rewards.py'}:{name}", settings)


def judge(function: Any, prompts: tuple[str, ...] = ("a", "b", "c")) -> list[float]:
    return score(function, PICTURES[: len(prompts)], list(prompts), [{}] * len(prompts)).values.tolist()


def test_it_sees_its_own_version_of_a_module(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(place / "here")
    assert judge(resolve(f"{place / 'rewards.py'}:version")) == [1, 2, 3]
    assert judge(reward(place, "version", batch_size=2)) == [2, 3, 4]


def test_it_has_neither_tiller_nor_our_folder_but_what_it_is_given(place: Path) -> None:
    assert judge(reward(place, "isolated", env={"EXTRA": "7"})) == [0, 7, 0]


def test_a_class_gets_its_settings(place: Path) -> None:
    assert judge(reward(place, "Scaled", settings={"by": 2.5})) == [2.5] * 3


def test_one_child_serves_all_calls(place: Path) -> None:
    function = reward(place, "process", batch_size=1)
    first, second = judge(function), judge(function)
    assert first == second
    assert len(set(first)) == 1


PARENT = """
import json, os, subprocess, sys
child = subprocess.Popen([sys.argv[1], "-I", sys.argv[2]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
order = {"reward": sys.argv[3], "settings": {}, "token": "t", "timeout": 5, "limits": {}}
child.stdin.write(json.dumps(order).encode() + b"\\n")
child.stdin.flush()
assert json.loads(child.stdout.readline())["port"] > 0
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_child_ends_when_its_parent_is_killed(place: Path) -> None:
    python = place / "other" / "bin" / "python"
    words = [sys.executable, "-c", PARENT, str(python), child.__file__, f"{place / 'rewards.py'}:process"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert gone(int(done.stdout))


def gone(process: int) -> bool:
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True  # nobody has asked for its exit code yet
        time.sleep(0.05)
    return False


def test_a_child_that_is_killed_is_started_again(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    function = reward(place, "process")
    before = judge(function)[0]
    os.kill(int(before), signal.SIGKILL)
    assert gone(int(before))
    after = judge(function)[0]
    assert after != before
    assert gone(int(before))


def test_one_that_dies_in_a_call_is_started_once_and_its_last_words_are_shown(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    function = reward(place, "dies_on_3")
    assert judge(function) == [1, 1, 1]
    began = time.monotonic()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ServiceError, match=r"died twice; its last lines were: out of"),
    ):
        judge(function, ("1", "2", "3"))
    assert time.monotonic() - began < 10
    assert caplog.text.count("died and is started again; its last lines were: out of memory, says the reward") == 1
    assert judge(function) == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "why"),
    [("absent", "AttributeError"), ("Scaled", r"TypeError.*missing 1 required positional argument: 'by'")],
)
def test_one_that_cannot_be_loaded_says_why(place: Path, name: str, why: str) -> None:
    with pytest.raises(ServiceError, match=rf"rewards.py:{name} in .* does not start: {why}.*its last lines were"):
        judge(reward(place, name))


def test_an_error_in_the_reward_is_a_missing_score_with_its_words(place: Path) -> None:
    found = score(reward(place, "broken"), PICTURES[:1], ["a"], [{}])
    assert found.reasons == {0: "ValueError: no idea"}


def test_a_python_that_is_none_and_one_that_says_nothing(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which is no program"):
        reward(place, "version", python=str(tmp_path / "nowhere"))
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nsleep 30\n")
    silent.chmod(0o755)
    began = time.monotonic()
    with pytest.raises(ServiceError, match=r"was not ready after 0.3 s"):
        judge(reward(place, "version", python=str(silent), start_timeout=0.3))
    assert time.monotonic() - began < 5
    with pytest.raises(ConfigError, match="cannot run in another environment"):
        resolve("jpeg_compressibility", {"python": sys.executable})


def test_its_own_time_counts_and_the_token_is_in_no_argument(place: Path) -> None:
    function = reward(place, "process")
    assert within(function, 1e-9) is function
    process = int(judge(function)[0])
    words = Path(f"/proc/{process}/cmdline").read_bytes() + Path(f"/proc/{process}/environ").read_bytes()
    token = function._child.server().headers["Authorization"].removeprefix("Bearer ")
    assert len(token) > 40
    assert token.encode() not in words
    assert isinstance(function, InVenv)
    assert token not in repr(function._child.server())
