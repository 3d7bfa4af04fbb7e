"""The tokenizer without its model: against `tokenizers` and against llama.cpp with the whole model."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import LlamaConfig

from dither.engines.llamacpp import EngineError, LlamaCpp
from dither.engines.vocabulary import Vocabulary, vocabulary_fingerprint
from dither.errors import UnsupportedError
from dither.models.source import open_model
from models.families_util import NASTY, byte_level_tokenizer, converted, random_model, save_model, with_bos

pytestmark = pytest.mark.slow  # real engines: `make test` runs it, `make check` does not

TINY = {
    "vocab_size": 500, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 1, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def tiny(folder: Path, tokenizer: Tokenizer) -> Path:
    return save_model(random_model(LlamaConfig(**TINY)), folder, tokenizer)


def test_bundled_model_tokenizes_as_its_own_tokenizer_json() -> None:
    folder = Path(str(files("dither") / "demo_model"))
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "\n\n".join(NASTY) + "\n <|endoftext|> is text here"
    with Vocabulary(open_model(folder)) as vocabulary:
        assert vocabulary.size == reference.get_vocab_size()
        assert vocabulary.bos is None
        for piece in NASTY:
            ids = vocabulary.tokenize(piece)
            assert ids == reference.encode(piece, add_special_tokens=False).ids
            assert vocabulary.detokenize(ids) == piece
        assert 0 not in vocabulary.tokenize(text)
        assert 0 in vocabulary.tokenize(text, parse_special=True)
        assert vocabulary.tokenize("") == []


def test_tokens_are_those_of_llama_cpp_with_the_weights(tmp_path: Path) -> None:
    path = converted(tiny(tmp_path / "model", byte_level_tokenizer(size=500)))
    text = "\n".join(NASTY) * 20
    with Vocabulary(open_model(path)) as vocabulary, LlamaCpp(path, context=32, threads=1) as engine:
        assert vocabulary.tokenize(text) == engine.tokenize(text, parse_special=False)


def test_begin_token_is_known_only_where_one_is_added(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(size=500)
    plain = open_model(tiny(tmp_path / "plain", tokenizer))
    begun = open_model(tiny(tmp_path / "begun", with_bos(tokenizer)))
    with Vocabulary(plain) as vocabulary:
        assert vocabulary.bos is None
    with Vocabulary(begun) as vocabulary:
        assert vocabulary.bos == tokenizer.token_to_id("<s>")


def test_fingerprint_tells_vocabularies_apart(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(size=500)
    folder = tiny(tmp_path / "model", tokenizer)
    same = vocabulary_fingerprint(open_model(converted(folder)))
    assert vocabulary_fingerprint(open_model(folder)) == same
    other = tiny(tmp_path / "other", byte_level_tokenizer(size=480))
    assert vocabulary_fingerprint(open_model(other)) != same


def test_file_without_tokens_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "bare.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="no token list"):
        Vocabulary(open_model(tmp_path / "bare.gguf"))


def test_closed_vocabulary_says_so_and_leaves_no_file(tmp_path: Path) -> None:
    folder = Path(str(files("dither") / "demo_model"))
    with Vocabulary(open_model(folder)) as vocabulary:
        path = vocabulary._engine.path
        assert path.exists()
    assert not path.exists()
    with pytest.raises(EngineError, match="closed"):
        vocabulary.tokenize("a")
