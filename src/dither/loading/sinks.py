"""Where a matrix's rows go as they are read, and the layer that they become.

    PackedRows      encoded a few rows at a time by a codec of ours: never whole but as codes
    BnbLinear       gathered in the type that is computed in, then quantized by bitsandbytes as a whole, for
                    its blocks run on from row to row; the gathered copy lives while one matrix is read

Rows arrive in any order, from any thread.

Legend: R rows, C columns, G groups of a row, E experts.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import nn

from dither.codecs.base import SplitCodec
from dither.loading.int4 import Int4Linear, can_hold
from dither.loading.linear import Grid, QuantizedLinear, QuantizedStack
from dither.loading.methods import LoadMethod
from dither.solvers import find_solver
from dither.types import Floats

OUTLIERS = 6.0  # inputs beyond it are multiplied in float16: the threshold of arXiv:2208.07339, section 3


class PackedRows:
    """Codes of ours."""

    def __init__(
        self, method: LoadMethod, codec: SplitCodec, shape: tuple[int, ...], device: torch.device, kernel: bool = False
    ) -> None:
        """With `kernel` the layer multiplies by torch's 4-bit kernel, where that can hold the matrix."""
        self.method, self.codec, self.shape, self.device, self.kernel = method, codec, shape, device, kernel
        self.solver = find_solver(method.solver)
        rows, columns = prod(shape[:-1]), shape[-1]
        groups = columns // codec.block
        numbers = tuple(map(float, codec.table)) if method.kind == "table" else ()
        self.grid = Grid(method.kind, method.bits, columns, numbers)
        self.packed_RN = torch.empty(rows, columns * method.bits // 8, dtype=torch.uint8)
        self.scale_RG = torch.empty(rows, groups, dtype=getattr(torch, codec.stored))
        self.zero_RG = torch.empty(rows, groups if method.has_zeros else 0, dtype=torch.uint8)

    def put(self, w_RC: Floats, row_R: torch.Tensor) -> None:
        """Some rows, and their places in the parameter; experts are flattened into the rows."""
        raw_RN = self.solver(w_RC, self.codec, None).raw_RN
        codes_RC, scale_RG, *zero_RG = self.codec.split(raw_RN)
        self.packed_RN[row_R] = self.grid.packed(torch.from_numpy(codes_RC))
        self.scale_RG[row_R] = torch.from_numpy(scale_RG).to(self.scale_RG.dtype)
        if self.method.has_zeros:
            self.zero_RG[row_R] = torch.from_numpy(zero_RG[0])

    def module(self, bias_R: nn.Parameter | None) -> nn.Module:
        """The layer, once every row has been put."""
        packed, scale, zero = (part.to(self.device) for part in (self.packed_RN, self.scale_RG, self.zero_RG))
        if len(self.shape) == 2:
            plain = QuantizedLinear(self.grid, packed, scale, zero, bias_R)
            group = self.grid.columns // scale.shape[1]
            if not (self.kernel and can_hold(self.grid, len(packed), group, self.device)):
                return plain
            layer = Int4Linear(plain)
            return layer if layer.agrees() else plain
        return QuantizedStack(
            self.grid, *(part.view(*self.shape[:2], part.shape[-1]) for part in (packed, scale, zero))
        )


class BnbLinear:
    """A layer of bitsandbytes."""

    def __init__(
        self, method: LoadMethod, group: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.method, self.group, self.device, self.dtype = method, group, device, dtype
        self.w_RC = torch.empty(shape, dtype=dtype)

    def put(self, w_RC: Floats, row_R: torch.Tensor) -> None:
        self.w_RC[row_R] = torch.from_numpy(w_RC).to(self.dtype)

    def module(self, bias_R: nn.Parameter | None) -> nn.Module:
        layer: nn.Module = self._eight_bits() if self.method.bnb == "int8" else self._four_bits()
        layer.bias = bias_R  # type: ignore[assignment]
        return layer

    def _four_bits(self) -> Any:
        from bitsandbytes.nn import Linear4bit, Params4bit

        rows, columns = self.w_RC.shape
        kind: dict[str, Any] = {"compress_statistics": False, "quant_type": self.method.bnb}
        layer = Linear4bit(columns, rows, bias=False, compute_dtype=self.dtype, device="meta", **kind)
        weight = Params4bit(self.w_RC, requires_grad=False, blocksize=self.group, module=layer, **kind)
        layer.weight = weight.to(self.device)  # which is when it is quantized
        return layer

    def _eight_bits(self) -> Any:
        from bitsandbytes.nn import Int8Params, Linear8bitLt

        rows, columns = self.w_RC.shape
        layer = Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=OUTLIERS, device="meta")
        layer.weight = Int8Params(self.w_RC, requires_grad=False, has_fp16_weights=False).to(self.device)
        return layer


Sink = PackedRows | BnbLinear


def stored_bytes(module: nn.Module) -> int:
    """What a quantized layer takes: codes, scales and zero points."""
    if isinstance(module, (QuantizedLinear, QuantizedStack)):
        return module.stored_bytes
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    return int(weight.nbytes + (weight.SCB if state is None else state.absmax).nbytes)
