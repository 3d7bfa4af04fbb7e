"""Byte-level BPE (Radford et al. 2019): GPT-2's tokenizer, and since Llama 3 nearly everybody's.

tokenizer.json holds tokens in GPT-2's printable alphabet of bytes, merges in order of rank, and the
pre-tokenizer; GGUF wants the same lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dither.errors import SourceError
from dither.models.tokenizers import pre as pre_tokenizers
from dither.models.tokenizers.vocabulary import AddedToken, Token, Vocabulary, overlay


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json spells its tokens in bytes."""
    return "ByteLevel" in {*_types(tokenizer.get("pre_tokenizer")), *_types(tokenizer.get("decoder"))}


def _types(node: Mapping[str, Any] | None) -> list[str]:
    if not node:
        return []
    inner = [*node.get("pretokenizers", ()), *node.get("decoders", ())]
    return [str(node.get("type")), *(kind for part in inner for kind in _types(part))]


def read(tokenizer: Mapping[str, Any], added: Mapping[int, AddedToken], pre: str | None) -> Vocabulary:
    """Raises UnsupportedError where llama.cpp has no such pre-tokenizer and `pre` names none."""
    if pre is None:
        name, notes = pre_tokenizers.decide(tokenizer)
    else:
        name = pre_tokenizers.checked_name(pre)
        notes = [f"the pre-tokenizer is {name!r} because --pre says so"]
    tokens = {number: Token(text) for text, number in tokenizer["model"]["vocab"].items()}
    overlay(tokens, added, spaces=False)
    return Vocabulary("gpt2", name, tokens, merges(tokenizer), notes=notes)


def merges(tokenizer: Mapping[str, Any]) -> list[str]:
    """Merges as "left right", from that form or from pairs."""
    listed, vocab = [], tokenizer["model"]["vocab"]
    for merge in tokenizer["model"].get("merges") or ():
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2 or any(" " in part for part in pair):
            raise SourceError("tokenizer.json", f"merge {merge!r} is no pair", "Fetch the file again.")
        if not {*pair, "".join(pair)} <= vocab.keys():  # the tokenizers library refuses this as well
            raise SourceError(
                "tokenizer.json", f"merge {merge!r} makes or takes what is no token", "Fetch the file again."
            )
        listed.append(f"{pair[0]} {pair[1]}")
    return listed
