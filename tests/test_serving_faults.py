"""A remote reward against servers that fail in every way: bounded tries and time, answers kept, never a 0."""

from __future__ import annotations

import os
import pickle
import random
import resource
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import stub
from stub import Conversation
from tiller.rewards import score
from tiller.rewards.serving.client import Remote, Server
from tiller.rewards.serving.exchange import Refusal, Times
from tiller.rewards.serving.persistence import Persistence
from tiller.types import ConfigError, RewardError, Score, ServiceError

PICTURES = [Image.new("RGB", (4, 4), (40 * index, 0, 0)) for index in range(4)]
PROMPTS = [f"cat {index}" for index in range(4)]
METADATA: list[Mapping[str, Any]] = [{"n": index} for index in range(4)]
QUICK = Persistence(concurrency=1, retries=3, backoff=0.01, longest_wait=0.05, budget=2.0)


def at(server: stub.Stub, **changes: Any) -> Server:
    times = changes.pop("times", Times(connect=1.0, read=0.5, total=0.5))
    settings = {"persistence": QUICK, "batch_size": 2, **changes}
    return Server(server.url, "the server", times=times, **settings)


def judge(reward: Server, count: int = 4) -> list[Score]:
    answer = reward(PICTURES[:count], PROMPTS[:count], METADATA[:count])
    assert isinstance(answer, list)
    return answer


def well(talk: Conversation) -> None:
    """Each picture's own metadata, doubled: a mix-up of samples would show."""
    talk.give([{"value": 2 * entry["n"]} for entry in talk.message["metadata"]])


def values(scores: Sequence[Score]) -> list[float | None]:
    return [one.value for one in scores]


def test_scores_come_back_to_their_own_pictures() -> None:
    with stub.stub(well) as server:
        assert values(judge(at(server))) == [0, 2, 4, 6]
        assert [len(talk.message["images"]) for talk in server.talks] == [2, 2]


@pytest.mark.parametrize(
    "fault",
    [stub.status(503), stub.reset, stub.status(500, b"<html>"), stub.raw(b"{}"), stub.raw(b""), stub.status(429)],
    ids=["503", "reset", "500", "no results", "empty", "429"],
)
def test_two_faults_cost_two_more_requests_and_no_score(fault: stub.Answer) -> None:
    with stub.stub(fault, fault, well) as server:
        assert values(judge(at(server), 2)) == [0, 2]
        assert len(server.talks) == 3


BAD = {
    "error in a 200": b'{"schema": 1, "error": "no GPU"}',
    "short list": b'{"schema": 1, "results": [{"value": 1}]}',
    "long list": b'{"schema": 1, "results": [{"value": 1}, {"value": 1}, {"value": 1}]}',
    "NaN": b'{"schema": 1, "results": [{"value": NaN}, {"value": 1}]}',
    "1e999": b'{"schema": 1, "results": [{"value": 1e999}, {"value": 1}]}',
    "text": b'{"schema": 1, "results": [{"value": "1"}, {"value": 1}]}',
    "truth": b'{"schema": 1, "results": [{"value": true}, {"value": 1}]}',
    "no value": b'{"schema": 1, "results": [{"score": 1}, {"value": 1}]}',
    "duplicates": b'{"schema": 1, "results": [{"index": 0, "value": 1}, {"index": 0, "value": 2}]}',
    "foreign index": b'{"schema": 1, "results": [{"index": 0, "value": 1}, {"index": 2, "value": 2}]}',
    "schema 2": b'{"schema": 2, "results": [{"value": 1}, {"value": 1}]}',
    "schema true": b'{"schema": true, "results": [{"value": 1}, {"value": 1}]}',
    "bare list": b"[1, 2]",
    "deep": b"[" * 100_000,
    "many values": b'{"schema": 1, "results": [' + b"0," * 500_000 + b"0]}",
    "wrong sum": b'{"schema": 1, "results": [{"value": 3, "parts": {"a": 1, "b": 1}}, {"value": 1}]}',
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD.keys())
def test_an_answer_that_is_not_to_be_believed_gives_no_score_at_all(body: bytes) -> None:
    with stub.stub(stub.raw(body)) as server:
        scores = judge(at(server), 2)
        assert len(server.talks) == 1 + QUICK.retries
    assert values(scores) == [None, None]
    assert scores[0].reason.startswith("the server: the ")


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    with stub.stub(stub.raw(pickle.dumps(Bomb()))) as server:
        assert values(judge(at(server), 2)) == [None, None]
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("fault", [stub.drip, stub.hang], ids=["drip", "hang"])
def test_a_server_that_never_ends_costs_its_time_and_no_more(fault: stub.Answer) -> None:
    with stub.stub(fault) as server:
        began = time.monotonic()
        scores = judge(at(server, persistence=replace(QUICK, retries=1), times=Times(0.2, 0.2, 0.2)), 2)
        elapsed = time.monotonic() - began
        assert values(scores) == [None, None]
        assert scores[0].reason == "the server: no answer in time"
        assert len(server.talks) == 4  # twice two tries, for its /health lives
    assert 4 * 0.2 <= elapsed < QUICK.budget


