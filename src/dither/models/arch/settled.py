"""Where config.json and the tensors of a checkpoint contradict each other, or one key another: settled, and said.

What transformers does decides, and `models/contradictions` has the words.  Where one reader adds tensors that another
leaves out, and they are not zero, nobody can tell here which of the two the model was trained as: that is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dither.errors import SourceError
from dither.formats.tensor_names import EMBEDDING, OUTPUT, within_block
from dither.models.arch.family import Family, Rule
from dither.models.checkpoint import StoredTensor
from dither.models.contradictions import note
from dither.models.json_object import JsonObject, described

Targets = dict[str, tuple[Rule, dict[int, StoredTensor]]]  # by name: the rule, and a source for each expert

BIASES = {
    "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"),
    "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
}
TIED = "tie_word_embeddings"
HEAD = "lm_head.weight"
_CONFIG = "config.json"
_FETCH_AGAIN = "Fetch the checkpoint again, or take it from its authors."
_ROWS = 4096  # of two matrices that are compared, at a time
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Keys of a multimodal checkpoint's top level that are read there, whatever the text model says.
_OF_THE_WHOLE = ("architectures", "dtype", "torch_dtype", TIED, "_name_or_path")
_NOT_COMPARED = (*_OF_THE_WHOLE, "model_type", "transformers_version", "quantization_config", "initializer_range")


def lifted(config: Mapping[str, Any]) -> tuple[JsonObject, list[str]]:
    """config.json with a nested text model lifted out, as transformers reads it: what stands outside is not its own."""
    text = JsonObject(config, _CONFIG).section("text_config")
    if not text:
        return JsonObject(config, _CONFIG), []
    outer = {key: config[key] for key in config if key in _OF_THE_WHOLE or key.endswith("_token_id")}
    inner = {key: value for key, value in text.items() if key not in outer or key not in _OF_THE_WHOLE}
    differing = [
        key
        for key in text
        if config.get(key) not in (None, text[key]) and key not in _NOT_COMPARED and not key.endswith("_token_id")
    ]
    notes = [note("text_config", keys=", ".join(map(described, differing[:8])))] if differing else []
    return JsonObject({**outer, **inner}, _CONFIG), notes


def told_of_config(family: Family, config: JsonObject, tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Notes on what config.json says of the whole and is not so."""
    kind = config.get("model_type")
    if kind is not None and kind not in family.model_types:
        yield note("architectures and model_type", kind=described(kind), family=family.name)
    stated = config.get("dtype") or config.get("torch_dtype")
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        if len(tensor.shape) > 1:
            sizes[tensor.dtype] += tensor.nbytes
    stored = max(sizes, key=sizes.__getitem__, default="")
    if stored in _TYPES.values() and isinstance(stated, str) and _TYPES.get(stated, stored) != stored:
        yield note("dtype", stated=stated, stored=stored)


def settle_embedding(config: JsonObject, targets: Targets, rules: Sequence[Rule]) -> Iterator[str]:
    """A tied matrix that is stored under the head's name alone is both."""
    if config.get(TIED) and EMBEDDING not in targets and OUTPUT in targets:
        rule = next(rule for rule in rules if rule.target == EMBEDDING)
        targets[EMBEDDING] = (rule, targets.pop(OUTPUT)[1])
        yield note("tied, only the head")


def settle_output(family: Family, config: JsonObject, targets: Targets, *, readable: bool) -> Iterator[str]:
    """The output matrix is left out where it is the embedding, which llama.cpp then takes.

    Without `readable`, a second matrix of a tied model is taken for a copy.  Raises SourceError for one that is
    missing or does not fit.
    """
    tied = config.get(TIED, False)
    if OUTPUT not in targets:
        if not tied:
            reason = "is missing, and config.json does not say that it is tied to the embedding"
            way_out = f"Fetch the checkpoint again; where it is tied, set {TIED} to true in config.json."
            raise SourceError(f"tensor {HEAD}", reason, way_out)
        return
    head, embedding = targets[OUTPUT][1][0], targets[EMBEDDING][1][0]
    rows = embedding.shape[0] if embedding.shape else 0
    if head.shape[:1] != (rows,):
        reason = f"has shape {list(head.shape)}, which are not the embedding's {rows} rows"
        raise SourceError(f"tensor {HEAD}", reason, _FETCH_AGAIN)
    if not tied:
        return
    if readable and not _are_equal(head, embedding):
        if family.assumes.get(TIED):
            reason = f"is stored and differs from the embedding, to which llama.cpp ties it in {family.name}"
            raise SourceError(f"tensor {HEAD}", reason, "No GGUF of this model would be right: take its original.")
        yield note("tied, another head")
        return
    del targets[OUTPUT]
    yield note("tied, the same head" if readable else "tied, unread head")


def settle_biases(family: str, config: JsonObject, targets: Targets) -> Iterator[str]:
    """Biases that config.json denies are left out where they are zero, and refused where they are not."""
    for key, kinds in BIASES.items():
        names = [name for name in targets if within_block(name) in {f"{kind}.bias" for kind in kinds}]
        if config.get(key) is True:
            there = {within_block(name) for name in targets}
            without = [kind for kind in kinds if f"{kind}.weight" in there and f"{kind}.bias" not in there]
            if without:
                yield note("biases promised", key=key, kinds=", ".join(without))
        if config.get(key) is not False or not names:
            continue
        for name in names:
            stored = targets[name][1][0]
            if np.any(stored.read(0, stored.rows)):
                reason = f"is stored and not zero, but {key} is not true in config.json: transformers leaves it out, "
                way_out = f"Set {key} to true in config.json if the model was trained with biases, or remove them."
                raise SourceError(f"tensor {stored.name}", f"{reason}llama.cpp adds it", way_out)
            del targets[name]
        where = ", ".join(dict.fromkeys(within_block(name).removesuffix(".bias") for name in names))
        yield note("biases denied", count=len(names), where=where, family=family)


def _are_equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two matrices hold the same numbers; most that differ do so in their first rows."""
    if a.shape != b.shape:
        return False
    starts = range(0, a.rows, _ROWS)
    return all(
        np.array_equal(a.read(at, stop), b.read(at, stop), equal_nan=True)
        for at, stop in ((start, min(start + _ROWS, a.rows)) for start in starts)
    )
