"""A hub on the loopback interface: the few endpoints that huggingface_hub asks, served from a folder."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class _Hub(BaseHTTPRequestHandler):
    server: LocalHub

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Authorization") or ""))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) == self.server.repo:
            self._send_json(self._describe(parts[4:]), with_body)
        elif "/".join(parts[:2]) == self.server.repo and parts[2:3] == ["resolve"]:
            self._send_file("/".join(parts[4:]), with_body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)

    def _describe(self, rest: list[str]) -> Any:
        if rest[:1] == ["tree"]:
            return [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.server.files.items()
            ]
        siblings = [{"rfilename": name} for name in self.server.files]
        return {"id": self.server.repo, "modelId": self.server.repo, "sha": COMMIT, "siblings": siblings}

    def _send_json(self, content: Any, with_body: bool) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"}, with_body)

    def _send_file(self, name: str, with_body: bool) -> None:
        data = self.server.files.get(name)
        if data is None or self.server.gated:
            status, code = (403, "GatedRepo") if self.server.gated else (404, "EntryNotFound")
            self._send(status, b"", {"X-Error-Code": code}, with_body)
            return
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        self._send(200, data, {"ETag": etag, "X-Repo-Commit": COMMIT}, with_body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)


class LocalHub(ThreadingHTTPServer):
    """Serves one repository; `requests` lists (method, path, Authorization) of what was asked."""

    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Hub)
        self.repo, self.files = repo, files
        self.gated = False  # listed, but no file is given out
        self.requests: list[tuple[str, str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def fetched(self) -> set[str]:
        """Files of the repository whose content was downloaded."""
        marker = f"/{self.repo}/resolve/"
        return {path.split("/", 5)[-1] for method, path, _ in self.requests if method == "GET" and marker in path}


Hub = TypeVar("Hub", bound=LocalHub)


def local_hub(repo: str, files: dict[str, bytes]) -> AbstractContextManager[LocalHub]:
    return serving(LocalHub(repo, files))


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints: huggingface_hub reads its environment when it is imported."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        kept.pop(proxy, None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def folder_bytes(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
