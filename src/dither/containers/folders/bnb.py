"""bitsandbytes: NF4 and FP4 in blocks along the whole tensor, and LLM.int8; what QLoRA trains on.

A block is 64 weights in the order of memory; where the columns are a multiple of 64 it never crosses a row.
With double quantization (the default here, as in QLoRA) the blocks' scales are 8-bit codes themselves, nested
over the whole tensor, so they are rounded when the last row is there: what a solver counts of a tensor's
error is without that.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dither.codecs.base import SplitCodec
from dither.containers.folders.integers import signed
from dither.containers.folders.scheme import TORCH, Arrays, Order, Parts, Scheme, Wish, refuse
from dither.formats.layouts import Table4, bnb, integers
from dither.types import Bytes, No, Yes

_ONE_ARRAY = "bitsandbytes stores matrices, and a layer's experts are one array there"


class FourBitFolder(Scheme):
    listed = 3
    loaded_by = ("transformers",)
    without_experts = MappingProxyType({"transformers": _ONE_ARRAY})
    needs = "bitsandbytes"
    groups = ()  # bitsandbytes has no smaller blocks than the default

    def __init__(self, name: str) -> None:
        self.name, self.title = name, f"bitsandbytes {name.upper()}"
        self.words = "16 values under a scale per 64 weights, to fine-tune on; bitsandbytes"

    def codec(self, wish: Wish) -> str:
        if wish.bits not in (None, 4) or wish.sym is not None:
            raise refuse(self, "a grid", "has one already", "Only --group can be chosen.")
        group = 64 if wish.group is None else wish.group
        if group not in (64, 128, 256, 512, 1024, 2048, 4096):
            raise refuse(self, f"--group {group}", "is no block of bitsandbytes", "Choose 64, 128, … 4096.")
        return f"{self.name}-g{group}-dq"

    def can_hold(self, codec: str, shape: tuple[int, ...]) -> Yes | No:
        kind, block, _ = _parsed(codec)
        if kind != self.name:
            return No(f"{self.title} holds no {codec}")
        if shape[-1] % block:
            return No(f"{shape[-1]} columns; blocks of {block} would cross rows")
        return Yes()

    def mixes(self, first: str, second: str) -> bool:
        return first == second

    def parts(self, codec: SplitCodec, rows: int, columns: int, dtype: str) -> Parts:
        kind, block, nested = _parsed(codec.name)
        return bnb.parts(rows, columns, kind, block, nested=nested, dtype=TORCH[dtype])

    def pack(self, codec: SplitCodec, raw_RN: Bytes, columns: int, dtype: str, order_C: Order | None = None) -> Arrays:
        kind, _, nested = _parsed(codec.name)
        codes_RC, absmax_RG = codec.split(raw_RN)
        return bnb.pack(Table4(codes_RC, absmax_RG, kind), nested=nested, dtype=TORCH[dtype])

    def config(self, modules: Mapping[str, str], plain: list[str], wish: Wish) -> dict[str, Any]:
        kind, _, nested = _parsed(next(iter(modules.values())))
        four_bit = {
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": nested,
            "bnb_4bit_compute_dtype": TORCH[wish.dtype],
            "bnb_4bit_quant_storage": "uint8",
        }
        return _config(plain, four_bit)


def _parsed(codec: str) -> tuple[str, int, bool]:
    """
    >>> _parsed("nf4-g64-dq")
    ('nf4', 64, True)
    """
    kind, _, rest = codec.partition("-g")
    block, _, nested = rest.partition("-")
    return kind, int(block) if block.isdigit() else 1, nested == "dq"


class EightBitFolder(Scheme):
    name, title, listed = "int8", "bitsandbytes LLM.int8", 3
    loaded_by = ("transformers",)
    without_experts = MappingProxyType({"transformers": _ONE_ARRAY})
    needs = "bitsandbytes"
    words = "8 bits per weight, outliers of activations apart; bitsandbytes"

    def codec(self, wish: Wish) -> str:
        self.check_no_grid(wish, 8)
        return "int8-channel-f32"

    def can_hold(self, codec: str, shape: tuple[int, ...]) -> Yes | No:
        return Yes() if codec == "int8-channel-f32" else No(f"{self.title} holds no {codec}")

    def parts(self, codec: SplitCodec, rows: int, columns: int, dtype: str) -> Parts:
        return integers.parts(rows, columns, "llm-int8")

    def pack(self, codec: SplitCodec, raw_RN: Bytes, columns: int, dtype: str, order_C: Order | None = None) -> Arrays:
        return integers.pack(signed(*codec.split(raw_RN)), "llm-int8")

    def config(self, modules: Mapping[str, str], plain: list[str], wish: Wish) -> dict[str, Any]:
        return _config(plain, {})


def _config(plain: list[str], four_bit: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": bool(four_bit),
        "load_in_8bit": not four_bit,
        **four_bit,
        "llm_int8_skip_modules": plain,
        "llm_int8_threshold": 6.0,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


SCHEMES = (FourBitFolder("nf4"), FourBitFolder("fp4"), EightBitFolder())
