"""Checkpoints, opened and run: where tensors come from, what a family calls them, its network block by block."""

from dither.system.discovery import room_path

__path__ = room_path(__path__, __name__)
