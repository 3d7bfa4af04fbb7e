"""Dither: quantize large language models, prove what that cost, and run them.

    import dither
    result = dither.quantize("path/to/checkpoint", "Q4_K_M", "model.gguf")
    print(result.bits_per_weight, result.relative_error)
    print(dither.inspect("model.gguf").bits_per_weight)

Everything is imported on first use: `import dither` itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dither.errors import DitherError

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dither._inspect import Inspection, inspect
    from dither._quantize import Result, preview, quantize
    from dither.codecs import codec
    from dither.containers.presets import preset_names
    from dither.containers.recipe import Plan
    from dither.models.source import open_model

_HOMES = {
    "Inspection": "dither._inspect",
    "Plan": "dither.containers.recipe",
    "Result": "dither._quantize",
    "codec": "dither.codecs",
    "inspect": "dither._inspect",
    "open_model": "dither.models.source",
    "preset_names": "dither.containers.presets",
    "preview": "dither._quantize",
    "quantize": "dither._quantize",
}

__all__ = [
    "DitherError",
    "Inspection",
    "Plan",
    "Result",
    "__version__",
    "codec",
    "inspect",
    "open_model",
    "preset_names",
    "preview",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dither' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
