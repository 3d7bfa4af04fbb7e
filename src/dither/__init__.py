"""Dither: quantize large language models, prove what that cost, and run them.

    import dither
    result = dither.quantize("path/to/checkpoint", "Q4_K_M", "model.gguf")
    print(result.bits_per_weight, result.relative_error)
    print(dither.inspect("model.gguf").bits_per_weight)

With evidence the file loses far less, and `measure` says how much:

    dither.calibrate("path/to/checkpoint", out="evidence")
    dither.quantize("path/to/checkpoint", "Q4_K_M", "better.gguf", evidence="evidence")
    print(dither.measure(["better.gguf"], "path/to/checkpoint")[0].kl_mean)

And before any of that, `dither.fit("org/name", memory="16GiB").recommendation` says what runs here.

Everything is imported on first use: `import dither` itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dither.errors import DitherError

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dither._answers import answers
    from dither._calibrate import Calibration, calibrate
    from dither._convert import Converted, convert
    from dither._fit import fit
    from dither._inspect import Inspection, inspect
    from dither._load import load
    from dither._measure import measure
    from dither._plan import Budget, Planned, budget, plan
    from dither._quantize import Result, preview, quantize
    from dither._report import Report, report, runs
    from dither._within import ladder, quantize_within
    from dither.codecs import codec
    from dither.containers.presets import preset_names
    from dither.containers.recipe import Plan
    from dither.fitting.result import Fit
    from dither.formats.evidence import EvidenceStore
    from dither.measuring.schema import Measurement
    from dither.models.source import open_model
    from dither.showing.notebook import Runs

_HOMES = {
    "Budget": "dither._plan",
    "Calibration": "dither._calibrate",
    "Converted": "dither._convert",
    "EvidenceStore": "dither.formats.evidence",
    "Fit": "dither.fitting.result",
    "Inspection": "dither._inspect",
    "Measurement": "dither.measuring.schema",
    "Plan": "dither.containers.recipe",
    "Planned": "dither._plan",
    "Report": "dither._report",
    "Result": "dither._quantize",
    "Runs": "dither.showing.notebook",
    "answers": "dither._answers",
    "budget": "dither._plan",
    "calibrate": "dither._calibrate",
    "codec": "dither.codecs",
    "convert": "dither._convert",
    "fit": "dither._fit",
    "inspect": "dither._inspect",
    "ladder": "dither._within",
    "load": "dither._load",
    "measure": "dither._measure",
    "open_model": "dither.models.source",
    "plan": "dither._plan",
    "preset_names": "dither.containers.presets",
    "preview": "dither._quantize",
    "quantize": "dither._quantize",
    "quantize_within": "dither._within",
    "report": "dither._report",
    "runs": "dither._report",
}

__all__ = [
    "Budget",
    "Calibration",
    "Converted",
    "DitherError",
    "EvidenceStore",
    "Fit",
    "Inspection",
    "Measurement",
    "Plan",
    "Planned",
    "Report",
    "Result",
    "Runs",
    "__version__",
    "answers",
    "budget",
    "calibrate",
    "codec",
    "convert",
    "fit",
    "inspect",
    "ladder",
    "load",
    "measure",
    "open_model",
    "plan",
    "preset_names",
    "preview",
    "quantize",
    "quantize_within",
    "report",
    "runs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dither' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
