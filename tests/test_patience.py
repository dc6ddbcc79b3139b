"""A reward that hangs ends the run within its time, by name, with the stacks of all threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tiny
from tiller.recipe import RunSettings
from tiller.rewards import Background, score, within
from tiller.rewards.contract import reward_name
from tiller.types import ConfigError, RewardError, RewardTimeout

PICTURES = [Image.new("RGB", (2, 2)) for _ in range(4)]
never = threading.Event()


def sleepy(images: Sequence[Any], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
    never.wait()  # the line that the error names
    return []


LINE = sleepy.__code__.co_firstlineno + 1


def judge(reward: Any, count: int = 4) -> list[float]:
    return score(reward, PICTURES[:1] * count, ["a cat"] * count, [{}] * count).values.tolist()


def test_an_answer_in_time_is_the_rewards_own() -> None:
    async def later(images: Any, prompts: Any, metadata: Any) -> list[float]:
        return [float(len(prompt)) for prompt in prompts]

    assert judge(within(lambda images, prompts, metadata: [2.5] * len(images), 10)) == [2.5] * 4
    assert judge(within(later, 10)) == [5.0] * 4
    assert reward_name(within(later, 10)) == "later"


def test_an_error_of_the_reward_names_its_line_as_before() -> None:
    def broken(images: Any, prompts: Any, metadata: Any) -> list[float]:
        raise ZeroDivisionError("no pixels")

    line = broken.__code__.co_firstlineno + 1
    with pytest.raises(RewardError, match=rf"reward broken failed.*no pixels \(test_patience.py:{line}\)"):
        judge(within(broken, 10))


def judge_in_background(reward: Any) -> None:
    with Background(reward) as scorer:
        scorer.submit(PICTURES, ["a cat"] * 4, [{}] * 4).result()


@pytest.mark.parametrize("where", ["here", "background"])
def test_no_answer_is_an_error_with_name_line_and_stacks(tmp_path: Path, where: str) -> None:
    limited, began = within(sleepy, 0.2, tmp_path / "stacks.txt"), time.monotonic()
    with pytest.raises(RewardTimeout) as caught:
        {"here": judge, "background": judge_in_background}[where](limited)
    assert 0.2 <= time.monotonic() - began < 5
    said = str(caught.value)
    assert said.startswith("reward sleepy did not answer within 0.2 s for 4 image(s)")
    assert f"stands at test_patience.py:{LINE}" in said
    assert said.endswith("mend it, or give it more time (run.reward_timeout).")
    stacks = (tmp_path / "stacks.txt").read_text()
    assert f'test_patience.py", line {LINE} in sleepy' in stacks
    assert "in test_no_answer_is_an_error" in stacks  # the main thread's too


def test_more_pictures_get_more_time() -> None:
    """0.1 s for 32 pictures are 0.4 s for 128, and no less than 0.1 s for one."""

    def slow(images: Any, prompts: Any, metadata: Any) -> list[float]:
        time.sleep(0.2)
        return [1.0] * len(images)

    assert judge(within(slow, 0.1), 128) == [1.0] * 128
    with pytest.raises(RewardTimeout, match=r"within 0\.1 s for 1 image"):
        judge(within(slow, 0.1), 1)


def test_a_reward_with_a_gradient_or_without_a_limit_is_called_as_it_is() -> None:
    def graph(images: Any, prompts: Any, metadata: Any) -> Any: ...

    assert within(sleepy, None) is sleepy
    graph.differentiable = True  # type: ignore[attr-defined]
    assert within(graph, 1) is graph


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="reward_timeout is 0"):
        RunSettings(reward_timeout=0)


HANGING = """
from concurrent.futures import ThreadPoolExecutor
import threading
calls, pool = [], ThreadPoolExecutor(1)

def mine(images, prompts, metadata):
    calls.append(1)
    if len(calls) > {sound}:
        pool.submit(threading.Event().wait).result()  # a thread that Python waits for when it ends
    return [float(sum(image.tobytes())) for image in images]
"""


def test_a_command_whose_reward_hangs_ends_with_the_last_epoch_saved(tmp_path: Path) -> None:
    """Preflight, the base model's evaluation and an epoch of two batches are judged: the fifth call is epoch 2's."""
    tiny.tiny_sd().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "rewards.py").write_text(HANGING.format(sound=4))
    recipe = {
        "model": {"name": "model", "lora_rank": 2},
        "prompts": "prompts.txt",
        "reward": "rewards.py:mine",
        "sampling": {"num_inference_steps": 2, "height": 16, "width": 16},
        "train": {"epochs": 3, "samples_per_epoch": 4, "group_size": 2, "batch_size": 2},
        "run": {"output_dir": "run", "reward_timeout": 3, "sample_prompts": 0},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "tiller", "train", "recipe.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240, env=dict(os.environ))
    assert done.returncode == 2
    said = "error: reward mine did not answer within 3 s for 2 image(s) and stands at rewards.py:9"
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
    assert "rewards.py" in (tmp_path / "run" / "stacks.txt").read_text()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["epoch-000001"]
