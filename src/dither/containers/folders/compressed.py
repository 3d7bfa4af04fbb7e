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
from dither.codecs.base import SplitCodec
from dither.codecs.integers import NAME
from dither.containers.folders.integers import BITS, integer_codec, integers_of, known_integers, signed, whole_groups
from dither.containers.folders.scheme import STORED, Arrays, Order, Parts, Scheme, Wish
from dither.formats.layouts import Affine, Micro, compressed, float8, integers, micro
from dither.types import Bytes, No, Tensor, Yes

_MOST = 6 * 448.0  # the largest code under the largest scale of NVFP4
_CHUNK = 2**22  # weights read at a time


@dataclass(frozen=True)
class Format:
    """How one kind of grid is stored, and what the configuration says of it."""

    name: str  # in the configuration
    codecs: re.Pattern[str]  # the names of those that are stored so
    parts: Callable[[SplitCodec, int, int], Parts]  # of a matrix of so many rows and columns
    pack: Callable[[SplitCodec, Bytes], Arrays]
    weights: Callable[[str], dict[str, Any]]  # the configuration's arguments, of a codec's name
    activations: str = "int"  # what they are rounded to, where the folder rounds them
    generic: str = ""  # the codec's name without the exponent that differs from tensor to tensor


def _numbers(bits: int, kind: str, symmetric: bool = True) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": symmetric, "dynamic": False}


def _rounded(kind: str) -> dict[str, Any]:
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}


def _settings(codec: SplitCodec) -> dict[str, Any]:
    kind = known_integers(codec.name)
    return {"bits": kind.bits, "symmetric": not kind.affine, "scale": kind.scale}


def _integers(codec: str) -> dict[str, Any]:
    kind = known_integers(codec)
    group = {"strategy": "group", "group_size": kind.group} if kind.group else {"strategy": "channel"}
    return {**_numbers(kind.bits, "int", not kind.affine), "actorder": None, **group}


def _pack_float8(codec: SplitCodec, raw_RN: Bytes) -> Arrays:
    codes_RC, scale_R1 = codec.split(raw_RN)
    return float8.pack(codes_RC, scale_R1, "channel", scale=STORED[codec.stored])


def _pack_micro(codec: SplitCodec, raw_RN: Bytes) -> Arrays:
    codes_RC, scale_RG = codec.split(raw_RN)
    exponent = codec.name.partition("-e")[2]
    return micro.pack(Micro(codes_RC, scale_RG, 2.0 ** int(exponent) if exponent else None))


def _micro(grid: str, strategy: str, scale: str, generic: str = "") -> Format:
    size = {"strategy": strategy, "group_size": micro.GROUPS[grid], "scale_dtype": scale}
    return Format(
        f"{grid.lower()}-pack-quantized",
        re.compile(f"(?i:{grid})(-e.+)?"),
        lambda _, rows, columns: micro.parts(rows, columns, grid),
        _pack_micro,
        lambda _: {**_numbers(4, "float"), **size},
        generic=generic,
    )


# Codes one to a byte, for kernels that multiply integers.
_BYTES = Format(
    "int-quantized",
    re.compile("int8-channel.*"),
    lambda codec, rows, columns: integers.parts(rows, columns, "int-quantized", scale=STORED[codec.stored]),
    lambda codec, raw_RN: integers.pack(signed(*codec.split(raw_RN)), "int-quantized", scale=STORED[codec.stored]),
    _integers,
)
_FORMATS = (
    Format(
        "pack-quantized",
        NAME,
        lambda codec, rows, columns: compressed.parts(rows, columns, **_settings(codec), group_size=codec.block),
        lambda codec, raw_RN: compressed.pack(Affine(*codec.split(raw_RN)), **_settings(codec)),
        _integers,
    ),
    Format(
        "float-quantized",
        re.compile("fp8-channel.*"),
        lambda codec, rows, columns: float8.parts(rows, columns, "channel", scale=STORED[codec.stored]),
        _pack_float8,
        lambda _: {**_numbers(8, "float"), "strategy": "channel"},
        activations="float",
    ),
    _micro("MXFP4", "group", "torch.uint8"),
    _micro("NVFP4", "tensor_group", "torch.float8_e4m3fn", generic="nvfp4"),
)


