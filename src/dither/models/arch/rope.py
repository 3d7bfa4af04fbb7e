"""Rotary position embedding: how a config.json scales it, and how a GGUF says the same.

Which of config.json's spellings counts is settled in `rope_config`.  GGUF knows three schemes by name (linear,
yarn, longrope) and takes any other that is a factor per frequency as a tensor:

    linear    positions divided by a factor (Chen et al. 2023, arXiv:2306.15595)
    yarn      frequencies interpolated by their wavelength, scores scaled (Peng et al. 2023, arXiv:2309.00071)
    llama3    Llama 3.1's own interpolation by wavelength, here → `rope_freqs.weight`
    longrope  searched factors, one list up to the original context, one beyond → `rope_factors_*.weight`

A tensor's factor divides the frequency of its pair of dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from dither.errors import SourceError, UnsupportedError
from dither.formats.ggml import Field, f32, string, u32
from dither.models.arch.rope_config import Rotary
from dither.models.contradictions import note
from dither.models.json_object import JsonObject, described
from dither.types import Floats

_WAY_OUT = "Take the file from the original model."


@dataclass(frozen=True)
class Rope:
    """`metadata` lacks the architecture's prefix; `tensors` are 1-D, of half the rotated dimensions."""

    metadata: dict[str, Field]
    tensors: dict[str, Floats] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def rope_of(settled: Rotary, config: JsonObject, head_dim: int, scalings: tuple[str, ...], family: str) -> Rope:
    """What a GGUF must say about rotary embedding.

    `scalings` are the kinds that llama.cpp can compute in this architecture.  Raises UnsupportedError
    for any other, SourceError where a scheme's numbers are missing.
    """
    shared, local = JsonObject(settled.shared, config.thing), JsonObject(settled.local, config.thing)
    kind = shared.text("rope_type") or "default"
    kind = "longrope" if kind == "su" else kind
    if kind != "default" and kind not in scalings:
        known = ", ".join(scalings)
        raise UnsupportedError(
            "config.json",
            f"RoPE scaling {described(kind)} is not known for {family}",
            f"llama.cpp computes {known} there: convert a checkpoint that uses one of these.",
        )
    share = shared.positive("partial_rotary_factor") if "partial_rotary_factor" in shared else 1.0
    dimensions = int(head_dim * min(share, 1.0))
    metadata = {"rope.dimension_count": u32(dimensions), "rope.freq_base": f32(shared.positive("rope_theta"))}
    if "rope_theta" in local:
        metadata["rope.freq_base_swa"] = f32(local.positive("rope_theta"))
    if local.get("rope_type", "default") != "default":
        raise UnsupportedError("config.json", "local layers have a RoPE scaling of their own", "")
    if kind in ("linear", "yarn"):
        metadata |= {"rope.scaling.type": string(kind), "rope.scaling.factor": f32(shared.positive("factor"))}
        return Rope({**metadata, **(_yarn(shared, config) if kind == "yarn" else {})})
    if kind == "llama3":
        return Rope(metadata, {"rope_freqs.weight": llama3_factors(shared, dimensions)})
    if kind == "longrope":
        return _longrope(metadata, shared, config, dimensions)
    notes = ("dynamic RoPE scaling is left out: exact up to the original context",) if kind == "dynamic" else ()
    return Rope(metadata, notes=notes)


def _yarn(shared: JsonObject, config: JsonObject) -> dict[str, Field]:
    """llama.cpp multiplies `attn_factor` by 1 + 0.1 ln factor, which is the paper's own default."""
    original = shared.whole("original_max_position_embeddings") or config.given("max_position_embeddings")
    found = {"rope.scaling.original_context_length": u32(original)}
    factor = shared.positive("factor")
    if shared.get("attention_factor") is not None:
        found["rope.scaling.attn_factor"] = f32(shared.positive("attention_factor") / _mscale(factor, 1.0))
    elif shared.get("mscale") and shared.get("mscale_all_dim"):
        above, below = (_mscale(factor, shared.positive(name)) for name in ("mscale", "mscale_all_dim"))
        found["rope.scaling.attn_factor"] = f32(above / below / _mscale(factor, 1.0))
    for name, built_in in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        # llama.cpp has keys for the first two, but reads them for few architectures, and none of ours.
        if shared.get(name, built_in) not in (built_in, None):
            raise built_in_otherwise(name, shared[name], "YaRN", repr(built_in))
    return found


def built_in_otherwise(name: str, actual: object, what: str, built_in: str) -> UnsupportedError:
    """The error for a setting that llama.cpp has built in otherwise: it would run and be wrong."""
    reason = f"is {described(actual)}, but llama.cpp computes {what} with {built_in}"
    return UnsupportedError(f"config.json, {name}", reason, "No GGUF of this model would be right.")


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def llama3_factors(shared: JsonObject, dimensions: int) -> Floats:
    """Llama 3.1's factors: short wavelengths stay, long ones are stretched, a ramp in 1/wavelength between.

    Source: `_compute_llama3_parameters` of transformers, which took it from Meta's reference code.
    """
    factor, low, high, original = (
        shared.positive(name)
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    if high <= low:
        reason = "high_freq_factor of RoPE is not above low_freq_factor"
        raise SourceError("config.json", reason, _WAY_OUT)
    exponents = np.arange(0, dimensions, 2, dtype=np.float64) / dimensions
    wavelengths = 2 * np.pi * shared.positive("rope_theta") ** exponents
    turns = original / wavelengths  # how often the pair goes around within the original context
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - kept) / factor + kept), dtype=np.float32)


def _longrope(metadata: dict[str, Field], shared: JsonObject, config: JsonObject, dimensions: int) -> Rope:
    original = int(shared.positive("original_max_position_embeddings"))
    ratio = config.given("max_position_embeddings") / original
    notes: tuple[str, ...] = ()
    scale = ratio if shared.get("factor") is None else shared.positive("factor")
    attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 and original > 1 else 1.0
    if shared.get("attention_factor") is not None:
        attention = shared.positive("attention_factor")
    elif not math.isclose(scale, ratio):
        notes = (note("longrope factor", factor=f"{scale:g}", ratio=f"{ratio:g}"),)
    metadata |= {
        "rope.scaling.type": string("longrope"),
        "rope.scaling.original_context_length": u32(original),
        "rope.scaling.attn_factor": f32(attention),
    }
    tensors: dict[str, Floats] = {}
    for length in ("long", "short"):
        factors = np.asarray(shared.numbers(f"{length}_factor"), dtype=np.float32)
        if factors.shape != (dimensions // 2,):
            reason = f"{length}_factor has {factors.size} numbers, not {dimensions // 2}"
            raise SourceError("config.json", reason, _WAY_OUT)
        tensors[f"rope_factors_{length}.weight"] = factors
    return Rope(metadata, tensors, notes)
