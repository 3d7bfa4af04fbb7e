"""A checkpoint's tokenizer as a GGUF carries it: the tokens, and what llama.cpp must do around them.

Which token begins and ends a text, whether they are added to every prompt, and the chat template are
spread over six files that repeat and contradict each other.  transformers' own order of precedence
decides: tokenizer_config.json, special_tokens_map.json, then config.json and generation_config.json.
What is added around a text is what tokenizer.json's post-processor adds: since version 5 the flags in
tokenizer_config.json count only where there is no tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dither.errors import SourceError, UnsupportedError, UsageError
from dither.formats.ggml import Field, ValueType, array, boolean, string, u32
from dither.formats.mapped import MappedFile
from dither.models.checkpoint import Checkpoint
from dither.models.contradictions import note
from dither.models.json_object import JsonObject, described
from dither.models.tokenizers import byte_level, sentencepiece
from dither.models.tokenizers.ends import more_ends
from dither.models.tokenizers.pre import Chain
from dither.models.tokenizers.templates import read_templates, template_fields
from dither.models.tokenizers.vocabulary import AddedToken, Token, TokenList, added_tokens, padded

# transformers' name → GGUF's, whose "seperator" is spelled so in every file there is
SPECIAL = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "cls": "cls",
    "mask": "mask",
}  # fmt: skip


@dataclass(frozen=True)
class Tokenizer:
    """Everything a GGUF says about it.  `tokens` and the rest are as long as the embedding has rows."""

    vocabulary: TokenList
    tokens: Mapping[str, int]  # text → id
    listed: tuple[Token, ...]
    used: int  # tokens up to the last real one; what follows is padding
    special: Mapping[str, int]  # GGUF's name → id
    add_bos: bool
    add_eos: bool
    templates: Mapping[str, str]
    swallows_space: bool  # special tokens that eat the white space behind them, as Phi-3's do
    notes: tuple[str, ...]

    def fields(self, size: int) -> dict[str, Field]:
        """GGUF's tokenizer keys for a vocabulary of `size` tokens."""
        listed = self.listed[:size]
        keys = {
            "model": string(self.vocabulary.model),
            "pre": string(self.vocabulary.pre),
            "tokens": array(ValueType.STRING, [token.text for token in listed]),
            "token_type": array(ValueType.INT32, [int(token.type) for token in listed]),
        }
        if self.vocabulary.model == "llama":
            keys["scores"] = array(ValueType.FLOAT32, [token.score for token in listed])
        else:
            keys["merges"] = array(ValueType.STRING, self.vocabulary.merges)
        keys |= {f"{name}_token_id": u32(number) for name, number in self.special.items()}
        keys |= {"add_bos_token": boolean(self.add_bos), "add_eos_token": boolean(self.add_eos)}
        if self.vocabulary.add_space_prefix is not None:
            keys["add_space_prefix"] = boolean(self.vocabulary.add_space_prefix)
        named = {f"tokenizer.ggml.{name}": field for name, field in keys.items()}
        return {**named, **template_fields(self.templates)}


def read_tokenizer(
    checkpoint: Checkpoint, *, rows: int, pre: str | None, chains: Sequence[Chain], config: JsonObject
) -> Tokenizer:
    """The tokenizer of a checkpoint whose embedding has `rows` rows; `chains` are its family's own.

    Raises SourceError where files are missing or contradict each other, UnsupportedError for a
    tokenizer that llama.cpp does not have, UsageError for a `pre` that it does not know.
    """
    settings = checkpoint.document("tokenizer_config.json")
    stored = checkpoint.read_json("tokenizer.json")
    tokenizer = None if stored is None else JsonObject(stored, "tokenizer.json")
    if tokenizer is not None:
        model = tokenizer.section("model")
        if not model or (model.get("type") in (None, "BPE") and "vocab" not in model):
            raise SourceError("tokenizer.json", "lacks a model with a vocabulary", "Fetch the file again.")
    added = added_tokens(tokenizer, settings, checkpoint.document("added_tokens.json"))
    vocabulary = _read_vocabulary(checkpoint, tokenizer, settings, added, pre, chains)
    beyond = [number for number in vocabulary.tokens if number >= rows]
    notes = list(vocabulary.notes)
    if beyond:
        notes.append(note("rows and tokens", count=len(beyond), rows=rows))
    listed = padded(vocabulary.tokens, rows)
    ids = {token.text: number for number, token in enumerate(listed)}
    by_text, generation = map(checkpoint.document, ("special_tokens_map.json", "generation_config.json"))
    sources = [settings, by_text, config, generation]  # transformers' order
    special = {**vocabulary.special, **dict(_special_ids(sources, ids, rows))}
    ends, told = more_ends(generation, [config, by_text, settings], special, listed)
    special |= ends
    templates, differing = read_templates(checkpoint.folder, settings)
    if vocabulary.model == "gpt2":  # where llama.cpp takes token 11 for both ends of a text unless told otherwise
        if "eos" not in special:
            way_out = "Put eos_token into tokenizer_config.json."
            raise SourceError("the tokenizer", "names no token that ends a text", way_out)
        special = {"bos": special["eos"], **special}
    around, contradictions = _added_around(settings, tokenizer, special, ids)
    return Tokenizer(
        vocabulary=vocabulary,
        tokens=ids,
        listed=tuple(listed),
        used=1 + max((number for number in vocabulary.tokens if number < rows), default=0),
        special=special,
        add_bos=around["bos"],
        add_eos=around["eos"],
        templates=templates,
        swallows_space=any(token.rstrip for token in added.values()),
        notes=(*notes, *contradictions, *told, *differing),
    )


