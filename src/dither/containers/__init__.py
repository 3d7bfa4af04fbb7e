"""Files that quantized weights travel in: GGUF and folders of safetensors, their presets, mixes and plans."""

from __future__ import annotations

from dither.system.discovery import room_path

__path__ = room_path(__path__, __name__)
