"""Which types a plan may choose from, tensor by tensor, and what each costs in bytes.

A plan decides about the matrices that a preset would quantize, embedding and output included.  Vectors,
norms, routers and the like are `fixed`: they keep what every preset gives them, and their bytes come off the
budget.

Of a matrix the container says which types its rows fit; an I-quant that cannot be encoded without importance
needs the tensor to have some.  Ternary types are for models trained ternary and ruin any other, so they must
be asked for by name, as must F32.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dither.codecs import all_codecs, codec
from dither.containers.gguf import can_hold
from dither.containers.recipe import Options, PlannedTensor, make_plan
from dither.errors import UsageError
from dither.formats.ggml import GGML_TYPES
from dither.types import Model, No, Tensor

UNASKED = ("F32", "TQ1_0", "TQ2_0")  # never chosen unless named
_ANY_PRESET = Options("Q4_K_M")  # presets differ in types, not in what they leave alone


def candidates(
    model: Model, *, importance: Collection[str], types: Sequence[str] | None = None
) -> dict[str, tuple[str, ...]]:
    """The types each matrix that is to be quantized may take, the largest first; in the file's order.

    `importance` names the tensors that have evidence; `types` limits the choice (any case).  Raises
    UsageError for a type that is not known, and for a matrix that none of the types fits.
    """
    allowed = allowed_types(types)
    kept = fixed(model)
    found = {}
    for tensor in model.tensors:
        if tensor.name in kept:
            continue
        refused = {name: _refusal(tensor, name, importance) for name in allowed}
        found[tensor.name] = tuple(name for name, reason in refused.items() if not reason)
        if not found[tensor.name]:
            raise UsageError(
                tensor.name,
                f"can become none of the types asked for ({'; '.join(refused.values()) or 'none were'})",
                "Add one that fits it to --types, such as Q8_0 or F16.",
            )
    return found


def allowed_types(types: Sequence[str] | None) -> tuple[str, ...]:
    """The types named, or all but the `UNASKED`, by falling bits per weight.  Raises UsageError."""
    if types is None:
        return tuple(name for name in all_codecs() if name in GGML_TYPES and name not in UNASKED)
    named = {codec(name.strip()).name for name in types}
    for name in sorted(named - set(all_codecs())):
        raise UsageError(f"type {name}", "is none of GGUF's, for which plans are made")
    return tuple(name for name in all_codecs() if name in named)


def fixed(model: Model) -> dict[str, PlannedTensor]:
    """What no plan decides about, and what it becomes: tensor → type, bytes and why, in the file's order."""
    plan = make_plan(model, _ANY_PRESET)
    # A reason without a fallback says why a tensor is left alone: 1-D, a bias, a router.
    return {tensor.name: tensor for tensor in plan.tensors if tensor.reason and not tensor.is_fallback}


def bytes_of(tensor: Tensor, type: str) -> int:
    """Bytes of the tensor's data in a type that can hold it; padding in the file comes on top."""
    return tensor.rows * GGML_TYPES[type].row_bytes(tensor.columns)


def _refusal(tensor: Tensor, name: str, importance: Collection[str]) -> str:
    """Why a tensor cannot become a type, or ""."""
    verdict = can_hold(name, tensor.shape)
    if isinstance(verdict, No):
        return verdict.reason
    if all_codecs()[name].needs_importance and tensor.name not in importance:
        return f"{name} needs importance, and there is none for it"
    return ""
