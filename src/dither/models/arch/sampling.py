"""How tokens are drawn, as a model's authors suggest it: generation_config.json's numbers under GGUF's names.

llama.cpp takes them for what a request leaves open.  transformers asks for `do_sample` first: numbers beside
`"do_sample": false` mean nothing there, and are not carried.
"""

from __future__ import annotations

from dither.formats.ggml import Field, ValueType, f32
from dither.models.json_object import JsonObject

# By GGUF's name after general.sampling.
SAMPLING = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}  # fmt: skip


def sampling_fields(generation: JsonObject) -> dict[str, Field]:
    """Metadata of the numbers that generation_config.json has.  Raises FormatError for one that is none."""
    if generation.flag("do_sample") is False:
        return {}
    found = {}
    for key, name in SAMPLING.items():
        if generation.get(name) is None:
            continue
        if key == "top_k":
            value = Field(ValueType.INT32, generation.whole(name, most=2**31 - 1))
        else:
            value = f32(generation.number(name))
        found[f"general.sampling.{key}"] = value
    return found
