"""Convert: a model in one file format into another, as exactly as the other can hold it.

    any → folder     plain safetensors, de-quantized: BF16 unless another dtype is asked for
    any → x.gguf     each quantized matrix in a type of GGUF that holds exactly its numbers, if there is one

Which are exact is found out from the weights, not from names: GPTQ's and AWQ's integers of 4 bits are Q4_0
where their zero points are all 8, and Q4_1 where scale times zero point is a float16.  What is not exact is
counted and said.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dither.containers.folders import find_scheme
from dither.containers.mix import exactly
from dither.errors import UsageError
from dither.formats.ggml import STORED_FLOATS
from dither.models.source import opened
from dither.progress import Progress
from dither.quantizing.job import make
from dither.quantizing.request import Making, Running, options_of
from dither.quantizing.result import Result
from dither.types import Model, Tensor

DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
EXACT = ("MXFP4", "Q4_0", "Q4_1")  # types of GGUF that other formats' grids may coincide with, the smallest first
_CHUNK = 2**22  # weights looked at at once


@dataclass(frozen=True)
class Converted:
    """`exact` matrices hold the very numbers of the source, `rounded` ones do not."""

    result: Result
    exact: int
    rounded: int

    def to_json(self) -> dict[str, Any]:
        return {**self.result.to_json(), "exact": self.exact, "rounded": self.rounded}


def convert(
    model: str | Path | Model,
    out: str | Path,
    to: str | None = None,
    *,
    dtype: str = "bf16",
    pre: str | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Writes `model` to `out`: a GGUF where that ends in .gguf, a checkpoint folder otherwise.

    `to` names one type for the matrices that are quantized (Q4_0, Q8_0, … of GGUF), or a folder's container
    ("safetensors", "gptq", …); None takes what is exact.  `dtype` ("bf16", "f16", "f32") is what numbers, and
    matrices that no type holds exactly, become.

    Raises UsageError, SourceError and OutputError as `quantize` does.
    """
    if dtype.lower() not in DTYPES:
        raise UsageError(f"--dtype {dtype}", f"is not one of {', '.join(DTYPES)}")
    numbers = DTYPES[dtype.lower()]
    source = opened(model, pre)
    if not str(out).endswith(".gguf"):
        container = to or "safetensors"
        if find_scheme(container) is None:
            reason = "is a type of GGUF, and the output is a folder"
            raise UsageError(f"--to {container}", reason, f"Name a file: -o {Path(out).name}.gguf.")
        options = options_of(container, dtype=numbers)
    else:
        options = options_of(numbers, tensors=_overrides(source, to, numbers))
    result = make(source, options, Making(), Running.of(threads, force=force, progress=progress), out)
    matrices = [t.name for t in source.tensors if len(t.shape) > 1 and t.name in result.tensors]
    exact = sum(result.tensors[name]["squared_error"] == 0 for name in matrices)
    return Converted(result, exact, len(matrices) - exact)


def _overrides(model: Model, to: str | None, numbers: str) -> tuple[tuple[str, str], ...]:
    """(regular expression of one name, type) of every matrix that is quantized."""
    if to is not None and find_scheme(to) is not None:
        raise UsageError(f"--to {to}", "is a folder, and the output is a GGUF", "Name a folder with -o.")
    quantized = [t for t in model.tensors if len(t.shape) > 1 and t.stored not in STORED_FLOATS]
    types = {tensor.name: to.upper() if to is not None else _exact_type(tensor) for tensor in quantized}
    return tuple((exactly(name), kind) for name, kind in types.items() if kind is not None)


def _exact_type(tensor: Tensor) -> str | None:
    """The type of GGUF that holds every number of a tensor; None where there is none."""
    if tensor.read_raw is not None:
        return tensor.stored  # a GGUF's own
    if tensor.recode is None:
        return None
    step = max(1, _CHUNK // tensor.columns)
    starts = range(0, tensor.rows, step)
    for kind in EXACT:
        if all(tensor.recode(kind, at, min(at + step, tensor.rows)) is not None for at in starts):
            return kind
    return None
