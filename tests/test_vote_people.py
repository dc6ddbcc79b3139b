"""People as the reward of a run: who is compared with whom, what votes come to, and that a kill loses none."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny
from tiller.cli import main
from tiller.rewards import resolve, score
from tiller.types import ConfigError, RewardError
from tiller.vote.ledger import read
from tiller.vote.people import People
from votes import Elsewhere

Chooser = Callable[[Image.Image, Image.Image], str]


def shades(*values: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (value, value, value)) for value in values]


def brighter(left: Image.Image, right: Image.Image) -> str:
    return "left" if np.asarray(left).mean() > np.asarray(right).mean() else "right"


class Voter(threading.Thread):
    """Somebody at the page who votes on all that comes, by looking at the pictures."""

    def __init__(self, url: str, choose: Chooser = brighter, name: str = "ann", most: int = 10**6):
        super().__init__(daemon=True)
        self.client, self.choose, self.rater, self.most = Elsewhere(url), choose, name, most
        self.votes, self.over = 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.is_set() and self.votes < self.most:
            try:
                asked = self.client.ballot(self.rater)
                if "ballot" not in asked:
                    time.sleep(0.02)
                    continue
                left, right = (self._picture(asked[side]) for side in ("left", "right"))
                sent = {key: asked[key] for key in ("contest", "ballot")}
                self.client.post("/vote", sent | {"rater": self.rater, "choice": self.choose(left, right)})
                self.votes += 1
            except OSError:
                return

    def _picture(self, name: str) -> Image.Image:
        import io

        return Image.open(io.BytesIO(self.client.get(f"/picture/{name}")[2]))


def asked(people: People, *batches: tuple[list[Image.Image], list[str]], **voter: Any) -> list[np.ndarray]:
    """The scores of batches that somebody votes on."""
    with people._lock:
        _, url = people._page
    somebody = Voter(url, **voter)
    try:
        return [score(people, images, prompts, [{}] * len(images)).values for images, prompts in batches]
    finally:
        somebody.over.set()
        somebody.join(5)


def test_a_score_is_the_share_of_wins_and_what_nobody_sees_has_none(tmp_path: Path) -> None:
    people = People(folder=str(tmp_path), pause=0.0)
    found, alone = asked(
        people,
        (shades(10, 200, 90, 150, 40, 240), ["a"] * 4 + ["b"] * 2),
        (shades(5, 5), ["c", "d"]),  # nothing of the same prompt to compare them with
    )
    # in the ring 10 - 200 - 90 - 150 - 10
    assert found.tolist() == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    assert np.isnan(alone).all()
    assert people.groupwise  # so that no batch splits a group


def test_more_rivals_make_a_finer_order_and_ties_are_half(tmp_path: Path) -> None:
    def choose(left: Image.Image, right: Image.Image) -> str:
        values = [np.asarray(one).mean() for one in (left, right)]
        return "tie" if abs(values[0] - values[1]) < 20 else brighter(left, right)

    people = People(folder=str(tmp_path), pause=0.0, rivals=3)
    (found,) = asked(people, (shades(10, 200, 90, 210), ["a"] * 4), choose=choose)
    assert found == pytest.approx([0, 2.5 / 3, 1 / 3, 2.5 / 3])


def test_two_votes_each_are_of_two_people(tmp_path: Path) -> None:
    people = People(folder=str(tmp_path), pause=0.0, min_votes=2)
    url = people._page[1]
    contrary = Voter(url, lambda left, right: brighter(right, left), "bob")
    (found,) = asked(people, (shades(10, 200, 90), ["a"] * 3))
    contrary.over.set()
    assert found == pytest.approx([0.5, 0.5, 0.5])
    assert len(read(tmp_path / "votes.jsonl")[0]) == 6


def test_time_runs_out_on_what_nobody_voted_on(tmp_path: Path) -> None:
    people = People(folder=str(tmp_path), pause=0.0, timeout=0.5)
    (found,) = asked(people, (shades(10, 200, 90, 150), ["a", "a", "b", "b"]), most=1)
    assert found[:2].tolist() == [0, 1]
    assert np.isnan(found[2:]).all()
    scores = score(people, shades(1, 2), ["c", "c"], [{}] * 2)
    assert set(scores.reasons.values()) == {"nobody voted on it"}


def test_the_last_vote_can_be_undone_for_a_while(tmp_path: Path) -> None:
    people = People(folder=str(tmp_path), pause=1.0)
    _, url = people._page
    found: list[Any] = []
    call = threading.Thread(target=lambda: found.append(people(shades(10, 200), ["a", "a"], [{}] * 2)))
    call.start()
    client = Elsewhere(url)
    while "ballot" not in client.ballot():
        time.sleep(0.01)
    client.vote("tie")
    assert client.post("/undo", {"rater": "ann", "ballot": client.ballot()["last"]})[0] == 200
    client.vote("skip")
    call.join(10)
    assert [one.value for one in found[0]] == [None, None]  # the skip, and not the tie
    assert client.ballot()["last"] is None


def test_no_vote_is_asked_for_twice(tmp_path: Path) -> None:
    images, prompts = shades(10, 200, 90, 150), ["a"] * 4
    first = People(folder=str(tmp_path), pause=0.0)
    (before,) = asked(first, (images, prompts))
    first._page[0].ledger.close()  # the process ends
    again = People(folder=str(tmp_path), pause=0.0, timeout=0.01)
    assert score(again, images, prompts, [{}] * 4).values.tolist() == before.tolist()


def test_settings_and_what_is_no_picture(tmp_path: Path) -> None:
    assert resolve("people", {"min_votes": 2, "port": 8080}) == People(min_votes=2, port=8080)
    for settings, complaint in (
        ({"min_votes": 0}, "at least 1"),
        ({"timeout": 0}, "more than 0"),
        ({"host": "0.0.0.0"}, "--allow-remote|allow_remote"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            People(**settings)  # type: ignore[arg-type]
    with pytest.raises(RewardError, match="people vote on pictures, and this model draws a list"):
        People(folder=str(tmp_path))([shades(1, 2)], ["a"], [{}])


# ---- a run ----

RECIPE = """
model: {{name: {folder}/model, lora_rank: 4, mixed_precision: "no", device: cpu}}
prompts: {folder}/prompts.txt
sampling: {{num_inference_steps: 3, height: 16, width: 16}}
reward: {{name: people, pause: 0.0}}
algorithm: {{name: ALGORITHM}}
train: {{epochs: 2, samples_per_epoch: 8, group_size: 4, batch_size: 8, learning_rate: 1.0e-3}}
evaluation: {{samples_per_prompt: 1}}
run: {{output_dir: {folder}/run, checkpoint_every: 1, sample_prompts: 2}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    tiny.tiny_sd().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path).replace("ALGORITHM", "d3po"))
    return path


