"""Ways of quantizing by the name that config.json has for them, and what others need to know of each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from dither.system.discovery import modules


@dataclass(frozen=True)
class Method:
    """`vllm` is vLLM's --quantization: "" leaves it to vLLM, which picks the fastest kernel; None: not taken."""

    name: str  # `quant_method` in config.json
    title: str  # as a person reads it
    vllm: str | None = ""
    vllm_bits: tuple[int, ...] = ()  # per weight that vLLM has kernels for, where those differ


@cache
def methods() -> dict[str, Method]:
    """Every method that a layout of this folder stores, by name."""
    return {
        method.name: method for module in modules("dither.formats.layouts") for method in getattr(module, "METHODS", ())
    }
