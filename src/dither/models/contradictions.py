"""Two sources that contradict each other: what other readers make of them, what is done here, and what is said.

A checkpoint says most things twice: config.json beside the tensors, one key beside its older spelling, three files
with a chat template.  Where both agree nobody notices which is read; where they do not, two programs run two different
models, and neither says so.  This is the one list of such pairs.  `transformers` and `llama_cpp` are facts of
transformers 5.23 and of llama.cpp's converter and loader; `here` is what Dither does: what transformers does, because
a model is what its authors computed with, or a refusal where the readers disagree about the weights themselves.

Whoever settles a pair prints its note through `note`, so that no choice is made without a word and every word is on
this page.  `docs/contradictions.md` is made of it (`markdown`), and tests hold each pair against transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Pair:
    sources: str
    transformers: str
    llama_cpp: str
    here: str
    note: str = ""  # what is printed, as a format; "" where the input is refused


REFUSED = "refused"
SAME = "the same"

PAIRS: dict[str, Pair] = {
    # The output matrix
    "tied, another head": Pair(
        "`tie_word_embeddings` is true, and an output matrix is stored that is not the embedding",
        "keeps both",
        "keeps both (Gemma 2 has room for one)",
        "keeps both; refused for Gemma 2",
        "config.json ties the output matrix to the embedding, but lm_head.weight is stored and differs: it is kept, "
        "as transformers keeps it",
    ),
    "tied, the same head": Pair(
        "`tie_word_embeddings` is true, and the embedding is stored again as the output matrix",
        "ties them",
        "keeps both: the file is larger and computes the same",
        "leaves the copy out",
        "lm_head.weight repeats the embedding, to which config.json ties it: left out",
    ),
    "tied, unread head": Pair(
        "the same, where only headers are read (`fit`, `inspect` of a hub's repository)",
        "–",
        "–",
        "takes the two for one",
        "lm_head.weight is stored beside an embedding that it is tied to: counted as a copy, which reading will tell",
    ),
    "tied, only the head": Pair(
        "`tie_word_embeddings` is true, and the matrix is stored under the head's name alone",
        "takes it for both",
        "refuses the file: no embedding",
        "takes it for both",
        "model.embed_tokens.weight is not stored: lm_head.weight, which config.json ties to it, is taken for both",
    ),
    "untied, no head": Pair(
        "`tie_word_embeddings` is false, and no output matrix is stored",
        "fills one with random numbers",
        "takes the embedding",
        REFUSED,
    ),
    # Rotary embedding
    "rope_scaling beside rope_parameters": Pair(
        "`rope_scaling` beside `rope_parameters`",
        "takes `rope_scaling` instead of all of `rope_parameters`, its `rope_theta` included; Gemma 3 adds it to the "
        "global layers'",
        "ignores `rope_scaling`",
        "as transformers",
        "config.json has rope_scaling beside rope_parameters: {taken}, as transformers reads them{lost}",
    ),
    "rope_theta twice": Pair(
        "`rope_theta` at the top and in `rope_parameters` or `rope_scaling`",
        "takes the inner one",
        SAME,
        "as transformers",
        "config.json has rope_theta {outer} at the top and {inner} in {section}: the latter counts, as in transformers",
    ),
    "partial_rotary_factor twice": Pair(
        "`partial_rotary_factor` at the top and in `rope_parameters`",
        "takes the inner one",
        SAME,
        "as transformers",
        "config.json has partial_rotary_factor {outer} at the top and {inner} in {section}: the latter counts, as in "
        "transformers",
    ),
    "type beside rope_type": Pair(
        "`type` beside `rope_type`",
        "takes `rope_type`",
        SAME,
        "as transformers",
        "config.json has type {type} beside rope_type {rope_type} in {section}: the latter counts, as in transformers",
    ),
    "type alone, Gemma 3": Pair(
        "`type` without `rope_type` in Gemma 3's `rope_scaling`",
        "ignores the scaling (version 4 did not)",
        "reads it",
        REFUSED,
    ),
    "rope_type null": Pair("`rope_type` is null", "fails", "leaves scaling out", REFUSED),
    "rope by kind of layer": Pair(
        "`rope_parameters` by kind of layer in a family whose layers all rotate alike, or without kinds in Gemma 3",
        "ignores what is inside",
        "reads it",
        REFUSED,
    ),
    "original context twice": Pair(
        "`original_max_position_embeddings` at the top and in `rope_parameters` (llama3, yarn, longrope)",
        "takes the outer one",
        "takes the inner one",
        "as transformers",
        "config.json has original_max_position_embeddings {outer} at the top and {inner} in {section}: the former "
        "counts, as in transformers",
    ),
    "original context, Phi-3": Pair(
        "`original_max_position_embeddings` in Phi-3's `rope_parameters` alone",
        "takes 4096, its default for the top",
        "takes the inner one",
        "as transformers",
        "config.json has original_max_position_embeddings {inner} in {section} alone: transformers takes {outer} for "
        "Phi-3, its default for the top",
    ),
    "original context missing": Pair(
        "a scaling that needs `original_max_position_embeddings`, which is nowhere",
        "takes `max_position_embeddings`",
        "8192 for llama3, fails for others",
        "as transformers",
        "config.json has no original_max_position_embeddings for its {kind} RoPE scaling: max_position_embeddings "
        "({value}) is taken, as in transformers",
    ),
    "longrope factor": Pair(
        "longrope's `factor` beside the ratio of both context lengths",
        "takes `factor`",
        "takes the ratio",
        "as transformers",
        "longrope's factor {factor} in config.json is not max / original context ({ratio}): factor counts, as in "
        "transformers",
    ),
    "longrope called yarn": Pair(
        "Phi-3's `rope_type` is yarn or su, with longrope's factors",
        "takes both for longrope",
        "yarn has another attention factor",
        "as transformers",
        "rope_type {kind} in config.json is longrope for Phi-3, as in transformers",
    ),
    # Sizes
    "biases denied": Pair(
        "`attention_bias` or `mlp_bias` is false, and biases are stored",
        "leaves them out",
        "adds them where its graph of the family has them",
        "refused; leaves them out where all are zero",
        "{count} biases are zero throughout and left out ({where}): {family} has none there",
    ),
    "biases promised": Pair(
        "`attention_bias` or `mlp_bias` is true, and biases are not stored, or not all",
        "fills them with zeros",
        "does without",
        "does without, which computes the same",
        "config.json says {key} is true, but none is stored for {kinds}: none is added, which computes the same as the "
        "zeros of transformers",
    ),
    "vocab_size and rows": Pair(
        "`vocab_size` is not the number of the embedding's rows",
        "refuses the folder",
        "writes a file that it refuses to load",
        "takes the rows",
        "vocab_size is {stated} in config.json, but the embedding has {rows} rows: the rows count (transformers "
        "refuses this folder until vocab_size is {rows})",
    ),
    "rows and tokens": Pair(
        "the tokenizer has tokens beyond the embedding's rows",
        "fails when such a token comes",
        "refuses",
        "leaves them out",
        "{count} tokens lie beyond the embedding's {rows} rows: left out",
    ),
    "layers": Pair(
        "`num_hidden_layers` is not the number of layers stored",
        "leaves further layers out, fills missing ones with random numbers",
        "fails",
        REFUSED,
    ),
    "shapes": Pair(
        "`head_dim`, `num_key_value_heads`, `num_experts`, `intermediate_size` and the shapes stored",
        "fails",
        "writes a file that it refuses to load",
        REFUSED,
    ),
    "dtype": Pair(
        "`dtype` (`torch_dtype`) and the type that tensors are stored as",
        'rounds to `dtype` when asked for "auto"',
        "takes the first tensor's",
        "reads what is stored",
        "dtype is {stated} in config.json, but tensors are stored as {stored}: read as they are stored",
    ),
    # Whose config it is
    "architectures and model_type": Pair(
        "`architectures` and `model_type` name two families",
        "goes by `model_type`",
        "goes by `architectures`",
        "refused; a `model_type` of no family is told",
        "config.json's model_type is {kind}, of no family here: read as {family}, which architectures says",
    ),
    "text_config": Pair(
        "a key at the top and another value in `text_config`",
        "reads `text_config` alone",
        "takes the inner one, the outer one where that is missing",
        "as transformers",
        "config.json has {keys} at the top otherwise than in text_config: the latter counts, as in transformers",
    ),
    # Files
    "quantization twice": Pair(
        "`quantization_config` in config.json, and quantize_config.json, quant_config.json or hf_quant_config.json",
        "reads config.json alone",
        "reads config.json, then hf_quant_config.json",
        "as transformers",
        "{file} says {theirs} and config.json {ours}: the latter counts, as in transformers",
    ),
    "scales of a cache": Pair(
        "k_scale, v_scale and the like beside weights",
        "leaves them out",
        "fails",
        "leaves them out: they belong to a run-time's cache",
        "{count} scales of a run-time's cache or activations are left out: they are no part of the weights",
    ),
    "other weights": Pair(
        "model.safetensors beside shards, consolidated.safetensors, pytorch_model.bin, a variant (fp16)",
        "reads model.safetensors, else the shards of the index",
        "reads the index's shards, else model*.safetensors",
        "as transformers",
        "{files}: not read, {read} counts",
    ),
    "an adapter": Pair(
        "adapter_model.safetensors or adapter_config.json beside full weights",
        "with peft: loads the adapter's base model and the adapter; without: the full weights",
        "reads the full weights",
        "reads the full weights",
        "{files}: an adapter beside full weights is not applied; merge it first if it belongs to the model",
    ),
    "a projector": Pair(
        "a vision tower or a projector beside the text model",
        "loads both",
        "writes the text model, the rest as mmproj",
        "takes the text model",
        "{count} tensors of the vision part are left out: only the text model is converted",
    ),
    "index and shards": Pair(
        "a tensor is in another shard than the index says, or in none",
        "reads whatever the shards hold",
        "compares the names",
        "reads whatever the shards hold; one in two shards, or in none, is refused",
        "{count} tensors are in another shard than {index} says",
    ),
    # The tokenizer
    "ends of a text": Pair(
        "`eos_token` of the tokenizer, `eos_token_id` of generation_config.json and of config.json",
        "ends at generation_config.json's, else config.json's",
        "takes the tokenizer's, and known texts such as <|im_end|>",
        "takes the tokenizer's; the others end generation as well (llama.cpp has room for two more)",
        "{files}: generation ends at {ends}, the tokenizer's eos_token is {eos}: {outcome}",
    ),
    "chat templates": Pair(
        "chat_template.jinja, tokenizer_config.json, chat_template.json",
        "takes the first; the last is for processors",
        "takes tokenizer_config.json's, else the first, else the last",
        "takes the first, the second, the last, in this order",
        "{others} holds another chat template than {chosen}: the latter counts, as in transformers",
    ),
}


def note(name: str, **values: Any) -> str:
    """What is said of a pair that was settled."""
    return PAIRS[name].note.format(**values)


def markdown() -> str:
    """The table of docs/contradictions.md."""
    head = "| two sources | transformers | llama.cpp | Dither |\n|---|---|---|---|"
    cells = ((pair.sources, pair.transformers, pair.llama_cpp, pair.here) for pair in PAIRS.values())
    return "\n".join([head, *(f"| {' | '.join(row)} |" for row in cells)])
