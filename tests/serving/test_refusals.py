"""Everything a request can get wrong, and what it is told: OpenAI's form, the right status, no slot lost."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from serving_util import Answer, ask, connected, http, read_answer, speak

import dither
from dither.serving import app
from dither.web import connection

pytestmark = pytest.mark.slow  # real servers and engines: `make test` runs it, `make check` does not

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def refused(answer: Answer, status: int, code: str | None = None, param: str | None = None) -> str:
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and isinstance(error["type"], str)
    if code:
        assert error["code"] == code
    if param:
        assert error["param"] == param
    return str(error["message"])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"a": NaN}',
        b"[" * 100_000,
        b'{"a":' * 200 + b"1" + b"}" * 200,
        b'{"model": "thinker", "messages": [{"role": "user", "content": "\\ud83d"}]}',
    ],
    ids=["empty", "cut", "a list", "a text", "no UTF-8", "NaN", "deep list", "deep object", "surrogate"],
)
def test_what_is_no_json_object(url: str, body: bytes) -> None:
    refused(speak(url, http(url, CHAT, body)), 400, "invalid_json")


WRONG: list[tuple[str, Any]] = [
    ("messages", None),
    ("messages", []),
    ("messages", "hello"),
    ("messages[0]", ["hello"]),
    ("messages[0].role", [{"role": "wizard", "content": "x"}]),
    ("messages[0].content", [{"role": "user"}]),
    ("messages[0].content", [{"role": "user", "content": 5}]),
    ("messages[0].content[0]", [{"role": "user", "content": ["x"]}]),
    ("messages[0].content[0].type", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
    ("messages[0].content[0].text", [{"role": "user", "content": [{"type": "text", "text": 1}]}]),
    ("messages[0].tool_call_id", [{"role": "tool", "content": "x"}]),
    ("messages[0].tool_calls[0]", [{"role": "assistant", "content": None, "tool_calls": [1]}]),
    ("stream", "yes"),
    ("stream_options", True),
    ("temperature", "hot"),
    ("temperature", 3),
    ("temperature", True),
    ("top_p", -1),
    ("max_tokens", 0),
    ("max_tokens", 1.5),
    ("max_tokens", -1),
    ("max_completion_tokens", "many"),
    ("stop", [""]),
    ("stop", ["x"] * 17),
    ("stop", 4),
    ("seed", "x"),
    ("presence_penalty", 9),
    ("logit_bias", {"x": 1}),
    ("logit_bias", [1]),
    ("top_logprobs", 21),
    ("n", 2),
    ("functions", [{"name": "f"}]),
    ("modalities", ["audio"]),
    ("audio", {"voice": "x"}),
    ("tools", {}),
    ("tools[0].type", [{"type": "browser"}]),
    ("tools[0].function", [{"type": "function"}]),
    ("response_format", {"type": "yaml"}),
    ("response_format", "json"),
    ("response_format.json_schema", {"type": "json_schema"}),
    ("chat_template_kwargs", {"messages": []}),
    ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}),
]


@pytest.mark.parametrize(("param", "value"), WRONG, ids=[f"{i}-{p}" for i, (p, _) in enumerate(WRONG)])
def test_a_wrong_value_is_named(url: str, param: str, value: Any) -> None:
    field = param.split("[")[0].split(".")[0]
    body = {"model": "thinker", "messages": HELLO, field: value}
    message = refused(ask(url, CHAT, body), 400, param=param)
    assert field in message


def test_choices_that_would_keep_a_model_busy_for_good(url: str) -> None:
    def schema(value: Any) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}

    chain = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 3} for i in range(20)}
    for value in (
        {"type": "string", "pattern": "^" + "(a|b)?" * 60 + "$"},
        {"type": "string", "pattern": "^((((a{0,99}){0,99}){0,99}){0,99})$"},
        {"type": "string", "pattern": "(" * 200 + ")" * 200},
        {"$defs": chain | {"d20": {"type": "string"}}, "$ref": "#/$defs/d0"},
        {"enum": [str(i) for i in range(2000)]},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}},
    ):
        body = {"model": "thinker", "messages": HELLO, "response_format": schema(value)}
        refused(ask(url, CHAT, body), 400, "invalid_value", "response_format.json_schema")


def test_a_schema_that_is_none_gets_the_engine_s_reason(url: str) -> None:
    for schema in ({"type": "nonsense"}, {"$ref": "#/nowhere"}, {"$ref": "#"}):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        assert refused(ask(url, CHAT, {"model": "caller", "messages": HELLO, "response_format": form}), 400)


def test_tools_where_the_template_has_no_place_for_them(url: str) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = {"model": "thinker", "messages": HELLO, "tools": tools, "max_tokens": 1}
    assert "thinker" in refused(ask(url, CHAT, body), 400, "unsupported_value", "tools")
    assert ask(url, CHAT, body | {"tool_choice": "none"}).status == 200


def test_a_context_that_overflows(url: str) -> None:
    body = {"model": "thinker", "messages": [{"role": "user", "content": "x" * 3000}]}
    for more in ({}, {"stream": True}):
        message = refused(ask(url, CHAT, body | more), 400, "context_length_exceeded", "messages")
        assert "1024" in message and "30" in message
    long = {"model": "caller", "input": "x" * 3000}
    refused(ask(url, "/v1/embeddings", long), 400, "context_length_exceeded", "input")


def test_other_bodies(url: str) -> None:
    for body in ({}, {"prompt": ""}, {"prompt": 5}, {"prompt": [1.5]}, {"prompt": ["a", "b"]}, {"prompt": [-1]}):
        refused(ask(url, "/v1/completions", {"model": "thinker", **body}), 400, param="prompt")
    for body in ({}, {"input": []}, {"input": [""]}, {"input": 1}, {"input": ["a"] * 2049}, {"input": [[]]}):
        refused(ask(url, "/v1/embeddings", {"model": "caller", **body}), 400, param="input")
    refused(ask(url, "/v1/embeddings", {"model": "caller", "input": "x", "dimensions": 8}), 400)
    refused(ask(url, "/v1/completions", {"model": "thinker", "prompt": "x", "echo": True}), 400, param="echo")


def test_paths_and_methods(url: str) -> None:
    refused(ask(url, "/v1/nothing"), 404, "not_found")
    refused(ask(url, "/v1/models/nobody"), 404, "model_not_found")
    refused(ask(url, CHAT), 405)
    refused(ask(url, "/v1/models", {}), 405)
    refused(ask(url, CHAT, {"messages": HELLO}), 400, param="model")  # there are several


def test_a_body_beyond_the_limit(url: str) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {app.BODY_LIMIT + 1}\r\n\r\n"
    refused(speak(url, head.encode()), 413, "request_too_large")
    chunk = b"%x\r\n%s\r\n" % (2**20, b" " * 2**20)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    refused(speak(url, head.encode() + 17 * chunk), 413, "request_too_large")


def test_a_body_that_never_comes(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n" + "{"
    refused(speak(url, head.encode()), 408, "timeout")


def test_a_head_that_never_ends(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte by byte, on a new connection and on one that was answered before: both are hung up."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    for before in (b"", http(url, "/health")):
        with connected(url, before) as slow:
            if before:
                assert read_answer(slow).status == 200
            with pytest.raises(ConnectionError):
                for _ in range(200):
                    slow.sendall(b"G")
                    time.sleep(0.02)


def test_what_is_no_http(url: str, caplog: pytest.LogCaptureFixture) -> None:
    refused(speak(url, b"GARBAGE\r\n\r\n"), 400, "invalid_http")
    for path in (CHAT, "/v1/nothing"):  # one that reads its body, one that answers at once
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        refused(speak(url, f"{head}no size\r\n".encode()), 400, "invalid_http")
    assert ask(url, "/health").status == 200
    assert not caplog.records


def test_more_connections_than_may_be(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MOST_CONNECTIONS", 1)
    with connected(url, b""):
        answer = ask(url, "/health")
        refused(answer, 503, "too_many_connections")
        assert "retry-after" in answer.headers


def test_foreign_pages_get_nothing(url: str) -> None:
    """DNS rebinding comes with the attacker's name as Host; a blind post says where it is from."""
    body = {"model": "thinker", "messages": HELLO, "max_tokens": 1}
    for headers in ("Host: evil.example:80\r\n", "Host: localhost.evil.example\r\n", "Host: \r\n"):
        refused(ask(url, CHAT, body, headers), 403, "host_not_allowed")
    for headers in ("Origin: https://evil.example\r\n", "Origin: null\r\n", "Sec-Fetch-Site: cross-site\r\n"):
        refused(ask(url, CHAT, body, headers), 403, "origin_not_allowed")
    for headers in ("Host: host.docker.internal:8080\r\n", "Host: [::1]:80\r\n", "Host: LOCALHOST\r\n"):
        assert ask(url, CHAT, body, headers).status == 200
    answer = ask(url, CHAT, None, "Origin: https://evil.example\r\n", method="OPTIONS")
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_no_answer_allows_other_origins(url: str) -> None:
    answer = ask(url, "/v1/models")
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_a_server_without_grammars(models: Any) -> None:
    with dither.serve(models / "thinker.gguf", api_keys=["one", "two"], threads=1, slots=1, context=256) as server:
        body = {"messages": HELLO, "max_tokens": 1}
        for header in ("", "Authorization: Bearer \r\n", "Authorization: Basic one\r\n"):
            refused(ask(server.url, CHAT, body, header), 401, "invalid_api_key")
        refused(ask(server.url, CHAT, body, "Authorization: Bearer three\r\n"), 401, "invalid_api_key")
        assert ask(server.url, "/health").status == 200
        assert ask(server.url, "/v1/models").status == ask(server.url, "/metrics").status == 401
        for key in ("one", "two"):
            header = f"Host: some.name\r\nAuthorization: Bearer {key}\r\n"
            assert ask(server.url, CHAT, body, header).status == 200
            refused(ask(server.url, CHAT, body | {"grammar": 'root ::= "x"'}, header), 400, param="grammar")


