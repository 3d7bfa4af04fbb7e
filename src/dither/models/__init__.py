"""Checkpoints, opened and run: where tensors come from, what a family calls them, its network block by block."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
