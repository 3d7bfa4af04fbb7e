"""One weight made of several tensors: found by their names, checked by their shapes, read by rows.

Legend: O out features (rows), I in features (columns), G groups per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

import numpy as np

from dither.errors import FormatError
from dither.formats.layouts import Affine, Int8, Micro, Table4
from dither.formats.layouts.recode import recode
from dither.models.packed.settings import WAY_OUT
from dither.models.stored import PlainTensor, check_rows
from dither.system.text import shown
from dither.types import Bytes, Floats

Unpacked: TypeAlias = Affine | Table4 | Micro | Int8
FLOATS = ("F16", "BF16", "F32")  # that scales are stored as


@dataclass(frozen=True)
class PackedTensor:
    """A quantized weight, not yet read; the interface is `stored.StoredTensor`'s."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # "int4-g128", "uint4-g128" (with zero points), "int8-channel", "nf4-g64-dq", "MXFP4"
    nbytes: int  # of all parts together
    _unpack: Callable[[int, int], Unpacked] = field(repr=False, compare=False)
    _check_files: Callable[[], None] = field(repr=False, compare=False)  # that what was unpacked is what was opened

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    def read(self, start: int, stop: int) -> Floats:
        with np.errstate(all="ignore"):  # what overflows is infinite, and whoever needs finite weights checks
            values_RC = self._checked(start, stop).values()
        self._check_files()
        return values_RC

    def check_readable(self) -> None:
        """Whatever is packed here can be read."""

    def recode(self, kind: str, start: int, stop: int) -> Bytes | None:
        """Rows `start` to `stop` as ggml's blocks of `kind` (Q4_0, Q4_1, MXFP4), uint8 (stop − start, N).

        None where those would not be the same weights to the bit.  Raises as `read` does.
        """
        with np.errstate(all="ignore"):
            weight = self._checked(start, stop)
            found_RN = recode(weight, kind) if isinstance(weight, (Affine, Micro)) else None
        self._check_files()
        return found_RN

    def _checked(self, start: int, stop: int) -> Unpacked:
        check_rows(self, start, stop)
        weight = self._unpack(start, stop)
        thing = f"tensor {shown(self.name)}"
        if not np.isfinite(weight.scales()).all():
            raise FormatError(thing, "has a scale that is NaN or infinite", WAY_OUT)
        if isinstance(weight, Affine) and weight.group_of_I is not None and weight.group_of_I.size:
            least, most = int(weight.group_of_I.min()), int(weight.group_of_I.max())
            if not 0 <= least <= most < weight.scale_OG.shape[1]:
                reason = f"has columns of groups {least} to {most}, but {weight.scale_OG.shape[1]} groups"
                raise FormatError(thing, reason, WAY_OUT)
        return weight


@dataclass(frozen=True)
class Joined:
    """A weight, and the names of the tensors it is made of."""

    tensor: PackedTensor
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Module:
    """A linear layer's tensors by suffix."""

    name: str  # "model.layers.0.mlp.up_proj"
    tensors: Mapping[str, PlainTensor]

    @property
    def thing(self) -> str:
        return f"tensor {shown(self.name)}.weight"

    def only(self, suffixes: Sequence[str]) -> Module:
        return Module(self.name, {suffix: tensor for suffix, tensor in self.tensors.items() if suffix in suffixes})

    def has(self, suffix: str) -> bool:
        return suffix in self.tensors

    def part(self, suffix: str, dtypes: Sequence[str], like: int | tuple[int, ...]) -> PlainTensor:
        """A part of one of these number types, of a shape or of so many dimensions.

        Raises FormatError where it is missing or different.
        """
        dimensions = like if isinstance(like, int) else len(like)
        tensor = self.tensors.get(suffix)
        if tensor is None:
            raise FormatError(self.thing, f"lacks its part {suffix}", "Fetch the checkpoint again.")
        if tensor.dtype not in dtypes or len(tensor.shape) != dimensions:
            reason = f"is {tensor.dtype} of shape {list(tensor.shape)}; {dimensions} dimensions of "
            raise FormatError(f"tensor {shown(tensor.name)}", reason + f"{' or '.join(dtypes)} are due", WAY_OUT)
        if not isinstance(like, int):
            self.expect(suffix, like)
        return tensor

    def expect(self, suffix: str, shape: tuple[int, ...]) -> None:
        """Raises FormatError where a part that is there has another shape."""
        tensor = self.tensors[suffix]
        if tensor.shape != shape:
            reason = f"has shape {list(tensor.shape)}, where {list(shape)} is due"
            raise FormatError(f"tensor {shown(tensor.name)}", reason, WAY_OUT)

    def wrong(self, reason: str) -> FormatError:
        return FormatError(self.thing, reason, WAY_OUT)

    def _check_files(self) -> None:
        for tensor in self.tensors.values():
            tensor.check_file()

    def joined(
        self, shape: tuple[int, ...], kind: str, read: Callable[..., Unpacked], suffixes: Sequence[str], **settings: Any
    ) -> Joined:
        """The weight that all tensors of the module make.

        `read` is a layout's: it gets those of `suffixes` that are there, as arrays that copy nothing, the rows, and
        `settings`.
        """

        def unpack(start: int, stop: int) -> Unpacked:
            arrays = {suffix: self.tensors[suffix].array() for suffix in suffixes if suffix in self.tensors}
            return read(arrays, start, stop, **settings)

        size = sum(tensor.nbytes for tensor in self.tensors.values())
        tensor = PackedTensor(f"{self.name}.weight", shape, kind, size, unpack, self._check_files)
        return Joined(tensor, tuple(part.name for part in self.tensors.values()))


def modules(stored: Mapping[str, PlainTensor], marker: str, suffixes: Sequence[str]) -> Iterator[Module]:
    """Every layer that has a tensor `marker`, with those of `suffixes` that are there."""
    for name in stored:
        if name.endswith(f".{marker}"):
            home = name[: -len(marker) - 1]
            found = {end: stored[f"{home}.{end}"] for end in suffixes if f"{home}.{end}" in stored}
            yield Module(home, found)


def kind_of(bits: int, symmetric: bool, columns: int, groups: int) -> str:
    """How integers are called: `int4-g128`, `uint4-g128` with zero points, `int8-channel`."""
    sign = "" if symmetric else "u"
    return f"{sign}int{bits}-{'channel' if groups == 1 else f'g{-(-columns // groups)}'}"
