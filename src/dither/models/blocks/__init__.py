"""A model one decoder block at a time: whatever its size, never more than one block in memory.

A GGUF of 70 billion parameters has 80 blocks of under a billion each.  Calibrating, measuring and
training rounding all walk the same path: embed the tokens, run every sequence through block 0, drop it,
run block 1, …, and end at the head.

    metadata.py  an architecture's keys, checked as they are read
    config.py    a checkpoint's config.json, or GGUF's metadata → the configuration that transformers builds from
    rotary.py    GGUF's rotary embedding → transformers' parameters of it
    llama3.py    Llama 3.1's scaling found again in its factors
    restore.py   GGUF's tensors → the parameters of transformers' modules, and back
    watch.py     what each linear layer reads, seen while a block computes
    block.py     one block, and the head behind the last
    stream.py    the walk itself: `Blocks`
    network.py   what transformers' class takes, held against a checkpoint
    saved.py     what a checkpoint's folder says beside its weights

The arithmetic is transformers' own; here is only what brings GGUF's tensors to it.  torch and
transformers are imported on first use, because the rest of Dither works without them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dither.errors import UsageError
from dither.types import Model

if TYPE_CHECKING:
    from dither.models.blocks.block import Block, Head
    from dither.models.blocks.network import check_network
    from dither.models.blocks.saved import checkpoint_config, not_carried, save_tokenizer
    from dither.models.blocks.stream import Blocks
    from dither.models.blocks.watch import See

__all__ = [
    "Block",
    "Blocks",
    "Head",
    "See",
    "check_network",
    "checkpoint_config",
    "not_carried",
    "open_blocks",
    "save_tokenizer",
]

_HOMES = {
    "Block": "block", "Head": "block", "Blocks": "stream", "See": "watch", "check_network": "network",
    "checkpoint_config": "saved", "not_carried": "saved", "save_tokenizer": "saved",
}  # fmt: skip


def open_blocks(model: Model, *, device: str = "cpu", dtype: str = "float32") -> Blocks:
    """The network of an opened model, ready to load block by block; no weight is read yet.

    `dtype` is what the blocks compute in: "float32" or "bfloat16".  Raises UnsupportedError where
    nothing here knows the architecture or one of its settings, SourceError where tensors are missing
    or of other shapes than the metadata makes them, UsageError where torch or transformers is missing.
    """
    return _home("stream").open_blocks(model, device=device, dtype=dtype)  # type: ignore[no-any-return]


def _home(module: str) -> Any:
    try:
        return import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("torch", "transformers"):
            raise
        reason = f"needs {error.name}, which is not installed"
        raise UsageError("running a model", reason, "pip install 'dither[calibrate]'") from None


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_home(_HOMES[name]), name)
