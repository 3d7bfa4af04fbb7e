"""Who may ask the server: every rule asked over a real socket, with what an attacker could send."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path

import pytest

from dashboard.conftest import Served, start_server, stop_server
from dither.dashboard import security

pytestmark = pytest.mark.slow


def test_only_its_own_names_are_answered(served: Served) -> None:
    for host in (f"127.0.0.1:{served.port}", f"localhost:{served.port}", f"LOCALHOST:{served.port}"):
        assert served.ask("GET", "/api/jobs", host=host)[0] == 200
    for host in (
        "evil.example",
        f"evil.example:{served.port}",
        "127.0.0.1",
        f"127.0.0.1:{served.port + 1}",
        f"127.0.0.1.evil.example:{served.port}",
        f"192.168.0.1:{served.port}",
        "",
    ):
        status, answer, _ = served.ask("GET", "/api/jobs", host=host)
        assert status in (400, 421), host
        assert b"dither.results" not in json.dumps(answer, default=str).encode()


def test_two_hosts_are_none(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        own = f"127.0.0.1:{served.port}"
        connection.sendall(f"GET /api/jobs HTTP/1.1\r\nHost: {own}\r\nHost: evil.example\r\n\r\n".encode())
        assert connection.recv(100).split()[1] in (b"400", b"421")


def test_other_pages_may_not_ask(served: Served) -> None:
    body = {"kind": "quantize", "fields": {}}
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{served.port}", "http://127.0.0.1:1"):
        for method, path in (
            ("POST", "/api/command"),
            ("POST", "/api/jobs"),
            ("GET", "/api/events"),
            ("GET", "/api/document"),
        ):
            assert served.ask(method, path, body, origin=origin)[0] == 403, (origin, path)
    assert served.ask("POST", "/api/command", body, origin="")[0] == 403  # who changes things must say
    assert served.ask("POST", "/api/command", body)[0] == 200
    assert served.ask("GET", "/api/document", sec_fetch_site="cross-site")[0] == 403
    assert served.ask("GET", "/static/app.css", sec_fetch_site="same-site")[0] == 403
    assert served.ask("GET", "/api/document", sec_fetch_site="same-origin")[0] == 200
    assert served.ask("GET", "/", sec_fetch_site="cross-site")[0] == 200  # a link to the page is no harm


def test_a_form_of_another_page_cannot_post(served: Served) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert served.ask("POST", "/api/jobs", {}, content_type=kind)[0] == 415


def test_bodies_end_at_a_limit(served: Served) -> None:
    one_more = str(security.MOST_BODY + 1)
    assert served.ask("POST", "/api/command", raw=b"", content_length=one_more)[0] == 413
    assert served.ask("POST", "/api/command", raw=b"", content_length="99999999999")[0] == 413
    assert served.ask("POST", "/api/command", raw=b"", content_length="-1")[0] in (400, 413)
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    connection.putrequest("POST", "/api/command", skip_host=True)
    own = f"127.0.0.1:{served.port}"
    for name, value in (
        ("Host", own),
        ("Origin", f"http://{own}"),
        ("Content-Type", "application/json"),
        ("Transfer-Encoding", "chunked"),
    ):
        connection.putheader(name, value)
    connection.endheaders()
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    try:
        for _ in range(security.MOST_BODY // 0x10000 + 1):
            connection.send(piece)
        connection.send(b"0\r\n\r\n")
    except OSError:
        pass  # it hung up before we had sent all, as it may
    else:
        assert connection.getresponse().status == 413
    connection.close()


def test_malformed_requests_are_answered_in_words(served: Served) -> None:
    for raw in (b"", b"{", b"[]", b'{"kind": 5}', b'{"kind": "quantize", "more": 1}', b"[" * 100_000):
        status, answer, _ = served.ask("POST", "/api/jobs", raw=raw)
        assert status == 400 and set(answer["error"]) == {"thing", "reason", "way_out"}, raw[:40]
    assert served.ask("GET", "/static/../../../../etc/passwd")[0] == 404
    assert served.ask("GET", "/static/%2e%2e/%2e%2e/errors.py")[0] == 404
    assert served.ask("GET", "/charts/..%2fguide.json")[0] == 404
    assert served.ask("GET", "/api/jobs/..%2f..%2fetc")[0] == 404
    assert served.ask("GET", "/docs")[0] == served.ask("GET", "/openapi.json")[0] == 404
    assert served.ask("GET", "/api/tile?run=none&tensor=x")[1]["error"]["thing"] == "run none"


def test_every_answer_carries_the_policy(served: Served) -> None:
    for method, path, options in (
        ("GET", "/", {}),
        ("GET", "/api/document", {}),
        ("GET", "/nowhere", {}),
        ("GET", "/", {"host": "evil.example"}),
    ):
        headers = served.ask(method, path, **options)[2]
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["server"] is None


def test_beyond_this_machine_a_token_is_needed(runs: Path, tmp_path: Path) -> None:
    served = start_server(runs, tmp_path, "--host", "0.0.0.0")
    try:
        token = served.url.split("token=")[1]
        assert len(token) >= 32
        for path in ("/", "/static/app.css", "/api/document", "/api/events", f"/api/document?token={token}"):
            assert served.ask("GET", path)[0] == 401, path
        assert served.ask("GET", "/?token=wrong")[0] == 401
        assert served.ask("GET", "/?token=%E2%82%AC")[0] == 401
        status, _, headers = served.ask("GET", f"/?token={token}")
        cookie = headers["set-cookie"]
        assert status == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
        assert served.ask("GET", "/api/document", cookie=cookie.split(";")[0])[0] == 200
        assert served.ask("GET", "/api/document", cookie=f"dither-{served.port}={token[:-1]}")[0] == 401
        assert served.ask("GET", "/api/jobs", authorization=f"Bearer {token}")[0] == 200
        assert served.ask("GET", "/api/jobs", authorization="Bearer x")[0] == 401
        # Numbers cannot be rebound, names can.
        assert served.ask("GET", "/api/jobs", authorization=f"Bearer {token}", host="evil.example")[0] == 421
        address = f"192.0.2.7:{served.port}"
        assert served.ask("GET", "/api/jobs", authorization=f"Bearer {token}", host=address)[0] == 200
    finally:
        said = stop_server(served)
    assert served.process.returncode == 0, said
