"""The token list that every kind of tokenizer ends up as, and the tokens added on top of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from dither.errors import SourceError
from dither.models.json_object import JsonObject

PADDING_SCORE = -10000.0
ADDED_SCORE = -1000.0


class TokenType(IntEnum):
    """llama.cpp's kinds of token, with sentencepiece's numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Token:
    text: str
    type: TokenType = TokenType.NORMAL
    score: float = 0.0


@dataclass(frozen=True)
class AddedToken:
    """A token matched in the text before anything else."""

    text: str
    special: bool
    rstrip: bool = False  # swallows the white space behind it

    @property
    def is_control(self) -> bool:
        """Some checkpoints fail to call their chat markup special; its shape gives it away."""
        bars = (("<|", "|>"), ("<｜", "｜>"))
        return self.special or any(self.text.startswith(a) and self.text.endswith(z) for a, z in bars)


@dataclass
class TokenList:
    """Tokens by id, before padding."""

    model: str  # GGUF's tokenizer.ggml.model: "gpt2" or "llama"
    pre: str
    tokens: dict[int, Token]
    merges: list[str] = field(default_factory=list)
    add_space_prefix: bool | None = None
    special: dict[str, int] = field(default_factory=dict)  # GGUF's name → id, where nothing else names them
    notes: list[str] = field(default_factory=list)


def added_tokens(tokenizer: JsonObject | None, config: JsonObject, plain: JsonObject) -> dict[int, AddedToken]:
    """Added tokens by id from tokenizer.json, else tokenizer_config.json, else added_tokens.json.

    Later sources only fill ids that earlier ones lack: transformers lets them win in this order.
    """
    found: dict[int, AddedToken] = {}
    for entry in tokenizer.sections("added_tokens") if tokenizer else ():
        entry.given("id")
        found.setdefault(entry.whole("id") or 0, _added(entry))
    decoder = config.section("added_tokens_decoder")
    for number in decoder:
        if not re.fullmatch("[0-9]{1,10}", number):
            raise decoder.wrong(number, "a number as its key")
        found.setdefault(int(number), _added(decoder.section(number)))
    for text, at in plain.wholes().items():
        found.setdefault(at, AddedToken(text, special=False))
    return found


def _added(entry: JsonObject) -> AddedToken:
    entry.given("content")
    return AddedToken(entry.text("content") or "", bool(entry.get("special")), bool(entry.get("rstrip")))


def overlay(tokens: dict[int, Token], added: Mapping[int, AddedToken], spaces: bool) -> None:
    """Puts added tokens over a vocabulary.  `spaces`: sentencepiece's ▁ stands for a space in them."""
    for number, extra in added.items():
        known = tokens.get(number)
        if known and known.type == TokenType.UNKNOWN:
            continue
        kind = TokenType.CONTROL if extra.is_control else TokenType.USER_DEFINED
        text = extra.text.replace("▁", " ") if spaces and kind == TokenType.USER_DEFINED else extra.text
        tokens[number] = Token(text, kind, ADDED_SCORE)


def padded(tokens: Mapping[int, Token], size: int) -> list[Token]:
    """`size` tokens without gaps, `[PADi]` where the tokenizer has none; ids beyond `size` are left out.

    Raises SourceError where two tokens have the same text, which llama.cpp refuses to load.
    """
    filler = (Token(f"[PAD{number}]", TokenType.UNUSED, PADDING_SCORE) for number in range(size))
    listed = [tokens.get(number, padding) for number, padding in enumerate(filler)]
    seen: dict[str, int] = {}
    for number, token in enumerate(listed):
        if token.text in seen:
            reason = f"is the text of both {seen[token.text]} and {number}"
            raise SourceError(f"token {token.text!r}", reason, "Take the tokenizer's files from the original model.")
        seen[token.text] = number
    return listed
