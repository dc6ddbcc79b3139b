"""The vote page against what the web may throw at it: real requests to a real server."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tiller.cli import main
from tiller.types import ConfigError
from tiller.vote.booth import Booth
from tiller.vote.contest import Contest, find
from tiller.vote.ledger import decode, read
from tiller.vote.pictures import Picture, as_png, look_at
from tiller.vote.server import check_host
from votes import Client, Elsewhere, contests, paint, served

Page = tuple[Client, Booth]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("page")
    prompts = "<script>document.title='owned'</script> & \"quoted\" {}"
    with served(folder, contests(folder, 40, prompts)) as (client, booth):
        yield client, booth


def length(page: Page) -> int:
    return page[1].ledger.path.stat().st_size


# ---- who is let in ----


@pytest.mark.parametrize("path", ["/", "/ballot?rater=ann", "/picture/0", "/nothing", "/favicon.ico", "/../a"])
def test_without_the_token_nothing_is_told(page: Page, path: str) -> None:
    client, _ = page
    for headers in ({}, {"Cookie": f"tiller_vote_{client.port}=wrong"}, {"Authorization": "Bearer wrong"}):
        status, _, body = client.raw("GET", path, None, headers)
        assert status == 401
        assert json.loads(body) == {"error": "Open the address that tiller printed; it ends in a token."}


def test_the_token_leaves_the_address_for_a_cookie(page: Page) -> None:
    client, _ = page
    status, headers, _ = client.raw("GET", f"/?token={client.token}&rater=a+%26+b")
    assert (status, headers["location"]) == (303, "/?rater=a+%26+b")
    cookie = headers["set-cookie"]
    assert cookie.startswith(f"tiller_vote_{client.port}={client.token};")
    assert "httponly" in cookie.lower()
    assert "samesite=lax" in cookie.lower()
    assert client.raw("GET", "/ballot?rater=ann", None, {"Authorization": f"Bearer {client.token}"})[0] == 200


@pytest.mark.parametrize(
    "name", ["evil.example:{0}", "evil.example", "127.0.0.1", "127.0.0.1:1", "10.0.0.7:{0}", "a@127.0.0.1:{0}", "[::1"]
)
def test_another_name_for_this_address_is_refused(page: Page, name: str) -> None:
    """DNS rebinding: the browser is here, but thinks it is with somebody else."""
    client, _ = page
    assert client.get("/ballot?rater=ann", Host=name.format(client.port))[0] == 403


@pytest.mark.parametrize("name", ["localhost:{0}", "127.0.0.1:{0}", "[::1]:{0}"])
def test_this_machines_own_names_are_known(page: Page, name: str) -> None:
    client, _ = page
    assert client.get("/ballot?rater=ann", Host=name.format(client.port))[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:{0}", "http://127.0.0.1:1", None])
def test_a_vote_from_another_site_is_refused(page: Page, origin: str | None) -> None:
    client, booth = page
    before, asked = length(page), client.ballot()
    body = {"rater": "ann", "contest": asked["contest"], "ballot": asked["ballot"], "choice": "left"}
    cookie = {"Cookie": f"tiller_vote_{client.port}={client.token}"}
    headers = cookie | ({} if origin is None else {"Origin": origin.format(client.port)})
    for path in ("/vote", "/undo"):
        assert client.raw("POST", path, json.dumps(body).encode(), headers)[0] == 403
    assert length(page) == before
    assert not booth.tally.of(asked["contest"])


# ---- what is sent back ----


def test_every_answer_forbids_what_the_page_does_not_need(page: Page) -> None:
    client, _ = page
    picture = client.ballot()["left"]
    for path in ("/", "/?rater=ann", "/ballot?rater=ann", f"/picture/{picture}", "/nothing"):
        _, headers, _ = client.get(path)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert "server" not in headers


def test_the_page_is_one_file_with_a_new_nonce_each_time(page: Page) -> None:
    client, _ = page
    seen = set()
    for _ in range(2):
        _, headers, body = client.get("/?rater=ann")
        text, nonce = body.decode(), headers["content-security-policy"].split("'nonce-")[1].split("'")[0]
        assert text.count("<script") == text.count(f'<script nonce="{nonce}">') == 1
        assert "{{" not in text
        assert "http://" not in text and "https://" not in text  # noqa: PT018
        seen.add(nonce)
    assert len(seen) == 2


def test_names_and_prompts_are_text(page: Page) -> None:
    """A rater's name is escaped in the page; prompts go as JSON, which is never taken for a page."""
    client, _ = page
    _, _, body = client.get("/?rater=%22%3E%3Cscript%3Ealert(1)%3C/script%3E")
    assert b'data-rater="&quot;&gt;&lt;script&gt;alert(1)&lt;/script&gt;"' in body
    assert b"alert(1)</script>" not in body
    _, headers, body = client.get("/ballot?rater=ann")
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["prompt"].startswith("<script>")


