"""Byte-level BPE (Radford et al. 2019): GPT-2's tokenizer, and since Llama 3 nearly everybody's.

tokenizer.json holds tokens in GPT-2's printable alphabet of bytes, merges in order of rank, and the
pre-tokenizer; GGUF wants the same lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dither.errors import SourceError
from dither.models.json_object import JsonObject, described
from dither.models.tokenizers import pre as pre_tokenizers
from dither.models.tokenizers.pre import Chain
from dither.models.tokenizers.vocabulary import AddedToken, Token, TokenList, overlay


def is_byte_level(tokenizer: JsonObject) -> bool:
    """Whether a tokenizer.json spells its tokens in bytes."""
    parts = (tokenizer.section(key) for key in ("pre_tokenizer", "decoder"))
    return "ByteLevel" in {node.text("type") for part in parts for node in part.within("pretokenizers", "decoders")}


def read(tokenizer: JsonObject, added: Mapping[int, AddedToken], pre: str | None, chains: Sequence[Chain]) -> TokenList:
    """`chains` are pre-tokenizers beside llama.cpp's that are known to all.

    Raises UnsupportedError where llama.cpp has no such pre-tokenizer and `pre` names none.
    """
    if pre is None:
        name, notes = pre_tokenizers.decide(tokenizer, chains)
    else:
        name = pre_tokenizers.checked_name(pre, chains)
        notes = [f"the pre-tokenizer is {name!r} because --pre says so"]
    tokens = {number: Token(text) for text, number in vocabulary_of(tokenizer).items()}
    overlay(tokens, added, spaces=False)
    return TokenList("gpt2", name, tokens, merges(tokenizer), notes=notes)


def vocabulary_of(tokenizer: JsonObject) -> dict[str, int]:
    return tokenizer.section("model").section("vocab").wholes()


def merges(tokenizer: JsonObject) -> list[str]:
    """Merges as "left right", from that form or from pairs."""
    listed, vocab, model = [], vocabulary_of(tokenizer), tokenizer.section("model")
    found = model.get("merges") or []
    if not isinstance(found, list):
        raise model.wrong("merges", "a list")
    for merge in found:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        if not is_pair or any(" " in part for part in pair):
            raise SourceError("tokenizer.json", f"merge {described(merge)} is no pair", "Fetch the file again.")
        if not {*pair, "".join(pair)} <= vocab.keys():  # the tokenizers library refuses this as well
            reason = f"merge {described(merge)} makes or takes what is no token"
            raise SourceError("tokenizer.json", reason, "Fetch the file again.")
        listed.append(f"{pair[0]} {pair[1]}")
    return listed
