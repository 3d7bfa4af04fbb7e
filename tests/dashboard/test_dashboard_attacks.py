"""What strangers send to the page's server byte by byte: two requests in one, heads and bodies that never end."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dashboard.conftest import Served, start_server, stop_server
from dither.dashboard import security
from dither.web import connection
from raw_http import everything, smuggled

pytestmark = pytest.mark.slow
HOST = "127.0.0.1"


@pytest.mark.parametrize("name", list(smuggled("x", "/")))
def test_a_hidden_request_is_not_answered(served: Served, name: str) -> None:
    raw = smuggled(f"{HOST}:{served.port}", "/api/command")[name]
    answered = everything((HOST, served.port), raw)
    assert answered.count(b"HTTP/1.1 ") <= 1, answered
    assert answered.split()[1:2] in ([b"400"], [b"421"]) and b"hidden" not in answered
    assert served.ask("GET", "/api/jobs")[0] == 200


def test_heads_end_at_a_limit(served: Served) -> None:
    head = f"GET /api/jobs HTTP/1.1\r\nHost: {HOST}:{served.port}\r\n"
    for more in (f"X: {'a' * 2**22}\r\n", "X: a\r\n" * 2**19):
        answered = everything((HOST, served.port), f"{head}{more}\r\n".encode())
        assert answered.split()[1:2] in ([], [b"400"])
    assert served.ask("GET", "/api/jobs")[0] == 200


@pytest.fixture(scope="module")
def hasty(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that waits a second for heads and bodies instead of thirty."""
    patience = tmp_path_factory.mktemp("patience")
    (patience / "sitecustomize.py").write_text(
        "from dither.dashboard import security\nfrom dither.web import connection\n"
        "connection.HEAD_SECONDS = security.BODY_SECONDS = 1.0\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        import os

        patch.setenv("PYTHONPATH", os.pathsep.join([str(patience), os.environ.get("PYTHONPATH", "")]))
        served = start_server(runs, tmp_path_factory.mktemp("state"))
    yield served
    stop_server(served)


def test_slow_heads_keep_nobody_out_for_long(hasty: Served) -> None:
    """More sockets than the server takes, none of which ever finishes its head: all are hung up in time."""
    with ExitStack() as held:
        slow = [held.enter_context(socket.create_connection((HOST, hasty.port), timeout=10)) for _ in range(250)]
        for one in slow:
            one.sendall(b"GET / HTTP/1.1\r\nX: ")
        assert hasty.ask("GET", "/api/jobs")[0] == 503  # beyond 200 at once
        began = time.monotonic()
        assert all(one.recv(10) == b"" for one in slow)
        assert time.monotonic() - began < 5
        assert hasty.ask("GET", "/api/jobs")[0] == 200


def test_a_body_that_never_comes_is_not_waited_for(hasty: Served) -> None:
    own = f"{HOST}:{hasty.port}"
    head = f"POST /api/command HTTP/1.1\r\nHost: {own}\r\nOrigin: http://{own}\r\nContent-Type: application/json\r\n"
    answered = everything((HOST, hasty.port), f"{head}Content-Length: 100\r\n\r\n{{".encode())
    assert answered.startswith(b"HTTP/1.1 408")
    assert json.loads(answered.partition(b"\r\n\r\n")[2])["error"]["reason"] == "the body did not arrive within 1 s"


def test_the_limits_are_what_the_pages_say() -> None:
    assert connection.HEAD_SECONDS == security.BODY_SECONDS == 30.0


@pytest.mark.parametrize(
    "path",
    [
        "/static/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/..%5c..%5cx",
        "/static/app.css%00.js",
        "/charts/%2e%2e%2f%2e%2e%2ferrors.py",
        "/api/jobs/%2e%2e%2f%2e%2e",
        "/api/tile?run=..%2f..%2f..%2fetc%2fpasswd&tensor=x",
        "/api/jobs/..%00",
    ],
)
def test_no_path_leaves_its_folder(served: Served, path: str) -> None:
    status, answer, _ = served.ask("GET", path)
    assert status in (400, 404, 422), answer
    assert "root:" not in str(answer)


def test_deep_json_is_refused(served: Served) -> None:
    for body in (b'{"kind": ' + b"[" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b'{"kind": ' + b"9" * 10**5):
        began = time.monotonic()
        assert served.ask("POST", "/api/command", raw=body)[0] in (400, 422)
        assert time.monotonic() - began < 2


def test_nothing_of_a_request_stands_in_an_answer_s_head(served: Served) -> None:
    _, answer, headers = served.ask("GET", "/api/jobs/%0d%0aX-Evil:%201%1b%5b2J")
    assert headers["x-evil"] is None and "\x1b" not in str(answer)
