"""GGUF's rotary embedding back to transformers' parameters of it: `models/arch/rope.py` read backwards.

llama.cpp turns a pair of dimensions by position · base^(−2i/d) / factor_i.  Where the factors of a
`rope_freqs.weight` come from is found out where it can be (`llama3.py`), because config.json has words for schemes
and engines have kernels for them; any others are told factor by factor, as LongRoPE's are.

One choice depends on length.  LongRoPE has factors for short and for long contexts; llama.cpp decides by
the context it was opened with, transformers by the positions it is given.  Both agree where sequences
fill the context.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dither.errors import SourceError, UnsupportedError
from dither.models.arch.family import Family
from dither.models.arch.recognize import PLAIN
from dither.models.blocks.llama3 import llama3_parameters
from dither.models.blocks.metadata import Metadata
from dither.system.text import shown
from dither.types import Floats, Model

Parameters = dict[str, Any]
LLAMA_CPP_BASE = 10000.0
FREQUENCIES = "rope_freqs.weight"
BY_LENGTH = ("rope_factors_short.weight", "rope_factors_long.weight")


def rope_parameters(
    model: Model, metadata: Metadata, family: Family, head_dim: int, context: int, *, by_layer: bool
) -> Parameters:
    """transformers' `rope_parameters`; with one entry per kind of layer where `by_layer`.

    Raises UnsupportedError for a scaling that is not known, SourceError where its numbers are missing.
    """
    dimensions = metadata.whole("rope.dimension_count", head_dim)
    parameters: Parameters = {
        "rope_theta": metadata.number("rope.freq_base", LLAMA_CPP_BASE),
        **_share(family, dimensions, head_dim),
    }
    parameters |= _scaling(model, metadata, family, dimensions, context, parameters["rope_theta"])
    if not by_layer:
        return parameters
    local = metadata.number("rope.freq_base_swa", family.defaults["rope_local_base_freq"])
    return {"full_attention": parameters, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def _share(family: Family, dimensions: int, head_dim: int) -> Parameters:
    """The part of a head that is rotated; transformers computes int(head_dim · share) from it."""
    if dimensions == head_dim:
        return {}
    if dimensions > head_dim or dimensions % 2 or "partial_rotary_factor" in family.assumes:
        reason = f"is {dimensions} of a head's {head_dim}: nothing here can run that"
        raise UnsupportedError(f"metadata {family.arch}.rope.dimension_count", reason)
    share = dimensions / head_dim
    if int(head_dim * share) != dimensions:
        share = (dimensions + 0.5) / head_dim
    return {"partial_rotary_factor": share}


def _scaling(
    model: Model, metadata: Metadata, family: Family, dimensions: int, context: int, base: float
) -> Parameters:
    """How frequencies are scaled, and scores with them, as llama.cpp reads it."""
    original = metadata.whole("rope.scaling.original_context_length", context)
    attention = metadata.number("rope.scaling.attn_factor", 1.0)
    key = next((key for key in ("rope.scaling.factor", "rope.scale_linear") if metadata.value(key)), None)
    kind = metadata.text("rope.scaling.type", "linear")
    is_stretched = kind == "yarn" or (key is not None and kind != "none")
    stretch = metadata.number(key or "rope.scaling.factor") if is_stretched else 1.0
    thing = f"metadata {family.arch}.rope.scaling.type"
    if kind not in ("none", "linear", "yarn", "longrope") or (stretch != 1 and kind not in family.scalings):
        raise UnsupportedError(thing, f"is {shown(kind)}, which is not known for {family.name}", PLAIN)
    tables = _tables(model, dimensions)
    if kind == "yarn":
        if tables:
            raise UnsupportedError(thing, "is yarn beside factors for each frequency: nothing here can run that", PLAIN)
        # llama.cpp multiplies the key by the paper's own 1 + 0.1 ln factor; transformers wants the product.
        scale = 1 + 0.1 * math.log(stretch) if stretch > 1 else 1.0
        known = {"original_max_position_embeddings": original, "attention_factor": attention * scale}
        return {"rope_type": "yarn", "factor": stretch, **known}
    if len(tables) == 1 and (tables[0] == tables[0][0]).all():  # all alike: positions divided
        stretch, tables = stretch * float(tables[0][0]), []
    if len(tables) == 1 and stretch == attention == 1:
        found = llama3_parameters(tables[0], base)
        if found is not None:
            return found
    if attention == 1 and not tables:
        return {"rope_type": "default"} if stretch == 1 else {"rope_type": "linear", "factor": stretch}
    by_length = tables or [np.ones(dimensions // 2, np.float32)]
    return {
        "rope_type": "longrope",
        "long_factor": (stretch * by_length[-1]).tolist(),
        "short_factor": (stretch * by_length[0]).tolist(),
        "factor": max(context / original, 1.0),
        "original_max_position_embeddings": original,
        "attention_factor": attention,
    }


def _tables(model: Model, dimensions: int) -> list[Floats]:
    """No factors, one for any length of text, or those for short texts and those for long ones.

    Source: `get_rope_factors` of llama.cpp, where one for any length comes first.
    """
    every, short, long = (factors(model, name, dimensions) for name in (FREQUENCIES, *BY_LENGTH))
    if every is not None:
        return [every]
    if short is None and long is None:
        return []
    if short is None or long is None:
        name = BY_LENGTH[short is not None]
        raise SourceError(f"tensor {name}", "is missing, and its twin is there", "Take the GGUF from its authors.")
    return [short, long]


def factors(model: Model, name: str, dimensions: int) -> Floats | None:
    """One factor for each rotated pair, float32 (P,), or None where the model has no such tensor."""
    tensor = next((tensor for tensor in model.tensors if tensor.name == name), None)
    if tensor is not None and tensor.shape != (dimensions // 2,):
        reason = f"has shape {list(tensor.shape)}, but {dimensions} dimensions are rotated in pairs"
        raise SourceError(f"tensor {name}", reason, "Take the GGUF from its authors.")
    return None if tensor is None else tensor.read(0, 1)[0]
