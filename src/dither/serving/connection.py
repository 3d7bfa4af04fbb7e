"""What is no HTTP, refused in OpenAI's form like all the rest (`web/connection.py`)."""

from __future__ import annotations

from dither.serving.errors import invalid
from dither.web import connection


class Connection(connection.Connection):
    refusal = invalid(None, "this is not a request in HTTP/1.1", "invalid_http").encoded()
