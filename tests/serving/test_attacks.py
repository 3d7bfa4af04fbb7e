"""What strangers send to the API's server to get in, to get two answers for one, or to keep others out."""

from __future__ import annotations

import hmac
import json
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from serving_util import address, ask, connected, http, read_answer, speak
from starlette.datastructures import Headers

import dither
from dither.serving import requests
from dither.serving.access import Access
from dither.serving.errors import ApiError
from dither.web import access, connection
from raw_http import everything, smuggled

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("name", list(smuggled("x", "/")))
def test_a_hidden_request_is_not_answered(url: str, name: str) -> None:
    host, port = address(url)
    answered = everything((host, port), smuggled(f"{host}:{port}", CHAT)[name])
    assert answered.count(b"HTTP/1.1 ") <= 1, answered
    assert answered.split()[1:2] in ([b"400"], [b"403"]) and b"hidden" not in answered
    assert ask(url, "/health").status == 200


def test_a_hidden_request_behind_a_good_one_is_not_answered(url: str) -> None:
    """On a connection that is kept open, the second head is looked at as the first is."""
    host, port = address(url)
    for name in ("a length beside a coding", "a head that ends with bare line feeds", "a folded line"):
        raw = http(url, "/health") + smuggled(f"{host}:{port}", CHAT)[name]
        answered = everything((host, port), raw)
        assert answered.count(b"HTTP/1.1 200") == 1 and answered.count(b"HTTP/1.1 ") == 2, name
        assert b"HTTP/1.1 400" in answered


def test_heads_end_at_a_limit(url: str) -> None:
    for more in (f"X: {'a' * 2**22}\r\n", "X: a\r\n" * 2**19):
        answered = everything(address(url), http(url, "/health", headers=more))
        assert answered.split()[1:2] in ([], [b"400"])  # hung up before all was sent, or told
    assert ask(url, "/" + "a" * 60_000).status == 404


def test_slow_heads_keep_nobody_out(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few hundred sockets that never finish their heads: others are answered, and the sockets are hung up."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 1.0)
    with ExitStack() as held:
        slow = [held.enter_context(socket.create_connection(address(url), timeout=10)) for _ in range(300)]
        for one in slow:
            one.sendall(b"GET / HTTP/1.1\r\nX: ")
        began = time.monotonic()
        assert ask(url, "/health").status == 200
        assert time.monotonic() - began < 1.0
        assert all(one.recv(10) == b"" for one in slow)  # hung up without a word


NAMES = [
    "../../../../etc/passwd",
    "..\\..\\x",
    "/etc/passwd",
    "thinker/../caller",
    "thinker.gguf",
    "thinker\0",
    "%2e%2e",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_s_name_is_no_path(url: str, name: str) -> None:
    answer = ask(url, CHAT, {"model": name, "messages": [{"role": "user", "content": "x"}]})
    assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")
    quoted = "".join(f"%{byte:02x}" for byte in name.encode())
    answer = ask(url, f"/v1/models/{quoted}")
    assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert b"root:" not in answer.body


FIELDS = ["lora", "adapter", "lora_path", "model_path", "chat_template", "mmproj", "slot_id", "cache_prompt", "id_slot"]


def test_no_field_names_a_file_or_a_program(url: str, tmp_path: Path) -> None:
    """What llama.cpp's own server might take for an adapter, a slot or a template never reaches it."""
    template = "{{ cycler.__init__.__globals__.os.popen('touch " + str(tmp_path / "owned") + "') }}"
    body = {"model": "thinker", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    hostile = body | dict.fromkeys(FIELDS, template)
    assert requests.chat(requests.parse(json.dumps(hostile).encode())).keys().isdisjoint(FIELDS)
    lengths = [ask(url, CHAT, one).json()["usage"]["prompt_tokens"] for one in (body, hostile)]
    assert lengths[0] == lengths[1]
    assert not (tmp_path / "owned").exists()


def test_words_of_a_request_are_no_template(url: str) -> None:
    """{{ 7 * 7 }} in a message is seven characters, not forty-nine: the same prompt length as any such text."""
    counts = []
    for text in ("{{ 7 * 7 }}", "[[ 7 * 7 ]]"):  # byte for byte as long, and this tokenizer knows bytes
        answer = ask(url, CHAT, {"model": "thinker", "messages": [{"role": "user", "content": text}], "max_tokens": 1})
        counts.append(answer.json()["usage"]["prompt_tokens"])
    assert counts[0] == counts[1]


def test_keys_are_compared_whole_and_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key is compared, by the comparison whose time does not depend on where texts differ."""
    compared = []

    def counted(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(access, "hmac", type("Counting", (), {"compare_digest": staticmethod(counted)}))
    guard = Access(["one", "two", "three"], "0.0.0.0", insecure=False)
    guard.check(Headers({"authorization": "Bearer one"}), public=False)
    assert compared == [b"one", b"two", b"three"]
    for given in ("", "Bearer", "Bearer on", "Bearer one two", "Basic one", "one", "Bearer ONE"):
        with pytest.raises(ApiError, match="API key"):
            guard.check(Headers({"authorization": given}), public=False)


def test_a_key_opens_nothing_when_it_comes_twice_or_elsewhere(models: Path) -> None:
    with dither.serve([models / "thinker.gguf"], api_keys=["secret"], context=256, slots=1, threads=1) as server:
        for headers in ("", "X-Api-Key: secret\r\n", "Cookie: key=secret\r\n", "Authorization: Basic secret\r\n"):
            assert ask(server.url, "/v1/models", headers=headers).status == 401
        assert ask(server.url, "/v1/models?api_key=secret").status == 401
        two = "Authorization: Bearer wrong\r\nAuthorization: Bearer secret\r\n"
        assert ask(server.url, "/v1/models", headers=two).status == 401
        for path in ("/V1/models", "//v1/models", "/v1//models", "/health/../v1/models", "/health%2f..%2fmodels"):
            assert ask(server.url, path).status == 401, path
        assert ask(server.url, "/v1/models", headers="Authorization: Bearer secret\r\n").status == 200


def deep(levels: int, opens: str, closes: str) -> bytes:
    return ('{"messages": ' + opens * levels + "1" + closes * levels + "}").encode()


@pytest.mark.parametrize(
    "body", [deep(100_000, "[", "]"), deep(100_000, '{"a":', "}"), b'{"max_tokens": ' + b"9" * 10**5]
)
def test_deep_json_and_long_numbers_are_refused(url: str, body: bytes) -> None:
    began = time.monotonic()
    assert speak(url, http(url, CHAT, body)).status == 400
    assert time.monotonic() - began < 2


def test_what_is_said_back_holds_no_control_characters(url: str) -> None:
    """A client's terminal shows `message`; JSON escapes what was sent, and no header repeats it."""
    answer = ask(url, CHAT, {"model": "\x1b[2J\r\nX-Evil: 1", "messages": []})
    assert b"\x1b" not in answer.body and "x-evil" not in answer.headers
    assert isinstance(json.loads(answer.body)["error"]["message"], str)
    answer = ask(url, "/v1/%1b%5b2J%0d%0aX-Evil:%201")
    assert answer.status == 404 and b"\x1b" not in answer.body and "x-evil" not in answer.headers


def test_a_socket_that_sends_half_and_leaves_is_forgotten(url: str, server: Any) -> None:
    for cut in (1, 20, 60):
        with connected(url, http(url, CHAT, {"model": "thinker", "messages": []})[:-cut]):
            pass
    with connected(url, http(url, "/health")) as good:
        assert read_answer(good).status == 200
