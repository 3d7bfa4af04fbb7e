"""Hours at low load: does a server that is asked every few seconds grow, lose or mix anything?

What a leak of a descriptor or of a hundred bytes a request does shows only over hours.  `dither serve` runs as its
users run it, on the bundled model; one client asks every few seconds, in turn: a greedy answer that must be the one
it gave first, a list that a JSON schema forces to be this request's marker, a stream read to its end, a stream left
in the middle, a completion, a malformed request.  Memory and open files of server and engine are sampled every 30 s,
and the slope of a line through the second half says what grows.  The figures so far are written beside the others at
every sample, so that a run that ends early has said all it saw: `--from FILE` makes them the row's.

    python tools/campaign/soak.py --seconds 7200 --save      (`make soak`; no part of `make campaign`)
"""

from __future__ import annotations

import http.client
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from frame import Ask, Line, Row, main, save

import dither
from dither.running.memory import resident_bytes

SAMPLE_SECONDS, EVERY = 30.0, 4.0  # seconds between samples, and between requests on average
PROMPTS = ["The cat", "Once upon a time", "A model is", "Write a list", "In the morning", "What is light?"]


class Sample(NamedTuple):
    seconds: float
    server_bytes: int
    server_files: int
    engine_bytes: int
    engine_files: int


def open_files(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def child_of(pid: int) -> int:
    """The engine: the server's only child while one model is loaded."""
    found = [task.read_text().split() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    return int(next(ids[0] for ids in found if ids))


@contextmanager
def served(model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`dither serve` as a process of its own, ended as a person ends it."""
    words = [sys.executable, "-m", "dither", "serve", str(model), "--port", "0", "--json", *options]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            document = ""
            assert process.stdout
            for line in process.stdout:
                document += line
                if line == "}\n":
                    break
            yield process, json.loads(document)["url"]
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()


def post(url: str, path: str, body: bytes, most: int | None = None) -> tuple[int, bytes]:
    """One request over a connection of its own; `most` bytes are read before it is left."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
    try:
        connection.request("POST", f"/v1{path}", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read(most) if most else answer.read()
    finally:
        connection.close()


class Client:
    """One request of each kind in turn, and what came of them."""

    def __init__(self, url: str, seed: int) -> None:
        self.url, self.draw = url, random.Random(seed)
        self.first: dict[str, str] = {}
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.kinds = (self.greedy, self.marker, self.stream, self.vanish, self.complete, self.malformed)

    def turn(self, number: int) -> None:
        kind = self.kinds[number % len(self.kinds)]
        try:
            kind(number)
            self.answers[kind.__name__] += 1
        except (OSError, http.client.HTTPException, ValueError, KeyError, AssertionError) as error:
            self.wrong.append(f"request {number}, {kind.__name__}: {error!r}"[:300])

    def ask(self, prompt: str, **more: Any) -> bytes:
        return json.dumps({"messages": [{"role": "user", "content": prompt}], "temperature": 0, **more}).encode()

    def greedy(self, number: int) -> None:
        prompt = self.draw.choice(PROMPTS)
        status, raw = post(self.url, "/chat/completions", self.ask(prompt, max_tokens=32))
        assert status == 200, raw[:200]
        text = json.loads(raw)["choices"][0]["message"]["content"]
        assert text == self.first.setdefault(prompt, text), f"{prompt!r}: {text!r}, first {self.first[prompt]!r}"

    def marker(self, number: int, stream: bool = False) -> None:
        word = f"m{number}-{self.draw.randrange(10**6):06d}"
        schema = {"type": "array", "items": {"const": word}, "minItems": 3, "maxItems": 3}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body = self.ask(f"Say {word}.", max_tokens=300, response_format=form, stream=stream)
        status, raw = post(self.url, "/chat/completions", body)
        assert status == 200, raw[:200]
        if stream:
            lines = [line[6:] for line in raw.decode().split("\n") if line.startswith("data: ")]
            assert lines[-1] == "[DONE]", raw[-200:]
            events = [json.loads(line) for line in lines[:-1]]
            text = "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])
        else:
            text = json.loads(raw)["choices"][0]["message"]["content"]
        assert json.loads(text) == [word] * 3, text[:200]

    def stream(self, number: int) -> None:
        self.marker(number, stream=True)

    def vanish(self, number: int) -> None:
        status, _ = post(self.url, "/chat/completions", self.ask("Tell me", max_tokens=400, stream=True), most=300)
        assert status == 200

    def complete(self, number: int) -> None:
        status, raw = post(self.url, "/completions", b'{"prompt": "The", "max_tokens": 4, "temperature": 0}')
        assert status == 200, raw[:200]

    def malformed(self, number: int) -> None:
        body = self.draw.choice([b"{", b"[]", b'{"messages": 5}', b"[" * 50_000, b'{"messages": []', b"\xff"])
        status, raw = post(self.url, "/chat/completions", body)
        assert status == 400 and "error" in json.loads(raw), (status, raw[:200])


def slope_per_hour(samples: list[Sample], field: str) -> float:
    """The least squares line through the second half, in units per hour."""
    half = samples[len(samples) // 2 :]
    if len(half) < 2:
        return 0.0
    times = [sample.seconds / 3600 for sample in half]
    values = [float(getattr(sample, field)) for sample in half]
    mean_t, mean_v = sum(times) / len(times), sum(values) / len(values)
    above = sum((t - mean_t) * (v - mean_v) for t, v in zip(times, values, strict=True))
    return above / sum((t - mean_t) ** 2 for t in times)


def figures(client: Client, samples: list[Sample], exit_code: int | None) -> dict[str, Any]:
    last, middle = samples[-1], samples[len(samples) // 2]
    return {
        "hours": round(last.seconds / 3600, 3),
        "requests": dict(client.answers),
        "wrong": client.wrong[:20],
        "wrong_count": len(client.wrong),
        "samples": len(samples),
        "slope_per_hour": {name: round(slope_per_hour(samples, name), 1) for name in Sample._fields[1:]},
        "middle": middle._asdict(),
        "end": last._asdict(),
        "most_files": max(sample.server_files for sample in samples),
        "exit_code": exit_code,
        "every_tenth": [list(sample) for sample in samples[::10]],
    }


def bundled(folder: Path) -> Path:
    path = folder / "dither-demo-Q4_K_M.gguf"
    dither.quantize(str(files("dither") / "demo_model"), "Q4_K_M", path)
    return path


def soak(model: Path, seconds: float, seed: int, so_far: Path) -> dict[str, Any]:
    samples: list[Sample] = []
    with served(model, "-c", "512", "--slots", "2", "--threads", "1") as (process, url):
        client, engine, began = Client(url, seed), child_of(process.pid), time.monotonic()
        number, sampled = 0, -SAMPLE_SECONDS
        while (now := time.monotonic() - began) < seconds:
            client.turn(number)
            number += 1
            if now - sampled >= SAMPLE_SECONDS:
                pids = (process.pid, engine)
                samples.append(Sample(round(now, 1), *(f(pid) for pid in pids for f in (resident_bytes, open_files))))
                sampled = now
                so_far.write_text(json.dumps(figures(client, samples, None), indent=1) + "\n")
            time.sleep(EVERY * (0.5 + client.draw.random()))
        process.send_signal(signal.SIGTERM)
        return figures(client, samples, process.wait(60))


def lines(found: dict[str, Any]) -> list[Line]:
    asked = Line("one client, a request every few seconds: answered whole and as before")
    asked.tried, asked.broke = sum(found["requests"].values()) + found["wrong_count"], found["wrong_count"]
    asked.failures = found["wrong"]
    asked.figures = {"hours": found["hours"], **found["requests"]}
    flat = Line("memory and open files of server and engine over the second half", tried=found["samples"])
    half = found["hours"] / 2
    for name, slope in found["slope_per_hour"].items():
        shown = f"{slope / 2**20:+.2f} MiB" if name.endswith("bytes") else f"{slope:+.1f}"
        flat.figures[f"{name.replace('_', ' ')}, an hour"] = shown
        most = max(2 * 2**20, 0.05 * found["middle"][name]) if name.endswith("bytes") else 2
        if slope * half > most:
            flat.broke += 1
            flat.failures.append(f"{name} grows by {shown} an hour")
    for name in ("server_bytes", "engine_bytes"):
        mib = [round(found[when][name] / 2**20, 1) for when in ("middle", "end")]
        flat.figures[name.replace("_bytes", " MiB")] = f"{mib[0]} → {mib[1]}"
    flat.figures["most files"] = found["most_files"]
    return [asked, flat]


def run(ask: Ask) -> Sequence[Line]:
    return lines(soak(bundled(ask.work), ask.seconds, ask.seed, Path("soak-so-far.json")))


def main_or_keep() -> None:
    row = Row("soak", "Two hours at low load", run)  # no ROW: `all.py` leaves it out
    if sys.argv[1:2] == ["--from"]:
        found = json.loads(Path(sys.argv[2]).read_text())
        print(save(row, 0, 3600 * found["hours"], lines(found), "python tools/campaign/soak.py --seconds 7200 --save"))
    else:
        main(row)


if __name__ == "__main__":
    main_or_keep()
