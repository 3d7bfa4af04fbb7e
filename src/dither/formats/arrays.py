"""NumPy's `.npz`, read with suspicion: where each array lies in the file, and nothing taken on trust.

A `.npz` is a zip archive, each member a `.npy`: magic, version, a header that is a Python literal with
dtype, order and shape, then the numbers (NumPy Enhancement Proposal 1).  Only members that are stored
uncompressed are read, in C order, of plain little-endian numbers, and only where header and shape add
up to the member's own size; so no file can ask for more memory than it has bytes, and nothing is ever
unpickled.  Rows are read straight from their place in the file.

Source of the zip fields: PKWARE's APPNOTE, section 4.3.7 (local file header).
"""

from __future__ import annotations

import struct
import warnings
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tokenize import TokenError  # numpy's, where it looks for what Python 2 wrote
from typing import Any

import numpy as np
import numpy.typing as npt

from dither.errors import FormatError, SourceError
from dither.system.text import shown

_LOCAL = struct.Struct("<4s22xHH")  # signature … lengths of the name and of the extra field
_WAY_OUT = "The file is damaged or no array file: make it again."


@dataclass(frozen=True)
class Member:
    """One array of a `.npz`: `offset` is where its numbers start in the file."""

    path: Path
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    def read(self) -> npt.NDArray[Any]:
        """The whole array."""
        return self._numbers(0, prod(self.shape)).reshape(self.shape)

    def row(self, index: int) -> npt.NDArray[Any]:
        """`array[index]`, reading no more than that."""
        row: npt.NDArray[Any] = self.rows(index, index + 1)[0]
        return row

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """`array[start:stop]`, reading no more than that."""
        size = prod(self.shape[1:])
        return self._numbers(start * size, (stop - start) * size).reshape(stop - start, *self.shape[1:])

    def _numbers(self, start: int, count: int) -> npt.NDArray[Any]:
        found = np.fromfile(self.path, self.dtype, count, offset=self.offset + start * self.dtype.itemsize)
        if len(found) != count:
            raise FormatError(f"{self.path}: {self.name}", "shrank while it was being read", _WAY_OUT)
        return found


def read_members(path: Path) -> dict[str, Member]:
    """Every array of a `.npz` by name.

    Raises SourceError where there is no such file, FormatError where a member is compressed, holds
    anything but plain numbers, or is not as long as its header says.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            found = (_member(path, info, file) for info in archive.infolist())
            return {member.name: member for member in found}
    except FileNotFoundError:
        raise SourceError(str(path), "no such file", "Check the folder.") from None
    except OSError as error:
        raise SourceError(str(path), f"cannot be read ({error.strerror})", "Check its permissions.") from None
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, struct.error) as error:
        raise FormatError(str(path), f"is no .npz archive ({error})", _WAY_OUT) from None


def _member(path: Path, info: zipfile.ZipInfo, file: Any) -> Member:
    thing = f"{path}: {shown(info.filename)}"
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise FormatError(thing, "is compressed or encrypted; only stored arrays are read", _WAY_OUT)
    file.seek(info.header_offset)
    signature, name_length, extra_length = _LOCAL.unpack(file.read(_LOCAL.size))
    if signature != b"PK\3\4":
        raise FormatError(thing, "does not start where the archive says", _WAY_OUT)
    start = info.header_offset + _LOCAL.size + name_length + extra_length
    file.seek(start)
    dtype, shape = _npy_header(file, thing)
    offset = file.tell()
    size = prod(shape) * dtype.itemsize
    if offset - start + size != info.file_size or offset + size > path.stat().st_size:
        raise FormatError(thing, f"is not the {size} bytes that its shape {shape} needs", _WAY_OUT)
    return Member(path, info.filename.removesuffix(".npy"), dtype, shape, offset)


def _npy_header(file: Any, thing: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    from numpy.lib import format as npy

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a header that numpy has to guess at
            version = npy.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version}")
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read(file)
    except (ValueError, TypeError, Warning, EOFError, MemoryError, RecursionError, TokenError) as error:
        raise FormatError(thing, f"is no array ({shown(str(error))})", _WAY_OUT) from None
    if dtype.kind not in "fiu" or dtype.hasobject or dtype.byteorder == ">" or (fortran and len(shape) > 1):
        raise FormatError(thing, f"holds {dtype} in an order or of a kind that is not read", _WAY_OUT)
    if any(dimension < 0 for dimension in shape):
        raise FormatError(thing, f"has a shape of {shape}", _WAY_OUT)
    return dtype, tuple(map(int, shape))
