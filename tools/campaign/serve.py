"""A server under load while its engine is killed and its model's file is exchanged: is anything lost or mixed?

`dither serve` runs as its users run it, with 64 clients at once: streams read to their end, streams read slowly,
streams left in the middle, requests that are none, and greedy answers without a stream.  A JSON schema forces every
stream to be a marker that no other request has, so that a mix-up of any kind shows; a greedy answer must not be that
of another prompt (its own last words may differ: batches of other sizes change a model's last digits).

While that goes on, the engine gets SIGKILL, the file is replaced by another model's, by garbage, or cut short under
the engine's map.  A client may then be told so, by a status or by an event in its stream; what is neither whole nor
told is lost.  `/health` must say 503 while the model loads, and the server's memory and open files end as they began.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from frame import Ask, Line, Row, main
from serve_load import TIMES, ask, child_of, request
from soak import open_files, served

import dither
from dither.running.memory import resident_bytes

CLIENTS, SLOTS, QUEUE = 64, 8, 32
KINDS = ("stream",) * 6 + ("slow", "vanish", "vanish", "malformed", "malformed", "greedy", "greedy")
PROMPTS = [f"{word} is" for word in ("Water", "The king", "A stone", "My sister", "Iron", "Winter", "A ship", "Bread")]
MALFORMED = [
    b"{",
    b"[]",
    b"\xff\xfe",
    b'{"messages": 5}',
    b'{"messages": []}',
    b"[" * 10_000,
    b'{"messages": [{"role": 1}]}',
]
CHAT = "/v1/chat/completions"


class Bench:
    """The server under test, and what became of every request of a phase."""

    def __init__(self, url: str, pid: int, model: Path, draw: random.Random) -> None:
        parts = urlsplit(url)
        self.address = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.pid, self.model, self.draw = pid, model, draw
        self.alone: dict[str, str] = {}
        self.requests = 0

    async def post(self, body: Any) -> tuple[int, Any, Any]:
        if isinstance(body, bytes):
            reader, writer = await asyncio.open_connection(*self.address)
            head = (
                f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            return int((await reader.readuntil(b"\r\n\r\n")).split()[1]), reader, writer
        status, _, reader, writer = await request(self.address, CHAT, body)
        return status, reader, writer

    async def greedy(self, prompt: str) -> tuple[int, str]:
        body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 24}
        status, reader, writer = await self.post(body)
        raw = await reader.read()
        writer.close()
        document = json.loads(raw)
        return status, document["choices"][0]["message"]["content"] if status == 200 else document["error"]["code"]

    async def health(self) -> int:
        status, _, reader, writer = await request(self.address, "/health", None)
        await reader.read()
        writer.close()
        return int(status)

    def engine(self) -> int | None:
        try:
            return child_of(self.pid)
        except (StopIteration, OSError):
            return None

    def kill(self) -> bool:
        pid = self.engine()
        if pid is None:
            return False
        os.kill(pid, signal.SIGKILL)
        return True


async def one(bench: Bench, kind: str, marker: str, told_is_fine: bool) -> tuple[str, str | None]:
    """What became of one request: in a word, and what was wrong with that, if anything."""
    if kind == "malformed":
        status, reader, writer = await bench.post(bench.draw.choice(MALFORMED))
        error = json.loads(await reader.read()).get("error")
        writer.close()
        return "malformed, refused", None if status == 400 and error else f"malformed: {status} {error}"
    if kind == "greedy":
        prompt = bench.draw.choice(PROMPTS)
        status, text = await bench.greedy(prompt)
        if status != 200:
            return _told(status, text, told_is_fine)
        if text == bench.alone[prompt]:
            return "greedy, as alone", None
        other = [p for p in PROMPTS if p != prompt and bench.alone[p] == text]
        return "greedy, other last words", f"{prompt!r} got the answer of {other[0]!r}" if other else None
    status, reader, writer = await bench.post(ask(marker))
    try:
        raw, leave_after = b"", bench.draw.randrange(300, 6000)
        while piece := await reader.read(200 if kind == "slow" else 65536):
            raw += piece
            if kind == "slow":
                await asyncio.sleep(0.02)
            if kind == "vanish" and status == 200 and len(raw) > leave_after:
                return "left by its client", None
    finally:
        writer.close()
    if status != 200:
        return _told(status, json.loads(raw)["error"]["code"], told_is_fine)
    return _streamed(raw, marker, told_is_fine)


def _told(status: int, code: str, told_is_fine: bool) -> tuple[str, str | None]:
    if status == 429:
        return "told to come again", None
    fine = told_is_fine and (status, code) in ((502, "engine"), (503, "model_not_loaded"), (503, "unavailable"))
    return f"told {code}", None if fine else f"status {status}, {code}"


def _streamed(raw: bytes, marker: str, told_is_fine: bool) -> tuple[str, str | None]:
    lines = [line[6:] for line in raw.decode().split("\n") if line.startswith("data: ")]
    if lines and lines[-1].startswith('{"error"'):
        return "told in its stream", None if told_is_fine else f"{marker}: {lines[-1]}"
    if not lines or lines[-1] != "[DONE]":
        return "cut", f"{marker}: cut off after {len(raw)} bytes, without a word"
    events = [json.loads(line) for line in lines[:-1]]
    text = "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])
    right = text == json.dumps([marker] * TIMES) or json.loads(text) == [marker] * TIMES
    return "whole and its own", None if right else f"{marker}: {text[:200]!r}"


async def phase(bench: Bench, line: Line, seconds: float, disturb: Callable[[float], Awaitable[None]] | None) -> None:
    until, became = time.monotonic() + seconds, Counter[str]()

    async def client(number: int) -> None:
        draw, turn = random.Random(f"{line.what} {number}"), 0
        while time.monotonic() < until:
            marker, kind = f"c{number}-t{turn}-{draw.randrange(10**6):06d}", draw.choice(KINDS)
            try:
                word, wrong = await asyncio.wait_for(one(bench, kind, marker, disturb is not None), 120)
            except (OSError, ValueError, KeyError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
                word, wrong = "lost", f"{marker}, {kind}: {error!r}"
            became[word] += 1
            line.count(wrong)
            await asyncio.sleep(0.2 + draw.random() if word.startswith("told") else 0)
            turn += 1

    disturbing = asyncio.ensure_future(disturb(until)) if disturb else None
    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    if disturbing:
        await disturbing
    line.figures |= dict(sorted(became.items()))


async def recovered(bench: Bench, line: Line, what: str) -> None:
    """The next requests load the model anew, and while nothing is loaded `/health` says so."""
    began, seen = time.monotonic(), Counter[int]()
    asked = asyncio.ensure_future(bench.greedy(PROMPTS[0]))
    while not asked.done() and time.monotonic() - began < 60:
        seen[await bench.health()] += 1
        await asyncio.sleep(0.01)
    status, text = await asked
    line.figures["seconds until it answers"] = f"{time.monotonic() - began:.1f}"
    line.figures["503 from /health meanwhile"] = line.figures.get("503 from /health meanwhile", 0) + seen[503]
    line.count(None if status == 200 and seen[503] else f"{what}: {status} {text!r}, /health {dict(seen)}")


async def trial(bench: Bench, ask_: Ask, other: Path) -> list[Line]:
    for prompt in PROMPTS:
        bench.alone[prompt] = (await bench.greedy(prompt))[1]
    plain = Line(f"{CLIENTS} clients: streams, slow, vanishing, malformed, greedy")
    killed = Line("the same, the engine killed (SIGKILL) every few seconds")
    exchanged = Line("the same, the model's file replaced, cut short, and put back")
    alone = Line("after a kill, one client: answered, and 503 from /health while it loads")
    flat = Line("memory and open files of the server at the end, against the first quiet moment")
    good = bench.model.with_name("good.gguf")
    shutil.copy(bench.model, good)

    async def kill(until: float) -> None:
        while time.monotonic() < until - 2:
            await asyncio.sleep(1 + 2 * bench.draw.random())
            killed.figures["kills"] = killed.figures.get("kills", 0) + bench.kill()

    def put(path: Path) -> None:
        new = bench.model.with_name("new")
        shutil.copy(path, new)
        new.replace(bench.model)

    async def exchange(until: float) -> None:
        """Another model's file, then garbage, each under the name while the engine has the old one mapped."""
        step = max(1.0, (until - time.monotonic()) / 8)
        garbage = bench.model.with_name("garbage")
        garbage.write_bytes(b"GGUF" + bytes(1000))
        for path, killing in ((other, False), (other, True), (garbage, False), (garbage, True), (good, True)):
            put(path)
            exchanged.figures["replaced"] = exchanged.figures.get("replaced", 0) + 1
            if killing:
                bench.kill()
            await asyncio.sleep(step)
        with bench.model.open("r+b") as file:  # under the map: SIGBUS in the engine, not in the server
            file.truncate(good.stat().st_size // 2)
        exchanged.figures["cut short"] = 1
        await asyncio.sleep(step)
        put(good)
        bench.kill()

    share = ask_.seconds * 0.8 / 3
    await phase(bench, plain, share, None)
    await asyncio.sleep(2)
    before = resident_bytes(bench.pid), open_files(bench.pid)
    await phase(bench, killed, share, kill)
    await phase(bench, exchanged, share, exchange)
    await asyncio.sleep(2)
    while alone.tried < 3:
        bench.kill()
        await asyncio.sleep(0.3)
        await recovered(bench, alone, "after a kill")
    after = resident_bytes(bench.pid), open_files(bench.pid)
    flat.figures = {"MiB": f"{before[0] / 2**20:.1f} → {after[0] / 2**20:.1f}", "files": f"{before[1]} → {after[1]}"}
    grown = after[0] > 1.15 * before[0] + 2**23 or after[1] > before[1] + 2
    flat.count(f"grew: {flat.figures}" if grown else None)
    return [plain, killed, exchanged, alone, flat]


def run(ask_: Ask) -> Sequence[Line]:
    model, other = ask_.work / "m.gguf", ask_.work / "other.gguf"
    for path, kind in ((model, "Q4_K_M"), (other, "Q8_0")):
        dither.quantize(str(files("dither") / "demo_model"), kind, path)
    options = ("-c", "512", "--slots", str(SLOTS), "--queue", str(QUEUE), "--threads", "1")
    with served(model, *options) as (process, url):
        lines = asyncio.run(trial(Bench(url, process.pid, model, random.Random(ask_.seed)), ask_, other))
        process.send_signal(signal.SIGTERM)
        lines[-1].count(None if process.wait(60) == 0 else f"the server ended with {process.returncode}")
    return lines


def untried() -> str:
    return "" if Path("/proc/self/status").exists() else "memory and children are read from Linux's /proc"


ROW = Row("serve", "A server under load", run, share=6, untried=untried)

if __name__ == "__main__":
    main(ROW)
