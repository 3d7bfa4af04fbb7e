"""FP8 checkpoints: which scale belongs to which weight, and how it is spread over rows and columns.

A stored 8-bit weight times its scale is the weight.  Five arrangements occur, told apart by shape:

    one number                         per tensor                 (static FP8, ModelOpt)
    [experts]                          per expert of a stack
    [out, 1] or [out]                  per output channel         (FBGEMM, compressed-tensors)
    [⌈out / 128⌉, ⌈in / 128⌉]          per block                  (DeepSeek-V3, Qwen3-FP8: `weight_scale_inv`)
    [out, in / 32]                     per group, an exponent     (MXFP8, OCP Microscaling Formats 1.0)

`weight_scale_inv` is multiplied as well: its name speaks of the quantizer's point of view
(DeepSeek-V3 technical report, section 3.3, and its `weight_dequant` kernel).

Legend: R flattened rows, C columns, K columns of the scale's grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from dither.errors import FormatError
from dither.system.text import shown
from dither.types import Floats

WEIGHT_SCALES = ("_scale_inv", "_scale")  # appended to a weight's name
# What a run-time would scale activations and caches by: of no use to weights.
ACTIVATION_SCALES = (
    "input_scale", "input_scale_ub", "activation_scale", "output_scale", "k_scale", "v_scale", "q_scale",
)  # fmt: skip
MICRO = (1, 32)  # a block of MXFP8
_WAY_OUT = "Take the model it was made from, in bf16."


def beside(weight: str, suffixes: Iterable[str]) -> set[str]:
    """Names of what a run-time scales by around a weight: a cache's scales lie one level up."""
    module = weight.rpartition(".")[0]
    return {f"{home}.{suffix}" for home in (module, module.rpartition(".")[0]) for suffix in suffixes}


@dataclass(frozen=True)
class Scale:
    """A grid of scales laid over a weight whose experts are flattened into its rows.

    The grid stays on disk: those of a large mixture of experts fill hundreds of megabytes.
    """

    read_flat: Callable[[int, int], Floats]  # scales `start` to `stop`, all dimensions flattened
    grid_columns: int
    grid_rows_per_expert: int
    rows_per_expert: int
    block_rows: int
    block_columns: int

    def apply(self, w_RC: Floats, start: int, thing: str) -> None:
        """Multiplies rows `start`, `start + 1`, … in place.

        Raises FormatError, about `thing`, where a scale is NaN or infinite.
        """
        if not w_RC.size:
            return
        expert_R, within_R = np.divmod(np.arange(start, start + len(w_RC)), self.rows_per_expert)
        line_R = expert_R * self.grid_rows_per_expert + within_R // self.block_rows
        first, last = int(line_R[0]), int(line_R[-1])
        flat = self.read_flat(first * self.grid_columns, (last + 1) * self.grid_columns)
        if not np.isfinite(flat).all():
            raise FormatError(thing, "has an FP8 scale that is NaN or infinite", _WAY_OUT)
        scale_RK = flat.reshape(-1, self.grid_columns)[line_R - first]
        for k in range(self.grid_columns):
            w_RC[:, k * self.block_columns : (k + 1) * self.block_columns] *= scale_RK[:, k : k + 1]


def fit_scale(
    name: str,
    shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
    read_flat: Callable[[int, int], Floats],
    block: tuple[int, int],
    exponents: bool = False,
) -> Scale:
    """How a scale of one shape covers a weight of another.

    `block` is rows × columns of a block, from the checkpoint's config; `exponents`: the scales are powers of
    two and nothing else.  Raises FormatError where the two shapes do not belong together.
    """
    columns = shape[-1] if shape else 1
    if prod(scale_shape) == 1:
        whole = max(prod(shape[:-1]), 1)
        return Scale(read_flat, 1, 1, whole, whole, columns)
    experts, out = shape[:-2], shape[-2] if len(shape) > 1 else 1
    grid = (-(-out // block[0]), -(-columns // block[1]))
    if scale_shape in ((*experts, out, 1), (*experts, out)):
        return Scale(read_flat, 1, out, out, 1, columns)
    if scale_shape == (*experts, *grid):
        return Scale(read_flat, grid[1], grid[0], out, *block)
    if exponents and columns % MICRO[1] == 0 and scale_shape == (*experts, out, columns // MICRO[1]):
        return Scale(read_flat, columns // MICRO[1], out, out, *MICRO)
    if experts and scale_shape in (experts, (*experts, 1), (*experts, 1, 1)):
        return Scale(read_flat, 1, 1, out, out, columns)
    reason = f"is FP8 of shape {list(shape)}, but its scale has shape {list(scale_shape)}"
    raise FormatError(f"tensor {shown(name)}", f"{reason} (blocks of {block[0]} × {block[1]})", _WAY_OUT)


def block_of(config: Mapping[str, Any], thing: str) -> tuple[int, int]:
    """Rows and columns of a block, 128 × 128 where the config does not say.

    Raises FormatError where what it says is no block.
    """
    block = config.get("weight_block_size")
    groups = config.get("config_groups")
    if block is None and isinstance(groups, dict):
        stated = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        blocks = [weights.get("block_structure") for weights in stated if isinstance(weights, dict)]
        block = next((found for found in blocks if found), None)
    if block is None:
        return 128, 128
    if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)):
        raise FormatError(thing, f"weight_block_size is {shown(str(block))}", "Fetch config.json again.")
    return block[0], block[1]
