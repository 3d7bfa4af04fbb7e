"""Models that serve the tests, and HTTP spoken byte by byte."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

# Templates of the kind that models for tools and for reasoning carry; each character of <fn> is another, so
# that a parrot can be made to say it.
CALLER = """\
{%- if tools %}<|im_start|>system
Call as <fn>{"name": NAME, "arguments": ARGUMENTS}</fn>. There are:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}
<fn>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</fn>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
THINKER = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content or "" }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


TIMEOUT = 60.0


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The data of server-sent events; the last must be [DONE]."""
        assert self.headers["content-type"].startswith("text/event-stream")
        lines = self.body.decode().split("\n\n")
        assert lines[-1] == "" and lines[-2] == "data: [DONE]"
        assert all(line.startswith("data: ") for line in lines[:-1])
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    return parts.hostname, parts.port


@contextmanager
def connected(url: str, raw: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(address(url), timeout=TIMEOUT) as connection:
        connection.sendall(raw)
        yield connection


def speak(url: str, raw: bytes) -> Answer:
    """Sends these bytes and reads until the server closes or the answer is whole."""
    with connected(url, raw) as connection:
        return read_answer(connection)


def read_answer(connection: socket.socket) -> Answer:
    file = connection.makefile("rb")
    status = int(file.readline().split()[1])
    headers = {}
    while line := file.readline().strip():
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(file.readline(), 16):
            body += file.read(size)
            file.readline()
        return Answer(status, headers, body)
    return Answer(status, headers, file.read(int(headers.get("content-length", 0))))


def http(url: str, path: str, body: Any = None, headers: str = "", method: str = "") -> bytes:
    """A request as bytes; `body` is JSON to be, or bytes as they are."""
    host, port = address(url)
    payload = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    method = method or ("GET" if body is None else "POST")
    host_line = "" if "host:" in headers.lower() else f"Host: {host}:{port}\r\n"
    length = "" if body is None else f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    return f"{method} {path} HTTP/1.1\r\n{host_line}{headers}{length}\r\n".encode() + payload


def ask(url: str, path: str, body: Any = None, headers: str = "", method: str = "") -> Answer:
    return speak(url, http(url, path, body, headers, method))


def says(text: str) -> str:
    """A grammar under which a model can say nothing but this."""
    return f"root ::= {json.dumps(text)}"
