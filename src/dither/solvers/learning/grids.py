"""A matrix in a codec's grid, with a gradient for everything that its bytes store.

Codes and scales are whole numbers (or float16s), and rounding has no useful gradient.  So each stored
number is trained through a continuous *position*, and the straight-through estimator (Bengio et al. 2013,
arXiv:1308.3432) pretends on the way back that rounding had not happened.  Of a grid of scaled levels,

    ŵ = unit · M[i] · N[k] − below · L[j]        (`codecs.base.Levels`)
    ŵ = unit · (N[k] − L[j])                     where both are tied

three kinds of number are trained:

    k, one per weight           a position along the table N: one step up is the next larger number
    i and j, one per sub-block  positions along the tables of multiples, M and L
    unit and below, per block   a factor on the number as it was, rounded to the type that stores it

Along a table T the forward pass takes T[round(p)]; backward it is the polygon through T's points, whose
slope at p is that of the segment p lies in.  On a table of unequal steps, such as IQ4's, the gradient of
a position is thus as large as the step it can make.

Where positions begin decides much.  In the middle of their cells all would cross a border in the same
step, and at the borders all would in the first.  SignRound (Cheng et al. 2023, arXiv:2309.05516, equation
3) begins where the original weights lie, evenly spread, but that is nearest rounding; after error
feedback many codes are not their weight's nearest.  Here a code that is begins where its weight lies, and
one that is not begins the deeper in its cell the farther away its weight, for it was put there on
purpose.  Until something moves, the bytes are the start's.

A codec that shows no levels (a lattice) is trained through a shift of each weight, and its search run
anew.

Legend: R rows, C columns, N bytes of a packed row, B blocks of all rows, S sub-blocks of a block, I
weights of a sub-block, K entries of a table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from dither.codecs.base import LevelCodec, Levels, Scales
from dither.types import Bytes, Codec, Floats

# How far one step of the schedule moves each kind of number, relative to the positions of codes.
SUB_BLOCK_PACE, UNIT_PACE, SHIFT_PACE = 5.0, 0.5, 2.5
SPAN = 0.5  # farthest that a factor may get from 1
SHIFT = 2.0  # farthest that a weight is shifted
APPROACHES, APPROACH = 6, 0.7  # steps towards weights that a search rounds to the start, and their length
INSIDE = 0.999  # positions begin this share of half a step from the middle of their cell at most


@dataclass(frozen=True)
class Knob:
    """A tensor to train: where it may go, and how far one step of the schedule moves it."""

    tensor: torch.Tensor
    low: float
    high: float
    pace: float


class Trainable(ABC):
    """One matrix: `value` for the forward pass, `knobs` for the descent, `pack` for the file."""

    knobs: list[Knob]

    @abstractmethod
    def value(self) -> torch.Tensor:
        """ŵ, float32 (R, C), what `pack` decodes to; differentiable in every knob."""

    @abstractmethod
    def pack(self) -> Bytes:
        """Packed rows, uint8 (R, N)."""


def trainable(
    codec: Codec, w_RC: Floats, start_RN: Bytes, importance_C: Floats | None, device: torch.device
) -> Trainable:
    """The start's bytes, ready to be trained; left alone where rows share scales."""
    if codec.rows_together > 1:
        return FixedMatrix(codec, start_RN, device)
    if isinstance(codec, LevelCodec):
        return LevelMatrix(codec, w_RC, start_RN, device)
    return AnyMatrix(codec, w_RC, start_RN, importance_C, device)


class Table:
    """A rising table of numbers along which a position moves."""

    def __init__(self, numbers_K: Floats, device: torch.device) -> None:
        self.numbers_K = numbers_K
        self.last = len(numbers_K) - 1
        steps_K = np.diff(numbers_K)
        self.is_even = bool((steps_K == 1).all())
        self.first = float(numbers_K[0])
        self.table_K = torch.from_numpy(numbers_K.copy()).to(device)
        self.steps_K = torch.from_numpy(steps_K).to(device)

    def at(self, position: torch.Tensor) -> torch.Tensor:
        """T[round(p)], with the polygon's slope at p as its gradient."""
        if self.is_even:  # whole numbers: no need to look anything up
            return straight_through(position.detach().round() + self.first, position)
        # The value of the nearest entry; of the gradient, only the slope of the segment between p's two neighbors.
        fixed = position.detach()
        rounded = self.table_K[fixed.round().long()]
        slope = self.steps_K[fixed.floor().clamp(0, self.last - 1).long()]
        return rounded + (position - fixed) * slope

    def position_of(self, number: Floats) -> Floats:
        """Where a number lies along the polygon; beyond its ends, the ends."""
        places_K = np.arange(len(self.numbers_K), dtype=np.float32)
        return np.interp(number, self.numbers_K, places_K).astype(np.float32)


