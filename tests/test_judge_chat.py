"""The judges ask an OpenAI-compatible server, and the picture really gets there."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import pytest
from PIL import Image

from tiller.rewards.judge.questions import VLMQuestions


class Server(BaseHTTPRequestHandler):
    """A model that sees the colour of a picture, and answers yes where the question names it."""

    asked: list[dict] = []  # noqa: RUF012 (one per test session)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append({"path": self.path, "token": self.headers.get("Authorization"), **body})
        picture, text = body["messages"][-1]["content"]
        data = picture["image_url"]["url"].split(",", 1)[1]
        pixel = Image.open(BytesIO(base64.b64decode(data))).convert("RGB").getpixel((0, 0))
        colour = {(255, 0, 0): "red", (0, 0, 255): "blue"}[pixel]
        answer = "Yes." if colour in text["text"] else "No\x1b[31m."
        reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def test_a_served_judge_sees_the_picture_of_its_question(url, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "not-a-secret-one")
    images = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "red")]
    reward = VLMQuestions(model="judge", url=url, token_env="JUDGE_TOKEN", max_new_tokens=5)
    scores = reward(images, ["a red wall", "a red wall", "a blue wall"], [{}] * 3)
    assert [score.value for score in scores] == [1.0, 0.0, 0.0]
    assert scores[1].note.endswith("No [31m.")
    one = Server.asked[0]
    assert (one["path"], one["model"], one["temperature"], one["max_tokens"]) == (
        "/v1/chat/completions",
        "judge",
        0.0,
        5,
    )
    assert one["token"] == "Bearer not-a-secret-one"
