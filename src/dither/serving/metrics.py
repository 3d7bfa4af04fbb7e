"""What Prometheus reads: the server's own counts, then each engine's with the model's name on them.

Format: Prometheus' text exposition format 0.0.4.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

from dither.serving.pool import Pool, PooledModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SAMPLE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})? (\S+)$")


class Metrics:
    """Counts since the server began."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, int]] = Counter()  # path, model, status
        self.gone = 0  # clients that hung up before the end
        self.first_seconds, self.first_count = 0.0, 0  # until an engine's first byte, waiting included

    async def text(self, pool: Pool) -> str:
        lines = list(self._own(pool))
        for held in pool.models:
            if held.engine is not None and held.ready:
                lines += labelled(await held.engine.metrics(), _labels(held))
        return "\n".join(_grouped(lines)) + "\n"

    def _own(self, pool: Pool) -> Iterable[str]:
        answered = [
            ({"path": path, "model": model, "status": str(status)}, count)
            for (path, model, status), count in sorted(self.requests.items())
        ]
        first = "dither_first_byte_seconds"
        yield from _family("dither_requests_total", "counter", "Requests answered.", answered)
        gone = "Clients that hung up before the end."
        yield from _family("dither_clients_gone_total", "counter", gone, [({}, self.gone)])
        waiting = "Requests that wait for a model or a slot."
        yield from _family("dither_requests_waiting", "gauge", waiting, [({}, pool.waiting)])
        yield from _family(first, "summary", "Until the engine's first byte.", [])
        yield from (f"{first}_sum {round(self.first_seconds, 6)}", f"{first}_count {self.first_count}")
        models = [(_labels(held), held) for held in pool.models if held.loads or not held.embeddings]
        for name, kind, said, value in _OF_MODELS:
            yield from _family(name, kind, said, [(labels, value(held)) for labels, held in models])


_OF_MODELS: tuple[tuple[str, str, str, Callable[[PooledModel], int]], ...] = (
    ("dither_requests_running", "gauge", "Requests that an engine works on.", lambda held: held.running),
    ("dither_model_loaded", "gauge", "Whether the model is in memory.", lambda held: int(held.ready)),
    ("dither_model_loads_total", "counter", "How often the model was loaded.", lambda held: held.loads),
    ("dither_model_memory_bytes", "gauge", "Memory the model needs, as predicted.", lambda held: held.need),
)


def _labels(held: PooledModel) -> dict[str, str]:
    return {"model": held.model.name, "purpose": "embeddings" if held.embeddings else "text"}


def labelled(text: str, labels: dict[str, str]) -> list[str]:
    """Another's samples with labels added; comments as they are, anything else left out."""
    found = []
    for line in text.splitlines():
        if line.startswith("# "):
            found.append(line)
        elif sample := _SAMPLE.match(line):
            name, had, value = sample.groups()
            found.append(f"{name}{{{_written(labels) + (',' + had if had else '')}}} {value}")
    return found


def _grouped(lines: list[str]) -> list[str]:
    """The format wants all samples of a family together, under its comments, which come once."""
    families: dict[str, list[str]] = {}
    name = ""
    for line in lines:
        if line.startswith("# "):
            name = line.split(" ", 3)[2]
            if line in families.setdefault(name, []):
                continue
        families.setdefault(name, []).append(line)
    return [line for family in families.values() for line in family]


def _family(name: str, kind: str, said: str, samples: Iterable[tuple[dict[str, str], float]]) -> Iterable[str]:
    yield from (f"# HELP {name} {said}", f"# TYPE {name} {kind}")
    for labels, value in samples:
        yield f"{name}{{{_written(labels)}}} {value}" if labels else f"{name} {value}"


def _written(labels: dict[str, str]) -> str:
    escaped = {key: text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for key, text in labels.items()}
    return ",".join(f'{key}="{text}"' for key, text in escaped.items())