def straight_through(forward: torch.Tensor, backward: torch.Tensor) -> torch.Tensor:
    """The number of one and the gradient of the other; exact, for x − x is 0."""
    return forward + (backward - backward.detach())


class LevelMatrix(Trainable):
    """A matrix of scaled levels."""

    def __init__(self, codec: LevelCodec, w_RC: Floats, start_RN: Bytes, device: torch.device) -> None:
        self.codec, self.levels, self.shape = codec, codec.levels, w_RC.shape
        codes_BN, grid = codec.unpack(np.ascontiguousarray(start_RN).reshape(-1, codec.block_bytes))
        scales = codec.to_scales(grid)
        self.numbers, self.multiples, self.lowers = (
            Table(numbers, device) for numbers in (self.levels.numbers_K, self.levels.multiples_M, self.levels.lowers_M)
        )
        self.unit_B11, self.below_B11 = (
            torch.from_numpy(part.astype(np.float32)).to(device)[:, None, None]
            for part in (scales.unit_R, scales.below_R)
        )
        code_BSI = index_of(codes_BN, self.levels).reshape(*scales.multiple_RS.shape, -1)
        self.code_BSI = self._leaf(placed(code_BSI, self._wanted(w_RC, scales, code_BSI.shape)), device)
        self.multiple_BS1 = self._leaf(scales.multiple_RS[..., None].astype(np.float32), device)
        self.lower_BS1 = self._leaf(scales.lower_RS[..., None].astype(np.float32), device)
        self.unit_factor_B11 = torch.ones_like(self.unit_B11, requires_grad=True)
        self.below_factor_B11 = torch.ones_like(self.below_B11, requires_grad=True)
        self.knobs = self._knobs()

    def value(self) -> torch.Tensor:
        # Multiplied in the order in which decoders do, in float32, so that what is trained is what will be read.
        scale_BS1 = self._unit() * self.multiples.at(self.multiple_BS1)
        if self.levels.tied:
            steps_BSI = self.numbers.at(self.code_BSI) - self.lowers.at(self.lower_BS1)
            return (scale_BS1 * steps_BSI).reshape(self.shape)
        value_BSI = scale_BS1 * self.numbers.at(self.code_BSI)
        if self._subtracts:
            value_BSI = value_BSI - self._below() * self.lowers.at(self.lower_BS1)
        return value_BSI.reshape(self.shape)

    @torch.no_grad()
    def pack(self) -> Bytes:
        blocks = len(self.code_BSI)
        scales = Scales(
            self._unit().reshape(blocks).cpu().numpy(),
            _whole(self.multiple_BS1)[..., 0],
            self._below().reshape(blocks).cpu().numpy(),
            _whole(self.lower_BS1)[..., 0],
        )
        codes_BN = self.levels.codes_K[_whole(self.code_BSI).reshape(blocks, -1)]
        return self.codec.pack(codes_BN, self.codec.from_scales(scales)).reshape(self.shape[0], -1)

    @property
    def _subtracts(self) -> bool:
        return bool(self.levels.lowers_M.any())

    def _unit(self) -> torch.Tensor:
        if not self.levels.free_unit:
            return self.unit_B11
        return _stored(self.unit_B11 * self.unit_factor_B11, self.levels.unit_type)

    def _below(self) -> torch.Tensor:
        if self.levels.tied:
            return self._unit()
        if not self._subtracts:
            return self.below_B11
        return _stored(self.below_B11 * self.below_factor_B11, self.levels.unit_type)

    def _wanted(self, w_RC: Floats, scales: Scales, shape: tuple[int, ...]) -> Floats:
        """The position of each original weight; where a scale is zero any will do."""
        scale_BS1, lower_BS1 = (part_BS[..., None] for part_BS in scales.of_sub_blocks(self.levels))
        raised_BSI = w_RC.reshape(shape) + lower_BS1
        number_BSI = np.divide(raised_BSI, scale_BS1, out=np.zeros(shape, np.float32), where=scale_BS1 != 0)
        return self.numbers.position_of(number_BSI)

    def _knobs(self) -> list[Knob]:
        # A number that moves many weights at once has a pace of its own: sub-blocks' numbers are small and coarse,
        # units fine.  What a format fixes, or holds only one of, is no knob.
        knobs = [Knob(self.code_BSI, 0, self.numbers.last, 1)]
        sub_blocks = (self.multiple_BS1, self.multiples), (self.lower_BS1, self.lowers)
        knobs += [Knob(tensor, 0, table.last, SUB_BLOCK_PACE) for tensor, table in sub_blocks if table.last > 0]
        if self.levels.free_unit:
            knobs.append(Knob(self.unit_factor_B11, 1 - SPAN, 1 + SPAN, UNIT_PACE))
        if self.levels.free_unit and self._subtracts and not self.levels.tied:
            knobs.append(Knob(self.below_factor_B11, 1 - SPAN, 1 + SPAN, UNIT_PACE))
        return knobs

    @staticmethod
    def _leaf(position: Floats, device: torch.device) -> torch.Tensor:
        return torch.tensor(position, dtype=torch.float32, device=device, requires_grad=True)