def test_nothing_tells_which_picture_is_which(page: Page) -> None:
    client, booth = page
    _, _, body = client.get("/ballot?rater=blind")
    asked = json.loads(body)
    _, headers, data = client.get(f"/picture/{asked['left']}")
    assert headers["content-type"] == "image/png"
    for told in (body, data, json.dumps(headers).encode()):
        for name in (b"base", b"tuned", b".png", str(booth.ledger.path.parent).encode()):
            assert name not in told.replace(b"image/png", b"")


@pytest.mark.parametrize(
    "path",
    [
        "/picture/..%2f..%2fvotes.jsonl",
        "/picture/../votes.jsonl",
        "/picture/%2e%2e/%2e%2e/etc/passwd",
        "/picture//etc/passwd",
        "/picture/0-base.png",
        "/votes.jsonl",
        "/page.html",
        "/picture/" + "0" * 32,
    ],
)
def test_pictures_go_by_id_alone(page: Page, path: str) -> None:
    assert page[0].get(path)[0] == 404


# ---- what is taken ----


def test_a_vote_sent_again_changes_nothing(page: Page) -> None:
    client, booth = page
    asked = client.ballot("eve")
    body = {"rater": "eve", "contest": asked["contest"], "ballot": asked["ballot"], "choice": "left", "seconds": 2}
    status, _, answer = client.post("/vote", body)
    assert status == 200
    after = length(page)
    assert json.loads(answer)["done"] == 1
    assert client.post("/vote", body)[0] == 200
    assert client.post("/vote", body | {"seconds": 3})[0] == 200
    assert client.post("/vote", body | {"choice": "right"})[0] == 409
    assert length(page) == after
    assert client.post("/undo", {"rater": "eve", "ballot": asked["ballot"]})[0] == 200
    undone = length(page)
    assert client.post("/undo", {"rater": "eve", "ballot": asked["ballot"]})[0] == 200
    assert client.post("/vote", body)[0] == 200
    assert length(page) == undone
    assert "eve" not in booth.tally.of(asked["contest"])
    assert client.ballot("eve")["ballot"] != asked["ballot"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[1]", 400),
        (b"[" * 4000, 400),
        (b"x" * 5000, 413),
        ({"rater": "ann"}, 422),
        ({"rater": 7, "choice": "left", "contest": "c", "ballot": "b"}, 422),
        ({"rater": "x" * 41, "choice": "left", "contest": "c", "ballot": "b"}, 422),
        ({"rater": "a\nb", "choice": "left", "contest": "c", "ballot": "b"}, 422),
        ({"rater": "ann", "choice": "first", "contest": "c", "ballot": "b"}, 422),
        ({"rater": "ann", "choice": ["left"], "contest": "c", "ballot": "b"}, 422),
        ({"rater": "ann", "choice": "left", "contest": "c", "ballot": "b"}, 409),
    ],
)
def test_what_is_no_vote_is_not_written(page: Page, body: object, status: int) -> None:
    before = length(page)
    assert page[0].post("/vote", body)[0] == status
    assert length(page) == before


def test_seconds_are_what_the_page_says_within_reason(page: Page) -> None:
    client, booth = page
    for said, kept in ((1.234567, 1.23), (-5, 0.0), (1e9, 3600.0), ("long", None), (True, None), (None, None)):
        assert client.vote("tie", "timer", seconds=said)[0] == 200
        assert booth.last("timer").seconds == kept
    assert (
        client.post("/vote", b'{"rater": "timer", "choice": "tie", "contest": "c", "ballot": "b", "seconds": NaN}')[0]
        == 409
    )


