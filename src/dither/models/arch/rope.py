"""Rotary position embedding: how a config.json scales it, and how a GGUF says the same.

transformers 4 kept `rope_theta` and `rope_scaling` apart, transformers 5 has one `rope_parameters`, by
kind of layer where local and global layers differ.  GGUF knows three schemes by name (linear, yarn,
longrope) and takes any other that is a factor per frequency as a tensor:

    linear    positions divided by a factor (Chen et al. 2023, arXiv:2306.15595)
    yarn      frequencies interpolated by their wavelength, scores scaled (Peng et al. 2023, arXiv:2309.00071)
    llama3    Llama 3.1's own interpolation by wavelength, here → `rope_freqs.weight`
    longrope  searched factors, one list up to the original context, one beyond → `rope_factors_*.weight`

A tensor's factor divides the frequency of its pair of dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dither.errors import SourceError, UnsupportedError
from dither.formats.ggml import Field, f32, string, u32
from dither.system.text import shown
from dither.types import Floats

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Rope:
    """`metadata` lacks the architecture's prefix; `tensors` are 1-D, of half the rotated dimensions."""

    metadata: dict[str, Field]
    tensors: dict[str, Floats] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def parameters(config: Parameters) -> tuple[Parameters, Parameters]:
    """Both generations' spellings as one dictionary for global layers, and one for local layers."""
    stored = config.get("rope_parameters") or config.get("rope_scaling") or {}
    local = stored.get("sliding_attention") or {}
    shared = dict(stored.get("full_attention") or ({} if local else stored))
    shared.setdefault("rope_type", shared.get("type") or "default")
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(name) is not None:
            shared.setdefault(name, config[name])
    if not local and config.get("rope_local_base_freq") is not None:
        local = {"rope_theta": config["rope_local_base_freq"]}
    return shared, local


def rope_of(config: Parameters, head_dim: int, scalings: tuple[str, ...], family: str) -> Rope:
    """What a GGUF must say about rotary embedding.

    `scalings` are the kinds that llama.cpp can compute in this architecture.  Raises UnsupportedError
    for any other, SourceError where a scheme's numbers are missing.
    """
    shared, local = parameters(config)
    kind = {"su": "longrope"}.get(shared["rope_type"], shared["rope_type"])
    if kind != "default" and kind not in scalings:
        known = ", ".join(scalings)
        raise UnsupportedError(
            "config.json",
            f"RoPE scaling {kind!r} is not known for {family}",
            f"llama.cpp computes {known} there: convert a checkpoint that uses one of these.",
        )
    share = _positive({"partial_rotary_factor": 1.0, **shared}, "partial_rotary_factor")
    dimensions = int(head_dim * min(share, 1.0))
    metadata = {"rope.dimension_count": u32(dimensions), "rope.freq_base": f32(_positive(shared, "rope_theta"))}
    if "rope_theta" in local:
        metadata["rope.freq_base_swa"] = f32(_positive(local, "rope_theta"))
    if local.get("rope_type", "default") != "default":
        raise UnsupportedError("config.json", "local layers have a RoPE scaling of their own", "")
    if kind == "linear":
        return Rope({**metadata, **_scaling("linear", shared)})
    if kind == "yarn":
        return Rope({**metadata, **_yarn(shared, config)})
    if kind == "llama3":
        return Rope(metadata, {"rope_freqs.weight": llama3_factors(shared, dimensions)})
    if kind == "longrope":
        return _longrope(metadata, shared, config, dimensions)
    notes = ("dynamic RoPE scaling is left out: exact up to the original context",) if kind == "dynamic" else ()
    return Rope(metadata, notes=notes)


def _needed(shared: Parameters, name: str) -> Any:
    if shared.get(name) is None:
        raise _wrong(f"RoPE needs {name}")
    return shared[name]


def _positive(shared: Parameters, name: str) -> float:
    value = _needed(shared, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise _wrong(f"{name} of RoPE is {shown(repr(value))}")
    return float(value)


def _wrong(reason: str) -> SourceError:
    return SourceError("config.json", reason, "Take the file from the original model.")


def _scaling(kind: str, shared: Parameters) -> dict[str, Field]:
    return {"rope.scaling.type": string(kind), "rope.scaling.factor": f32(_positive(shared, "factor"))}


def _yarn(shared: Parameters, config: Parameters) -> dict[str, Field]:
    """llama.cpp multiplies `attn_factor` by 1 + 0.1 ln factor, which is the paper's own default."""
    original = shared.get("original_max_position_embeddings") or _needed(config, "max_position_embeddings")
    found = {**_scaling("yarn", shared), "rope.scaling.original_context_length": u32(original)}
    factor = _positive(shared, "factor")
    if shared.get("attention_factor") is not None:
        found["rope.scaling.attn_factor"] = f32(_positive(shared, "attention_factor") / _mscale(factor, 1.0))
    elif shared.get("mscale") and shared.get("mscale_all_dim"):
        above, below = (_mscale(factor, _positive(shared, name)) for name in ("mscale", "mscale_all_dim"))
        found["rope.scaling.attn_factor"] = f32(above / below / _mscale(factor, 1.0))
    for name, built_in in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        # llama.cpp has keys for the first two, but reads them for few architectures, and none of ours.
        if shared.get(name, built_in) not in (built_in, None):
            raise UnsupportedError(
                f"config.json, {name}",
                f"is {shared[name]!r}, but llama.cpp computes YaRN with {built_in!r}",
                "No GGUF of this model would be right.",
            )
    return found


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def llama3_factors(shared: Parameters, dimensions: int) -> Floats:
    """Llama 3.1's factors: short wavelengths stay, long ones are stretched, a ramp in 1/wavelength between.

    Source: `_compute_llama3_parameters` of transformers, which took it from Meta's reference code.
    """
    factor, low, high, original = (
        _positive(shared, name)
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    if high <= low:
        raise _wrong("high_freq_factor of RoPE is not above low_freq_factor")
    exponents = np.arange(0, dimensions, 2, dtype=np.float64) / dimensions
    wavelengths = 2 * np.pi * _positive(shared, "rope_theta") ** exponents
    turns = original / wavelengths  # how often the pair goes around within the original context
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - kept) / factor + kept), dtype=np.float32)


def _longrope(metadata: dict[str, Field], shared: Parameters, config: Parameters, dimensions: int) -> Rope:
    original = int(_positive(shared, "original_max_position_embeddings"))
    attention = 1.0
    if shared.get("attention_factor") is not None:
        attention = _positive(shared, "attention_factor")
    elif _needed(config, "max_position_embeddings") > original > 1:
        scale = config["max_position_embeddings"] / original
        attention = math.sqrt(1 + math.log(scale) / math.log(original))
    metadata = {
        **metadata,
        "rope.scaling.type": string("longrope"),
        "rope.scaling.original_context_length": u32(original),
        "rope.scaling.attn_factor": f32(attention),
    }
    return Rope(metadata, dict(_factor_lists(shared, dimensions)))


def _factor_lists(shared: Parameters, dimensions: int) -> Iterator[tuple[str, Floats]]:
    for length in ("long", "short"):
        factors = np.asarray(_needed(shared, f"{length}_factor"), dtype=np.float32)
        if factors.shape != (dimensions // 2,):
            raise SourceError(
                "config.json",
                f"{length}_factor has {factors.size} numbers, not {dimensions // 2}",
                "Take the file from the original model.",
            )
        yield f"rope_factors_{length}.weight", factors
