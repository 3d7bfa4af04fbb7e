"""What a model can be loaded as: for each name a codec, a solver, and the type that bitsandbytes has for it.

    nf4     4 bits, the quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314, section 3)
    fp4     4 bits, a sign, two of exponent and one of mantissa: bitsandbytes' own table
    int8    8 bits, one scale per row (Dettmers et al. 2022, arXiv:2208.07339, section 2)
    int4    4 bits, equal steps around zero
    fp8     E4M3, one scale per row
    hqq     4 bits, equal steps and a zero point, half-quadratic (solvers/half_quadratic.py)

Groups are neighbors in a row that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

from dither.errors import UsageError

GROUPS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BACKENDS = ("auto", "bitsandbytes", "torch", "dither")


@dataclass(frozen=True)
class LoadMethod:
    """One way of storing a matrix.  `bnb` is "" where bitsandbytes has none such."""

    name: str
    codec: str  # with {group} where there are groups
    solver: str
    bits: int  # of a code
    kind: str  # how codes become numbers: "steps", "table" or "float8" (linear.Grid)
    bnb: str  # "nf4", "fp4" or "int8"
    has_zeros: bool = False  # a zero point in each group, where it is not the middle of the codes

    def codec_name(self, group: int, bfloat16: bool = False) -> str:
        """`bfloat16`: with scales of that type."""
        return self.codec.format(group=group) + ("-bf16" if bfloat16 else "")


METHODS = {
    method.name: method
    for method in (
        LoadMethod("nf4", "nf4-g{group}", "nearest", 4, "table", "nf4"),
        LoadMethod("fp4", "fp4-g{group}", "nearest", 4, "table", "fp4"),
        LoadMethod("int8", "int8-channel-f32", "nearest", 8, "steps", "int8"),
        LoadMethod("int4", "int4-g{group}", "nearest", 4, "steps", ""),
        LoadMethod("fp8", "fp8-channel", "nearest", 8, "float8", ""),
        LoadMethod("hqq", "uint4-g{group}", "half-quadratic", 4, "steps", "", True),
    )
}


def find_method(to: str, group: int) -> LoadMethod:
    """Raises UsageError for a name or a group that is not known."""
    if to not in METHODS:
        raise UsageError(f"load as {to}", f"is not one of {', '.join(METHODS)}")
    if group not in GROUPS:
        raise UsageError(f"a group of {group}", f"is not one of {', '.join(map(str, GROUPS))}")
    return METHODS[to]


def choose_backend(method: LoadMethod, backend: str, has_bnb: bool, no_kernel: str) -> str:
    """Whose products to use: bitsandbytes', torch's or dither's.

    `no_kernel` says why torch has none for this method as it is wanted, and is "" where it has.  UsageError
    where those asked for are missing or lack the method.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend {backend}", f"is not one of {', '.join(BACKENDS)}")
    if backend == "auto":
        own = "dither" if no_kernel else "torch"
        backend = "bitsandbytes" if method.bnb and has_bnb else own
    if backend == "torch" and no_kernel:
        raise UsageError("backend torch", no_kernel, "Leave the backend out, or name dither.")
    if backend == "bitsandbytes" and not method.bnb:
        raise UsageError("backend bitsandbytes", f"has no {method.name}", "Leave the backend out, or name dither.")
    if backend == "bitsandbytes" and not has_bnb:
        reason = "needs bitsandbytes, which is not installed"
        raise UsageError(f"loading as {method.name} with bitsandbytes", reason, "pip install 'dither[bnb]'")
    return backend
