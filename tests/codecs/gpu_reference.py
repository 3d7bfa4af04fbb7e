"""Packed blocks of the types that GPUs read, decoded bit by bit in float64, by no code of `dither.codecs`.

Legend: R rows, C columns, N blocks, B weights of a block.
"""

from __future__ import annotations

import re

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

# Quantiles of a normal distribution, as QLoRA's appendix E prints them (arXiv:2305.14314).
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
]  # fmt: skip
FP4_SIZES = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]


def bits_of(raw_NN: np.ndarray) -> np.ndarray:
    return np.unpackbits(np.ascontiguousarray(raw_NN), axis=1, bitorder="little")


def codes_of(raw_NN: np.ndarray, bits: int, count: int) -> np.ndarray:
    """A stream of codes, lowest bit first."""
    stream = bits_of(raw_NN)[:, : bits * count].reshape(len(raw_NN), count, bits)
    return (stream.astype(np.int64) << np.arange(bits)).sum(axis=2)


def scales_of(raw_NN: np.ndarray, suffix: str) -> np.ndarray:
    if suffix == "f32":
        return np.ascontiguousarray(raw_NN[:, :4]).view("<f4").astype(np.float64)
    if suffix == "bf16":
        padded = np.concatenate([np.zeros_like(raw_NN[:, :2]), raw_NN[:, :2]], axis=1)
        return padded.view("<f4").astype(np.float64)
    return np.ascontiguousarray(raw_NN[:, :2]).view("<f2").astype(np.float64)


def e4m3() -> np.ndarray:
    """The 256 numbers of float8_e4m3fn: bias 7, no infinity, one NaN of either sign."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, mantissa / 512, (8 + mantissa) / 8 * 2.0 ** (exponent - 7))
    size[(code & 127) == 127] = np.nan
    return np.where(code >= 128, -size, size)


def decoded(name: str, raw_RN: np.ndarray, columns: int) -> np.ndarray:
    """Rows of `columns` numbers, as float32 products of what is stored."""
    kind, group, *more = name.split("-", 2)
    if kind == "nvfp4":
        inner_RC = dequantize(np.ascontiguousarray(raw_RN), GGMLQuantizationType.NVFP4)
        return np.ldexp(inner_RC, -int(name.split("-e")[1])).astype(np.float32)
    if kind == "fp8" and group.startswith("e"):
        return np.ldexp(e4m3()[raw_RN], -int(name.split("-e")[1])).astype(np.float32)
    suffix = more[0] if more else ("f32" if kind in ("nf4", "fp4", "fp8") else "f16")
    block = columns if group == "channel" else int(group[1:]) if re.fullmatch(r"g\d+", group) else 128
    raw_NN = np.ascontiguousarray(raw_RN).reshape(len(raw_RN) * (columns // block), -1)
    size = 4 if suffix in ("f32", "dq") else 2
    scale_N1 = scales_of(raw_NN, "f32" if size == 4 else suffix)
    if kind in ("nf4", "fp4"):
        table = NF4 if kind == "nf4" else [*FP4_SIZES, *(-x for x in FP4_SIZES)]
        number_NB = np.array(table, np.float32).astype(np.float64)[codes_of(raw_NN[:, 4:], 4, block)]
    elif kind == "fp8":
        number_NB = e4m3()[raw_NN[:, size:]]
    else:
        bits, affine = int(kind[-1]), kind[0] == "u"
        zero_N1 = raw_NN[:, size : size + 1].astype(np.int64) if affine else 2 ** (bits - 1)
        number_NB = codes_of(raw_NN[:, size + affine :], bits, block) - zero_N1
    return (number_NB * scale_N1).astype(np.float32).reshape(len(raw_RN), columns)
