"""Many clients at once on one served model: is every answer whole and its own, does anything leak?

`dither serve` runs as its users run it.  Clients stream, over and over; some read slowly, some vanish in
the middle.  A JSON schema forces each answer to be a list of a marker that no other request has: a mix-up
of any kind changes it, while batches of other sizes, which change a model's last digits, do not.

Counted: answers that were whole, wrong, cut; refusals with 429; the longest queue seen; resident memory of
the server and of the engine over time; what still runs at the end.

    python benchmarks/serve_load.py [--model FILE] [--clients 64] [--seconds 120] [--save NAME]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dither.running.memory import resident_bytes

TIMES = 5  # the marker in one answer
SLOTS, QUEUE = 8, 32
KINDS = ("plain",) * 7 + ("slow",) + ("vanish",) * 2


@dataclass
class Seen:
    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    server_rss: list[int] = field(default_factory=list)
    engine_rss: list[int] = field(default_factory=list)
    longest_queue: int = 0


def ask(marker: str) -> dict[str, Any]:
    items = {"type": "array", "items": {"const": marker}, "minItems": TIMES, "maxItems": TIMES}
    return {
        "messages": [{"role": "user", "content": f"Say {marker}."}],
        "stream": True,
        "max_tokens": 450,
        "stream_options": {"include_usage": True},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": items}},
    }


async def request(address: tuple[str, int], path: str, body: dict[str, Any] | None) -> Any:
    reader, writer = await asyncio.open_connection(*address)
    payload = b"" if body is None else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    head = "\r\n".join([*lines, f"Content-Length: {len(payload)}", "", ""])
    writer.write(head.encode() + payload)
    header = (await reader.readuntil(b"\r\n\r\n")).decode()
    return int(header.split()[1]), header.lower(), reader, writer


async def one(address: tuple[str, int], marker: str, kind: str, seen: Seen) -> float:
    """One request; how long to wait before the next."""
    began = time.monotonic()
    status, header, reader, writer = await request(address, "/v1/chat/completions", ask(marker))
    try:
        if status == 429:
            seen.answers["refused, to come again"] += 1
            assert "retry-after:" in header
            return 0.2 + random.random()
        if status != 200:
            seen.wrong.append(f"status {status}: {(await reader.read()).decode()[:200]}")
            return 0.0
        raw = b""
        leave_after = random.randrange(300, 6000)
        while piece := await reader.read(200 if kind == "slow" else 65536):
            raw += piece
            if kind == "slow":
                await asyncio.sleep(0.02)
            if kind == "vanish" and len(raw) > leave_after:
                seen.answers["left by the client"] += 1
                return 0.0
        check(raw, marker, seen)
        seen.seconds.append(time.monotonic() - began)
        return 0.0
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def check(raw: bytes, marker: str, seen: Seen) -> None:
    """The answer must be the marker, so many times, and the stream must have its end."""
    lines = [line for line in raw.decode().split("\n") if line.startswith("data: ")]
    if not lines or lines[-1] != "data: [DONE]":
        seen.wrong.append(f"{marker}: cut off after {len(raw)} bytes")
        return
    events = [json.loads(line[6:]) for line in lines[:-1]]
    text = "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])
    try:
        right = json.loads(text) == [marker] * TIMES and events[-1]["usage"]["total_tokens"] > 0
    except (ValueError, KeyError):
        right = False
    if right:
        seen.answers["whole and its own"] += 1
    else:
        seen.wrong.append(f"{marker}: {text[:200]!r}")


async def client(address: tuple[str, int], number: int, until: float, seen: Seen) -> None:
    draw = random.Random(number)
    turn = 0
    while time.monotonic() < until:
        marker = f"c{number}-t{turn}-{draw.randrange(10**6):06d}"
        try:
            await asyncio.sleep(await one(address, marker, draw.choice(KINDS), seen))
        except (OSError, asyncio.IncompleteReadError) as error:
            seen.wrong.append(f"{marker}: {error!r}")
        turn += 1


async def metrics(address: tuple[str, int]) -> dict[str, float]:
    _, _, reader, writer = await request(address, "/metrics", None)
    text = (await reader.read()).decode()
    writer.close()
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name.partition("{")[0]: float(value) for name, value in rows if "embeddings" not in name}


def child_of(pid: int) -> int:
    found = [task.read_text().split() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    return int(next(ids[0] for ids in found if ids))


async def watch(address: tuple[str, int], pid: int, until: float, seen: Seen) -> None:
    engine = child_of(pid)
    while time.monotonic() < until:
        found = await metrics(address)
        seen.longest_queue = max(seen.longest_queue, int(found["dither_requests_waiting"]))
        seen.server_rss.append(resident_bytes(pid))
        seen.engine_rss.append(resident_bytes(engine))
        await asyncio.sleep(0.5)


async def load(url: str, pid: int, clients: int, seconds: float) -> dict[str, Any]:
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    seen, until = Seen(), time.monotonic() + seconds
    jobs = [client(address, number, until, seen) for number in range(clients)]
    await asyncio.gather(watch(address, pid, until, seen), *jobs)
    for _ in range(100):  # what vanished at the very end
        left = await metrics(address)
        if not left["dither_requests_running"] + left["llamacpp:requests_processing"]:
            break
        await asyncio.sleep(0.1)
    half = len(seen.server_rss) // 2
    return {
        "clients": clients,
        "seconds": seconds,
        "slots": SLOTS,
        "queue": QUEUE,
        "answers": dict(seen.answers),
        "wrong": seen.wrong[:20],
        "wrong_count": len(seen.wrong),
        "median_seconds": round(statistics.median(seen.seconds), 3) if seen.seconds else None,
        "longest_queue": seen.longest_queue,
        "server_rss": _flatness(seen.server_rss, half),
        "engine_rss": _flatness(seen.engine_rss, half),
        "left": {
            name: left[name]
            for name in (
                "dither_requests_running",
                "dither_requests_waiting",
                "llamacpp:requests_processing",
                "llamacpp:requests_deferred",
            )
        },
    }


def _flatness(sizes: list[int], half: int) -> dict[str, float]:
    """Bytes in the middle of the run and at its end; growth is what leaks."""
    middle = statistics.median(sizes[half // 2 : half] or sizes)
    end = statistics.median(sizes[-max(1, half // 2) :])
    return {"middle": middle, "end": end, "growth": round(end / middle - 1, 4)}


def run(model: Path, clients: int, seconds: float) -> dict[str, Any]:
    words = [
        sys.executable,
        "-m",
        "dither",
        "serve",
        str(model),
        "--port",
        "0",
        "-c",
        "512",
        "--json",
        "--slots",
        str(SLOTS),
        "--queue",
        str(QUEUE),
        "--threads",
        "1",
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            document = ""
            assert process.stdout
            for line in process.stdout:
                document += line
                if line == "}\n":
                    break
            result = asyncio.run(load(json.loads(document)["url"], process.pid, clients, seconds))
            process.send_signal(signal.SIGTERM)
            return result | {"exit_code": process.wait(60)}
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF; default: the bundled model as Q4_K_M")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--save", metavar="NAME")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = run(chosen.model or bundled(Path(scratch)), chosen.clients, chosen.seconds)
    print(json.dumps(result, indent=1))
    if chosen.save:
        import record

        print(record.save(chosen.save, [result]))
    if result["wrong_count"] or result["exit_code"]:
        raise SystemExit(1)


def bundled(folder: Path) -> Path:
    from importlib.resources import files

    import dither

    path = folder / "dither-demo-Q4_K_M.gguf"
    dither.quantize(str(files("dither") / "demo_model"), "Q4_K_M", path)
    return path


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
