"""What a conversion cannot carry from one kind of file to the other, said before work starts.

A GGUF becomes a GGUF, and a folder a folder, with all that stands beside the weights.  Between the two kinds metadata
becomes config.json and a tokenizer becomes another's, or the other way round: what has no place is named, and a few
texts are cut both ways.
"""

from __future__ import annotations

from dither.models.tokenizers.original import tokenizer_notes
from dither.types import Model


def carried_notes(model: Model, *, is_folder: bool) -> list[str]:
    """Notes on what will differ in a folder (`is_folder`) or a GGUF made of `model`.

    Raises UnsupportedError for a GGUF whose network or tokenizer no folder can hold.
    """
    if model.kind == "gguf" and is_folder:
        from dither.models.blocks import not_carried

        return not_carried(model)
    return tokenizer_notes(model) if model.kind == "safetensors" and not is_folder else []
