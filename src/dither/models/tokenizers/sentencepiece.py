"""Sentencepiece BPE (Kudo & Richardson 2018): Llama 2, Mistral, Gemma and Phi-3.

Spaces are written ▁ and merged like letters; what no token covers falls back to bytes.  A merge is
chosen by the score of the token it makes.  Two files may hold it:

    tokenizer.model   sentencepiece's own, a protobuf: pieces with scores and types
    tokenizer.json    transformers' copy: the tokens, and merges in the order of those scores

The protobuf is read by hand: three fields of it are wanted, the wire format is twenty lines, and a
file from a stranger is better met with bounds checks than with a C++ parser.

Source: sentencepiece_model.proto (field numbers), Protocol Buffers' encoding guide (wire format).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dither.errors import FormatError, UnsupportedError
from dither.models.json_object import JsonObject
from dither.models.tokenizers.byte_level import merges as merges_of, vocabulary_of
from dither.models.tokenizers.vocabulary import AddedToken, Token, TokenList, TokenType, overlay

MODEL_FILE = "tokenizer.model"
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
SPECIAL_IDS = {40: "unknown", 41: "bos", 42: "eos", 43: "padding"}  # TrainerSpec's fields; −1 means none
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass
class SentencePieceModel:
    """What a tokenizer.model says."""

    tokens: list[Token] = field(default_factory=list)
    model_type: int = UNIGRAM  # the default of the .proto
    add_dummy_prefix: bool = True
    collapse_spaces: bool = True
    has_character_map: bool = False
    special: dict[str, int] = field(default_factory=lambda: {"unknown": 0, "bos": 1, "eos": 2})


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: int, float (32 bits) or bytes.

    Raises FormatError where a length leads outside the message or a wire type is unknown.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        size, at = _varint(data, at) if wire == BYTES else ({FIXED32: 4, FIXED64: 8}.get(wire, -1), at)
        if size < 0 or at + size > len(data):
            raise _damaged()
        raw = data[at : at + size]
        yield number, struct.unpack("<f", raw)[0] if wire == FIXED32 else raw
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not data[at - 1] & 0x80:
            return value, at
    raise _damaged()


def _damaged() -> FormatError:
    return FormatError(MODEL_FILE, "is no sentencepiece model", "Fetch the file again.")


def parse(data: bytes) -> SentencePieceModel:
    """The pieces of a tokenizer.model.  Raises FormatError where it is none."""
    found = SentencePieceModel()
    for number, value in fields(data):
        if not isinstance(value, bytes):
            continue
        if number == 1:
            found.tokens.append(_piece(value))
        elif number == 2:
            spec = dict(fields(value))
            if not all(isinstance(spec.get(key, 0), int) for key in (3, *SPECIAL_IDS)):
                raise _damaged()
            found.model_type = spec.get(3, found.model_type)
            numbers = {**found.special, **{SPECIAL_IDS[key]: spec[key] for key in SPECIAL_IDS if key in spec}}
            found.special = {name: number for name, number in numbers.items() if number < 2**31}
        elif number == 3:
            spec = dict(fields(value))
            found.has_character_map = bool(spec.get(2))
            found.add_dummy_prefix, found.collapse_spaces = bool(spec.get(3, 1)), bool(spec.get(4, 1))
    if not found.tokens:
        raise _damaged()
    return found


def _piece(data: bytes) -> Token:
    parts = dict(fields(data))
    try:
        kind = TokenType(parts.get(3, TokenType.NORMAL))
        return Token(parts[1].decode(), kind, float(parts.get(2, 0.0)))
    except (KeyError, ValueError, AttributeError) as error:
        raise _damaged() from error


def read_model(
    data: bytes, tokenizer: JsonObject | None, added: Mapping[int, AddedToken], space_prefix: bool | None
) -> TokenList:
    """A vocabulary from tokenizer.model, with tokenizer.json (if there is one) deciding about prefixes.

    Raises UnsupportedError for a unigram model, which llama.cpp's `llama` tokenizer is not.
    """
    pieces = parse(data)
    if pieces.model_type != BPE:
        way_out = "llama.cpp merges by score, as BPE does: no GGUF of this tokenizer would be right."
        raise UnsupportedError(MODEL_FILE, "is not BPE but another kind of sentencepiece model", way_out)
    tokens = dict(enumerate(pieces.tokens))
    overlay(tokens, added, spaces=True)
    if space_prefix is None:
        space_prefix = prefixes(tokenizer) if tokenizer else pieces.add_dummy_prefix
    notes = []
    if pieces.has_character_map:
        notes.append("tokenizer.model normalizes characters and llama.cpp does not: unusual forms are cut otherwise")
    if pieces.collapse_spaces and tokenizer is None:
        notes.append("tokenizer.model joins runs of spaces and llama.cpp keeps them")
    notes += anywhere(tokenizer)
    return TokenList("llama", "default", tokens, add_space_prefix=space_prefix, special=pieces.special, notes=notes)


def is_sentencepiece(tokenizer: JsonObject) -> bool:
    """Whether a tokenizer.json is a copy of sentencepiece BPE: merged text, bytes to fall back on."""
    model = tokenizer.section("model")
    return model.get("type") == "BPE" and bool(model.get("byte_fallback") or "<0x0A>" in model.section("vocab"))


def read_json(tokenizer: JsonObject, added: Mapping[int, AddedToken], space_prefix: bool | None) -> TokenList:
    """A vocabulary from tokenizer.json alone: a token's score is minus the rank of its first merge."""
    unknown, vocab = tokenizer.section("model").text("unk_token"), vocabulary_of(tokenizer)
    scores: dict[str, float] = {}
    pairs = [merge.split(" ", 1) for merge in merges_of(tokenizer)]
    for rank, (left, right) in enumerate(pairs):
        scores.setdefault(left + right, float(-rank))
    tokens = {}
    for text, number in vocab.items():
        kind = TokenType.BYTE if BYTE_TOKEN.fullmatch(text) else TokenType.NORMAL
        kind = TokenType.UNKNOWN if text == unknown else kind
        tokens[number] = Token(text, kind, scores.get(text, float(-len(pairs))))
    overlay(tokens, added, spaces=True)
    prefix = prefixes(tokenizer) if space_prefix is None else space_prefix
    notes = unlisted_merges(vocab, {(left, right) for left, right in pairs}, added)
    return TokenList("llama", "default", tokens, add_space_prefix=prefix, notes=notes + anywhere(tokenizer))


