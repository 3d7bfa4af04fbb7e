"""What a stranger may send or write to get in, each attack with the test that tries it, on both servers.

The tests run in real processes over real sockets.  Beside them, requests that nobody would write: valid ones with bytes
changed, cut and repeated, thousands of them, at both servers; each must be answered in HTTP or hung up on, nothing may
be answered twice, and the servers must answer as before afterwards.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from frame import ROOT, Ask, Line, Row, main
from fuzzing import mutated_bytes
from soak import served

import dither

API, REFUSED = "tests/serving/test_attacks.py", "tests/serving/test_refusals.py"
PAGE, GUARD = "tests/dashboard/test_dashboard_attacks.py", "tests/dashboard/test_dashboard_security.py"
WEB, FOLDERS = "tests/web/test_web.py", "tests/models/test_checkpoints.py"
ENGINE, TERMINAL = "tests/serving/test_transformers_engine.py", "tests/cli/test_hostile_names.py"
# what is tried → files, and what the names of their tests hold
ATTACKS = {
    "API: a key that is wrong, cut, doubled, in another place": ((API, WEB), "keys|a_key"),
    "page: no token, a wrong one, another port's cookie": ((GUARD,), "token"),
    "API: another Host, another page's Origin": ((REFUSED, WEB), "foreign|origin|a_host"),
    "page: another Host, two of them": ((GUARD,), "own_names|two_hosts"),
    "page: another page's Origin, a form": ((GUARD,), "other_pages|a_form"),
    "API: two requests in one (lengths, codings, folds, line feeds)": ((API,), "hidden"),
    "page: two requests in one": ((PAGE,), "hidden"),
    "API: heads and bodies without end, slow or huge": ((API, REFUSED, WEB), "heads|a_head|a_body|connections"),
    "page: heads and bodies without end, slow or huge": ((PAGE, GUARD), "heads|a_body|bodies"),
    "API: paths in a model's name, fields that name files": ((API,), "no_path|no_field"),
    "page: paths that leave their folder": ((PAGE,), "no_path"),
    "a folder's index that names files elsewhere": ((FOLDERS,), "index"),
    "pickles and code in a folder": ((FOLDERS,), "pickle|remote_code"),
    "templates that reach for Python or files": ((ENGINE, API), "hostile|template"),
    "API: deep JSON, numbers of 100,000 digits": ((API,), "deep"),
    "page: deep JSON, numbers of 100,000 digits": ((PAGE,), "deep"),
    "control characters in what a server says back": ((API, PAGE), "control|nothing_of"),
    "control characters in a terminal, from names in files": ((TERMINAL,), "terminal"),
}


def tried() -> list[Line]:
    """All of these tests in one run, told apart by their names."""
    every = sorted({place for places, _ in ATTACKS.values() for place in places})
    command = [sys.executable, "-m", "pytest", *every, "-p", "no:cacheprovider", "-rA", "-q"]
    names = "|".join(pattern for _, pattern in ATTACKS.values())
    command += ["-k", " or ".join(names.split("|"))]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = re.findall(r"^(PASSED|FAILED|ERROR) (\S+?)::(\S+)", ran.stdout, re.MULTILINE)
    lines = []
    for what, (places, pattern) in ATTACKS.items():
        line = Line(f"{what}: {', '.join(f'`{Path(file).name}`' for file in places)}, `{pattern.replace('|', '`, `')}`")
        for outcome, file, test in said:
            if file in places and re.search(pattern, test):
                line.count(None if outcome == "PASSED" else f"{outcome} {file}::{test}")
        if not line.tried:
            line.count("no test was run: " + ran.stdout[-300:])
        lines.append(line)
    return lines


@contextlib.contextmanager
def dashboard(folder: Path) -> Iterator[str]:
    folder.mkdir()
    words = [sys.executable, "-m", "dither", "dashboard", str(folder), "--no-open", "--json", "--port", "0"]
    with subprocess.Popen([*words, "--state", str(folder)], stdout=subprocess.PIPE, text=True) as process:
        document = ""
        assert process.stdout
        for said in process.stdout:
            document += said
            if said == "}\n":
                break
        try:
            yield json.loads(document)["url"]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def answered(address: tuple[str, int], raw: bytes, patience: float = 0.3) -> bytes:
    """All that comes back until the server hangs up; after so long a silence it is told that nothing more comes."""
    found, ended = b"", False
    with contextlib.suppress(ConnectionError), socket.create_connection(address, timeout=patience) as connection:
        connection.sendall(raw)
        while True:
            try:
                piece = connection.recv(65536)
            except TimeoutError:
                if ended:
                    raise
                ended = True
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(10)
                continue
            found += piece
            if not piece:
                break
    return found


def bombarded(what: str, url: str, seeds: list[bytes], good: bytes, ask: Ask, share: float) -> Line:
    """Requests with bytes changed: an answer for each head at most, never a 500, and the server goes on."""
    line, draw, statuses = Line(what), random.Random(ask.seed), set()
    found = re.match(r"http://([^:/]+):(\d+)", url)
    assert found
    address = (found[1], int(found[2]))
    fair = Ask(share, ask.seed, ask.runs, ask.work)
    while not fair.over(line.tried):
        raw = mutated_bytes(draw.choice(seeds), seeds, draw)
        try:
            said = answered(address, raw)
        except TimeoutError:
            line.count(f"neither answered nor hung up: {raw!r}")
            continue
        heads = re.findall(rb"HTTP/1\.1 (\d{3}) ", said)
        statuses |= set(heads)
        ends = raw.count(b"\n\r\n") + raw.count(b"\n\n")
        more = heads[ends:]  # what follows the last head that is whole may be told that it is none, once
        odd = (said and not heads) or more not in ([], [b"400"]) or b"500" in heads
        line.count(f"{raw!r} → {said[:200]!r}" if odd else None)
    line.figures["statuses"] = " ".join(sorted(status.decode() for status in statuses))
    line.count(None if b" 200 " in answered(address, good, 10)[:20] else "the server does not answer any more")
    return line


def run(ask: Ask) -> Sequence[Line]:
    lines = tried()
    model = ask.work / "m.gguf"
    dither.quantize(str(files("dither") / "demo_model"), "Q4_K_M", model)
    head = "Host: localhost\r\nContent-Type: application/json\r\nAuthorization: Bearer x\r\n"
    body = b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0}'
    chat = f"POST /v1/chat/completions HTTP/1.1\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    good = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    chunked = f"POST /v1/completions HTTP/1.1\r\n{head}Transfer-Encoding: chunked\r\n\r\n".encode()
    chunked += b"1a\r\n" + b'{"prompt":"a","max_tokens":' + b"\r\n2\r\n1}\r\n0\r\n\r\n"
    share = max(10.0, (ask.seconds - (Ask(0, 0, 0, ask.work).started - ask.started)) / 2)
    with served(model, "-c", "256", "--slots", "2", "--threads", "1") as (_, url):
        lines.append(bombarded("API: requests with bytes changed", url, [chat, good, chunked], good, ask, share))
    with dashboard(ask.work / "runs") as url:
        found = re.search(r":(\d+)/", url)
        assert found
        own = f"127.0.0.1:{found[1]}"
        head = f"Host: {own}\r\nOrigin: http://{own}\r\nContent-Type: application/json\r\n"
        body = b'{"kind": "quantize", "fields": {}}'
        post = f"POST /api/command HTTP/1.1\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        good = f"GET /api/jobs HTTP/1.1\r\nHost: {own}\r\nConnection: close\r\n\r\n".encode()
        page = f"GET /api/tile?run=a&tensor=b HTTP/1.1\r\nHost: {own}\r\n\r\n".encode()
        lines.append(bombarded("page: requests with bytes changed", url, [post, good, page], good, ask, share))
    return lines


ROW = Row("security", "Strangers at the door", run, share=5)

if __name__ == "__main__":
    main(ROW)
