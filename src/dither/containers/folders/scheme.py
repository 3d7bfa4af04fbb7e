"""What a safetensors container of quantized weights is: a table of a few functions, one file per method.

A scheme says which codecs it can hold and what the matrices of a model become unless somebody asks otherwise,
which tensors of the file a matrix turns into, and what config.json must say so that the consumer finds them.
It knows neither solvers nor models; the codec's bytes come to it as rows, a module at a time.

Legend: R rows (out features), C columns (in features), N bytes of a packed row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dither.codecs import split_codec
from dither.codecs.base import SplitCodec
from dither.errors import UsageError
from dither.formats.safetensors import nbytes
from dither.types import Bytes, No, Tensor, Yes

Parts = dict[str, tuple[str, tuple[int, ...]]]  # suffix → safetensors dtype and shape
Order = npt.NDArray[np.intp]
Arrays = Mapping[str, npt.NDArray[Any]]
TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors' dtypes by torch's name
STORED = {name: dtype for dtype, name in TORCH.items()}  # and back: codecs say theirs by that name


@dataclass(frozen=True)
class Wish:
    """What a person asked of the grid; None is the scheme's own choice."""

    bits: int | None = None
    group: int | None = None  # columns that share a scale; 0 for the whole row
    sym: bool | None = None  # around zero, or with a zero point
    dtype: str = "BF16"  # of the model's numbers that stay numbers
    act_order: bool = False  # groups by what columns matter
    method: str = ""  # what chooses the codes, for a format that can say so of itself

    @property
    def scale_suffix(self) -> str:
        """How a codec is called whose scales are of the model's dtype."""
        return {"F16": "", "BF16": "-bf16", "F32": "-f32"}[self.dtype]


class Scheme(ABC):
    """One target of `--to`.  `quantizes` is False where nothing is but names and dtypes."""

    name: str  # "awq"
    title: str  # as a person reads it: "AWQ"
    words: str  # what it is, for `dither types`
    listed = 9  # where it is listed: what most engines read comes first, and of equals the file whose name does
    quantizes = True
    # Formats called after a method: the solvers and transforms of which one has to be at work for that to be true, and
    # the transforms that are, where there is evidence and nobody says otherwise.
    named_after: frozenset[str] = frozenset()
    transforms: tuple[str, ...] = ()
    reorders = False  # whether groups may hold columns from anywhere
    loaded_by: tuple[str, ...] = ("vLLM", "transformers")  # who runs it, as they are called
    without_experts: Mapping[str, str] = {}  # of these, who does not load a mixture of experts, and why
    dtypes: tuple[str, ...] = ("BF16", "F16", "F32")  # of numbers that stay numbers, as its loaders take them
    needs: str = ""  # the package that transformers loads it with
    groups: tuple[int, ...] = (128, 64, 32)  # tried in this order where the wished one does not divide the columns

    @abstractmethod
    def codec(self, wish: Wish) -> str:
        """The codec of the matrices of a model's blocks.  Raises UsageError where it cannot be had."""

    @abstractmethod
    def can_hold(self, codec: str, shape: tuple[int, ...]) -> Yes | No:
        """Whether a matrix (R, C) may be stored in this codec, and if not, why."""

    @abstractmethod
    def parts(self, codec: SplitCodec, rows: int, columns: int, dtype: str) -> Parts:
        """The tensors of one module, by what is put behind its name.  `dtype` is the model's."""

    @abstractmethod
    def pack(self, codec: SplitCodec, raw_RN: Bytes, columns: int, dtype: str, order_C: Order | None = None) -> Arrays:
        """What they hold: arrays of exactly those dtypes' sizes and shapes.  `dtype` is the model's.

        With `order_C`, where `reorders`, the rows' columns are those of the matrix in that order.
        """

    @abstractmethod
    def config(self, modules: Mapping[str, str], plain: list[str], wish: Wish) -> dict[str, Any]:
        """`quantization_config`: module → codec of all that are quantized; `plain` linear ones are not."""

    def check_no_grid(self, wish: Wish, bits: int | None = None) -> None:
        """Raises UsageError where a wish names a grid that is not this scheme's only one, of `bits`."""
        if (wish.bits, wish.group, wish.sym) not in ((None, None, None), (bits, None, None)):
            raise refuse(self, "a grid", "has one already", "Leave --bits, --group and --sym out.")

    def choices(self, wish: Wish) -> tuple[str, ...]:
        """The codecs that a plan may choose among, numbers left aside: those of one group and symmetry."""
        return (self.codec(wish),)

    def codec_of(self, tensor: Tensor, codec: str) -> str:
        """The codec that this very matrix takes, where that hangs on its weights."""
        return codec

    def shared(self, kinds: Collection[str]) -> str | None:
        """The one codec that several kinds of it, which hang on weights, can give way to, if there is one."""
        return None

    def documents(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Other JSON files of the folder: name → content."""
        return {}

    def mixes(self, first: str, second: str) -> bool:
        """Whether one file may hold both codecs."""
        return True

    def smaller(self, codec: str, columns: int) -> str | None:
        """The same codec with a group that divides the columns; None where there is none."""
        fitting = (kind for kind, group in self.with_groups(codec).items() if columns % group == 0)
        return next(fitting, None)

    def with_groups(self, codec: str) -> dict[str, int]:
        """The same codec with smaller groups, and their sizes, the largest first."""
        head, _, rest = codec.partition("-g")
        group, dash, suffix = rest.partition("-")
        if not group.isdigit():
            return {}
        return {f"{head}-g{size}{dash}{suffix}": size for size in self.groups if size < int(group)}

    def bytes_of(self, codec: str, shape: tuple[int, ...]) -> int:
        """Bytes of a stack or a matrix as it will be stored."""
        rows, columns = shape[-2], shape[-1]
        experts = int(np.prod(shape[:-2]))
        parts = self.parts(split_codec(codec, columns), rows, columns, "BF16")
        return experts * sum(nbytes(dtype, part) for dtype, part in parts.values())


def refuse(scheme: Scheme, option: str, reason: str, way_out: str) -> UsageError:
    return UsageError(f"--to {scheme.name} with {option}", reason, way_out)