def _read_vocabulary(
    checkpoint: Checkpoint,
    tokenizer: JsonObject | None,
    settings: JsonObject,
    added: Mapping[int, AddedToken],
    pre: str | None,
    chains: Sequence[Chain],
) -> TokenList:
    if tokenizer and byte_level.is_byte_level(tokenizer):
        return byte_level.read(tokenizer, added, pre, chains)
    if pre is not None:
        raise UsageError(f"--pre {pre}", "is for byte-level BPE, and this tokenizer is none", "Leave it out.")
    prefix = settings.flag("add_prefix_space")
    path = checkpoint.folder / sentencepiece.MODEL_FILE
    if path.is_file():
        found = sentencepiece.read_model(MappedFile(path).data[:], tokenizer, added, prefix)
        if tokenizer is None or _same_tokens(tokenizer, found):
            return found
    if tokenizer and sentencepiece.is_sentencepiece(tokenizer):
        found = sentencepiece.read_json(tokenizer, added, prefix)
        if path.is_file():
            found.notes.append("tokenizer.model and tokenizer.json differ: the latter counts, as in transformers")
        return found
    if tokenizer is None:
        reason = "has neither tokenizer.json nor tokenizer.model"
        raise SourceError(str(checkpoint.folder), reason, "Fetch the tokenizer's files beside the weights.")
    kind = described(tokenizer["model"].get("type"))
    reason = f"holds a {kind} model, not BPE of bytes or of sentencepiece"
    way_out = "llama.cpp has no tokenizer of this kind for these families."
    raise UnsupportedError("tokenizer.json", reason, way_out)


def _same_tokens(tokenizer: JsonObject, found: TokenList) -> bool:
    vocab = tokenizer.section("model").get("vocab")
    return isinstance(vocab, dict) and all(
        number in found.tokens and text.replace("▁", " ") == found.tokens[number].text.replace("▁", " ")
        for text, number in vocab.items()
    )


def _special_ids(sources: list[JsonObject], ids: Mapping[str, int], rows: int) -> Iterator[tuple[str, int]]:
    for name, target in SPECIAL.items():
        for source in sources:
            token = source.get(f"{name}_token")
            text = token.get("content") if isinstance(token, dict) else token
            number = ids.get(text) if isinstance(text, str) else _first(source.get(f"{name}_token_id"))
            if number is not None and 0 <= number < rows:
                yield target, number
                break


def _first(value: Any) -> int | None:
    items = value if isinstance(value, list) else [value]
    return next((item for item in items if isinstance(item, int) and not isinstance(item, bool)), None)


def _added_around(
    settings: JsonObject, tokenizer: JsonObject | None, special: Mapping[str, int], ids: Mapping[str, int]
) -> tuple[dict[str, bool], list[str]]:
    """Whether every text gets the token that begins and the one that ends a text, and notes."""
    flags = {name: settings.get(f"add_{name}_token") for name in ("bos", "eos")}
    if tokenizer is None:
        wanted = {"bos": flags["bos"] is not False, "eos": flags["eos"] is True}
        return {name: on and name in special for name, on in wanted.items()}, []
    found, notes = {}, []
    for name, text in zip(("bos", "eos"), _template(tokenizer), strict=True):
        found[name] = text is not None and ids.get(text) == special.get(name)
        if text is not None and not found[name]:
            notes.append(f"tokenizer.json puts {text!r} around texts, which is not its {name} token: left out")
        if isinstance(flags[name], bool) and flags[name] != found[name]:
            notes.append(
                f"add_{name}_token is {str(flags[name]).lower()} in tokenizer_config.json and tokenizer.json "
                "does the opposite: the latter counts, as in transformers 5"
            )
    return found, notes


def _template(tokenizer: JsonObject) -> tuple[str | None, str | None]:
    """The special tokens that tokenizer.json's post-processor puts before and after a single text."""
    for node in reversed(list(tokenizer.section("post_processor").within("processors"))):
        kind = node.text("type")
        if kind == "TemplateProcessing" and node.get("single"):
            parts = node.sections("single")
            first, last = (part.section("SpecialToken") for part in (parts[0], parts[-1]))
            return first.text("id"), last.text("id")
        if kind in ("RobertaProcessing", "BertProcessing"):
            return _first_text(node, "cls"), _first_text(node, "sep")
    return None, None


def _first_text(node: JsonObject, key: str) -> str:
    """The text of a pair of text and number."""
    pair = node.get(key)
    if not isinstance(pair, list) or not pair or not isinstance(pair[0], str):
        raise node.wrong(key, "a pair of text and number")
    return pair[0]