def test_metrics_are_prometheus_text(url: str) -> None:
    ask(url, CHAT, {"model": "thinker", "messages": HELLO, "max_tokens": 2})
    answer = ask(url, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    seen: list[str] = []
    samples: dict[str, float] = {}
    for line in answer.body.decode().splitlines():
        if line.startswith("# TYPE "):
            assert line.split()[2] not in seen, "a family's samples must be together"
            seen.append(line.split()[2])
        elif not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            samples[name] = float(value)
            family = name.partition("{")[0]
            assert any(family in (kind, f"{kind}_sum", f"{kind}_count") for kind in seen[-1:])
    labels = 'model="thinker",purpose="text"'
    assert samples[f"dither_model_loaded{{{labels}}}"] == 1
    assert samples[f"llamacpp:tokens_predicted_total{{{labels}}}"] >= 2
    key = 'dither_requests_total{path="/chat/completions",model="thinker",status="200"}'
    assert samples[key] >= 1
    assert samples["dither_requests_waiting"] == 0


def test_nothing_of_this_left_a_slot_taken(server: dither.Server) -> None:
    assert server.app.pool.running == server.app.pool.waiting == 0 and not server.app.active
    assert all(not held.users for held in server.app.pool.models)
    assert json.loads(ask(server.url, "/health").body)["status"] == "ok"