class AnyMatrix(Trainable):
    """A matrix of any codec, whose weights are shifted before the codec's own search rounds them.

    A shift of one is the root mean square of what rounding did to the matrix at the start.  A search that is
    given a point of a lattice need not find that point again, so shifts start from weights of which it does
    find the start's bytes, or nearly: the original ones, moved again and again by what is still missing.
    """

    def __init__(
        self, codec: Codec, w_RC: Floats, start_RN: Bytes, importance_C: Floats | None, device: torch.device
    ) -> None:
        self.codec, self.importance_C, self.device = codec, importance_C, device
        start_RC = codec.decode(start_RN)
        self.unit = float(np.sqrt(np.square(w_RC - start_RC, dtype=np.float64).mean()))
        self.base_RC = self._leading_to(start_RC, w_RC)
        # Shifts are in units of the rounding error, so that one rate suits them and the positions of codes.
        self.shift_RC = torch.zeros(w_RC.shape, device=device, requires_grad=True)
        self.knobs = [Knob(self.shift_RC, -SHIFT, SHIFT, SHIFT_PACE)]

    def value(self) -> torch.Tensor:
        rounded_RC = torch.from_numpy(self.codec.decode(self.pack())).to(self.device)
        return straight_through(rounded_RC, self.shift_RC * self.unit)

    def pack(self) -> Bytes:
        shift_RC: Floats = self.shift_RC.detach().cpu().numpy() * np.float32(self.unit)
        return self.codec.encode(self.base_RC + shift_RC, self.importance_C)

    def _leading_to(self, start_RC: Floats, w_RC: Floats) -> Floats:
        # Steps shorter than what is missing: a search answers by leaps, and whole ones would overshoot.
        for _ in range(APPROACHES):
            missing_RC = start_RC - self.codec.decode(self.codec.encode(w_RC, self.importance_C))
            if not missing_RC.any():
                break
            w_RC = w_RC + np.float32(APPROACH) * missing_RC
        return w_RC


class FixedMatrix(Trainable):
    """A matrix that stays as it is."""

    def __init__(self, codec: Codec, start_RN: Bytes, device: torch.device) -> None:
        self.start_RN, self.knobs = start_RN, []
        self.value_RC = torch.from_numpy(codec.decode(start_RN)).to(device)

    def value(self) -> torch.Tensor:
        return self.value_RC

    def pack(self) -> Bytes:
        return self.start_RN


def index_of(codes_BN: np.ndarray, levels: Levels) -> np.ndarray:
    """The place of each code in the table of numbers.

    A code that the table leaves out is a second name of a number (−0 of a float): zero's place.
    """
    order_K = np.argsort(levels.codes_K, kind="stable")
    sorted_K = levels.codes_K[order_K]
    found_BN = np.searchsorted(sorted_K, codes_BN).clip(0, len(order_K) - 1)
    zero = int(np.abs(levels.numbers_K).argmin())
    return np.where(sorted_K[found_BN] == codes_BN, order_K[found_BN], zero)


def placed(index_BSI: np.ndarray, wanted_BSI: Floats) -> Floats:
    """Positions that round to `index`: where `wanted` lies in its cell, folded back beyond the border."""
    # Farther than half a step away, another code is nearer: this one was put there on purpose, so it starts deeper.
    away_BSI = np.abs(wanted_BSI - index_BSI)
    inside_BSI = np.minimum(away_BSI, np.maximum(1 - away_BSI, 0)) * INSIDE
    positions: Floats = (index_BSI + np.copysign(inside_BSI, wanted_BSI - index_BSI)).astype(np.float32)
    return positions


def _stored(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Rounded to a float type by name, straight through."""
    return straight_through(x.detach().to(getattr(torch, kind)).float(), x)


def _whole(position: torch.Tensor) -> np.ndarray:
    """Positions as rounded indices, int16."""
    return position.round().to(torch.int16).cpu().numpy()
