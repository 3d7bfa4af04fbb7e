"""An ordinary checkpoint: numbers, and nothing said of quantization.  What `dither convert` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dither.codecs.base import SplitCodec
from dither.containers.folders.scheme import Arrays, Order, Parts, Scheme, Wish, refuse
from dither.errors import UsageError
from dither.types import Bytes, No, Yes


class PlainFolder(Scheme):
    name, title = "safetensors", "safetensors without quantization"
    listed = 4
    words = "numbers as they are, in a folder"
    quantizes = False

    def codec(self, wish: Wish) -> str:
        if (wish.bits, wish.group, wish.sym) != (None, None, None):
            raise refuse(self, "a grid", "means nothing: numbers stay numbers", "Leave --bits and --group out.")
        return wish.dtype

    def can_hold(self, codec: str, shape: tuple[int, ...]) -> Yes | No:
        return No(f"a checkpoint of numbers holds no {codec}")

    def parts(self, codec: SplitCodec, rows: int, columns: int, dtype: str) -> Parts:
        raise UsageError(codec.name, "is not what a checkpoint of numbers holds", "Choose another container.")

    def pack(self, codec: SplitCodec, raw_RN: Bytes, columns: int, dtype: str, order_C: Order | None = None) -> Arrays:
        raise UsageError(codec.name, "is not what a checkpoint of numbers holds", "Choose another container.")

    def config(self, modules: Mapping[str, str], plain: list[str], wish: Wish) -> dict[str, Any]:
        return {}


SCHEMES = (PlainFolder(),)
