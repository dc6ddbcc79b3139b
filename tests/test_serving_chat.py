"""A chat model asked about pictures: what is sent, what is believed, and what a failure costs."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

import stub
from stub import Conversation
from tiller.rewards.serving.chat import ChatModel
from tiller.rewards.serving.exchange import Times
from tiller.rewards.serving.persistence import Failure, Persistence
from tiller.types import ConfigError, RewardError, ServiceError

QUICK = Persistence(concurrency=3, retries=2, backoff=0.01, longest_wait=0.05, budget=2.0)
PICTURES = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (5, 7, 3), dtype=np.uint8)) for n in range(3)]


def model(server: stub.Stub, **changes: Any) -> ChatModel:
    settings = {"persistence": QUICK, "times": Times(1, 1, 1), **changes}
    return ChatModel(f"{server.url}/v1", "judge-7b", **settings)


def completion(text: Any, **more: Any) -> bytes:
    usage = {"prompt_tokens": 10, "completion_tokens": 2}
    return json.dumps(
        {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage, **more}
    ).encode()


def strict(talk: Conversation) -> None:
    """A server that takes data: pictures and nothing else, and repeats the question."""
    message = talk.message
    assert talk.path == "/v1/chat/completions"
    content = message["messages"][-1]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        if part["type"] == "image_url" and not part["image_url"]["url"].startswith("data:image/"):
            return talk.say(400, b'{"error": "no addresses"}')
    talk.say(200, completion(f"about {parts[-1]['text']}"))


def test_the_request_is_the_one_that_such_servers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "key-1")
    with stub.stub(strict) as server:
        asked = model(server, token_env="JUDGE_TOKEN", system="Be strict.", max_tokens=9, extra={"seed": 3})
        assert asked.ask([PICTURES[0]], ["a cat?"]) == ["about a cat?"]
        talk = server.talks[0]
    assert talk.headers["authorization"] == "Bearer key-1"
    assert talk.headers["content-type"] == "application/json"
    url = talk.message["messages"][1]["content"][0]["image_url"]["url"]
    assert talk.message == {
        "model": "judge-7b",
        "temperature": 0.0,
        "max_tokens": 9,
        "seed": 3,
        "stream": False,
        "messages": [
            {"role": "system", "content": "Be strict."},
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "a cat?"}],
            },
        ],
    }
    kind, _, data = url.partition(",")
    assert kind == "data:image/png;base64"
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(sent, np.asarray(PICTURES[0]))


def test_answers_keep_their_order_and_usage_is_counted() -> None:
    with stub.stub(strict) as server:
        asked = model(server)
        answers = asked.ask([PICTURES[0], None, PICTURES[1:]], ["one", "two", "three"])
        assert answers == ["about one", "about two", "about three"]
        assert asked.ask(None, ["four"]) == ["about four"]
        assert repr(asked.usage) == "Usage(requests=4, prompt_tokens=40, completion_tokens=8)"
        by_question = {}
        for talk in server.talks:
            content = talk.message["messages"][0]["content"]
            by_question[content if isinstance(content, str) else content[-1]["text"]] = content
    assert by_question["two"] == "two"  # no picture: plain text, which every server takes
    assert [part["type"] for part in by_question["three"]] == ["image_url", "image_url", "text"]


def test_an_address_in_the_place_of_a_picture_is_never_sent() -> None:
    with stub.stub(strict) as server:
        with pytest.raises(RewardError, match="not addresses or files"):
            model(server).ask(["http://169.254.169.254/"], ["a cat?"])  # type: ignore[list-item]
        assert server.connections == 0
        assert stub_refuses(server)


def stub_refuses(server: stub.Stub) -> bool:
    """The stub would have noticed: it is asked by hand for what the client never sends."""
    from tiller.rewards.serving.exchange import exchange

    part = {"type": "image_url", "image_url": {"url": "http://x/"}}
    body = json.dumps({"messages": [{"content": [part, {"type": "text", "text": "?"}]}]}).encode()
    return exchange(f"{server.url}/v1/chat/completions", body, {}, Times(1, 1, 1), 1000).status == 400


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b'{"choices": []}', b'{"choices": [{"text": "old"}]}', b"[1]", b'{"choices": "x"}', b"[" * 99_999],
)
def test_what_is_no_completion_is_asked_again_and_then_fails_alone(body: bytes) -> None:
    def bad(talk: Conversation) -> None:
        talk.say(200, completion("yes") if talk.message["messages"][0]["content"] == "good" else body)

    with stub.stub(bad) as server:
        good, failed = model(server).ask(None, ["good", "bad"])
        assert len(server.talks) == 1 + (1 + QUICK.retries)
    assert good == "yes"
    assert isinstance(failed, Failure)
    assert failed.reason.endswith("the answer is no chat completion")


@pytest.mark.parametrize("text", [None, "", "  \n", 7, ["yes"]])
def test_silence_is_a_failure_and_no_text(text: Any) -> None:
    with stub.stub(stub.raw(completion(text))) as server:
        assert model(server).ask(None, ["?"]) == [Failure("the chat model said nothing")]
        assert len(server.talks) == 1  # temperature 0: it would say the same again


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_question_that_is_refused_fails_alone(code: int) -> None:
    with stub.stub(stub.status(code, b'{"error": {"message": "filtered\\u0007"}}')) as server:
        (failed,) = model(server).ask(None, ["?"])
        assert len(server.talks) == 1
    assert isinstance(failed, Failure)
    assert f"status {code}" in failed.reason
    assert "filtered" in failed.reason


@pytest.mark.parametrize("code", [301, 401, 403, 404])
def test_what_concerns_all_questions_ends_the_run(code: int) -> None:
    with stub.stub(stub.status(code, Location="http://169.254.169.254/")) as server:
        with pytest.raises(ServiceError, match=f"refuses .status {code}.*check url and token_env"):
            model(server).ask(None, ["?"])
        assert server.connections == 1


@pytest.mark.parametrize("fault", [stub.status(503), stub.status(429), stub.reset, stub.status(500)])
def test_two_faults_are_survived(fault: stub.Answer) -> None:
    with stub.stub(fault, fault, strict) as server:
        assert model(server).ask(None, ["q"]) == ["about q"]
        assert len(server.talks) == 3


def test_a_server_that_is_away_ends_the_run_after_the_budget() -> None:
    server = stub.Stub(strict)
    server.close()
    asked = model(server, persistence=Persistence(retries=0, backoff=0.05, longest_wait=0.1, budget=0.3))
    with pytest.raises(ServiceError, match=r"chat model judge-7b at http.* gave no answer for 0.3 s"):
        asked.ask(None, ["?"])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"extra": {"messages": []}}, "extra.messages is set by the request"),
        ({"picture": "gif"}, "give one of png, webp, jpeg"),
        ({"token_env": "NOT_SET_AT_ALL"}, "NOT_SET_AT_ALL, and it is not set"),
        ({"url": "http://key@host/v1"}, "holds a password"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        ChatModel(**({"url": "http://127.0.0.1:1/v1", "model": "m"} | changes))
