"""What serving through Dither costs: decode speed through it and straight from llama.cpp, in one run.

One engine process, one model, one slot; each round asks for the same answer twice, through Dither's server
and from the llama.cpp server behind it, in an order that alternates.  Tokens per second are counted by the
client, between the first token and the last, as llama.cpp's own figure would not see what a relay costs.
The ratio is the median over rounds of (through Dither ÷ direct), with the quartiles as its spread.  Rounds
are short, so that whatever else the machine does falls on both alike.  Beside it: the processor time that
Dither's side spends on each token, which no neighbor changes much.

    python benchmarks/serve_overhead.py [--model FILE] [--rounds 61] [--tokens 384] [--save NAME]
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dither

SECONDS = 0.6  # of one answer


def decode_speed(address: str, key: str, body: Mapping[str, Any]) -> float:
    """Tokens per second after the first, of one streamed answer."""
    connection = http.client.HTTPConnection(address)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.status == 200, response.read()
    first = last = 0.0
    tokens = 0
    for line in response:
        if line.startswith(b"data: {") and b'"finish_reason":null' in line:
            last = time.perf_counter()
            first = first or last
        if b'"usage":{' in line:
            tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    connection.close()
    assert tokens == body["max_tokens"], "an answer ended early: ignore its end token"
    return (tokens - 1) / (last - first)


def relay_seconds(server: dither.Server) -> float:
    """Processor time of the server's thread so far."""

    async def spent() -> float:
        return time.thread_time()

    assert server.loop is not None
    return asyncio.run_coroutine_threadsafe(spent(), server.loop).result()


def compare(model: Path, rounds: int, tokens: int, threads: int) -> dict[str, Any]:
    with dither.serve(model, context=512, slots=1, threads=threads) as server:
        assert server.app is not None
        engine: Any = server.app.pool.models[0].engine
        ways = {"dither": (urlsplit(server.url).netloc, "none"), "direct": (engine.address, engine.key)}
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": "Once"}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logit_bias": {"0": -100},
        }
        speed = [decode_speed(*way, body | {"max_tokens": 24}) for way in ways.values()][-1]  # a warm-up
        body["max_tokens"] = max(24, min(tokens, round(SECONDS * speed)))
        spent = 0.0
        found: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(rounds):
            for way in list(ways)[:: 1 if turn % 2 else -1]:
                before = relay_seconds(server)
                found[way].append(decode_speed(*ways[way], body))
                spent += relay_seconds(server) - before if way == "dither" else 0.0
    ratios = [through / direct for through, direct in zip(found["dither"], found["direct"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "model": model.name,
        "bytes": model.stat().st_size,
        "rounds": rounds,
        "tokens": body["max_tokens"],
        "relay_microseconds_per_token": round(1e6 * spent / rounds / body["max_tokens"], 1),
        "threads": threads,
        "ratio": round(middle, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "ratio_of_medians": round(statistics.median(found["dither"]) / statistics.median(found["direct"]), 4),
        "tokens_per_second": {way: round(statistics.median(speeds), 1) for way, speeds in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", help="GGUFs; default: the bundled model and")
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", metavar="NAME")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        models = chosen.model or defaults(Path(scratch))
        rows = [compare(model, chosen.rounds, chosen.tokens, chosen.threads) for model in models]
    print(json.dumps(rows, indent=1))
    if chosen.save:
        import record

        print(record.save(chosen.save, rows))


def defaults(folder: Path) -> list[Path]:
    """The bundled model, which is the hardest case, and one of a size that people serve on a laptop."""
    from serve_load import bundled
    from synthetic import write

    checkpoint = write(folder / "llama", layers=4)
    made = folder / "synthetic-Q4_K_M.gguf"
    dither.quantize(checkpoint, "Q4_K_M", made)
    return [bundled(folder), made]


if __name__ == "__main__":
    main()
