"""GGUF's rotary embedding back to transformers' parameters of it: `models/arch/rope.py` read backwards.

llama.cpp turns a pair of dimensions by position · base^(−2i/d) / factor_i.  Where the factors of a
`rope_freqs.weight` come from (Llama 3.1's interpolation, say) is no longer known here, nor needed: they
divide the frequencies of transformers' own module.

One choice depends on length.  LongRoPE has factors for short and for long contexts; llama.cpp decides by
the context it was opened with, transformers by the positions it is given.  Both agree where sequences
fill the context.
"""

from __future__ import annotations

import math
from typing import Any

from dither.errors import SourceError, UnsupportedError
from dither.models.arch.family import Family
from dither.models.blocks.metadata import Metadata
from dither.system.text import shown
from dither.types import Floats, Model

Parameters = dict[str, Any]
LLAMA_CPP_BASE = 10000.0
FREQUENCIES = "rope_freqs.weight"


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
        **_scaling(model, metadata, family, dimensions, context),
    }
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


def _scaling(model: Model, metadata: Metadata, family: Family, dimensions: int, context: int) -> Parameters:
    original = metadata.whole("rope.scaling.original_context_length", context)
    attention = metadata.number("rope.scaling.attn_factor", 1.0)
    factor = metadata.value("rope.scaling.factor")
    kind = metadata.text("rope.scaling.type", "linear" if factor else "none")
    long, short = (factors(model, f"rope_factors_{length}.weight", dimensions) for length in ("long", "short"))
    if long is not None and short is not None:
        return {
            "rope_type": "longrope",
            "long_factor": long.tolist(),
            "short_factor": short.tolist(),
            "original_max_position_embeddings": original,
            "attention_factor": attention,
        }
    if kind == "none":
        return {"rope_type": "default"}
    if kind not in ("linear", "yarn") or kind not in family.scalings:
        thing = f"metadata {family.arch}.rope.scaling.type"
        raise UnsupportedError(thing, f"is {shown(kind)}, which is not known for {family.name}")
    found: Parameters = {"rope_type": kind, "factor": metadata.number("rope.scaling.factor")}
    if kind == "yarn":
        # llama.cpp multiplies the key by the paper's own 1 + 0.1 ln factor; transformers wants the product.
        scale = 1 + 0.1 * math.log(found["factor"]) if found["factor"] > 1 else 1.0
        found |= {"original_max_position_embeddings": original, "attention_factor": attention * scale}
    return found


def factors(model: Model, name: str, dimensions: int) -> Floats | None:
    """One factor for each rotated pair, float32 (P,), or None where the model has no such tensor."""
    tensor = next((tensor for tensor in model.tensors if tensor.name == name), None)
    if tensor is not None and tensor.shape != (dimensions // 2,):
        reason = f"has shape {list(tensor.shape)}, but {dimensions} dimensions are rotated in pairs"
        raise SourceError(f"tensor {name}", reason, "Take the GGUF from its authors.")
    return None if tensor is None else tensor.read(0, 1)[0]
