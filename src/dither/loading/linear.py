"""A linear layer whose weight stays packed: codes and scales, de-quantized for the time of one product.

    forward     y = x Ŵᵀ + b     Ŵ is made, used and dropped
    backward    ∂x = ∂y Ŵ        Ŵ is made again

Keeping Ŵ from forward to backward would hold the whole model de-quantized at once, which is what training
adapters on top is meant to avoid (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).  Ŵ itself gets no gradient:
codes are whole numbers.

The layer is an `nn.Linear` to whoever asks, as peft does, and its `weight` holds the packed codes, as
bitsandbytes' does: uint8, so that a tool that would add to it fails rather than adds to what is thrown away.

Legend: R rows (out features), C columns (in features), G groups of a row, N bytes of a packed row, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dither.models.blocks.restore import other_release

CHUNK = 1 << 22  # weights that are float32 on their way to the type that is computed in


@dataclass(frozen=True)
class Grid:
    """How codes become numbers.

    kind    "steps"    ŵ = s · (q − z), z the middle of the codes where none is stored
            "table"    ŵ = s · numbers[q]
            "float8"   ŵ = s · q, where q are the bits of an E4M3
    """

    kind: str
    bits: int  # 4 (two codes per byte, the first in the low half) or 8
    columns: int
    numbers: tuple[float, ...] = ()

    def packed(self, codes_RC: Tensor) -> Tensor:
        """Codes, uint8, as they are kept."""
        if self.bits == 8:
            return codes_RC
        return codes_RC[..., 0::2] | codes_RC[..., 1::2] << 4

    def codes(self, packed_RN: Tensor) -> Tensor:
        """The inverse of `packed`."""
        if self.bits == 8:
            return packed_RN
        return torch.stack((packed_RN & 15, packed_RN >> 4), dim=-1).flatten(-2)

    def values(self, packed_RN: Tensor, scale_RG: Tensor, zero_RG: Tensor) -> Tensor:
        """The numbers, float32 (R, C).  `zero_RG` is empty where no zero points are stored."""
        codes_RGB = self.codes(packed_RN).view(*scale_RG.shape, -1)
        if self.kind == "table":
            table = torch.tensor(self.numbers, device=packed_RN.device)
            value_RGB = table[codes_RGB.int()]
        elif self.kind == "float8":
            value_RGB = codes_RGB.view(torch.float8_e4m3fn).float()
        else:
            middle = 1 << (self.bits - 1)
            value_RGB = codes_RGB.float() - (zero_RG.float().unsqueeze(-1) if zero_RG.numel() else middle)
        return (value_RGB * scale_RG.float().unsqueeze(-1)).flatten(-2)


class PackedWeight:
    """A packed matrix that makes its weight when it is needed, or does without."""

    grid: Grid
    weight: Tensor
    scale: Tensor
    zero: Tensor

    def times(self, x: Tensor) -> Tensor | None:
        """x Ŵᵀ by a kernel that takes the packed weight; None where there is none for such an x."""
        return None

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, (R, C)."""
        return dequantized(self.grid, self.weight, self.scale, self.zero, dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: PackedWeight) -> Tensor:
        ctx.layer, ctx.has_bias = layer, bias is not None
        found = layer.times(x)
        if found is None:
            return functional.linear(x, layer.dequantize(x.dtype), bias)
        return found if bias is None else found + bias

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        by_x = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = gradient @ ctx.layer.dequantize(gradient.dtype)
        if ctx.has_bias and ctx.needs_input_grad[1]:
            by_bias = gradient.flatten(0, -2).sum(dim=0)
        return by_x, by_bias, None


def product(x: Tensor, layer: PackedWeight, bias: Tensor | None) -> Tensor:
    """x Ŵᵀ + b in x's type, or in autocast's where that is on."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        cast_bias = None if bias is None else bias.to(dtype)
        found: Tensor = _Product.apply(x.to(dtype), cast_bias, layer)  # type: ignore[no-untyped-call]
    return found


def dequantized(grid: Grid, packed_RN: Tensor, scale_RG: Tensor, zero_RG: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (R, C), rows a few at a time, so that no float32 copy of it all exists beside it."""
    w_RC = torch.empty(len(packed_RN), grid.columns, dtype=dtype, device=packed_RN.device)
    step = max(1, CHUNK // grid.columns)
    for start in range(0, len(packed_RN), step):
        at = slice(start, start + step)
        w_RC[at] = grid.values(packed_RN[at], scale_RG[at], zero_RG[at])
    return w_RC


class _Packed(nn.Module):
    """Codes, scales and zero points of matrices.  A cast of the model leaves scales in their own type."""

    scale: Tensor
    zero: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scale = self.scale
        done = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)  # what computes was cast, not what the codes mean
        return done

    @property
    def stored_bytes(self) -> int:
        weight: Any = self.weight
        return int(weight.nbytes) + sum(part.nbytes for part in self.buffers())


class QuantizedLinear(_Packed, PackedWeight, nn.Linear):
    """A frozen linear layer of packed codes (see the module)."""

    def __init__(
        self, grid: Grid, packed_RN: Tensor, scale_RG: Tensor, zero_RG: Tensor, bias_R: nn.Parameter | None
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.grid = grid.columns, len(packed_RN), grid
        self.weight = nn.Parameter(packed_RN, requires_grad=False)
        self.bias = bias_R  # type: ignore[assignment]
        self.register_buffer("scale", scale_RG)
        self.register_buffer("zero", zero_RG)

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.grid.bits} bits, {self.grid.kind}"


class QuantizedStack(_Packed):
    """The same matrix of every expert, in the place of a stacked parameter: `stack[expert]` is what
    `torch.nn.functional.linear` takes for a weight."""

    def __init__(self, grid: Grid, packed_ERN: Tensor, scale_ERG: Tensor, zero_ERG: Tensor) -> None:
        super().__init__()
        self.grid, self.shape = grid, torch.Size((*packed_ERN.shape[:2], grid.columns))
        self.weight = nn.Parameter(packed_ERN, requires_grad=False)
        self.register_buffer("scale", scale_ERG)
        self.register_buffer("zero", zero_ERG)

    def __getitem__(self, expert: int | Tensor) -> Expert:
        return Expert(self, int(expert))

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.grid.bits} bits, {self.grid.kind}"


class Expert(PackedWeight):
    """One matrix of a stack, still packed: stands in for a tensor in a linear product, and nowhere else."""

    def __init__(self, stack: QuantizedStack, index: int) -> None:
        self.grid, self.weight = stack.grid, stack.weight[index]
        self.scale, self.zero = stack.scale[index], stack.zero[index]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        if func is not functional.linear or kwargs or not isinstance(args[1], cls):
            used = getattr(func, "__name__", func)
            raise other_release("a quantized expert", f"is used in {used}, not in a linear layer")
        return product(args[0], args[1], args[2] if len(args) > 2 else None)
