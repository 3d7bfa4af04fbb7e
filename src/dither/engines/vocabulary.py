"""A model's tokenizer, exactly as llama.cpp applies it, without the model's weights.

Every `Model` carries GGUF's tokenizer metadata, whether it was opened from a checkpoint or from a
GGUF.  That metadata is written beside the smallest weights that llama.cpp accepts (one Llama block,
32 wide, all zero: 18 bytes per token of vocabulary as Q4_0) and the file is opened by llama.cpp
itself.  So there is one tokenizer, the one that will meet the quantized file, and no second
implementation that could disagree with it.

Source: `tools/server/README.md` in llama.cpp (`/tokenize`, `/detokenize`, `/apply-template`).
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from dither.engines.llamacpp import LlamaCpp
from dither.errors import UnsupportedError
from dither.formats.ggml import f32, string, u32
from dither.formats.gguf import lay_out
from dither.types import Model

_WIDTH = 32  # one block of Q4_0
_TOKENS = "tokenizer.ggml.tokens"
_IDENTITY = (_TOKENS, "tokenizer.ggml.merges", "tokenizer.ggml.pre", "tokenizer.ggml.model")


class Vocabulary:
    """Text to token ids and back, as llama.cpp does it.  A context manager.

    Raises UnsupportedError where the model's metadata holds no token list, EngineError where
    llama.cpp refuses the tokenizer.
    """

    def __init__(self, model: Model) -> None:
        if _TOKENS not in model.metadata:
            raise UnsupportedError(model.origin, "carries no token list", "Take a file that holds its tokenizer.")
        self._folder = tempfile.TemporaryDirectory(prefix="dither-vocabulary-")
        try:
            path = Path(self._folder.name) / "vocabulary.gguf"
            _write_dummy(model, path)
            self._engine = LlamaCpp(path, context=8, threads=1)
        except BaseException:
            self._folder.cleanup()
            raise
        self.size = self._engine.vocabulary_size

    def tokenize(self, text: str, parse_special: bool = False, add_special: bool = False) -> list[int]:
        """Token ids of the whole text in one piece, nothing added around it unless `add_special`.

        With `parse_special`, markers such as `<|im_start|>` become the tokens they name; without,
        they are text like any other, as in llama-imatrix and llama-perplexity.
        """
        return self._engine.tokenize(text, parse_special=parse_special, add_special=add_special) if text else []

    def detokenize(self, tokens: Sequence[int]) -> str:
        return self._engine.detokenize(tokens)

    @property
    def bos(self) -> int | None:
        return self._engine.bos

    @property
    def has_chat_template(self) -> bool:
        return self._engine.has_chat_template

    def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that the model's chat template makes of `messages` ({"role", "content"} each)."""
        return self._engine.apply_template(messages)

    def close(self) -> None:
        self._engine.close()
        self._folder.cleanup()

    def __enter__(self) -> Vocabulary:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def vocabulary_fingerprint(model: Model) -> str:
    """sha256 over tokens, merges, pre-tokenizer and kind: equal where equal text gives equal ids."""
    digest = hashlib.sha256()
    for key in _IDENTITY:
        field = model.metadata.get(key)
        items = [] if field is None else field.value if isinstance(field.value, list) else [field.value]
        digest.update(f"{key}\0{len(items)}\0".encode())
        for item in items:
            digest.update(str(item).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _write_dummy(model: Model, path: Path) -> None:
    """The tokenizer's metadata on zeros: what llama.cpp needs to load a file, and nothing more."""
    size = len(model.metadata[_TOKENS].value)
    fields = {"general.architecture": string("llama")}
    # llama.cpp reads rules out of a model's name, Phi-3's among them.
    fields |= {key: model.metadata[key] for key in ("general.name",) if key in model.metadata}
    fields |= {
        "llama.block_count": u32(1),
        "llama.context_length": u32(64),
        "llama.embedding_length": u32(_WIDTH),
        "llama.feed_forward_length": u32(_WIDTH),
        "llama.attention.head_count": u32(1),
        "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
        "llama.vocab_size": u32(size),
    }
    fields |= {key: field for key, field in model.metadata.items() if key.startswith("tokenizer.")}
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    tensors: list[tuple[str, tuple[int, ...], str]] = [
        ("token_embd.weight", (size, _WIDTH), "Q4_0"),
        ("output_norm.weight", (_WIDTH,), "F32"),
        ("blk.0.attn_norm.weight", (_WIDTH,), "F32"),
        ("blk.0.ffn_norm.weight", (_WIDTH,), "F32"),
        *((f"blk.0.{name}.weight", (_WIDTH, _WIDTH), "Q4_0") for name in matrices),
    ]
    layout = lay_out(fields, tensors)
    with path.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.total)
