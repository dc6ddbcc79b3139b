"""A reward behind HTTP: what it answers, what it refuses before it costs anything, and that scores are the reward's."""

from __future__ import annotations

import base64
import http.client
import io
import json
import resource
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiller.cli import main
from tiller.commands import serve
from tiller.rewards import resolve, score
from tiller.rewards.serving import protocol
from tiller.rewards.serving.client import Remote
from tiller.rewards.serving.protocol import Limits, Malformed
from tiller.rewards.serving.server import RewardServer, Service, is_loopback
from tiller.types import ConfigError, RewardError, Score

Metadata = Sequence[Mapping[str, Any]]


def red(images: Sequence[Image.Image], prompts: Sequence[str], metadata: Metadata) -> list[float]:
    return [float(np.asarray(image)[..., 0].mean()) for image in images]


def picture(value: int = 0, size: int = 8) -> Image.Image:
    noise = np.random.default_rng(value).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@contextmanager
def serving(reward: Any = red, **settings: Any) -> Iterator[RewardServer]:
    server = RewardServer(Service(reward, "red", "1", tell=lambda text: None, **settings))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def url(server: RewardServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def ask(server: RewardServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
    """One request; headers replace the usual ones, an empty one leaves it out."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, {name: value for name, value in sent.items() if value})
    response = connection.getresponse()
    answer = response.status, json.loads(response.read())
    connection.close()
    return answer


def message(*images: bytes, **changes: Any) -> dict[str, Any]:
    texts = [base64.b64encode(image).decode() for image in images]
    return {"schema": 1, "images": texts, "prompts": ["p"] * len(images), "metadata": [{}] * len(images)} | changes


GOOD = protocol.encode_picture(picture())


def test_the_same_scores_near_and_far_for_every_lossless_format() -> None:
    pictures = [picture(index) for index in range(5)]
    near = score(red, pictures, ["p"] * 5, [{}] * 5).values
    with serving() as server:
        for kind in ("png", "webp"):
            far = Remote(url(server), picture=kind, batch_size=2)  # type: ignore[arg-type]
            np.testing.assert_array_equal(score(far, pictures, ["p"] * 5, [{}] * 5).values, near)


def test_an_address_is_a_reward() -> None:
    with serving() as server:
        reward = resolve(url(server), {"batch_size": 3})
        assert score(reward, [picture()], ["p"], [{}]).values[0] == red([picture()], [], [])[0]
    with pytest.raises(ConfigError, match=r"reward.retires is unknown; did you mean reward.retries\?"):
        resolve("http://127.0.0.1:1", {"retires": 3})


def test_prompts_and_metadata_arrive_and_named_scores_reasons_and_notes_return() -> None:
    def named(images: Any, prompts: Sequence[str], metadata: Metadata) -> dict[str, list[Any]]:
        lengths = [Score(float(len(prompt)), note=f"of {prompt}") for prompt in prompts]
        return {"length": lengths, "n": [Score(None, reason="none") if m["n"] < 0 else m["n"] for m in metadata]}

    with serving(named) as server:
        far = score(Remote(url(server)), [picture()] * 2, ["ä\n", "bcd"], [{"n": 5}, {"n": -1}])
    np.testing.assert_array_equal(far.values, [7, np.nan])
    np.testing.assert_array_equal(far.components["length"], [2, 3])
    assert far.reasons[1] == "n: n: none"
    assert "of bcd" in far.notes[1]


def test_a_coroutine_a_tensor_and_an_array_are_answers_too() -> None:
    async def later(images: Any, prompts: Any, metadata: Any) -> list[float]:
        return [2.0] * len(images)

    kinds = [later, lambda i, p, m: np.full(len(i), 2.0), lambda i, p, m: tuple(np.float32(2) for _ in i)]
    for reward in kinds:
        with serving(reward) as server:
            assert score(Remote(url(server)), [picture()] * 2, ["p"] * 2, [{}] * 2).values.tolist() == [2.0, 2.0]


def test_a_picture_on_which_the_reward_fails_costs_its_own_score_alone() -> None:
    def touchy(images: Any, prompts: Sequence[str], metadata: Any) -> list[float]:
        if "bad" in prompts:
            raise ZeroDivisionError("no pixels")
        return [1.0] * len(images)

    with serving(touchy) as server:
        far = score(Remote(url(server)), [picture()] * 3, ["a", "bad", "c"], [{}] * 3)
    np.testing.assert_array_equal(far.values, [1, np.nan, 1])
    assert far.reasons == {1: "ZeroDivisionError: no pixels"}


@pytest.mark.parametrize("wrong", [[1.0], [1.0, True], [1.0, "2"], 3.0, None, {}, {"a": [1.0]}])
def test_a_reward_that_returns_no_scores_ends_the_run_as_it_would_in_the_same_process(wrong: Any) -> None:
    calls: list[int] = []

    def mistaken(images: Any, prompts: Any, metadata: Any) -> Any:
        calls.append(len(images))
        return wrong

    refused = pytest.raises(RewardError, match=r"^reward server .* refuses \(status 422: .*mend that reward")
    with serving(mistaken) as server, refused:
        score(Remote(url(server)), [picture()] * 2, ["p"] * 2, [{}] * 2)
    assert calls == [2]  # one call for each picture alone would have made scores of some of these


def test_a_reward_that_compares_is_not_asked_picture_by_picture() -> None:
    class Ranks:
        groupwise = True
        sizes: list[int] = []  # noqa: RUF012

        def __call__(self, images: Sequence[Any], prompts: Any, metadata: Any) -> list[float]:
            self.sizes.append(len(images))
            if len(images) != 5:
                raise ValueError("five")
            return [float(index) for index in range(5)]

    reward = Ranks()
    with serving(reward) as server:
        far = Remote(url(server), groupwise=True, batch_size=2)
        assert score(far, [picture()] * 5, ["p"] * 5, [{}] * 5).values.tolist() == [0, 1, 2, 3, 4]
        status, answer = ask(server, "POST", "/v1/score", message(GOOD, GOOD))
    assert reward.sizes == [5, 2]
    assert (status, answer["error"]) == (500, "red failed: ValueError: five")


def test_health_and_info_say_what_is_there() -> None:
    with serving() as server:
        assert ask(server, "GET", "/health")[1]["status"] == "ok"
        _, info = ask(server, "GET", "/v1/info")
        assert info["reward"] == {"name": "red", "version": "1"}
        assert info["schemas"] == [1]
        assert info["limits"]["pictures"] == 128
        assert ask(server, "GET", "/v1/score")[0] == 404
        assert ask(server, "POST", "/score", {})[0] == 404
        assert ask(server, "PUT", "/v1/score", {})[0] == 501


REFUSED = {
    "schema 2": (message(GOOD, schema=2), "schema 2 and this server reads 1"),
    "schema true": (message(GOOD, schema=True), "schema True"),
    "no schema": ({"images": [], "prompts": [], "metadata": []}, "schema None"),
    "unknown key": (message(GOOD, callback="http://x"), "callback"),
    "lengths": (message(GOOD, prompts=[]), "1 images, 0 prompts"),
    "no lists": (message(GOOD, images="abc"), "must be lists"),
    "prompt": (message(GOOD, prompts=[1]), "must be a text"),
    "metadata": (message(GOOD, metadata=[[]]), "must be an object"),
    "an address": (message(GOOD, images=["http://169.254.169.254/"]), "no base64"),
    "a data address": (message(GOOD, images=["data:image/png;base64,AAAA"]), "no base64"),
    "a number": (message(GOOD, images=[1]), "no base64"),
    "nothing": (message(b""), "no picture"),
    "list": ([], "no JSON object"),
    "NaN": (b'{"schema": NaN}', "no JSON"),
    "a pickle": (b"\x80\x04\x95\x00", "no JSON"),
    "deep": (b"[" * 200_000, "no JSON"),
    "a long number": (b'{"schema": ' + b"1" * 10_000 + b"}", "no JSON"),
    "many values": (b'{"schema": [' + b"{}," * 600_000 + b"0]}", "too many values"),
}


@pytest.mark.parametrize(("body", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_a_request_that_breaks_the_format_is_refused_in_words(body: Any, why: str) -> None:
    with serving() as server:
        status, answer = ask(server, "POST", "/v1/score", body)
    assert status == 400
    assert answer["schema"] == 1
    assert why in answer["error"]


def file(kind: str, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    data = io.BytesIO()
    Image.new(mode, size).save(data, kind)
    return data.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG that is a few kilobytes long and says it has so many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1_000_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


HOSTILE = {
    "gif": file("GIF", mode="P"),
    "bmp": file("BMP"),
    "tiff": file("TIFF"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/etc/passwd) run\n",
    "fits": b"SIMPLE  =                    T" + b" " * 2850,
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "polyglot": b"GIF89a" + GOOD,
    "truncated": GOOD[: len(GOOD) // 2],
    "5000 x 5000": bomb(5000, 5000),
    "12000 x 12000": bomb(12000, 12000),
    "20000 x 20000": bomb(20000, 20000),
    "2 billion wide": bomb(2**31 - 1, 1),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_picture_is_refused_before_it_is_decoded(data: bytes) -> None:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(Malformed, match=r"^image 1 "):
        protocol.read_request(json.dumps(message(GOOD, data)).encode(), Limits())
    assert time.process_time() - began < 1.0
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 32 * 2**20


def test_many_pictures_are_no_bomb_either() -> None:
    small = Limits(pictures=2, total_pixels=100)
    with pytest.raises(Malformed, match="3 pictures are more than the 2"):
        protocol.read_request(json.dumps(message(GOOD, GOOD, GOOD)).encode(), small)
    with pytest.raises(Malformed, match="128 pixels are more than the 100"):
        protocol.read_request(json.dumps(message(GOOD, GOOD)).encode(), small)


def test_a_body_over_the_cap_is_refused_by_its_head_alone() -> None:
    with serving(limits=Limits(body=1000)) as server, socket.create_connection(server.server_address[:2]) as line:
        line.sendall(b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        line.sendall(b"Content-Length: 1000000000000\r\n\r\n")
        line.settimeout(2)
        assert b"413" in line.recv(1000).partition(b"\r\n")[0]


def test_a_client_that_is_still_sending_reads_the_refusal() -> None:
    with serving(limits=Limits(body=1000)) as server:
        status, answer = ask(server, "POST", "/v1/score", b" " * 10_000_000)
    assert (status, answer["error"]) == (413, "the request is larger than 1000 bytes")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content_Type": "text/plain"}, 415),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example:80"}, 403),
        ({"Host": "red.example"}, 200),
        ({"Host": "[::1]:8700"}, 200),
        ({"Origin": "http://127.0.0.1:8700"}, 403),
        ({"Origin": "null"}, 403),
        ({"Transfer_Encoding": "chunked", "Content_Length": "5"}, 411),
        ({"Content_Length": "-5"}, 411),
    ],
)
def test_who_may_ask(headers: dict[str, str], status: int) -> None:
    with serving(hosts=("red.example",)) as server:
        assert ask(server, "POST", "/v1/score", message(GOOD), **headers)[0] == status


def test_a_token_guards_all_but_the_health(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(token="right") as server:
        for given in ("", "Bearer wrong", "Bearer righ", "Bearer right2", "Basic right"):
            status, answer = ask(server, "POST", "/v1/score", message(GOOD), Authorization=given)
            assert (status, "token" in answer["error"]) == (401, True)
            assert ask(server, "GET", "/v1/info", Authorization=given)[0] == 401
        assert ask(server, "POST", "/v1/score", message(GOOD), Authorization="Bearer right")[0] == 200
        assert ask(server, "GET", "/health")[0] == 200
        monkeypatch.setenv("RED_TOKEN", "right")
        assert score(Remote(url(server), token_env="RED_TOKEN"), [picture()], ["p"], [{}]).valid.all()
        assert "right" not in repr(server.service)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_other_machines_need_a_token(host: str) -> None:
    with pytest.raises(ValueError, match="a token is needed"):
        RewardServer(Service(red, "red"), host)
    with pytest.raises(ConfigError, match="--token-env NAME"):
        serve.run("jpeg_compressibility", {}, host, 0, None, None)
    assert not is_loopback(host)
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")


def test_more_requests_than_slots_are_told_to_come_back_and_all_are_answered() -> None:
    gate, running, most = threading.Semaphore(0), 0, 0
    lock = threading.Lock()

    def slow(images: Any, prompts: Any, metadata: Any) -> list[float]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.acquire(timeout=5)
        with lock:
            running -= 1
        return [1.0] * len(images)

    with serving(slow, requests=2, calls=1) as server, ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(ask, server, "POST", "/v1/score", message(GOOD)) for _ in range(4)]
        while sum(one.done() for one in asked) < 2:
            time.sleep(0.01)
        refused = [one.result() for one in asked if one.done()]
        assert [status for status, _ in refused] == [503, 503]
        gate.release(100)
        assert sorted(one.result()[0] for one in asked) == [200, 200, 503, 503]
        far = Remote(url(server), batch_size=1, concurrency=8)
        assert score(far, [picture()] * 8, ["p"] * 8, [{}] * 8).valid.all()
    assert most == 1


def test_a_reward_that_hangs_is_said_in_time() -> None:
    release = threading.Event()

    def hangs(images: Any, prompts: Any, metadata: Any) -> list[float]:
        release.wait(10)
        return [1.0] * len(images)

    with serving(hangs, timeout=0.2) as server:
        began = time.monotonic()
        assert ask(server, "POST", "/v1/score", message(GOOD)) == (
            504,
            {"schema": 1, "error": "red did not answer within 0.2 s"},
        )
        assert time.monotonic() - began < 2
        assert ask(server, "GET", "/health")[0] == 200
        release.set()


def test_a_request_that_drips_in_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiller.rewards.serving.server.HEAD_TIME", 0.3)
    with serving() as server, socket.create_connection(server.server_address[:2]) as line:
        began = time.monotonic()
        line.settimeout(0.05)
        while time.monotonic() - began < 5:
            try:
                line.sendall(b"X")
                if line.recv(10) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        assert 0.2 < time.monotonic() - began < 2


def test_pairs_cannot_be_served() -> None:
    def better(first: Any, second: Any, prompts: Any, metadata: Any) -> list[float]:
        return [0.5] * len(first)

    better.pairwise = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="compares pairs"):
        RewardServer(Service(better, "better"))


def test_the_command_says_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "jpeg_compressibilty"]) == 2
    assert "did you mean jpeg_compressibility" in capsys.readouterr().err
    assert main(["serve", "jpeg_compressibility", "model=x"]) == 2
    assert "takes no settings" in capsys.readouterr().err
    assert main(["serve", "jpeg_compressibility", "--token-env", "NOT_SET"]) == 2
    assert "NOT_SET is not set" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "jpeg_compressibility", "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another --port" in capsys.readouterr().err
