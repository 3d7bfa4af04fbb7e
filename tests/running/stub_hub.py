"""A hub on the loopback interface that takes uploads: the calls of huggingface_hub without Xet.

    POST /api/repos/create                            a repository
    POST /api/models/R/preupload/main                 which files are large ("lfs")
    POST /R.git/info/lfs/objects/batch                where the large ones go
    PUT  /put/SHA                                     their bytes
    POST /api/models/R/commit/main                    JSON lines: header, files, lfsFiles

`lose` counts uploads that are broken off first, as a network would.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StubHub:
    def __init__(self, lose: int = 0) -> None:
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.puts, self.lose, self.requests = 0, lose, 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_PUT(self) -> None:
                hub.puts += 1
                body = self._body()
                if hub.lose:
                    hub.lose -= 1
                    self._answer({"error": "not today"}, 403)
                    return
                sha = hashlib.sha256(body).hexdigest()
                assert self.path == f"/put/{sha}"
                hub.objects[sha] = body
                self._answer({})

            def do_GET(self) -> None:
                hub.requests += 1
                self._answer({"id": "me/model", "sha": "0" * 40, "siblings": [], "private": False})

            def do_POST(self) -> None:
                hub.requests += 1
                hub.tokens.add(self.headers.get("Authorization"))
                body = self._body()
                if self.path == "/api/repos/create":
                    hub.created.append(json.loads(body))
                    self._answer({"url": f"{hub.url}/me/model", "id": "me/model", "name": "me/model"})
                elif self.path.endswith("/preupload/main"):
                    files = json.loads(body)["files"]
                    large = [
                        {
                            "path": f["path"],
                            "uploadMode": "lfs" if f["path"].endswith(".gguf") else "regular",
                            "shouldIgnore": False,
                        }
                        for f in files
                    ]
                    self._answer({"files": large, "commitOid": "0" * 40})
                elif self.path.endswith("/objects/batch"):
                    asked = json.loads(body)["objects"]
                    self._answer({"transfer": "basic", "objects": [self._where(each) for each in asked]})
                elif self.path.endswith("/commit/main"):
                    for line in body.splitlines():
                        hub._commit(json.loads(line))
                    commit = {"commitUrl": f"{hub.url}/me/model/commit/1", "commitOid": "1" * 40}
                    self._answer(commit | {"success": True, "hookOutput": ""})
                else:
                    self._answer({})

            def _where(self, each: dict[str, Any]) -> dict[str, Any]:
                if each["oid"] in hub.objects:  # as the hub does: nothing to send
                    return each
                return each | {"actions": {"upload": {"href": f"{hub.url}/put/{each['oid']}"}}}

            def _body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def _answer(self, document: object, status: int = 200) -> None:
                raw = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def _commit(self, line: dict[str, Any]) -> None:
        value = line["value"]
        if line["key"] == "file":
            self.files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            self.files[value["path"]] = self.objects[value["oid"]]

    def __enter__(self) -> StubHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
