"""bitsandbytes' NF4 and FP4: nibbles that look up sixteen numbers, under the largest magnitude of a block.

    weight                              U8 [n/2, 1]  n = O·I codes in row-major order, the high nibble first
    weight.absmax                       F32 [n/64]   the largest magnitude of each block of 64
    weight.quant_map                    F32 [16]     the numbers themselves
    weight.quant_state.bitsandbytes__nf4   U8        JSON: quant_type, blocksize, dtype, shape

Blocks know no rows: where I is no multiple of 64, one may begin in a row and end in the next.

Double quantization (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3) stores each absmax in a byte:
their mean is taken off, and what is left is quantized in blocks of 256 to a "dynamic" map (Dettmers 2015,
arXiv:1511.04561), whose numbers get a decade coarser towards zero.  Then `weight.absmax` is U8, and
`weight.nested_absmax` F32 [n/64/256], `weight.nested_quant_map` F32 [256] and three keys of JSON join.

Sources: bitsandbytes, `functional.py` (QuantState, create_dynamic_map) and its CPU kernels.

Legend: O out features, I in features, G blocks of a row, n all weights, B blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dither.errors import FormatError, UnsupportedError
from dither.formats.layouts.methods import Method
from dither.formats.layouts.parts import TABLES, Arrays, Shapes, Table4
from dither.system.json_text import parse_object
from dither.types import Bytes, Floats

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes has kernels for
NESTED_BLOCK = 256
METHODS = (Method("bitsandbytes", "bitsandbytes", vllm="bitsandbytes"),)
MAX_STATE = 4096  # bytes of JSON
_DTYPES = ("float32", "float16", "bfloat16")
_LONGEST = -1.2345678901234567e-300  # no float is written longer
_FETCH_AGAIN = "The file is damaged: fetch it again."


@dataclass(frozen=True)
class State:
    """What the JSON beside a weight says."""

    quant_type: str
    block: int
    shape: tuple[int, int]
    nested_block: int = 0  # 0 where the absmax are floats
    nested_offset: float = 0.0


@cache
def dynamic_map() -> Floats:
    """The 256 numbers of the signed dynamic type, in order.

    Decade d below one has 2^(6 − d) of each sign, the middles of equal parts of [0.1, 1] · 10^−d; zero and
    one complete them.  Rounded where torch rounds, so that files agree to the bit.
    """
    found = [np.float32(0), np.float32(1)]
    for i in range(7):
        edges = _linspace(np.float32(0.1), np.float32(1), 2**i + 1)
        middles = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        found += [*middles, *-middles]
    return np.sort(np.array(found, np.float32))


def _linspace(first: np.float32, last: np.float32, count: int) -> Floats:
    """From both ends to the middle, each product and sum rounded once (a fused multiply-add)."""
    step = np.float64(np.float32((last - first) / np.float32(count - 1)))
    index = np.arange(count)
    rising = np.float64(first) + step * index
    falling = np.float64(last) - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)


def parts(
    rows: int, columns: int, quant_type: str, block: int = 64, *, nested: bool = False, dtype: str = "bfloat16"
) -> Shapes:
    """The tensors of one matrix.

    Raises UnsupportedError where blocks would not be whole within a row (bitsandbytes would allow it; here
    no scale is shared between rows).
    """
    thing = f"{rows} × {columns} as {quant_type.upper()}"
    if block not in BLOCKS:
        raise UnsupportedError(thing, f"has blocks of {BLOCKS} only", "Choose one of them.")
    if columns % block:
        reason = f"needs whole blocks, and {columns} columns are no multiple of {block}"
        raise UnsupportedError(thing, reason, "Choose another block size.")
    count = rows * columns
    absmax = "U8" if nested else "F32"
    found: Shapes = {
        "weight": ("U8", (count // 2, 1)),
        "weight.absmax": (absmax, (count // block,)),
        "weight.quant_map": ("F32", (16,)),
    }
    if nested:
        found["weight.nested_absmax"] = ("F32", (-(-count // block // NESTED_BLOCK),))
        found["weight.nested_quant_map"] = ("F32", (256,))
    state = _state_bytes(State(quant_type, block, (rows, columns), NESTED_BLOCK * nested), dtype)
    return found | {f"weight.quant_state.bitsandbytes__{quant_type}": ("U8", (len(state),))}


def pack(weight: Table4, *, nested: bool = False, dtype: str = "bfloat16") -> Arrays:
    """The tensors of `parts`.  With `nested` the absmax are rounded: see `nest`."""
    rows, columns = weight.codes_OI.shape
    codes_n = weight.codes_OI.reshape(-1)
    absmax_B = np.ascontiguousarray(weight.absmax_OG, np.float32).reshape(-1)
    block = columns // weight.absmax_OG.shape[1]
    found: Arrays = {
        "weight": (codes_n[::2] << np.uint8(4) | codes_n[1::2])[:, None],
        "weight.absmax": absmax_B,
        "weight.quant_map": TABLES[weight.quant_type].copy(),
    }
    offset = 0.0
    if nested:
        found["weight.absmax"], found["weight.nested_absmax"], offset = nest(absmax_B)
        found["weight.nested_quant_map"] = dynamic_map().copy()
    state = State(weight.quant_type, block, (rows, columns), NESTED_BLOCK * nested, offset)
    raw = np.frombuffer(_state_bytes(state, dtype), np.uint8)
    return found | {f"weight.quant_state.bitsandbytes__{weight.quant_type}": raw}


def nest(absmax_B: Floats) -> tuple[Bytes, Floats, float]:
    """Absmax of a whole matrix as bytes, the largest of every 256 of what is left of them, and their mean."""
    offset = float(np.float32(absmax_B.mean(dtype=np.float64))) if absmax_B.size else 0.0
    rest_B = absmax_B - np.float32(offset)
    padded = np.zeros(-(-rest_B.size // NESTED_BLOCK) * NESTED_BLOCK, np.float32)
    padded[: rest_B.size] = rest_B
    rest = padded.reshape(-1, NESTED_BLOCK)
    largest = np.abs(rest).max(axis=1)
    unit = np.clip(rest / np.maximum(largest, np.float32(1e-38))[:, None], -1, 1)
    numbers = dynamic_map()
    middles = (numbers[:-1] + numbers[1:]) / np.float32(2)
    index = np.searchsorted(middles, unit.reshape(-1)).astype(np.uint8)
    return index[: rest_B.size], largest, offset


def unpack(arrays: Mapping[str, npt.NDArray[Any]], state: State, start: int, stop: int) -> Table4:
    """Rows `start` to `stop` of the matrix; where blocks cross rows, with an absmax for every weight.

    `weight` may be of any number type (`bnb_4bit_quant_storage`): its bytes count.
    """
    columns, block = state.shape[1], state.block
    first, last = start * columns, stop * columns
    bytes_N = np.ascontiguousarray(arrays["weight"]).reshape(-1).view(np.uint8)[first // 2 : -(-last // 2)]
    codes_n = np.empty(2 * bytes_N.size, np.uint8)
    codes_n[::2] = bytes_N >> 4
    codes_n[1::2] = bytes_N & 15
    codes_OI = codes_n[first % 2 : first % 2 + last - first].reshape(stop - start, columns)
    low, high = first // block, -(-last // block)
    absmax_B = arrays["weight.absmax"][low:high]
    if state.nested_block:
        largest_B = arrays["weight.nested_absmax"][(low + np.arange(absmax_B.size)) // state.nested_block]
        absmax_B = arrays["weight.nested_quant_map"][absmax_B] * largest_B + np.float32(state.nested_offset)
    if columns % block == 0:
        absmax_OG = absmax_B.reshape(stop - start, columns // block)
    else:
        absmax_OG = absmax_B[np.arange(first, last) // block - low].reshape(stop - start, columns)
    return Table4(codes_OI, absmax_OG.astype(np.float32), state.quant_type)


def _state_bytes(state: State, dtype: str) -> bytes:
    """The JSON, filled with spaces to a length that no number in it changes."""

    def written(offset: float) -> bytes:
        content: dict[str, Any] = {
            "quant_type": state.quant_type,
            "blocksize": state.block,
            "dtype": dtype,
            "shape": list(state.shape),
        }
        if state.nested_block:
            content |= {"nested_blocksize": state.nested_block, "nested_dtype": "float32", "nested_offset": offset}
        return json.dumps(content).encode()

    return written(state.nested_offset).ljust(len(written(_LONGEST)))


def read_state(raw: bytes, thing: str) -> State:
    """The JSON of a stranger's file.  Raises FormatError, about `thing`, where it makes no sense."""
    if len(raw) > MAX_STATE:
        raise FormatError(thing, f"has {len(raw)} bytes of JSON, more than the {MAX_STATE} that are read")
    found = parse_object(raw, thing, _FETCH_AGAIN, finite=False, unique=True)
    shape: Any = found.get("shape")
    block: Any = found.get("blocksize")
    kind: Any = found.get("quant_type")
    if not isinstance(kind, str) or kind not in TABLES:
        raise FormatError(thing, f"has quant_type {kind!r:.40}, which is neither nf4 nor fp4", _FETCH_AGAIN)
    if not (isinstance(shape, list) and len(shape) == 2 and all(_whole(n, 2**40) for n in shape)):
        raise FormatError(thing, f"has shape {shape!r:.40}, which is no matrix", _FETCH_AGAIN)
    if not _whole(block, 2**20):
        raise FormatError(thing, f"has blocksize {block!r:.40}", _FETCH_AGAIN)
    if "nested_blocksize" not in found:
        return State(kind, block, (shape[0], shape[1]))
    nested: Any = found["nested_blocksize"]
    offset: Any = found.get("nested_offset")
    # The offset must be a finite float32: JSON allows integers that no float can hold.
    if not _whole(nested, 2**20) or type(offset) not in (int, float) or not abs(offset) < 3.4e38:
        reason = f"has nested_blocksize {nested!r:.40} and nested_offset {offset!r:.40}"
        raise FormatError(thing, reason, _FETCH_AGAIN)
    return State(kind, block, (shape[0], shape[1]), nested, float(offset))


def _whole(value: Any, most: int) -> bool:
    return type(value) is int and 0 < value <= most
