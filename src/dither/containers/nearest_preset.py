"""The preset that comes closest to a size from below: what a planned file is named after, and raced with."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

from dither.containers.mix import Options, make_mix
from dither.containers.presets import preset_names
from dither.errors import UsageError
from dither.formats.ggml import FLOAT_TYPES
from dither.types import Model


def nearest_preset(model: Model, size: int, importance: Collection[str] = ()) -> str:
    """The largest preset whose tensors take at most `size` bytes; the smallest where none is."""
    sizes = {}
    for name in preset_names():
        with suppress(UsageError):  # a type that needs importance, or columns that nothing of it fits
            sizes[name] = make_mix(model, Options(name), importance).tensor_bytes
    fitting = [name for name, own in sizes.items() if own <= size and name not in FLOAT_TYPES]
    return max(fitting, key=sizes.__getitem__) if fitting else min(sizes, key=sizes.__getitem__)
