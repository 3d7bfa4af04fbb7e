"""A few texts through two tokenizers: llama.cpp on a model's vocabulary, and another's that ought to cut alike.

A model reads numbers.  Where a converted tokenizer cuts a text otherwise the model still answers, only worse, and
nobody is told; so every conversion between a GGUF and a checkpoint tries what converters are known to lose: spaces in
front and in runs, line breaks, digits, contractions, other scripts, signs that no token covers, and the model's own
marks in the middle of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dither.engines.llama_start import EngineError
from dither.engines.vocabulary import Vocabulary
from dither.types import Model

TEXTS = (
    "Hello there, old man!",
    " leading space,  two  spaces   three",
    "line\nbreak\n\ntwo\r\nwindows\n\n\n\tand\ttabs  \n",
    "I'm sure they'll say we've DON'T I'LL",
    "1 12 123 12345 3.14 1,000 v2.0",
    "def f(x): return x[0] != 1  # it's {code};",
    "Ünïcödé café Ёлка ☃ 漢字 港を出た 한국어 العربية हिन्दी",
    "🙂 👩‍🚀 ½ Ⅻ",
)
MARKS = 6  # of the model's own, tried in the middle of a text
_SHOWN = 8  # ids of a text

Encode = Callable[[str], Sequence[int]]  # ids of a text, marks read as what they name, nothing added around it


@dataclass(frozen=True)
class Difference:
    text: str
    ours: list[int] | None  # None: llama.cpp stops with an error
    theirs: list[int]


def differences(model: Model, encode: Encode, whole: Encode | None, marks: Sequence[str]) -> list[Difference]:
    """Texts that llama.cpp cuts otherwise; `whole` adds what belongs around a text, `marks` are matched first.

    Raises EngineError where llama.cpp refuses the vocabulary.
    """
    with Vocabulary(model) as vocabulary:
        inside = [f"one{mark}two {mark} three\n{mark}\nfour" for mark in chosen(marks)]
        listed = [(text, encode, False) for text in (*TEXTS, *inside)]
        return list(_differing(vocabulary, [*listed, *([(TEXTS[0], whole, True)] if whole else [])]))


def _differing(vocabulary: Vocabulary, texts: Sequence[tuple[str, Encode, bool]]) -> Iterator[Difference]:
    for text, encode, is_whole in texts:
        theirs = list(encode(text))
        try:
            ours = vocabulary.tokenize(text, parse_special=True, add_special=is_whole)
        except EngineError:
            ours = None
        if ours != theirs:
            yield Difference(text, ours, theirs)


def chosen(marks: Sequence[str]) -> list[str]:
    """Of thousands the first, the last, and those that are not plain ASCII."""
    strange = [mark for mark in marks if not mark.isascii() or " " in mark]
    return list(dict.fromkeys((*strange[: MARKS // 2], *marks[: MARKS // 2], *marks[-1:])))[:MARKS]


def told(found: Sequence[Difference], other: str) -> list[str]:
    """A note that names the first text of those that differ; none where nothing does."""
    if not found:
        return []
    first, others = found[0], len(found) - 1
    ours = "stops with an error" if first.ours is None else f"makes {_ids(first.ours, first.theirs)}"
    theirs = _ids(first.theirs, first.ours or [])
    more = f" ({others} more of the texts tried {'differs' if others == 1 else 'differ'} too)" if others else ""
    return [f"the tokenizers differ at {first.text!r}: llama.cpp {ours}, {other} makes {theirs}{more}"]


def _ids(ids: Sequence[int], others: Sequence[int]) -> str:
    """The ids from where they part."""
    same = next((at for at, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1]), 0)
    start = max(0, same - 1)
    listed = " ".join(map(str, ids[start : start + _SHOWN]))
    return f"{'… ' if start else ''}{listed or 'nothing'}{' …' if len(ids) > start + _SHOWN else ''}"
