"""What `dither fit` found, as records: for Python, and as one JSON document.

Units: bytes, tokens per second, KL divergence in nats per token.  Every figure has a tag that says where
it is from: *measured* (counted in a header, timed here, or a measurement of this model), *estimated* (by a
formula that was checked against the real thing, see docs/fit.md), *literature* (published by others), *told*
(by the person).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dither.capacity.advice import FITS, EngineAdvice, Verdict
from dither.capacity.machine import ESTIMATED, MEASURED, Device, Machine
from dither.capacity.memory import Memory, Shape, margin
from dither.capacity.quality import Quality
from dither.display import table
from dither.units import format_bytes


@dataclass(frozen=True)
class Candidate:
    """One type of the model, or the file as it is; bytes, tokens per second, KL in nats per token."""

    type: str
    file: str | None  # where it lies already
    bits_per_weight: float
    memory: Memory
    verdict: Verdict
    quality: Quality | None
    needs_importance: bool
    notes: tuple[str, ...] = ()
    active: int = 0  # bytes of weights read per token
    embedding: int = 0  # bytes of a token embedding that is no output matrix

    @property
    def fits(self) -> bool:
        return self.verdict.word in FITS

    def to_json(self) -> dict[str, Any]:
        speed, quality, memory = self.verdict.speed, self.quality, self.memory
        sizes = {
            f"{part}_bytes": getattr(memory, part) for part in ("weights", "cache", "compute", "overhead", "total")
        }
        return {
            "type": self.type,
            "file": self.file,
            "bits_per_weight": self.bits_per_weight,
            **sizes,
            "verdict": self.verdict.word,
            "gpu_layers": self.verdict.gpu_layers,
            "tokens_per_second": speed.likely if speed else None,
            "tokens_per_second_low": speed.low if speed else None,
            "tokens_per_second_high": speed.high if speed else None,
            "no_speed_because": self.verdict.why_no_speed,
            "kl": quality.kl if quality else None,
            "kl_source": quality.source if quality else None,
            "needs_importance": self.needs_importance,
            "notes": list(self.notes),
            "tags": {
                "bits_per_weight": MEASURED,
                **{name: MEASURED if name == "weights_bytes" else ESTIMATED for name in sizes},
                "tokens_per_second": ESTIMATED,
                "kl": quality.tag if quality else None,
            },
        }


@dataclass(frozen=True)
class Fit:
    """What `dither fit` found."""

    model: str
    arch: str
    parameters: int
    context: int  # tokens per slot
    kv: str
    slots: int
    machine: Machine
    shape: Shape
    candidates: tuple[Candidate, ...]  # the largest first
    chosen: str | None  # a candidate's type, None where nothing fits
    recommendation: str
    commands: tuple[str, ...]
    ruled_out: tuple[tuple[str, str], ...]  # which, why
    engines: tuple[EngineAdvice, ...]
    bytes_read: int | None  # from the network, None where nothing was asked of it
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether anything does, wholly in memory."""
        return any(candidate.fits for candidate in self.candidates)

    def _repr_html_(self) -> str:
        """In a notebook."""
        rows = [_shown(candidate) for candidate in self.candidates]
        heads = ("type", "bits per weight", "memory", "runs", "tokens per second", "KL divergence")
        title = f"{self.model}, contexts of {self.context} tokens, cache in {self.kv}"
        return table(title, heads, rows, [self.recommendation, *self.commands, *self.notes])

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "architecture": self.arch,
            "parameters": self.parameters,
            "context": self.context,
            "kv": self.kv,
            "slots": self.slots,
            "machine": _machine_json(self.machine),
            "fits": self.fits,
            "chosen": self.chosen,
            "recommendation": self.recommendation,
            "commands": list(self.commands),
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "ruled_out": [{"what": what, "why": why} for what, why in self.ruled_out],
            "engines": [asdict(engine) for engine in self.engines],
            "bytes_read": self.bytes_read,
            "notes": list(self.notes),
        }


def _shown(candidate: Candidate) -> tuple[str, ...]:
    speed, quality = candidate.verdict.speed, candidate.quality
    return (
        candidate.type,
        f"{candidate.bits_per_weight:.2f}",
        format_bytes(candidate.memory.total),
        candidate.verdict.word,
        f"{speed.likely:.3g} ({ESTIMATED})" if speed else "",
        f"{quality.kl:.3g} ({quality.tag})" if quality else "",
    )


def _machine_json(machine: Machine) -> dict[str, Any]:
    def device(found: Device) -> dict[str, Any]:
        return {
            "name": found.name,
            "bytes": found.bytes,
            "bandwidth": found.bandwidth,
            "tags": {"bytes": found.how_bytes, "bandwidth": found.how_bandwidth or None},
        }

    return {
        "cpu": machine.cpu,
        "cores": machine.cores,
        "memory": device(machine.memory),
        "free_bytes": machine.free,
        "margin_bytes": margin(machine.memory.bytes),
        "gpus": [device(gpu) for gpu in machine.gpus],
        "unified": machine.unified,
        "tags": {"free_bytes": MEASURED, "margin_bytes": ESTIMATED, "cores": MEASURED},
    }
