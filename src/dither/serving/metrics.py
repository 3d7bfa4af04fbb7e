"""What Prometheus reads: the server's own counts, then each engine's with the model's name on them.

Format: Prometheus' text exposition format 0.0.4.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from dither.serving.pool import Pool

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SAMPLE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})? (\S+)$")


class Metrics:
    """Counts since the server began."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, int]] = Counter()  # path, model, status
        self.gone = 0  # clients that hung up before the end
        self.first_seconds, self.first_count = 0.0, 0  # until an engine's first byte, waiting included

    def first_byte(self, seconds: float) -> None:
        self.first_seconds += seconds
        self.first_count += 1

    async def text(self, pool: Pool) -> str:
        lines = [*self._own(pool)]
        for held in pool.models:
            if held.engine is not None and held.ready:
                found = await held.engine.metrics()
                purpose = "embeddings" if held.embeddings else "text"
                lines += labelled(found, {"model": held.model.name, "purpose": purpose})
        return "\n".join(_grouped(lines)) + "\n"

    def _own(self, pool: Pool) -> Iterable[str]:
        yield from _family("dither_requests_total", "counter", "Requests answered.")
        for (path, model, status), count in sorted(self.requests.items()):
            yield _sample("dither_requests_total", {"path": path, "model": model, "status": str(status)}, count)
        yield from _family("dither_clients_gone_total", "counter", "Clients that hung up before the end.")
        yield _sample("dither_clients_gone_total", {}, self.gone)
        yield from _family("dither_requests_waiting", "gauge", "Requests that wait for a model or a slot.")
        yield _sample("dither_requests_waiting", {}, pool.waiting)
        yield from _family("dither_first_byte_seconds", "summary", "Until the engine's first byte.")
        yield _sample("dither_first_byte_seconds_sum", {}, round(self.first_seconds, 6))
        yield _sample("dither_first_byte_seconds_count", {}, self.first_count)
        for name, kind, said in (
            ("dither_requests_running", "gauge", "Requests that an engine works on."),
            ("dither_model_loaded", "gauge", "Whether the model is in memory."),
            ("dither_model_loads_total", "counter", "How often the model was loaded."),
            ("dither_model_memory_bytes", "gauge", "Memory the model needs, as predicted."),
        ):
            yield from _family(name, kind, said)
            for held in pool.models:
                if held.embeddings and not held.loads:
                    continue
                purpose = "embeddings" if held.embeddings else "text"
                values = {
                    "dither_requests_running": held.running,
                    "dither_model_loaded": int(held.ready),
                    "dither_model_loads_total": held.loads,
                    "dither_model_memory_bytes": held.need,
                }
                yield _sample(name, {"model": held.model.name, "purpose": purpose}, values[name])


def labelled(text: str, labels: dict[str, str]) -> list[str]:
    """Another's samples with labels added; comments as they are, anything else left out."""
    found = []
    for line in text.splitlines():
        if line.startswith("# "):
            found.append(line)
        elif sample := _SAMPLE.match(line):
            name, had, value = sample.groups()
            mine = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
            found.append(f"{name}{{{mine + (',' + had if had else '')}}} {value}")
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


def _family(name: str, kind: str, said: str) -> list[str]:
    return [f"# HELP {name} {said}", f"# TYPE {name} {kind}"]


def _sample(name: str, labels: dict[str, str], value: float) -> str:
    inner = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
    return f"{name}{{{inner}}} {value}" if inner else f"{name} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
