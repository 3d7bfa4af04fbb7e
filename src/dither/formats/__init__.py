"""Bytes on disk: each file format is read with suspicion and written here; what they mean is for other rooms."""

from __future__ import annotations

from dither.system.discovery import room_path

__path__ = room_path(__path__, __name__)
