"""What every type of every tensor costs, as far as it has been found out: a file beside the evidence.

    divergence of tensor t at its probe's type · ratio of the errors of that type and of the probe's

is the predicted KL divergence of storing t in that type; those of a whole file add up
(`measuring.sensitivity`).  The file grows tensor by tensor and outlives a run that is killed; what made it is
in its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dither.progress import Progress, Silent
from dither.system.files import replace

_VERSION = 1


@dataclass
class Costs:
    """`probe`: tensor → the type it was measured at; `divergence`: nats per token; `ratios`: tensor → type →
    its error over that of the probe's type."""

    path: Path
    probe: dict[str, str] = field(default_factory=dict)
    divergence: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, progress: Progress | None = None) -> Costs:
        """What is known already.  A file that cannot be understood counts as none, and `progress` is told:
        what it held took minutes or hours to measure."""
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["version"] != _VERSION:
                raise ValueError("written by another version")
            probe = {str(name): str(kind) for name, kind in kept["probe"].items()}
            ratios = {str(name): _numbers(found) for name, found in kept["ratios"].items()}
            return cls(path, probe, _numbers(kept["divergence"]), ratios)
        except FileNotFoundError:
            return cls(path)  # nothing was measured yet
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            text = f"{path} is damaged: the sensitivities it held are lost, and are measured again."
            (progress or Silent()).note(text)
            return cls(path)

    def save(self) -> None:
        """Raises OutputError where the disk refuses."""
        document = {"version": _VERSION, "probe": self.probe, "divergence": self.divergence, "ratios": self.ratios}
        replace(self.path, json.dumps(document, allow_nan=False).encode(), "Free some space and run it again.")

    def found(self, divergence: Mapping[str, float]) -> None:
        self.divergence |= divergence
        self.save()

    def predicted(self, tensor: str, kind: str) -> float:
        """Nats per token."""
        return self.divergence[tensor] * self.ratios[tensor][kind]


def _numbers(found: Mapping[str, object]) -> dict[str, float]:
    numbers = {str(name): float(value) for name, value in found.items()}  # type: ignore[arg-type]
    if not all(math.isfinite(value) and value >= 0 for value in numbers.values()):
        raise ValueError("not a finite number of at least 0")
    return numbers
