"""compressed-tensors: the container of vLLM and llm-compressor, several formats under one configuration.

    w4a16, w8a16   integers packed into words, per group or per row; activations stay as they are
    w8a8           int8 per row; activations become int8 per token while the model runs
    fp8            e4m3 per row; activations become e4m3 per token while the model runs
    mxfp4, nvfp4   four-bit floats under tiny float scales, per 32 or 16 columns

Scales are stored in the model's dtype.  A file may mix them: each codec has a group in the configuration that
lists its modules.  What is particular to a grid stands in its `Format`; the first of a folder's formats whose
pattern a codec's name matches stores it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dither.codecs import codec as find_codec
from dither.codecs.integers import NAME
from dither.containers.folders.scheme import (
    BITS,
    STORED,
    Arrays,
    Order,
    Parts,
    Scheme,
    SplitCodec,
    Wish,
    integer_codec,
    known_integers,
    signed,
    whole_groups,
)
from dither.formats.layouts import Affine, Float8, Micro, compressed, float8, integers, micro
from dither.types import Bytes, No, Tensor, Yes

_MOST = 6 * 448.0  # the largest code under the largest scale of NVFP4
_CHUNK = 2**22  # weights read at a time


@dataclass(frozen=True)
class Format:
    """Integers packed into words, and what the other formats answer differently."""

    name: str  # in the configuration
    codecs: re.Pattern[str]  # the names of those that are stored so
    activations: str = "int"  # what they are rounded to, where the folder rounds them

    def can_hold(self, codec: str, columns: int) -> Yes | No:
        return whole_groups(known_integers(codec), columns)

    def parts(self, codec: SplitCodec, rows: int, columns: int) -> Parts:
        kind = known_integers(codec.name)
        group = kind.group or columns
        return compressed.parts(rows, columns, kind.bits, group, symmetric=not kind.affine, scale=kind.scale)

    def pack(self, codec: SplitCodec, raw_RN: Bytes, columns: int) -> Arrays:
        kind = known_integers(codec.name)
        affine = Affine(*codec.split(raw_RN))
        return compressed.pack(affine, kind.bits, symmetric=not kind.affine, scale=kind.scale)

    def weights(self, codec: str) -> dict[str, Any]:
        """What the configuration says of them."""
        kind = known_integers(codec)
        group = {"strategy": "group", "group_size": kind.group} if kind.group else {"strategy": "channel"}
        return {**_numbers(kind.bits, "int", symmetric=not kind.affine), "actorder": None, **group}

    def generic(self, codec: str) -> str:
        """A codec's name without what differs from tensor to tensor."""
        return codec

    def codec_of(self, tensor: Tensor, codec: str) -> str:
        return codec

    def shared(self, kinds: Collection[str]) -> str | None:
        return None


class _WholeBytes(Format):
    """Codes one to a byte, for kernels that multiply integers."""

    def parts(self, codec: SplitCodec, rows: int, columns: int) -> Parts:
        return integers.parts(rows, columns, "int-quantized", scale=known_integers(codec.name).scale)

    def pack(self, codec: SplitCodec, raw_RN: Bytes, columns: int) -> Arrays:
        numbers = signed(*codec.split(raw_RN))
        return integers.pack(numbers, "int-quantized", scale=known_integers(codec.name).scale)


class _Float8(Format):
    def can_hold(self, codec: str, columns: int) -> Yes | No:
        return Yes()

    def parts(self, codec: SplitCodec, rows: int, columns: int) -> Parts:
        return float8.parts(rows, columns, "channel", scale=_scale_of(codec))

    def pack(self, codec: SplitCodec, raw_RN: Bytes, columns: int) -> Arrays:
        codes_RC, scale_R1 = codec.split(raw_RN)
        return float8.pack(Float8(codes_RC, scale_R1, (1, columns)), "channel", scale=_scale_of(codec))

    def weights(self, codec: str) -> dict[str, Any]:
        return {**_numbers(8, "float"), "strategy": "channel"}


@dataclass(frozen=True)
class _Micro(Format):
    """Four-bit floats.  `grid` is what the layout calls them; `strategy` and `scale` are the configuration's."""

    grid: str = "MXFP4"
    strategy: str = "group"
    scale: str = "torch.uint8"

    def can_hold(self, codec: str, columns: int) -> Yes | No:
        block = find_codec(codec).block
        return No(f"{columns} columns; {codec} needs a multiple of {block}") if columns % block else Yes()

    def parts(self, codec: SplitCodec, rows: int, columns: int) -> Parts:
        return micro.parts(rows, columns, self.grid)

    def pack(self, codec: SplitCodec, raw_RN: Bytes, columns: int) -> Arrays:
        codes_RC, scale_RG = codec.split(raw_RN)
        return micro.pack(Micro(codes_RC, scale_RG))

    def weights(self, codec: str) -> dict[str, Any]:
        size = {"strategy": self.strategy, "group_size": micro.GROUPS[self.grid]}
        return {**_numbers(4, "float"), **size, "scale_dtype": self.scale}


