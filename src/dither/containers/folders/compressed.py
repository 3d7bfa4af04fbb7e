"""compressed-tensors: the container of vLLM and llm-compressor, several formats under one configuration.

    w4a16, w8a16   integers packed into words, per group or per row; activations stay as they are
    w8a8           int8 per row; activations become int8 per token while the model runs
    fp8            e4m3 per row; activations become e4m3 per token while the model runs
    mxfp4, nvfp4   four-bit floats under tiny float scales, per 32 or 16 columns

Scales are stored in the model's dtype.  A file may mix them: each codec has a group in the configuration that
lists its modules.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from dither.containers.folders.scheme import (
    Arrays,
    Integers,
    Order,
    Parts,
    Scheme,
    Wish,
    group_name,
    integers_of,
    refuse,
    signed,
    whole_groups,
)
from dither.formats.layouts import Affine, Float8, Micro, compressed, float8, integers, micro
from dither.types import Bytes, Codec, No, Tensor, Yes

BITS = (2, 3, 4, 8)
_MOST = 6 * 448.0  # the largest code under the largest scale of NVFP4
_CHUNK = 2**22  # weights read at a time


class Compressed(Scheme):
    """One of the names above; `activations` are what the consumer rounds them to."""

    def __init__(self, name: str, words: str, bits: int | None, group: int, activations: bool = False) -> None:
        self.name, self.title = name, f"compressed-tensors {name.upper()}"
        self.words = f"compressed-tensors: {words}; vLLM, transformers"
        self.bits, self.group, self.activations = bits, group, activations

    def codec(self, wish: Wish) -> str:
        if self.bits is None or self.activations:
            if (wish.bits, wish.group, wish.sym) not in ((None, None, None), (self.bits, None, None)):
                raise refuse(self, "a grid", "has one already", "Leave --bits, --group and --sym out.")
            return self._fixed(wish)
        bits = wish.bits or self.bits
        if bits not in BITS:
            raise refuse(self, f"--bits {bits}", "is not one of 2, 3, 4 and 8", "Choose one of them.")
        group = self.group if wish.group is None else wish.group
        sign = "int" if wish.sym in (None, True) else "uint"
        return f"{sign}{bits}-{group_name(group)}{wish.scale_suffix}"

    def _fixed(self, wish: Wish) -> str:
        return {
            "w8a8": f"int8-channel{wish.scale_suffix}",
            "fp8": f"fp8-channel{wish.scale_suffix or '-bf16'}",
            "mxfp4": "MXFP4",
            "nvfp4": "nvfp4",
        }[self.name]

    def codec_of(self, tensor: Tensor, codec: str) -> str:
        """NVFP4 has a scale for the whole tensor besides: the power of two that its largest weight leaves."""
        if codec.upper() != "NVFP4":
            return codec
        step, largest = max(1, _CHUNK // tensor.columns), 0.0
        for start in range(0, tensor.rows, step):
            largest = max(largest, float(np.abs(tensor.read(start, min(start + step, tensor.rows))).max(initial=0)))
        exponent = math.floor(math.log2(_MOST / largest)) if 0 < largest < math.inf else 0
        return f"nvfp4-e{exponent}"

    def shared(self, kinds: Collection[str]) -> str | None:
        """One scale for matrices that are computed as one: that of the largest weight among them."""
        exponents = [kind.partition("-e")[2] for kind in kinds if kind.startswith("nvfp4-e")]
        return f"nvfp4-e{min(map(int, exponents))}" if len(exponents) == len(kinds) else None

    def choices(self, wish: Wish) -> tuple[str, ...]:
        if self.bits is None or self.activations:
            return (self.codec(wish),)
        return tuple(self.codec(replace(wish, bits=bits)) for bits in BITS)

    def can_hold(self, codec: str, shape: tuple[int, ...]) -> Yes | No:
        columns, kind = shape[-1], integers_of(codec)
        if kind is not None:
            return whole_groups(kind, columns)
        block = {"MXFP4": 32, "NVFP4": 64}.get(codec.partition("-")[0].upper())
        if block is not None:
            return No(f"{columns} columns; {codec} needs a multiple of {block}") if columns % block else Yes()
        return Yes() if codec.startswith("fp8-channel") else No(f"compressed-tensors has no {codec}")

    def parts(self, codec: Codec, rows: int, columns: int, dtype: str) -> Parts:
        kind = integers_of(codec.name)
        if kind is None:
            if codec.name.startswith("fp8"):
                return float8.parts(rows, columns, "channel", scale=_scale_of(codec.name))
            return micro.parts(rows, columns, codec.name.partition("-")[0].upper())
        if self._is_plain(kind):
            return integers.parts(rows, columns, "int-quantized", scale=kind.scale)
        return compressed.parts(
            rows, columns, kind.bits, kind.group or columns, symmetric=not kind.affine, scale=kind.scale
        )

    def pack(self, codec: Codec, raw_RN: Bytes, columns: int, dtype: str, order_C: Order | None = None) -> Arrays:
        codes_RC, scale_RG, *zeros = codec.split(raw_RN)  # type: ignore[attr-defined]
        kind = integers_of(codec.name)
        if kind is None:
            if codec.name.startswith("fp8"):
                whole_row = Float8(codes_RC, scale_RG, (1, columns))
                return float8.pack(whole_row, "channel", scale=_scale_of(codec.name))
            scale = 2.0 ** int(codec.name.partition("-e")[2]) if codec.name.startswith("nvfp4") else None
            return micro.pack(Micro(codes_RC, scale_RG, scale))
        if self._is_plain(kind):
            return integers.pack(signed(codes_RC, scale_RG, zeros[0]), "int-quantized", scale=kind.scale)
        affine = Affine(codes_RC, scale_RG, zeros[0])
        return compressed.pack(affine, kind.bits, symmetric=not kind.affine, scale=kind.scale)

    def _is_plain(self, kind: Integers) -> bool:
        """Whether codes are stored one to a byte, for kernels that multiply integers."""
        return self.activations and kind.bits == 8

    def config(self, modules: Mapping[str, str], plain: list[str], wish: Wish) -> dict[str, Any]:
        kinds = [kind for kind, _ in Counter(_generic(codec) for codec in modules.values()).most_common()]
        groups = {}
        for number, kind in enumerate(kinds):
            targets = [name for name, codec in modules.items() if _generic(codec) == kind]
            groups[f"group_{number}"] = {
                "targets": targets if len(kinds) > 1 else ["Linear"],
                "weights": self._weights(kind),
                "input_activations": self._activations(kind),
                "output_activations": None,
                "format": self._format(kind),
            }
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": groups,
            "ignore": plain,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def _format(self, codec: str) -> str:
        kind = integers_of(codec)
        if kind is None:
            return {"MXFP4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}.get(codec, "float-quantized")
        return "int-quantized" if self._is_plain(kind) else "pack-quantized"

    def _weights(self, codec: str) -> dict[str, Any]:
        kind = integers_of(codec)
        if kind is not None:
            group = {"strategy": "group", "group_size": kind.group} if kind.group else {"strategy": "channel"}
            return {
                "num_bits": kind.bits,
                "type": "int",
                "symmetric": not kind.affine,
                "dynamic": False,
                "actorder": None,
                **group,
            }
        if codec.startswith("fp8"):
            return {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"}
        scale = {"MXFP4": (32, "group", "torch.uint8"), "nvfp4": (16, "tensor_group", "torch.float8_e4m3fn")}
        group_size, strategy, dtype = scale[codec]
        return {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "dynamic": False,
            "strategy": strategy,
            "group_size": group_size,
            "scale_dtype": dtype,
        }

    def _activations(self, codec: str) -> dict[str, Any] | None:
        if not self.activations:
            return None
        kind = "float" if codec.startswith("fp8") else "int"
        return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}


def _generic(codec: str) -> str:
    """A codec's name without what differs from tensor to tensor."""
    return "nvfp4" if codec.startswith("nvfp4") else codec


def _scale_of(codec: str) -> str:
    return "BF16" if codec.endswith("-bf16") else "F32"


SCHEMES = (
    Compressed("w4a16", "integers of 4 bits (or 2, 3, 8) in groups, mixed if wished", 4, 128),
    Compressed("w8a16", "integers of 8 bits per row", 8, 0),
    Compressed("w8a8", "8 bits per row, activations rounded to 8 bits too", 8, 0, activations=True),
    Compressed("fp8", "e4m3 per row, activations too", None, 0, activations=True),
    Compressed("mxfp4", "4-bit floats under a power of two per 32 weights", None, 32),
    Compressed("nvfp4", "4-bit floats under a tiny float per 16 weights", None, 16),
)
