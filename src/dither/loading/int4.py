"""Four-bit steps multiplied as they are packed, by torch's own kernels.

torch has products with 4-bit weights in groups for processors and for CUDA (those that torchao wraps), for
bfloat16 inputs; for others they are a slow loop or not there at all.  Each wants the codes in an order of its
own, which depends on the width of the machine's registers.  So the order is asked for: codes that spell their
own places are packed, and what comes back tells where each went.  With it codes can be taken out again, for
gradients, for a state dict, for another device.

A kernel is checked on the layer it is for: its product with random inputs against that of de-quantized rows.
One that disagrees is not used.

Legend: R rows (out features), C columns (in features), G groups of a row, N bytes of a packed row, T inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from dither.loading.linear import Grid, QuantizedLinear, dequantized
from dither.loading.methods import LoadMethod

GROUPS = (32, 64, 128, 256)
ROWS = 64  # every kernel's order repeats after so many rows
_CHUNK = 1 << 22  # weights whose codes are unpacked at a time
_MIDDLE = 8  # kernels compute ŵ = s · (q − 8) + m
_TILES = 8  # inner tiles of CUDA's order, 16 columns each
_AGREES = 0.02  # of the largest output: bfloat16 sums in another order; a wrong place errs by about one
_OPS = torch.ops.aten


class Int4Linear(QuantizedLinear):
    """A `QuantizedLinear` of four-bit steps whose `weight` lies as its device's kernel wants it.

    Its state dict is that of the plain layer.
    """

    means: Tensor  # (G, R, 2) bfloat16: s and m = s · (8 − z)

    def __init__(self, plain: QuantizedLinear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.grid, self.bias = plain.grid, plain.bias
        self.weight = nn.Parameter(ordered(plain.weight), requires_grad=False)
        self.register_buffer("means", _means(plain.scale, plain.zero))
        self.register_buffer("zero", plain.zero)

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        return self.means[..., 0].T

    def times(self, x: Tensor) -> Tensor | None:
        if x.dtype != torch.bfloat16:
            return None
        flat_TC = x.reshape(-1, self.in_features).contiguous()
        if not len(flat_TC):
            return x.new_empty(*x.shape[:-1], self.out_features)
        found_TR = _product(flat_TC, self.weight.data, self.in_features // len(self.means), self.means)
        return found_TR.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantized(self.grid, usual(self.weight.data), self.scale, self.zero, dtype)

    def agrees(self) -> bool:
        """Whether the kernel gives what the codes of its first and last rows say."""
        given = torch.Generator().manual_seed(0)
        x_TC = torch.randn(2, self.in_features, generator=given).to(self.weight.device, torch.bfloat16)
        found_TR = self.times(x_TC)
        assert found_TR is not None
        for at in (slice(0, ROWS), slice(self.out_features - ROWS, self.out_features)):
            rows = usual(self.weight.data[at]), self.scale[at], self.zero[at]
            expected_TR = x_TC.float() @ dequantized(self.grid, *rows, torch.float32).T
            bound = _AGREES * float(expected_TR.abs().max())
            if not ((found_TR[:, at].float() - expected_TR).abs() <= bound).all():
                return False
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Codes change their order where they change their device, and numbers never their type."""
        means, here = self.means, self.weight.device
        there = fn(torch.empty(0, dtype=torch.uint8, device=here)).device
        if there.type != here.type:
            self.weight.data = usual(self.weight.data)
        done = nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        if self.means.dtype != means.dtype:
            self.means = means.to(there)
        if there.type != here.type and there.type != "meta":
            self.weight.data = ordered(self.weight.data)
        return done

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = usual(self.weight.data)
        destination[f"{prefix}scale"] = self.scale.contiguous()
        del destination[f"{prefix}means"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        weight, scale, zero = (f"{prefix}{name}" for name in ("weight", "scale", "zero"))
        if weight in state_dict:
            state_dict[weight] = ordered(state_dict[weight].to(self.weight.device))
        if scale in state_dict:
            state_dict[f"{prefix}means"] = _means(state_dict.pop(scale), state_dict[zero])
        super()._load_from_state_dict(state_dict, prefix, *others)


def can_hold(grid: Grid, rows: int, group: int, device: torch.device) -> bool:
    """Whether torch has a kernel on this device for a matrix of this grid."""
    fits = grid.kind == "steps" and grid.bits == 4 and group in GROUPS and rows % ROWS == 0
    if device.type == "cuda":
        return fits and grid.columns % (16 * _TILES) == 0 and hasattr(_OPS, "_weight_int4pack_mm")
    return fits and device.type == "cpu" and hasattr(_OPS, "_weight_int4pack_mm_for_cpu")


def no_kernel(method: LoadMethod, group: int, device: torch.device, dtype: str) -> str:
    """Why torch has no fast product for matrices so stored; "" where it has one."""
    if method.kind != "steps" or method.bits != 4:
        return f"has no {method.name}: it has int4 and hqq"
    if group not in GROUPS:
        return f"has no groups of {group}: it has {', '.join(map(str, GROUPS))}"
    if dtype != "bfloat16":
        return f"computes in bfloat16, not in {dtype}"
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return "has no vector instructions on this processor"
    if device.type not in ("cpu", "cuda"):
        return f"has no such kernel for {device.type}"
    return ""


def ordered(packed_RN: Tensor) -> Tensor:
    """Codes in the usual order (`Grid.packed`), in that of the device's kernel: uint8 of the same shape."""
    found_RN = torch.empty_like(packed_RN)
    for at in _slices(packed_RN):
        found_RN[at] = _pack(_PAIRS.codes(packed_RN[at])).view_as(packed_RN[at])
    return found_RN


def usual(ordered_RN: Tensor) -> Tensor:
    """The inverse of `ordered`."""
    places = _places(2 * ordered_RN.shape[1], ordered_RN.device)
    found_RN = torch.empty_like(ordered_RN)
    for at in _slices(ordered_RN):
        nibbles = _PAIRS.codes(ordered_RN[at]).view(-1, len(places))
        found_RN[at] = _PAIRS.packed(nibbles[:, places].view(len(ordered_RN[at]), -1))
    return found_RN


def _slices(packed_RN: Tensor) -> list[slice]:
    step = max(1, _CHUNK // (2 * packed_RN.shape[1] * ROWS)) * ROWS
    return [slice(start, start + step) for start in range(0, len(packed_RN), step)]


_PAIRS = Grid("steps", 4, 0)


@lru_cache(maxsize=16)
def _places(columns: int, device: torch.device) -> Tensor:
    """Where the kernel's order has code c of row r of each 64 rows: int64 (64 · C,), at C · r + c.

    Places are spelled in digits to the base of sixteen, which are packed one after the other.
    """
    place = torch.arange(ROWS * columns, device=device)
    origin = torch.zeros_like(place)
    for shift in range(0, int(ROWS * columns - 1).bit_length(), 4):
        digits = (place >> shift & 15).to(torch.uint8).view(ROWS, columns)
        origin |= _PAIRS.codes(_pack(digits).view(1, -1))[0].long() << shift
    found = torch.empty_like(place)
    found[origin] = place
    return found


def _pack(codes_RC: Tensor) -> Tensor:
    """Bytes in the kernel's order, flat."""
    if codes_RC.device.type == "cuda":
        pairs_RN = codes_RC[:, 0::2] << 4 | codes_RC[:, 1::2]
        found: Tensor = _OPS._convert_weight_to_int4pack(pairs_RN.contiguous(), _TILES)
    else:
        found = _OPS._convert_weight_to_int4pack_for_cpu(codes_RC.int(), 1)
    return found.view(torch.uint8).flatten()


def _product(x_TC: Tensor, weight_RN: Tensor, group: int, means: Tensor) -> Tensor:
    if x_TC.device.type == "cuda":
        rows, columns = len(weight_RN), x_TC.shape[1]
        tiles = weight_RN.view(torch.int32).view(rows // 8, columns // (16 * _TILES), 32, _TILES // 2)
        found: Tensor = _OPS._weight_int4pack_mm(x_TC, tiles, group, means)
    else:
        found = _OPS._weight_int4pack_mm_for_cpu(x_TC, weight_RN, group, means)
    return found


def _means(scale_RG: Tensor, zero_RG: Tensor) -> Tensor:
    zero = zero_RG.float() if zero_RG.numel() else torch.full_like(scale_RG, _MIDDLE, dtype=torch.float32)
    shifted_RG = (_MIDDLE - zero) * scale_RG.float()
    return torch.stack((scale_RG.float().T, shifted_RG.T), dim=-1).to(torch.bfloat16).contiguous()
