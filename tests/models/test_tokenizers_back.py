"""A GGUF's tokenizer as a checkpoint's files: the same texts, the same tokens, in the library that made them.

The reference is the tokenizers library on the original tokenizer, sentencepiece on its own model, and llama.cpp.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from families_util import NASTY, TEXT, byte_level_tokenizer, random_model, save_tokenizer, split_chain, with_bos
from gguf import GGUFReader
from test_tokenizers import TINY, made_of
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, GenerationConfig

import dither
from dither.errors import FormatError, SourceError, UnsupportedError
from dither.formats.ggml import Field, ValueType, array, boolean, string, u32
from dither.models.arch import convert
from dither.models.arch.sampling import sampling_fields
from dither.models.checkpoint import open_checkpoint
from dither.models.json_object import JsonObject
from dither.models.tokenizers import pre
from dither.models.tokenizers.compared import Difference, chosen, told
from dither.models.tokenizers.original import tokenizer_notes
from dither.models.tokenizers.restored import restored
from dither.types import Model

NAMED = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    random_model(TINY).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(weights: Path, tmp_path: Path) -> Path:
    """A checkpoint without a tokenizer."""
    out = tmp_path / "model"
    out.mkdir()
    for name in ("model.safetensors", "config.json"):
        (out / name).write_bytes((weights / name).read_bytes())
    return out


def back(model: Model) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(restored(model.metadata).tokenizer))


def trained(**rules: Any) -> bytes:
    model = io.BytesIO()
    given = {"vocab_size": 420, "model_type": "bpe", "byte_fallback": True, "character_coverage": 0.99, **rules}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXT.split("\n"), *NASTY] * 3),
        model_writer=model,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **given,
    )
    return model.getvalue()


def sentencepiece_folder(folder: Path, model: bytes, **settings: Any) -> Model:
    (folder / "tokenizer.model").write_bytes(model)
    given = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    return convert(open_checkpoint(folder))


@pytest.mark.parametrize("chain", pre.CHAINS, ids=lambda chain: chain.name)
def test_every_chain_is_read_backwards(chain: pre.Chain, folder: Path) -> None:
    original = made_of(chain, learned_under_it=False)
    save_tokenizer(original, folder)
    model = convert(open_checkpoint(folder))
    found = back(model)
    for text in (*NASTY, TEXT):
        assert found.encode(text).ids == original.encode(text).ids, text
        assert found.decode(found.encode(text).ids) == text


def test_further_names_of_a_chain_are_known_and_others_refused() -> None:
    assert set(pre.ALIASES.values()) <= {chain.name for chain in (*pre.CHAINS, *pre.NAMED)}
    assert pre.chain_of("llama3").steps == pre.chain_of("llama-bpe").steps and pre.chain_of("llama3").whole_words
    assert pre.chain_of("command-r") == pre.chain_of("smollm")
    with pytest.raises(UnsupportedError, match=r"pre: is chameleon, whose expressions are not known.*--pre NAME"):
        pre.chain_of("chameleon")


def test_tokens_of_every_kind_come_back(folder: Path) -> None:
    """Signs beyond ASCII, tokens of spaces, marks that are special and marks that are not."""
    original = with_bos(byte_level_tokenizer(split_chain(pre.QWEN2)))
    original.add_tokens([AddedToken("⟦werkzeug⟧", normalized=False), AddedToken("    ", normalized=False)])
    original.add_special_tokens(["<|im_start|>", "<｜ende｜>"])
    save_tokenizer(original, folder, pad_token="<|im_start|>")
    model = convert(open_checkpoint(folder))
    files = restored(model.metadata)
    added = {entry["content"]: entry for entry in files.tokenizer["added_tokens"]}
    assert {text: entry["special"] for text, entry in added.items()} == {
        "<s>": True, "</s>": True, "⟦werkzeug⟧": False, "    ": False, "<|im_start|>": True, "<｜ende｜>": True,
    }  # fmt: skip
    assert files.settings["pad_token"] == "<|im_start|>" and files.special["bos"] == original.token_to_id("<s>")
    found = back(model)
    texts = ("a⟦werkzeug⟧b", "    x     y", "<|im_start|>user\nHé<｜ende｜>\n", *NASTY)
    for text in texts:
        assert found.encode(text).ids == original.encode(text).ids, text


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_comes_back_with_or_without_a_space_in_front(prefix: bool, folder: Path) -> None:
    raw = trained(add_dummy_prefix=prefix, user_defined_symbols=["<|im_start|>", "⟦x⟧"])
    model = sentencepiece_folder(folder, raw)
    original, found = sentencepiece.SentencePieceProcessor(model_proto=raw), back(model)
    for text in (*NASTY, TEXT):
        expected = original.encode(text)
        assert found.encode(text, add_special_tokens=False).ids == expected, text
        assert found.decode(expected) == text
    assert found.encode("x").ids == [1, *original.encode("x")]  # llama.cpp puts <s> there, and so does the file
    assert found.encode("⟦x⟧", add_special_tokens=False).ids == [original.piece_to_id("⟦x⟧")]


def test_phi_3s_marks_eat_the_space_behind_them_by_the_models_name(folder: Path) -> None:
    """Source: `llama_vocab::impl::load` of llama.cpp, which looks at general.name."""
    raw = trained(user_defined_symbols=["<|endoftext|>", "<|end|>"])
    model = sentencepiece_folder(folder, raw)
    for name, eats in (("Phi-3-mini", {"</s>", "<|end|>"}), ("Phi-4", set())):
        added = restored({**model.metadata, "general.name": string(name)}).tokenizer["added_tokens"]
        assert {entry["content"] for entry in added if entry["rstrip"]} == eats


def test_what_a_file_leaves_open_is_what_llama_cpp_assumes(folder: Path) -> None:
    model = sentencepiece_folder(folder, trained())
    bare = ("bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token", "add_eos_token", "add_space_prefix")
    assumed = {key: f for key, f in model.metadata.items() if key.removeprefix("tokenizer.ggml.") not in bare}
    assert restored(assumed).tokenizer == restored(model.metadata).tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_a_folder_holds_templates_ids_and_ends(kind: str, folder: Path, tmp_path: Path) -> None:
    templates = [{"name": name, "template": text} for name, text in NAMED.items()]
    if kind == "byte-level":
        original = byte_level_tokenizer(split_chain(pre.QWEN2))
        original.add_special_tokens(["<|im_end|>"])
        save_tokenizer(original, folder, chat_template=templates)
    else:
        sentencepiece_folder(folder, trained(control_symbols=["<|im_end|>"]), chat_template=templates)
    dither.quantize(folder, "F32", tmp_path / "model.gguf")
    dither.convert(tmp_path / "model.gguf", tmp_path / "back")
    found = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert found.chat_template == NAMED
    end, mark = found.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [end, mark]  # llama.cpp ends at the mark by its text
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == end
    again = dither.open_model(tmp_path / "back").metadata
    first = dither.open_model(tmp_path / "model.gguf").metadata
    for key in (key for key in first if key.startswith("tokenizer.") and not key.endswith(".scores")):
        assert list_of(again[key]) == list_of(first[key]), key


@pytest.mark.slow
def test_sentencepiece_without_bytes_is_told(folder: Path, tmp_path: Path) -> None:
    sentencepiece_folder(folder, trained(byte_fallback=False))
    [note] = dither.quantize(folder, "F32", tmp_path / "model.gguf").notes
    assert "no byte tokens, so llama.cpp stops with an error" in note and "write a folder" in note
    notes = dither.convert(tmp_path / "model.gguf", tmp_path / "back").result.notes
    assert any("no byte tokens" in note for note in notes)


@pytest.mark.slow
def test_a_text_that_is_cut_otherwise_is_named(folder: Path) -> None:
    save_tokenizer(byte_level_tokenizer(split_chain(pre.QWEN2)), folder)
    assert tokenizer_notes(convert(open_checkpoint(folder))) == []
    [note] = tokenizer_notes(convert(open_checkpoint(folder), pre="gpt-2"))
    assert note.startswith("the tokenizers differ at ") and "llama.cpp makes" in note and "tokenizer.json makes" in note


@pytest.mark.slow
def test_metadata_that_has_no_place_is_named(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(byte_level_tokenizer(split_chain(pre.QWEN2)), folder)
    model = convert(open_checkpoint(folder))
    more = {
        "general.license": string("mit"),
        "general.sampling.top_k": u32(20),
        "tokenizer.ggml.fim_pre_token_id": u32(3),
    }
    model = with_metadata(model, {**more, "llama.attention.scale": u32(2)})
    path = tmp_path / "model.gguf"
    dither.quantize(model, "F32", path)
    notes = dither.convert(path, tmp_path / "back").result.notes
    assert (
        "metadata that a folder has no place for is left out: general.license, tokenizer.ggml.fim_pre_token_id" in notes
    )
    assert "metadata llama.attention.scale is not taken into account" in notes
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["top_k"] == 20


@pytest.mark.slow
def test_how_tokens_are_drawn_goes_into_a_gguf_and_back(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(byte_level_tokenizer(split_chain(pre.QWEN2)), folder)
    stated = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05)
    stated.save_pretrained(folder)
    dither.quantize(folder, "F32", tmp_path / "model.gguf")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert fields["general.sampling.top_k"].contents() == 20
    assert fields["general.sampling.temp"].contents() == pytest.approx(0.6)
    dither.convert(tmp_path / "model.gguf", tmp_path / "back")
    back = GenerationConfig.from_pretrained(tmp_path / "back")
    for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty"):
        assert getattr(back, name) == getattr(stated, name)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [({"do_sample": False, "temperature": 0.6}, {}), ({"min_p": 0.5, "top_p": None}, {"general.sampling.min_p": 0.5})],
)
def test_greedy_generation_draws_nothing(stated: dict[str, Any], expected: dict[str, float]) -> None:
    found = sampling_fields(JsonObject(stated, "generation_config.json"))
    assert {name: field.value for name, field in found.items()} == expected


def test_a_temperature_in_words_is_refused() -> None:
    with pytest.raises(FormatError, match="temperature: is 'warm', but a number"):
        sampling_fields(JsonObject({"temperature": "warm"}, "generation_config.json"))


def list_of(field: Field) -> Any:
    return list(field.value) if field.type is ValueType.ARRAY else field.value


def with_metadata(model: Model, fields: dict[str, Field]) -> Model:
    return replace(model, metadata={**model.metadata, **fields})


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"tokenizer.ggml.model": string("t5")}, UnsupportedError, "model: is t5, which is no tokenizer"),
        ({"tokenizer.ggml.tokens": u32(3)}, SourceError, "tokens: is no list of texts"),
        ({"tokenizer.ggml.token_type": array(ValueType.INT32, [1, 1])}, SourceError, "2 entries for"),
        ({"tokenizer.ggml.tokens": array(ValueType.STRING, ["a", "a"])}, SourceError, "entries for 2 tokens"),
        ({"tokenizer.ggml.tokens": array(ValueType.STRING, ["\udcff"])}, SourceError, "tokens: is no list of texts"),
        ({"tokenizer.ggml.token_type": array(ValueType.STRING, ["x"])}, SourceError, "is no list of numbers"),
        ({"tokenizer.ggml.token_type": u32(1)}, SourceError, "token_type: is no list of numbers"),
        ({"tokenizer.chat_template.x": u32(1)}, SourceError, "chat_template, x: is no text"),
        ({"tokenizer.ggml.pre": string("made-up")}, UnsupportedError, "pre: is made-up"),
    ],
)
def test_lists_that_contradict_each_other_are_an_error(
    fields: dict[str, Field], error: type[Exception], message: str, folder: Path
) -> None:
    save_tokenizer(byte_level_tokenizer(split_chain(pre.QWEN2)), folder)
    metadata = {**convert(open_checkpoint(folder)).metadata, **fields, "tokenizer.ggml.add_bos_token": boolean(False)}
    with pytest.raises(error, match=message):
        restored(metadata)


def test_a_note_names_the_first_text_and_where_the_ids_part() -> None:
    found = [Difference("a\nb", [1, 2, 3, 4], [1, 2, 9]), Difference("c", None, [5])]
    assert told(found[:1], "the folder") == [
        r"the tokenizers differ at 'a\nb': llama.cpp makes … 2 3 4, the folder makes … 2 9"
    ]
    assert "(1 more of the texts tried differs too)" in told(found, "the folder")[0]
    assert "llama.cpp stops with an error" in told(found[1:], "the folder")[0]
    assert chosen(["<s>", "</s>", "<unk>", *(f"<{i}>" for i in range(999)), "⟦ä⟧"])[0] == "⟦ä⟧"