def test_a_server_that_hangs_altogether_ends_the_run_within_the_budget() -> None:
    budget = 1.0
    with stub.stub(stub.hang, health=stub.hang) as server:
        began = time.monotonic()
        reward = at(server, persistence=replace(QUICK, retries=0, budget=budget), times=Times(0.2, 0.2, 0.2))
        with pytest.raises(RewardError, match=r"the server gave no answer for 1.0 s \(no answer in time\)"):
            judge(reward)
    assert time.monotonic() - began < budget + 0.5  # one look at its health


def test_a_server_that_hangs_altogether_is_not_asked_again_before_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiller.rewards.serving.persistence.SLOW", 0.05)
    settings = replace(QUICK, budget=0.8, longest_wait=2.0, backoff=1.0)
    with stub.stub(stub.hang, health=stub.hang) as server:
        with pytest.raises(ServiceError, match="no answer in time"):
            judge(at(server, persistence=settings, times=Times(0.1, 0.1, 0.1)), 2)
        assert len(server.talks) == 1


@pytest.mark.parametrize("fault", [stub.gigabyte, stub.announced])
def test_a_gigabyte_is_cut_at_the_cap(fault: stub.Answer) -> None:
    with stub.stub(fault) as server:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
        scores = judge(at(server, times=Times(1, 5, 5), persistence=replace(QUICK, retries=0)), 2)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        time.sleep(0.1)  # until the stub notices
        sent = server.talks[0].sent
    assert values(scores) == [None, None]
    assert "larger than" in scores[0].reason
    assert sent < 2**20 + 2 * 64 * 1024 + 16 * 2**20  # the cap, and what the kernel's buffers held
    assert grown < 32 * 2**20


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    connected: list[Any] = []
    real = socket.create_connection

    def noted(address: Any, *rest: Any, **more: Any) -> Any:
        connected.append(address)
        return real(address, *rest, **more)

    with stub.stub(well) as other:
        for target in ("file:///etc/passwd", "http://169.254.169.254/latest/meta-data", f"{other.url}/v1/score"):
            with stub.stub(stub.status(code, Location=target)) as server:
                monkeypatch.setattr(socket, "create_connection", noted)
                connected.clear()
                with pytest.raises(RewardError, match="redirects are not followed"):
                    judge(at(server), 2)
                assert connected == [("127.0.0.1", int(server.url.rpartition(":")[2]))]
        assert other.connections == 0


@pytest.mark.parametrize(
    ("code", "cure"), [(400, "mend"), (401, "token_env"), (403, "address"), (404, "address"), (413, "batch_size")]
)
def test_a_refusal_is_asked_once_and_said_in_a_sentence(code: int, cure: str) -> None:
    with stub.stub(stub.status(code, b'{"error": "because\\u001b[31m"}')) as server:
        with pytest.raises(Refusal, match=rf"^the server refuses \(status {code}: because \[31m\).*{cure}") as found:
            judge(at(server))
        assert "\x1b" not in str(found.value)
        assert len(server.talks) == 1


def test_only_pictures_without_an_answer_are_asked_again() -> None:
    def half(talk: Conversation) -> None:
        talk.give([{"index": 1, "value": 2 * talk.message["metadata"][1]["n"]}])

    with stub.stub(half, stub.status(503), well) as server:
        assert values(judge(at(server, batch_size=4), 4)) == [0, 2, 4, 6]
        assert [[entry["n"] for entry in talk.message["metadata"]] for talk in server.talks] == [
            [0, 1, 2, 3],
            [0, 2, 3],
            [0, 2, 3],
        ]


def test_a_bad_batch_costs_its_own_scores_alone_and_they_are_missing_not_0() -> None:
    def picky(talk: Conversation) -> None:
        stub.raw(b"nonsense")(talk) if talk.message["metadata"][0]["n"] == 2 else well(talk)

    with stub.stub(picky) as server:
        found = score(at(server), PICTURES, PROMPTS, METADATA)
    np.testing.assert_array_equal(found.values, [0, 2, np.nan, np.nan])
    assert set(found.reasons) == {2, 3}
    assert "no JSON" in found.reasons[2]


def test_retry_after_is_obeyed_up_to_a_cap() -> None:
    settings = replace(QUICK, longest_wait=0.3)
    with stub.stub(stub.status(503, Retry_After="3600"), well) as server:
        began = time.monotonic()
        assert values(judge(at(server, persistence=settings), 2)) == [0, 2]
        assert 0.3 <= time.monotonic() - began < 1.0


