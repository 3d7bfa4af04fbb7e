"""AWQ as its GEMM kernels want it: integers of 4 bits in groups along a row, with zero points.

The format is a grid and an order of nibbles; the method of the same name (scales that protect channels) is a
transform, `--transform awq`, and goes with any container.  Where there is evidence it is applied unless somebody
chooses transforms: a file called AWQ is to be one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dither.codecs.base import SplitCodec
from dither.containers.folders.integers import group_name, integers_of, known_integers, whole_groups
from dither.containers.folders.scheme import Arrays, Order, Parts, Scheme, Wish, refuse
from dither.formats.layouts import Affine, awq
from dither.types import Bytes, No, Yes


class AwqFolder(Scheme):
    name, title, listed = "awq", "AWQ", 0
    loaded_by = ("vLLM", "SGLang", "transformers")
    needs = "gptqmodel"
    named_after, transforms = frozenset({"awq"}), ("awq",)
    words = "integers of 4 bits with zero points; vLLM, SGLang, transformers with gptqmodel"

    def codec(self, wish: Wish) -> str:
        if wish.bits not in (None, 4):
            raise refuse(self, f"--bits {wish.bits}", "is not held: AWQ is 4 bits", "Use --to gptq.")
        return f"{'int' if wish.sym else 'uint'}4-{group_name(128 if wish.group is None else wish.group)}"

    def can_hold(self, codec: str, shape: tuple[int, ...]) -> Yes | No:
        kind, (rows, columns) = integers_of(codec), shape[-2:]
        if kind is None or kind.bits != 4 or kind.scale != "F16":
            return No(f"AWQ holds integers of 4 bits with float16 scales, not {codec}")
        if rows % 8:
            return No(f"{rows} rows; AWQ packs them by eights")
        return whole_groups(kind, columns)

    def parts(self, codec: SplitCodec, rows: int, columns: int, dtype: str) -> Parts:
        kind = known_integers(codec.name)
        return awq.parts(rows, columns, kind.group or columns)

    def pack(self, codec: SplitCodec, raw_RN: Bytes, columns: int, dtype: str, order_C: Order | None = None) -> Arrays:
        return awq.pack(Affine(*codec.split(raw_RN)))

    def mixes(self, first: str, second: str) -> bool:
        one, other = integers_of(first), integers_of(second)
        return one is not None and other is not None and one.group == other.group

    def smaller(self, codec: str, columns: int) -> str | None:
        return None  # one group size for the whole file

    def config(self, modules: Mapping[str, str], plain: list[str], wish: Wish) -> dict[str, Any]:
        kind = known_integers(next(iter(modules.values())))
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": kind.group or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": plain or None,
        }


SCHEMES = (AwqFolder(),)