def prefixes(tokenizer: JsonObject | None) -> bool:
    """Whether text gets a space in front: a `Prepend` normalizer, or a `Metaspace` that prepends."""
    return any(
        node.text("type") == "Prepend"
        or (node.text("type") == "Metaspace" and node.get("prepend_scheme", "always") != "never")
        for node in _nodes(tokenizer)
    )


def anywhere(tokenizer: JsonObject | None) -> list[str]:
    if any(node.get("prepend_scheme") == "first" for node in _nodes(tokenizer)):
        return ["llama.cpp also puts a space in front of text that follows a special token, transformers does not"]
    return []


def _nodes(tokenizer: JsonObject | None) -> Iterator[JsonObject]:
    for part in (tokenizer.section("normalizer"), tokenizer.section("pre_tokenizer")) if tokenizer else ():
        yield from part.within("normalizers", "pretokenizers")


def unlisted_merges(
    vocab: Mapping[str, int], pairs: set[tuple[str, str]], added: Mapping[int, AddedToken]
) -> list[str]:
    """llama.cpp merges any two tokens whose concatenation is one, tokenizer.json only pairs it lists.

    A copy made from sentencepiece lists them all.  Where some are missing, the two may differ.
    """
    count = 0
    for text in vocab.keys() - {token.text for token in added.values()}:
        if not BYTE_TOKEN.fullmatch(text):
            splits = ((text[:at], text[at:]) for at in range(1, len(text)))
            count += any(left in vocab and right in vocab and (left, right) not in pairs for left, right in splits)
    if not count:
        return []
    return [f"{count} tokens can be merged in ways tokenizer.json does not list: some words may be cut otherwise"]