def test_pauses_double_and_differ_by_a_seeded_jitter() -> None:
    settings = Persistence(backoff=1.0, longest_wait=5.0)
    pauses = [settings.pause(attempt, random.Random(0)) for attempt in (1, 2, 3, 4)]
    share = random.Random(0).uniform(0.5, 1.0)
    assert pauses == pytest.approx([share, 2 * share, 4 * share, 5.0])
    assert settings.pause(1, random.Random(0), wanted=3.0) == 3.0
    assert settings.pause(1, random.Random(0), wanted=90.0) == 5.0


def test_a_server_that_comes_back_is_waited_for_and_said(caplog: pytest.LogCaptureFixture) -> None:
    server = stub.Stub(well)
    port = int(server.url.rpartition(":")[2])
    server.close()
    returned: list[stub.Stub] = []
    later = threading.Timer(0.4, lambda: returned.append(stub.Stub(well, port=port)))
    later.start()
    reward = Server(server.url, "the server", batch_size=2, persistence=replace(QUICK, longest_wait=0.2, budget=10.0))
    assert values(judge(reward)) == [0, 2, 4, 6]
    later.join()
    returned[0].close()
    said = [record.getMessage() for record in caplog.records]
    assert "the server does not answer (no connection: Connection refused); waiting, next try in" in said[0]
    assert "giving up in 10 s" in said[0]
    assert "answers again" in said[-1]


def test_a_server_that_stays_away_ends_the_run_after_the_budget() -> None:
    server = stub.Stub(well)
    server.close()
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"gave no answer for 0.6 s .*goes on from the last checkpoint"):
        judge(at(server, persistence=replace(QUICK, budget=0.6)))
    assert 0.6 <= time.monotonic() - began < 1.5


def test_a_batch_that_kills_every_connection_is_given_up_while_the_server_lives() -> None:
    def poisoned(talk: Conversation) -> None:
        stub.reset(talk) if talk.message["metadata"][0]["n"] == 0 else well(talk)

    with stub.stub(poisoned) as server:
        scores = judge(at(server))
        assert values(scores) == [None, None, 4, 6]
        assert len(server.talks) == 2 * (1 + QUICK.retries) + 1


def test_named_scores_and_reasons_come_through() -> None:
    rows = [{"value": 3, "parts": {"a": 1, "b": 2}, "note": "n"}, {"value": None, "reason": "why", "parts": {"a": 1}}]

    def parts(talk: Conversation) -> None:
        rows[1]["parts"] = {"a": 1, "b": None}
        talk.give(rows)

    with stub.stub(parts) as server:
        found = score(at(server), PICTURES[:2], PROMPTS[:2], METADATA[:2], weights={"a": 10.0, "b": 1.0})
    np.testing.assert_array_equal(found.values, [12, np.nan])
    np.testing.assert_array_equal(found.components["b"], [2, np.nan])
    assert found.reasons[1] == "b: why"


def test_groups_stay_together_and_a_reward_that_needs_them_says_so() -> None:
    def grouped(talk: Conversation) -> None:
        talk.give([{"value": 1}] * len(talk.message["images"]), reward={"name": "g", "groupwise": True})

    with stub.stub(grouped) as server:
        assert values(judge(at(server, groupwise=True))) == [1] * 4
        assert len(server.talks) == 1
        with pytest.raises(Refusal, match="add groupwise: true"):
            judge(at(server))


def test_videos_and_metadata_that_is_no_json_are_refused_before_anything_is_sent() -> None:
    with stub.stub(well) as server:
        with pytest.raises(ServiceError, match="takes single pictures, and these are lists"):
            at(server)([PICTURES], ["a"], [{}])  # type: ignore[list-item]
        with pytest.raises(ServiceError, match="metadata cannot be sent to the server as JSON"):
            at(server)(PICTURES[:1], ["a"], [{"n": object()}])
        assert server.connections == 0


def test_another_reward_behind_the_address_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def named(name: str) -> stub.Answer:
        return lambda talk: talk.give([{"value": 1}] * 2, reward={"name": name, "version": "1"})

    with stub.stub(named("old"), named("new")) as server:
        judge(at(server))
    assert "has changed its reward from old 1 to new 1" in caplog.text


def test_the_token_comes_from_the_environment_and_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with stub.stub(well) as server:
        with pytest.raises(ConfigError, match="A_TOKEN, and it is not set"):
            Remote(server.url, token_env="A_TOKEN")
        monkeypatch.setenv("A_TOKEN", "hidden-42")
        reward = Remote(server.url, token_env="A_TOKEN")
        reward(PICTURES, PROMPTS, METADATA)
        assert server.talks[0].headers["authorization"] == "Bearer hidden-42"
        assert "hidden" not in repr(reward) + repr(reward._server)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://me:secret@127.0.0.1:1", "holds a password"),
        ("ftp://127.0.0.1", "no address of a server"),
        ("file:///etc/passwd", "no address of a server"),
        ("http://127.0.0.1:99999", "no address"),
        ("http://", "no address"),
    ],
)
def test_an_address_that_is_none_is_refused_before_the_run(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as found:
        Remote(url)
    assert "secret" not in str(found.value)
