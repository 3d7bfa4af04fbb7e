"""What a checkpoint's folder says beside its weights, made from a GGUF's metadata by transformers."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from dither.errors import UnsupportedError
from dither.models.blocks.config import configure
from dither.system.text import shown
from dither.types import Model


def checkpoint_config(model: Model) -> dict[str, Any]:
    """config.json of the network that a model's metadata describes."""
    configured = configure(model)
    found: dict[str, Any] = configured.config.to_dict()
    return {**found, "architectures": [configured.family.architectures[0]]}


def save_tokenizer(model: Model, folder: Path) -> list[str]:
    """Writes the tokenizer of a GGUF into a folder; the names of its files.

    Raises UnsupportedError where transformers cannot make one of it.
    """
    path = Path(model.files[0])
    with tempfile.TemporaryDirectory() as scratch:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            tokenizer.save_pretrained(scratch)
        except Exception as error:  # tokenizers raises nothing narrower on a vocabulary it does not expect
            reason = f"has a tokenizer that transformers cannot save ({shown(str(error))})"
            way_out = "Convert the checkpoint it was made from, or write a GGUF."
            raise UnsupportedError(model.origin, reason, way_out) from error
        names = sorted(file.name for file in Path(scratch).iterdir())
        for name in names:
            shutil.copyfile(Path(scratch) / name, folder / name)
    return names
