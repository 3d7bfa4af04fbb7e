"""A checkpoint's own tokenizer, run by its own library where that is installed, to hold the written one against it.

Neither library is needed for converting; both are small, and whoever has transformers has the first.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dither.engines.llama_start import EngineError
from dither.models.tokenizers.compared import differences, told
from dither.models.tokenizers.restored import uncovered
from dither.models.tokenizers.sentencepiece import MODEL_FILE
from dither.models.tokenizers.vocabulary import TokenType
from dither.system.text import shown
from dither.types import Model

JSON_FILE = "tokenizer.json"


def tokenizer_notes(model: Model) -> list[str]:
    """What a GGUF of a checkpoint does with text otherwise than the checkpoint's own tokenizer."""
    signs = uncovered(model.metadata)
    if signs is not None:
        return [
            f"the tokenizer has no byte tokens, so llama.cpp stops with an error at {signs}. Transformers reads such a "
            "character as the unknown token: write a folder instead (--to safetensors, gptq, …), or take a model whose "
            "tokenizer has byte fallback"
        ]
    if "tokenizer.ggml.tokens" not in model.metadata:
        return []
    files = {Path(file).name: Path(file) for file in model.files}
    tokens, types = (model.metadata[f"tokenizer.ggml.{key}"].value for key in ("tokens", "token_type"))
    matched = (TokenType.CONTROL, TokenType.USER_DEFINED)
    marks = [token for token, kind in zip(tokens, types, strict=True) if kind in matched]
    try:
        if JSON_FILE in files:
            return _of_json(model, files[JSON_FILE], marks)
        return _of_sentencepiece(model, files[MODEL_FILE]) if MODEL_FILE in files else []
    except EngineError as error:
        return [f"llama.cpp does not take the tokenizer that was written: {shown(str(error))}"]
    except OSError as error:  # no place for the vocabulary that llama.cpp is to open: the conversion may have one
        return [f"the tokenizers were not compared: {error.strerror or error} in the folder for temporary files"]


def _of_json(model: Model, path: Path, marks: Sequence[str]) -> list[str]:
    if find_spec("tokenizers") is None:
        return []
    library: Any = importlib.import_module("tokenizers")
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        return [f"{JSON_FILE} could not be tried: the tokenizers library does not load it ({shown(str(error))})"]
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str) -> Sequence[int]:
        ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def whole(text: str) -> Sequence[int]:
        ids: Sequence[int] = tokenizer.encode(text).ids
        return ids

    return told(differences(model, encode, whole, marks), JSON_FILE)


def _of_sentencepiece(model: Model, path: Path) -> list[str]:
    """Plain text alone: what stands around it, and marks in it, are transformers' business."""
    if find_spec("sentencepiece") is None:
        return []
    library: Any = importlib.import_module("sentencepiece")
    encode = library.SentencePieceProcessor(model_proto=path.read_bytes()).encode
    return told(differences(model, encode, None, ()), MODEL_FILE)