class CompressedFolder(Scheme):
    """One of the names above.

    Its integers have `bits` in groups of `group` columns unless a wish says otherwise; a `fixed` grid knows no
    wish.  With `activations` the consumer rounds them to eight bits.
    """

    listed = 1
    needs = "compressed_tensors"

    def __init__(
        self,
        name: str,
        what: str,
        bits: int | None = None,
        group: int = 0,
        fixed: Callable[[Wish], str] | None = None,
        activations: bool = False,
        dtypes: tuple[str, ...] = Scheme.dtypes,
        without_experts: str = "",
    ) -> None:
        self.name, self.title = name, f"compressed-tensors {name.upper()}"
        self.words = f"compressed-tensors: {what}; vLLM, transformers"
        self.bits, self.group, self.fixed, self.activations = bits, group, fixed, activations
        self.dtypes, self.without_experts = dtypes, {"transformers": without_experts} if without_experts else {}

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
        formats = (_BYTES, *_FORMATS) if self.activations else _FORMATS
        return next((one for one in formats if one.codecs.fullmatch(codec)), None)

    def _format(self, codec: str) -> Format:
        found = self._find(codec)
        assert found is not None, codec  # `can_hold` was asked first
        return found

    def can_hold(self, codec: str, shape: tuple[int, ...]) -> Yes | No:
        columns, kind = shape[-1], integers_of(codec)
        if self._find(codec) is None:
            return No(f"compressed-tensors has no {codec}")
        if kind is not None:
            return whole_groups(kind, columns)
        block = find_codec(codec, columns).block
        return No(f"{columns} columns; {codec} needs a multiple of {block}") if columns % block else Yes()

    def codec_of(self, tensor: Tensor, codec: str) -> str:
        """NVFP4 has a scale for the whole tensor besides: the power of two that its largest weight leaves."""
        generic = self._format(codec).generic
        if not generic:
            return codec
        step, largest = max(1, _CHUNK // tensor.columns), 0.0
        for start in range(0, tensor.rows, step):
            largest = max(largest, float(np.abs(tensor.read(start, min(start + step, tensor.rows))).max(initial=0)))
        exponent = math.floor(math.log2(_MOST / largest)) if 0 < largest < math.inf else 0
        return f"{generic}-e{exponent}"

    def shared(self, kinds: Collection[str]) -> str | None:
        """One scale for matrices that are computed as one: that of the largest weight among them."""
        first, *others = {found.generic if (found := self._find(kind)) else "" for kind in kinds}
        exponents = [kind.partition("-e")[2] for kind in kinds]
        return f"{first}-e{min(map(int, exponents))}" if first and not others and all(exponents) else None

    def parts(self, codec: SplitCodec, rows: int, columns: int, dtype: str) -> Parts:
        return self._format(codec.name).parts(codec, rows, columns)

    def pack(self, codec: SplitCodec, raw_RN: Bytes, columns: int, dtype: str, order_C: Order | None = None) -> Arrays:
        return self._format(codec.name).pack(codec, raw_RN)

    def config(self, modules: Mapping[str, str], plain: list[str], wish: Wish) -> dict[str, Any]:
        generic = {name: self._format(codec).generic or codec for name, codec in modules.items()}
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
        without_experts="it finds no experts among these names",
    ),
    CompressedFolder(
        "fp8",
        "e4m3 per row, activations too",
        fixed=lambda wish: f"fp8-channel{wish.scale_suffix or '-bf16'}",
        activations=True,
    ),
    CompressedFolder(
        "mxfp4", "4-bit floats under a power of two per 32 weights", fixed=lambda _: "MXFP4", dtypes=("BF16",)
    ),
    CompressedFolder(
        "nvfp4",
        "4-bit floats under a tiny float per 16 weights",
        fixed=lambda _: "nvfp4",
        dtypes=("BF16",),
        without_experts="it loads the experts without an error and with other numbers",
    ),
)
