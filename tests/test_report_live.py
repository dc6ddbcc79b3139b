"""The live page: only for this machine, only with the token, and new whenever the run has something new."""

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from report_folder import run_folder
from tiller.report.live import HOST, SECURITY, Server, called_here
from tiller.types import RunError


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(run_folder(tmp_path / "run")) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def get(server: Server, path: str | None = None, **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection(HOST, server.server_port, timeout=20)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET", f"/?token={server.token}" if path is None else path, headers=sent)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body, dict(answer.getheaders())


def test_it_listens_on_this_machine_only(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.address.startswith(f"http://127.0.0.1:{server.server_port}/?token=")
    assert len(server.token) >= 32


def test_the_page_comes_with_the_token_and_says_that_it_is_live(server: Server) -> None:
    status, body, headers = get(server)
    assert status == 200
    assert '<html lang="en" data-live="10">' in body
    assert "connect-src &#x27;self&#x27;" in body
    assert SECURITY.items() <= headers.items()


@pytest.mark.parametrize("path", ["/", "/?token=", "/?token=wrong", "/?token=%00", "/?tokens=x", "/report.html"])
def test_without_the_token_there_is_nothing(server: Server, path: str) -> None:
    status, body, _ = get(server, path)
    assert status == 401
    assert "<" not in body


def test_no_other_path_is_served(server: Server) -> None:
    for path in ("/config.yaml", "/../etc/passwd", "//etc/passwd"):
        assert get(server, f"{path}?token={server.token}")[0] == 404


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "user@127.0.0.1", ""])
def test_a_name_bent_to_this_address_is_refused(server: Server, host: str) -> None:
    assert get(server, Host=host)[0] == 403


def test_names_of_this_machine_are_known_on_any_port() -> None:
    assert all(called_here(host) for host in ("127.0.0.1:1", "localhost", "localhost:65535"))
    assert not any(called_here(host) for host in ("127.0.0.1:x", "127.0.0.1:99999", "localhost/x", "[::1", "0.0.0.0"))


def test_a_page_that_has_not_changed_is_not_sent_again_and_one_that_has_is(server: Server) -> None:
    _, body, headers = get(server)
    assert get(server, If_None_Match=headers["ETag"])[:2] == (304, "")
    line = {"epoch": 5, "reward/mean": 0.9, "reward/std": 0.5, "reward_calls": 40}
    with (server.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    status, again, _ = get(server, If_None_Match=headers["ETag"])
    assert status == 200
    assert "5 of 4 epochs, 40 pictures drawn" in again
    assert again != body


def test_a_run_that_goes_away_is_told_of_in_a_sentence(server: Server) -> None:
    for name in ("config.yaml", "metrics.jsonl"):
        (server.folder / name).unlink()
    status, body, _ = get(server)
    assert status == 503
    assert "is no run folder" in body


def test_a_port_that_is_taken_is_said_to_be(server: Server) -> None:
    with pytest.raises(RunError, match=f"port {server.server_port} cannot be had"):
        Server(server.folder, server.server_port)
