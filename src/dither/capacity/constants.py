"""Every constant of the arithmetic, by name, for programs in other languages that compute the same.

The dashboard's page does (`reporting/page/js/memory.js`): it is handed these numbers with its document
instead of repeating them, so that a constant is changed in one place.
"""

from __future__ import annotations

import json
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
    found = {name.lower(): getattr(module, name) for module, names in _NAMES for name in names}
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]  # lists for tuples
