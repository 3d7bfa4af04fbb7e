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

from dither._version import __version__ as __version__
from dither.errors import DitherError as DitherError
from dither.system.discovery import room_path

__path__ = room_path(__path__, __name__)  # rooms take in files that lie elsewhere: see system/discovery.py

if TYPE_CHECKING:
    from dither.capacity.fit import fit as fit
    from dither.capacity.result import Fit as Fit
    from dither.codecs import codec as codec
    from dither.containers.mix import (
        Mix as Mix,
        Mix as Plan,  # noqa: F401
    )
    from dither.containers.presets import preset_names as preset_names
    from dither.formats.evidence import EvidenceStore as EvidenceStore
    from dither.loading.load import load as load
    from dither.measuring.calibrate import Calibration as Calibration, calibrate as calibrate
    from dither.measuring.measure import measure as measure
    from dither.measuring.schema import Measurement as Measurement
    from dither.models.source import open_model as open_model
    from dither.planning.budget import quantize_within as quantize_within
    from dither.planning.ladder import ladder as ladder
    from dither.planning.plan import Planned as Planned, budget as budget, plan as plan
    from dither.planning.reach import Budget as Budget
    from dither.quantizing.convert import Converted as Converted, convert as convert
    from dither.quantizing.quantize import Result as Result, preview as preview, quantize as quantize
    from dither.reporting.answers import answers as answers
    from dither.reporting.inspect import Inspection as Inspection, inspect as inspect
    from dither.reporting.notebook import Runs as Runs
    from dither.reporting.report import Report as Report, report as report, runs as runs
    from dither.running.bench import bench as bench
    from dither.running.benchmark import Benchmark as Benchmark
    from dither.running.export import Exported as Exported, export as export
    from dither.running.tasks import Scores as Scores, tasks as tasks
    from dither.serving.server import Server as Server, serve as serve

_MODULES = {  # the same for Python, which imports each on first use
    "capacity.fit": "fit",
    "capacity.result": "Fit",
    "codecs": "codec",
    "containers.mix": "Mix",
    "containers.presets": "preset_names",
    "formats.evidence": "EvidenceStore",
    "loading.load": "load",
    "measuring.calibrate": "Calibration calibrate",
    "measuring.measure": "measure",
    "measuring.schema": "Measurement",
    "models.source": "open_model",
    "planning.budget": "quantize_within",
    "planning.ladder": "ladder",
    "planning.plan": "Planned budget plan",
    "planning.reach": "Budget",
    "quantizing.convert": "Converted convert",
    "quantizing.quantize": "Result preview quantize",
    "reporting.answers": "answers",
    "reporting.inspect": "Inspection inspect",
    "reporting.notebook": "Runs",
    "reporting.report": "Report report runs",
    "running.bench": "bench",
    "running.benchmark": "Benchmark",
    "running.export": "Exported export",
    "running.tasks": "Scores tasks",
    "serving.server": "Server serve",
}
_HOMES = {name: (module, name) for module, names in _MODULES.items() for name in names.split()}
_HOMES["Plan"] = ("containers.mix", "Mix")  # its name in earlier versions
__all__ = sorted(["DitherError", "__version__", *_HOMES])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dither' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(import_module(f"dither.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