class _ScaledMicro(_Micro):
    """With a scale for the whole tensor besides: a power of two, which is part of the codec's name (nvfp4-e8)."""

    def pack(self, codec: SplitCodec, raw_RN: Bytes, columns: int) -> Arrays:
        exponent = int(codec.name.partition("-e")[2])
        codes_RC, scale_RG = codec.split(raw_RN)
        return micro.pack(Micro(codes_RC, scale_RG, 2.0**exponent))

    def generic(self, codec: str) -> str:
        return codec.partition("-")[0]

    def codec_of(self, tensor: Tensor, codec: str) -> str:
        """The power of two that the tensor's largest weight leaves."""
        step, largest = max(1, _CHUNK // tensor.columns), 0.0
        for start in range(0, tensor.rows, step):
            largest = max(largest, float(np.abs(tensor.read(start, min(start + step, tensor.rows))).max(initial=0)))
        exponent = math.floor(math.log2(_MOST / largest)) if 0 < largest < math.inf else 0
        return f"{self.grid.lower()}-e{exponent}"

    def shared(self, kinds: Collection[str]) -> str | None:
        """One scale for matrices that are computed as one: that of the largest weight among them."""
        exponents = [kind.partition("-e")[2] for kind in kinds]
        return f"{self.grid.lower()}-e{min(map(int, exponents))}" if all(exponents) else None


_FORMATS = (
    Format("pack-quantized", NAME),
    _Float8("float-quantized", re.compile("fp8-channel.*"), "float"),
    _Micro("mxfp4-pack-quantized", re.compile("(?i:mxfp4)")),
    _ScaledMicro(
        "nvfp4-pack-quantized", re.compile("(?i:nvfp4)(-e.+)?"), "int", "NVFP4", "tensor_group", "torch.float8_e4m3fn"
    ),
)
_BYTES_FIRST = (_WholeBytes("int-quantized", re.compile("int8-channel.*")), *_FORMATS)


def _scale_of(codec: SplitCodec) -> str:
    return STORED[codec.stored]  # type: ignore[attr-defined]


def _numbers(bits: int, kind: str, *, symmetric: bool = True) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": symmetric, "dynamic": False}


def _rounded(kind: str) -> dict[str, Any]:
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}


class CompressedFolder(Scheme):
    """One of the names above.

    Its integers have `bits` in groups of `group` columns unless a wish says otherwise; a `fixed` grid knows no
    wish.  With `activations` the consumer rounds them to eight bits.
    """

    listed = 1

    def __init__(
        self,
        name: str,
        what: str,
        bits: int | None = None,
        group: int = 0,
        fixed: Callable[[Wish], str] | None = None,
        activations: bool = False,
    ) -> None:
        self.name, self.title = name, f"compressed-tensors {name.upper()}"
        self.words = f"compressed-tensors: {what}; vLLM, transformers"
        self.bits, self.group, self.fixed, self.activations = bits, group, fixed, activations

    def codec(self, wish: Wish) -> str:
        if self.fixed is not None:
            self.check_no_grid(wish, self.bits)
            return self.fixed(wish)
        return integer_codec(self, wish, self.bits or 4, self.group) + wish.scale_suffix

    def choices(self, wish: Wish) -> tuple[str, ...]:
        if self.fixed is not None:
            return (self.codec(wish),)
        return tuple(self.codec(replace(wish, bits=bits)) for bits in BITS)

    def _find(self, codec: str) -> Format | None:
        formats = _BYTES_FIRST if self.activations else _FORMATS
        return next((one for one in formats if one.codecs.fullmatch(codec)), None)

    def _format(self, codec: str) -> Format:
        found = self._find(codec)
        assert found is not None, codec  # `can_hold` was asked first
        return found

    def can_hold(self, codec: str, shape: tuple[int, ...]) -> Yes | No:
        found = self._find(codec)
        return found.can_hold(codec, shape[-1]) if found else No(f"compressed-tensors has no {codec}")

    def codec_of(self, tensor: Tensor, codec: str) -> str:
        return self._format(codec).codec_of(tensor, codec)

    def shared(self, kinds: Collection[str]) -> str | None:
        first, *others = {self._find(kind) for kind in kinds}
        return None if others or first is None else first.shared(kinds)

    def parts(self, codec: SplitCodec, rows: int, columns: int, dtype: str) -> Parts:
        return self._format(codec.name).parts(codec, rows, columns)

    def pack(self, codec: SplitCodec, raw_RN: Bytes, columns: int, dtype: str, order_C: Order | None = None) -> Arrays:
        return self._format(codec.name).pack(codec, raw_RN, columns)

    def config(self, modules: Mapping[str, str], plain: list[str], wish: Wish) -> dict[str, Any]:
        generic = {name: self._format(codec).generic(codec) for name, codec in modules.items()}
        kinds = [kind for kind, _ in Counter(generic.values()).most_common()]
        groups = {}
        for number, kind in enumerate(kinds):
            found = self._format(kind)
            targets = [name for name, codec in generic.items() if codec == kind]
            groups[f"group_{number}"] = {
                "targets": targets if len(kinds) > 1 else ["Linear"],
                "weights": found.weights(kind),
                "input_activations": _rounded(found.activations) if self.activations else None,
                "output_activations": None,
                "format": found.name,
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


SCHEMES = (
    CompressedFolder("w4a16", "integers of 4 bits (or 2, 3, 8) in groups, mixed if wished", 4, 128),
    CompressedFolder("w8a16", "integers of 8 bits per row", 8),
    CompressedFolder(
        "w8a8",
        "8 bits per row, activations rounded to 8 bits too",
        8,
        fixed=lambda wish: f"int8-channel{wish.scale_suffix}",
        activations=True,
    ),
    CompressedFolder(
        "fp8",
        "e4m3 per row, activations too",
        fixed=lambda wish: f"fp8-channel{wish.scale_suffix or '-bf16'}",
        activations=True,
    ),
    CompressedFolder("mxfp4", "4-bit floats under a power of two per 32 weights", fixed=lambda _: "MXFP4"),
    CompressedFolder("nvfp4", "4-bit floats under a tiny float per 16 weights", fixed=lambda _: "nvfp4"),
)
