"""Files that quantized weights travel in: GGUF and folders of safetensors, their presets, mixes and plans."""

from __future__ import annotations

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
