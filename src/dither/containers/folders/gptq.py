"""GPTQ: integers of 2, 3, 4 or 8 bits in groups along a row, as gptqmodel, transformers and vLLM read them.

Around zero (`int4-g128`) the file is of the format's first version, which stores a zero point less one; with
zero points of their own (`uint4-g128`) of the second, because a zero of 0 less one would carry into the
neighbor.
Tensors of other bits or groups, and those that stay numbers, are told by rules on their names (`dynamic`),
which gptqmodel's own loader and vLLM read; transformers' knows one grid, and which modules are left out.
Columns stay in their groups (`desc_act` false) unless asked otherwise: error feedback takes them in the order
of what they matter within groups already, which costs nothing at run time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from dither._version import __version__
from dither.codecs.base import SplitCodec
from dither.containers.folders.integers import BITS, integer_codec, integers_of, known_integers, whole_groups
from dither.containers.folders.joined import fused_modules
from dither.containers.folders.scheme import Arrays, Order, Parts, Scheme, Wish
from dither.containers.folders.side import HEAD
from dither.formats.layouts import Affine, gptq
from dither.types import Bytes, No, Yes


def _inside_blocks(modules: Iterable[str]) -> list[str]:
    """Names of modules without their block's, each once: transformers loads by these, and reads no rules.

    >>> _inside_blocks(["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"])
    ['mlp.up_proj']
    """
    return list(dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name, count=1) for name in modules))


class GptqFolder(Scheme):
    name, title = "gptq", "GPTQ"
    named_after = frozenset({"gptq", "learned"})  # which starts from gptq's codes
    words = "integers of 2, 3, 4 or 8 bits in groups; vLLM, SGLang, transformers with gptqmodel"
    listed = 0
    loaded_by = ("vLLM", "SGLang", "transformers")
    needs = "gptqmodel"
    reorders = True

    def codec(self, wish: Wish) -> str:
        return integer_codec(self, wish, 4, 128)

    def choices(self, wish: Wish) -> tuple[str, ...]:
        return tuple(self.codec(replace(wish, bits=bits)) for bits in BITS)

    def can_hold(self, codec: str, shape: tuple[int, ...]) -> Yes | No:
        kind, (rows, columns) = integers_of(codec), shape[-2:]
        if kind is None or kind.bits not in BITS or kind.scale != "F16":
            return No(f"GPTQ holds integers of 2, 3, 4 or 8 bits with float16 scales, not {codec}")
        if columns % 32 or rows % 32:
            return No(f"{rows} × {columns}; GPTQ packs multiples of 32 both ways")
        return whole_groups(kind, columns)

    def parts(self, codec: SplitCodec, rows: int, columns: int, dtype: str) -> Parts:
        kind = known_integers(codec.name)
        return gptq.parts(rows, columns, kind.bits, kind.group or columns)

    def pack(self, codec: SplitCodec, raw_RN: Bytes, columns: int, dtype: str, order_C: Order | None = None) -> Arrays:
        kind = known_integers(codec.name)
        affine = Affine(*codec.split(raw_RN))
        if order_C is not None:
            back_C = np.argsort(order_C)
            group_of_C = (back_C // (kind.group or columns)).astype(np.int32)
            affine = replace(affine, codes_OI=affine.codes_OI[:, back_C], group_of_I=group_of_C)
        return gptq.pack(affine, kind.bits, v1=not kind.affine)

    def mixes(self, first: str, second: str) -> bool:
        one, other = integers_of(first), integers_of(second)
        return one is not None and other is not None and one.affine == other.affine

    def config(self, modules: Mapping[str, str], plain: list[str], wish: Wish) -> dict[str, Any]:
        usual, _ = Counter(modules.values()).most_common(1)[0]
        kind = known_integers(usual)
        kinds = {**dict.fromkeys((name for name in plain if name != HEAD), ""), **modules}
        rules: dict[str, dict[str, Any]] = {}
        for name, codec in {**kinds, **fused_modules(kinds)}.items():  # servers ask for their own modules
            other = integers_of(codec)
            if not codec:
                rules[f"-:^{re.escape(name)}$"] = {}
            elif codec != usual and other is not None:
                rules[f"+:^{re.escape(name)}$"] = {"bits": other.bits, "group_size": other.group or -1}
        inside = _inside_blocks(modules) if rules and len(set(modules.values())) == 1 else []
        return {
            "quant_method": "gptq",
            "bits": kind.bits,
            "group_size": kind.group or -1,
            "desc_act": wish.act_order,
            "sym": not kind.affine,
            "lm_head": False,
            "true_sequential": True,
            "pack_dtype": "int32",
            "checkpoint_format": "gptq_v2" if kind.affine else "gptq",
            **({"dynamic": rules} if rules else {}),
            **({"modules_in_block_to_quantize": [inside]} if inside else {}),
            "meta": {"quantizer": [f"dither:{__version__}"], **({"method": wish.method} if wish.method else {})},
        }

    def documents(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"quantize_config.json": dict(config)}  # where older loaders look


SCHEMES = (GptqFolder(),)