# ---- pictures that are not what they seem ----


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(edge: int) -> bytes:
    """A small PNG file of edge² pixels."""
    header = struct.pack(">IIBBBBB", edge, edge, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(edge // 8 + 1) * edge, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, kind)
    return buffer.getvalue()


STRANGERS = {
    "bomb.png": lambda: bomb(12000),  # which Pillow only warns of
    "bomber.png": lambda: bomb(20000),
    "animation.gif": lambda: encoded("GIF"),
    "gif.png": lambda: encoded("GIF"),
    "script.png": lambda: b"GIF89a/*" + bytes(20) + b"*/=1;alert(1)//",
    "postscript.png": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "eps.jpg": lambda: encoded("EPS"),
    "fits.png": lambda: b"SIMPLE  =                    T" + bytes(2850),
    "tiff.jpg": lambda: encoded("TIFF"),
    "page.jpg": lambda: b"<html><script>alert(1)</script></html>",
    "pickle.png": lambda: b"\x80\x04cos\nsystem\n.",
    "cut.png": lambda: encoded("PNG")[:20],
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_are_turned_away_before_they_are_decoded(tmp_path: Path, name: str) -> None:
    paint(tmp_path / "good.png", 3)
    (tmp_path / name).write_bytes(STRANGERS[name]())
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "first": "good.png", "second": name}))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ConfigError, match=rf"pairs\.jsonl, line 1: .*{name}.*(convert|make it smaller|repair)"):
        find(tmp_path / "pairs.jsonl")
    assert time.perf_counter() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_a_file_that_is_two_things_is_shown_as_pixels_alone(tmp_path: Path) -> None:
    """A PNG with a web page behind it, and the model's name in its metadata."""
    path, payload = tmp_path / "two.png", b"<script>alert(1)</script>PK\x03\x04"
    from PIL.PngImagePlugin import PngInfo

    told = PngInfo()
    told.add_text("model", "tuned-after-epoch-9")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path, pnginfo=told)
    path.write_bytes(path.read_bytes() + payload)
    shown = as_png(look_at(path))
    assert payload not in shown
    assert b"tuned" not in shown
    assert Image.open(io.BytesIO(shown)).getpixel((4, 4)) == (1, 2, 3)


def test_a_picture_that_changed_or_breaks_is_an_error_and_not_another_picture(tmp_path: Path) -> None:
    asked = contests(tmp_path, 2)
    broken = Picture(paint(tmp_path / "x.png", 9), "")
    broken.path.write_bytes(broken.path.read_bytes()[:70])
    asked.append(Contest("broken", look_at(broken.path), asked[0].first))
    with served(tmp_path, asked) as (client, _):
        paint(asked[1].first.path, 77)
        for picture in (asked[1].first, asked[2].first):
            status, _, body = client.get(f"/picture/{picture.id}")
            assert status == 500
            assert picture.path.name in json.loads(body)["error"]
        assert client.get(f"/picture/{asked[0].first.id}")[0] == 200


# ---- the command ----


def heeds_interrupts() -> None:
    """As in a terminal: what a shell starts in the background ignores Ctrl-C, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(folder: Path, *words: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "tiller", "vote", str(folder), *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heeds_interrupts
    )
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    return process, next(line.strip() for line in lines if "http://" in line)


def test_kill_9_and_again_then_ctrl_c(tmp_path: Path) -> None:
    for at in range(3):
        paint(tmp_path / f"0000-a-cat-{at}.png", at)
    process, url = started(tmp_path)
    client = Elsewhere(url)
    assert client.name in url
    assert client.ballot()["total"] == 3
    assert client.vote("left")[0] == 200
    assert client.vote("tie")[0] == 200
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    votes = tmp_path / "votes.jsonl"
    assert [decode(line).choice for line in votes.read_bytes().splitlines(keepends=True)][1:] == ["tie"]
    with votes.open("ab") as file:
        file.write(b'{"vote": "torn')
    process, url = started(tmp_path)
    client = Elsewhere(url)
    assert client.ballot()["done"] == 2
    assert client.vote("right")[0] == 200
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert "3 votes on 3 pairs (1 tie, 0 skips) of ann (3)" in said
    assert len(read(votes)[0]) == 3
    assert oct(os.stat(votes).st_mode & 0o002) == "0o0"


def test_others_are_let_in_by_an_explicit_word_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for at in range(2):
        paint(tmp_path / f"0000-a-cat-{at}.png", at)
    assert check_host("127.0.0.1", False) == check_host("localhost", False) == check_host("::1", False) == ""
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        assert main(["vote", str(tmp_path), "--host", host]) == 2
        assert "add --allow-remote if that is meant" in capsys.readouterr().err
    assert "not encrypted" in check_host("0.0.0.0", allow_remote=True)
    with served(tmp_path, contests(tmp_path, 1), host="0.0.0.0") as (client, _):
        assert client.get("/ballot?rater=ann", Host=f"10.1.2.3:{client.port}")[0] == 200
        assert client.get("/ballot?rater=ann", Host=f"evil.example:{client.port}")[0] == 403


def test_the_summary_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(tmp_path, contests(tmp_path, 2)) as (client, _):
        client.vote("left")
    assert main(["vote", str(tmp_path), "--summary"]) == 0
    assert capsys.readouterr().out.startswith("1 vote on 1 pair")
    assert main(["vote", str(tmp_path / "0-base.png"), "--summary"]) == 2
    assert "there are no votes in" in capsys.readouterr().err
