"""What a checkpoint's tensor is to those who read it, however it is stored.

Most are numbers in a row (`PlainTensor`).  A quantized linear layer is several tensors of the file that make
one of the model (`packed.PackedTensor`); above here nobody sees the difference but in `dtype`.

Legend: R flattened rows (every dimension but the last), C columns, N bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dither.errors import UnsupportedError, UsageError
from dither.formats import safetensors
from dither.formats.layouts.numbers import ARRAYS
from dither.formats.mapped import MappedFile
from dither.models import dtypes, fp8
from dither.system.text import shown
from dither.types import Bytes, Floats, Recode


class StoredTensor(Protocol):
    """One tensor of a model, not yet read."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...  # safetensors' name, "BF16", or what a packed one is: "int4-g128"
    @property
    def nbytes(self) -> int: ...  # as stored
    @property
    def columns(self) -> int: ...
    @property
    def rows(self) -> int: ...  # when all dimensions but the last are flattened; a 1-D tensor is one

    def read(self, start: int, stop: int) -> Floats:
        """Rows `start` to `stop` as a new float32 (stop − start, C) array.

        Raises UsageError where there are no such rows, UnsupportedError where nothing here knows the
        dtype, FormatError where a scale makes no sense, SourceError where the file has shrunk meanwhile.
        """
        ...

    def check_readable(self) -> None:
        """Raises UnsupportedError where nothing here knows the dtype."""
        ...

    @property
    def recode(self) -> Recode | None:
        """The same rows in another type, where they are codes (`types.Tensor.recode`)."""
        ...


def check_rows(tensor: StoredTensor, start: int, stop: int) -> None:
    """Raises UsageError where a tensor has no such rows."""
    if not 0 <= start <= stop <= tensor.rows:
        raise UsageError(shown(tensor.name), f"has {tensor.rows} rows, not {start} to {stop}")


@dataclass(frozen=True)
class PlainTensor:
    """Numbers of one type, FP8 ones with their scale."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: "BF16"
    nbytes: int  # as stored, scales not counted
    _file: MappedFile = field(repr=False, compare=False)
    _offset: int = field(repr=False)
    _scale: fp8.Scale | None = field(default=None, repr=False, compare=False)

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def recode(self) -> None:
        """Numbers are no codes."""

    @property
    def file_name(self) -> str:
        return self._file.path.name

    def read(self, start: int, stop: int) -> Floats:
        check_rows(self, start, stop)
        self.check_readable()
        w_RC = self.read_flat(start * self.columns, stop * self.columns).reshape(stop - start, self.columns)
        if self._scale:
            self._scale.apply(w_RC, start, f"tensor {shown(self.name)}")
        return w_RC

    def check_readable(self) -> None:
        if self.dtype not in dtypes.READABLE:
            reason = f"is stored as {self.dtype}"
            raise UnsupportedError(f"tensor {shown(self.name)}", reason, "Take a bf16 checkpoint.")

    def read_flat(self, start: int, stop: int) -> Floats:
        """Stored numbers `start` to `stop`, in order and unscaled, as a new float32 array."""
        size = safetensors.DTYPE_BITS[self.dtype] // 8
        raw_N = self._file.read(self._offset + start * size, (stop - start) * size)
        return dtypes.to_float32(raw_N, self.dtype)

    def check_file(self) -> None:
        """Raises SourceError where the file is not the one that was opened any more."""
        self._file.check()

    def raw(self) -> Bytes:
        """All stored bytes, as `MappedFile.view` has them; `check_file` tells afterwards whether they were good."""
        return self._file.view(self._offset, self.nbytes) if self.nbytes else np.empty(0, np.uint8)

    def array(self) -> npt.NDArray[Any]:
        """All stored numbers in their shape, copying nothing; see `formats.layouts.numbers` for types.

        Raises SourceError where the file has shrunk meanwhile.
        """
        return self.raw().view(ARRAYS[self.dtype]).reshape(self.shape)
