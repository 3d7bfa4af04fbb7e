"""Which tokens end what a model writes.

A tokenizer has one end of a text; generation may end at several, which generation_config.json lists, or config.json
where there is no such file (transformers asks no other).  llama.cpp ends at the tokenizer's, at tokens whose text it
knows, and at two more that a GGUF may name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dither.models.contradictions import note
from dither.models.json_object import JsonObject
from dither.models.tokenizers.vocabulary import Token
from dither.system.text import shown

# Texts that llama.cpp takes for an end of generation by themselves.
KNOWN_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
    "<|eom_id|>", "<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>",
}  # fmt: skip
_KEY = "eos_token_id"
_ROOM = ("eot", "eom")  # GGUF's names of further ends


def more_ends(
    generation: JsonObject, others: Sequence[JsonObject], special: Mapping[str, int], listed: Sequence[Token]
) -> tuple[dict[str, int], list[str]]:
    """Ends that a GGUF must name besides the tokenizer's, and notes where sources contradict each other.

    `generation` is generation_config.json; of `others`, config.json first, lists count as well.
    """
    asked = next(((source, found) for source in (generation, *others[:1]) if (found := _numbers(source))), None)
    ends = [*(asked[1] if asked else ()), *(end for source in others if _is_list(source) for end in _numbers(source))]
    eos = special.get("eos")
    fitting = [end for end in dict.fromkeys(ends) if 0 <= end < len(listed) and end != eos]
    unknown = [end for end in fitting if listed[end].text not in KNOWN_ENDS]
    left = [*unknown[len(_ROOM) :], *(end for end in dict.fromkeys(ends) if not 0 <= end < len(listed))]
    notes = []
    if asked and eos is not None and (eos not in asked[1] or left):
        outcome = "all of them end it" + (f", but {_texts(left, listed)} cannot be told to llama.cpp" if left else "")
        said = {"ends": _texts(asked[1], listed), "eos": _texts([eos], listed), "outcome": outcome}
        notes.append(note("ends of a text", files=asked[0].thing, **said))
    return dict(zip(_ROOM, unknown, strict=False)), notes


def _is_list(source: JsonObject) -> bool:
    return isinstance(source.get(_KEY), list)


def _numbers(source: JsonObject) -> list[int]:
    value: Any = source.get(_KEY)
    return [item for item in (value if isinstance(value, list) else [value]) if type(item) is int]


def _texts(numbers: Sequence[int], listed: Sequence[Token]) -> str:
    texts = [listed[number].text if 0 <= number < len(listed) else f"token {number}" for number in numbers[:4]]
    return shown(" and ".join(texts)) + (" and more" if len(numbers) > 4 else "")