def begun(recipe: Path) -> tuple[subprocess.Popen[str], str]:
    """A run in a process of its own, up to where it says that it waits; and where."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tiller", "train", str(recipe)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    said = ""
    assert process.stdout is not None
    for line in iter(process.stdout.readline, ""):
        said += line
        if found := re.search(r"waiting for votes on \d+ pairs, at (\S+)", said):
            return process, found[1]
    raise AssertionError(said)


def test_a_run_by_votes_survives_kill_and_interrupt_and_its_votes_are_data(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D3PO: kill -9 amid the votes of the first epoch, Ctrl-C amid those of the second; no vote is asked for twice."""
    process, url = begun(recipe)
    client = Elsewhere(url)
    for _ in range(3):
        assert client.vote("left")[0] == 200
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)

    process, url = begun(recipe)
    client = Elsewhere(url)
    assert (client.ballot()["done"], client.ballot()["total"]) == (3, 8)  # 2 groups of 4, each in a ring
    voter = Voter(url, most=5 + 2)
    voter.join(120)
    assert client.ballot()["done"] == 2  # of the second epoch
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    run = tmp_path / "run"
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["epoch-000001"]

    def come(message: str) -> None:
        if "waiting for votes on 6 pairs" in message:
            Voter(message.split(", at ")[1])

    monkeypatch.setattr("tiller.vote.people._tell", come)
    assert main(["train", str(recipe), "--resume"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(line["reward/mean"] == pytest.approx(0.5) for line in lines)  # every win is somebody's defeat
    votes = run / "people" / "votes.jsonl"
    assert len(read(votes)[0]) == 16

    offline = recipe.with_name("offline.yaml")  # the same votes again, without people
    text = recipe.read_text().replace("{name: people, pause: 0.0}", f"null\ndata: {votes}").replace("d3po", "dpo")
    text = (
        text.replace("/run,", "/offline,").replace("group_size: 4", "group_size: 2").replace("epochs: 2", "epochs: 1")
    )
    offline.write_text(text)
    assert main(["train", str(offline)]) == 0
    (line,) = (json.loads(line) for line in (tmp_path / "offline" / "metrics.jsonl").read_text().splitlines())
    assert line["policy/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert "reward/mean" not in line


def test_people_are_asked_about_training_alone(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "evaluation.rewards=[people]", "reward=jpeg_compressibility"]) == 2
    assert "vote on base against tuned model with tiller vote RUN" in capsys.readouterr().err
    assert main(["train", str(recipe), "reward=[people, jpeg_compressibility]"]) == 2
    assert "name people alone" in capsys.readouterr().err
