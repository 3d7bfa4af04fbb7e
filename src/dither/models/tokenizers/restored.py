"""A GGUF's tokenizer as the files of a checkpoint: what llama.cpp does with a text, said in tokenizer.json's words.

    tokens, merges             the vocabulary, `[PADi]` left out; of sentencepiece the merges follow from the scores
    pre                        the chain of expressions that llama.cpp has by that name (`pre.py`, read backwards)
    token types                what is matched before anything else: special (control), or not (user-defined)
    add_space_prefix           a normalizer that prepends, after every special token as llama.cpp does it
    add_bos_token, …           a post-processor, which is what counts in tokenizer.json
    …_token_id, chat templates tokenizer_config.json and generation_config.json

What is written is llama.cpp's reading of the file, defaults included, not that of the model's authors: a normalizer
that the way to a GGUF has left out stays out.

Source: `llama_vocab::impl::load` and `tokenize` of llama.cpp for the left side, the tokenizers library for the right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dither.errors import SourceError, UnsupportedError
from dither.formats.ggml import Field, ValueType
from dither.models.arch.naming import PHI_3, PHI_3_TOKENS
from dither.models.tokenizers.checkpoint_tokenizer import SPECIAL
from dither.models.tokenizers.ends import KNOWN_ENDS
from dither.models.tokenizers.pre import ADDS_BOS, ALIASES, Chain, chain_of, components
from dither.models.tokenizers.templates import KEY as TEMPLATE
from dither.models.tokenizers.vocabulary import TokenType
from dither.system.text import shown

PADDING = re.compile(r"\[PAD\d+\]")
MATCHED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)  # before anything else
DEFAULTS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}, "gpt2": {"bos": 11, "eos": 11}}  # llama.cpp's own
BYTES = 256
ENDS = ("eos", "eot", "eom")  # of an answer
_READ = ("model", "pre", "tokens", "token_type", "scores", "merges", "add_bos_token", "add_eos_token")
_WAY_OUT = "Convert the checkpoint that it was made from, or write a GGUF."


@dataclass(frozen=True)
class Restored:
    """The files of a tokenizer."""

    tokenizer: Mapping[str, Any]  # tokenizer.json
    settings: Mapping[str, Any]  # tokenizer_config.json
    special: Mapping[str, int]  # transformers' name ("bos") → id
    ends: tuple[int, ...]  # tokens that end an answer
    marks: tuple[str, ...]  # texts that are matched before anything else
    left_out: tuple[str, ...]  # keys of the metadata that a checkpoint has no place for


def restored(metadata: Mapping[str, Field], chains: Sequence[Chain] = ()) -> Restored:
    """The files that make transformers cut texts as llama.cpp does; `chains` are the families' own.

    Raises UnsupportedError for a kind of tokenizer that is not known here, SourceError where its lists contradict
    each other.
    """
    return _Reading(metadata, chains).files()


def special_ids(metadata: Mapping[str, Field], chains: Sequence[Chain] = ()) -> dict[str, int]:
    """`Restored.special` alone, which takes no merging.  Raises as `restored`."""
    return _Reading(metadata, chains).by_name


def uncovered(metadata: Mapping[str, Field]) -> str | None:
    """What llama.cpp has nothing for, in sentencepiece without byte tokens; None for any other tokenizer."""
    kind, tokens, types = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "tokens", "token_type"))
    if kind is None or tokens is None or types is None or kind.value != "llama":
        return None
    if list(types.value).count(TokenType.BYTE) == BYTES:
        return None
    return "any character that no token covers" + ("" if "\n" in tokens.value else ", a line break among them")


class _Reading:
    def __init__(self, metadata: Mapping[str, Field], chains: Sequence[Chain]) -> None:
        self._metadata = metadata
        self.kind = str(self._value("model"))
        if self.kind not in DEFAULTS:
            reason = f"is {shown(self.kind)}, which is no tokenizer that is known here"
            raise UnsupportedError("metadata tokenizer.ggml.model", reason, _WAY_OUT)
        self.tokens = self._texts("tokens")
        self.types = self._types()
        self.special = self._special()
        self.by_name = {name: self.special[key] for name, key in SPECIAL.items() if key in self.special}
        self.vocabulary = self._vocabulary()
        self.chain = chain_of(str(self._value("pre") or "default"), chains) if self.kind == "gpt2" else None

    def files(self) -> Restored:
        matched = [number for number, kind in enumerate(self.types) if kind in MATCHED]
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [self._added(number) for number in matched],
            **(self._byte_level() if self.chain else self._sentencepiece()),
            "post_processor": self._around(),
        }
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # which takes tokenizer.json as it is
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": self.tokens[number] for name, number in self.by_name.items()},
            **self._templates(),
        }
        if self.kind == "llama" and "unk" not in self.by_name and TokenType.UNKNOWN in self.types:
            settings["unk_token"] = self.tokens[self.types.index(TokenType.UNKNOWN)]
        marks = tuple(self.tokens[number] for number in matched)
        return Restored(tokenizer, settings, self.by_name, self._ends(), marks, self._left_out())

    def _value(self, key: str) -> Any:
        found = self._metadata.get(f"tokenizer.ggml.{key}")
        return None if found is None else found.value

    def _texts(self, key: str) -> list[str]:
        found = self._value(key)
        if not isinstance(found, list) or not all(map(_is_text, found)):
            raise SourceError(f"metadata tokenizer.ggml.{key}", "is no list of texts", _WAY_OUT)
        return found

    def _numbers(self, key: str) -> list[Any]:
        field = self._metadata.get(f"tokenizer.ggml.{key}")
        if field is not None and (
            field.type is not ValueType.ARRAY or field.item in (ValueType.STRING, ValueType.ARRAY)
        ):
            raise SourceError(f"metadata tokenizer.ggml.{key}", "is no list of numbers", _WAY_OUT)
        listed = [] if field is None else list(field.value)
        if listed and len(listed) != len(self.tokens):
            reason = f"has {len(listed)} entries for {len(self.tokens)} tokens"
            raise SourceError(f"metadata tokenizer.ggml.{key}", reason, _WAY_OUT)
        return listed

    def _types(self) -> list[int]:
        return [int(kind) for kind in self._numbers("token_type")] or [TokenType.NORMAL] * len(self.tokens)

    def _special(self) -> dict[str, int]:
        """GGUF's name → id.  Those that llama.cpp assumes count where a text would get them."""
        found = {}
        for name in (*SPECIAL.values(), *ENDS):
            number = self._value(f"{name}_token_id")
            if number is None and (name == "eos" or self.kind == "llama" or (name == "bos" and self._adds("bos"))):
                number = DEFAULTS[self.kind].get(name)
            if type(number) is int and 0 <= number < len(self.tokens):
                found[name] = number
        return found

    def _adds(self, name: str) -> bool:
        """Whether llama.cpp puts this token at its end of every text."""
        pre = str(self._value("pre"))
        assumed = name == "bos" and (self.kind == "llama" or ALIASES.get(pre, pre) in ADDS_BOS)
        flag = self._value(f"add_{name}_token")
        return assumed if flag is None else bool(flag)

    def _vocabulary(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for number, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind == TokenType.UNUSED and PADDING.fullmatch(text):
                continue
            if text in found:
                reason = f"{shown(text)} is the text of both {found[text]} and {number}"
                raise SourceError("metadata tokenizer.ggml.tokens", reason, _WAY_OUT)
            found[text] = number
        return found

    def _added(self, number: int) -> dict[str, Any]:
        text, kind = self.tokens[number], self.types[number]
        rules = {"single_word": False, "lstrip": False, "rstrip": self._swallows(text), "normalized": False}
        return {"id": number, "content": text, **rules, "special": kind != TokenType.USER_DEFINED}

    def _swallows(self, text: str) -> bool:
        """By a model's name llama.cpp knows Phi-3, whose special tokens eat the white space behind them."""
        name = self._metadata.get("general.name")
        if name is None or not PHI_3.search(str(name.value)) or not set(self.tokens) >= PHI_3_TOKENS:
            return False
        return text not in PHI_3_TOKENS - {"</s>"}

    def _byte_level(self) -> dict[str, Any]:
        assert self.chain is not None
        pairs = [tuple(merge.split(" ", 1)) for merge in self._texts("merges")]
        known = [pair for pair in pairs if len(pair) == 2 and {*pair, "".join(pair)} <= self.vocabulary.keys()]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {
            "normalizer": None,
            "pre_tokenizer": components(self.chain),
            "decoder": byte_level,
            "model": self._model(known, ignore_merges=self.chain.whole_words),
        }

    def _sentencepiece(self) -> dict[str, Any]:
        prefix = self._value("add_space_prefix")
        prefixed = prefix is None or bool(prefix)
        has_bytes = self.types.count(TokenType.BYTE) == BYTES
        unknown = self.special.get("unknown")
        space: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        back: dict[str, Any] = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if prefixed else [])]
        normalizers = [*([{"type": "Prepend", "prepend": "▁"}] if prefixed else []), space]
        return {
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": self._model(
                self._merges_by_score(),
                unk_token=None if unknown is None else self.tokens[unknown],
                fuse_unk=True,
                byte_fallback=has_bytes,
            ),
        }

    def _merges_by_score(self) -> list[tuple[str, str]]:
        """Every pair of tokens that makes a token, the best made first: llama.cpp merges by score alone."""
        scores = self._numbers("scores")
        if not scores:
            raise SourceError("metadata tokenizer.ggml.scores", "is missing", _WAY_OUT)
        plain = {text: at for text, at in self.vocabulary.items() if self.types[at] not in (*MATCHED, TokenType.BYTE)}
        made = [
            (-float(scores[number]), number, plain[text[:at]], plain[text[at:]])
            for text, number in plain.items()
            for at in range(1, len(text))
            if text[:at] in plain and text[at:] in plain
        ]
        return [(self.tokens[left], self.tokens[right]) for _, _, left, right in sorted(made)]

    def _model(self, merges: Sequence[tuple[str, ...]], **rules: Any) -> dict[str, Any]:
        plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
        told = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **rules}
        return {"type": "BPE", **plain, **told, "vocab": self.vocabulary, "merges": [list(pair) for pair in merges]}

    def _around(self) -> dict[str, Any]:
        """What every text gets; a processor that adds nothing keeps transformers from making one of its own."""
        bos, eos = (self.special.get(name) if self._adds(name) else None for name in ("bos", "eos"))
        special = {self.tokens[number]: number for number in (bos, eos) if number is not None}

        def end(number: int | None, kind: int) -> list[dict[str, Any]]:
            return [] if number is None else [{"SpecialToken": {"id": self.tokens[number], "type_id": kind}}]

        def pieces(name: str, kind: int) -> list[dict[str, Any]]:
            return [*end(bos, kind), {"Sequence": {"id": name, "type_id": kind}}, *end(eos, kind)]

        told = {text: {"id": text, "ids": [number], "tokens": [text]} for text, number in special.items()}
        pair = [*pieces("A", 0), *pieces("B", 1)]
        return {"type": "TemplateProcessing", "single": pieces("A", 0), "pair": pair, "special_tokens": told}

    def _templates(self) -> dict[str, Any]:
        """One text, or a list of named ones: both generations of transformers read them here."""
        prefix = f"{TEMPLATE}."
        found = {"default": self._metadata[TEMPLATE].value} if TEMPLATE in self._metadata else {}
        found |= {k.removeprefix(prefix): f.value for k, f in self._metadata.items() if k.startswith(prefix)}
        for name, text in found.items():
            if not _is_text(text):
                raise SourceError(f"metadata {TEMPLATE}, {shown(name)}", "is no text", _WAY_OUT)
        if set(found) == {"default"}:
            return {"chat_template": found["default"]}
        return {"chat_template": [{"name": name, "template": text} for name, text in found.items()]} if found else {}

    def _ends(self) -> tuple[int, ...]:
        """Where llama.cpp ends an answer: at tokens that the file names, and at texts that it knows."""
        named = [self.special[name] for name in ENDS if name in self.special]
        known = [at for at, text in enumerate(self.tokens) if text in KNOWN_ENDS and self.types[at] in MATCHED]
        return tuple(dict.fromkeys((*named, *known)))

    def _left_out(self) -> tuple[str, ...]:
        named = {*_READ, "add_space_prefix", *(f"{name}_token_id" for name in (*SPECIAL.values(), *ENDS))}
        carried = {*(f"tokenizer.ggml.{key}" for key in named), TEMPLATE, f"{TEMPLATE}s"}
        return tuple(
            key
            for key in self._metadata
            if key.startswith("tokenizer.") and key not in carried and not key.startswith(f"{TEMPLATE}.")
        )


def _is_text(value: Any) -> bool:
    """Whether it can be written into a JSON file: a stranger's text may hold bytes that are no UTF-8."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
