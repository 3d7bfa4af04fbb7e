"""FP8 in blocks of 128 × 128, as DeepSeek-V3 and Qwen3-FP8 are published: one float32 scale per tile.

Tiles hold rows in the checkpoint's order.  Where a family's rows are permuted for GGUF, whole heads stay
where they are, so a tile's rows remain a tile's rows as long as heads divide 128: otherwise it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dither.codecs.base import SplitCodec
from dither.containers.folders.scheme import Arrays, Order, Parts, Scheme, Wish
from dither.formats.layouts import float8
from dither.types import Bytes, No, Yes

CODEC = "fp8-128x128"


class Float8Folder(Scheme):
    name, title, listed = "fp8-block", "FP8 in blocks of 128 × 128", 2
    loaded_by = ("vLLM", "SGLang", "transformers")
    words = "e4m3 in tiles, as DeepSeek and Qwen publish it; vLLM, SGLang, transformers"

    def codec(self, wish: Wish) -> str:
        self.check_no_grid(wish)
        return CODEC

    def can_hold(self, codec: str, shape: tuple[int, ...]) -> Yes | No:
        return Yes() if codec == CODEC else No(f"{self.title} holds no {codec}")

    def parts(self, codec: SplitCodec, rows: int, columns: int, dtype: str) -> Parts:
        return float8.parts(rows, columns)

    def pack(self, codec: SplitCodec, raw_RN: Bytes, columns: int, dtype: str, order_C: Order | None = None) -> Arrays:
        codes_RC, scale_RG = codec.split(raw_RN)
        return float8.pack(codes_RC, scale_RG[::128])  # stored once per row, of 128 alike

    def config(self, modules: Mapping[str, str], plain: list[str], wish: Wish) -> dict[str, Any]:
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": plain or None,
        }


SCHEMES = (Float8Folder(),)
