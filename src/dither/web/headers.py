"""What a browser is told with every answer: this page loads from and talks to its own server, and nobody frames it."""

from __future__ import annotations

from starlette.types import Message, Send

SECURITY = {
    # No 'unsafe-inline' and no 'unsafe-eval': Vega interprets its expressions (page/js/chart.js).
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def adding(send: Send, headers: dict[str, str]) -> Send:
    """`send` that puts these headers on the answer."""
    more = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await send(message)

    return sent
