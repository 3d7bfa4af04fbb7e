"""Every constant of the arithmetic, by name, for programs in other languages that compute the same.

The dashboard's page does (`reporting/page/js/memory.js`): it is handed these numbers with its document
instead of repeating them, so that a constant is changed in one place.
"""

from __future__ import annotations

from typing import Any

from dither.capacity import advice, memory, recommendation, speed

_NAMES = (
    (memory, ("CELLS", "BATCH", "KV_TYPES", "RUNTIME", "TOKEN", "MERGE", "GPU_RUNTIME", "MARGIN_MOST", "MARGIN_SHARE")),
    (speed, ("LOW", "LIKELY", "HIGH", "CPU_LAYER", "GPU_LAYER", "SAMPLING")),
    (advice, ("READING",)),
    (recommendation, ("LADDER", "LEAST_GOOD", "GOOD_BITS")),
)


def constants() -> dict[str, Any]:
    """Bytes, tokens, seconds and shares, as their modules name them."""
    return {name.lower(): _as_json(getattr(module, name)) for module, names in _NAMES for name in names}


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(inner) for name, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value
