"""The local hub of tests/models, answering range requests as the real one does and counting bytes."""

from __future__ import annotations

import hashlib
import re
from contextlib import AbstractContextManager, suppress

from sources_util import COMMIT, LocalHub, _Hub, serving


class _RangeHandler(_Hub):
    server: RangeHub

    def _send_file(self, name: str, with_body: bool) -> None:
        data = self.server.files.get(name)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if data is None or self.server.gated or not asked or not self.server.ranges:
            super()._send_file(name, with_body)
            return
        start, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
        headers = {
            "Content-Range": f"bytes {start}-{end - 1}/{self.server.claimed.get(name, len(data))}",
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
        }
        self._send(206, data[start:end], headers, with_body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], with_body: bool) -> None:
        if with_body and status in (200, 206) and "/resolve/" in self.path:
            self.server.sent += len(data)
        with suppress(BrokenPipeError, ConnectionResetError):  # who asked hung up, having read enough
            super()._send(status, data, headers, with_body)


class RangeHub(LocalHub):
    """`sent` counts bytes of files; `ranges` False ignores them; `claimed` lies about a file's size."""

    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        super().__init__(repo, files)
        self.RequestHandlerClass = _RangeHandler
        self.sent = 0
        self.ranges = True
        self.claimed: dict[str, int] = {}


def range_hub(repo: str, files: dict[str, bytes]) -> AbstractContextManager[RangeHub]:
    return serving(RangeHub(repo, files))
