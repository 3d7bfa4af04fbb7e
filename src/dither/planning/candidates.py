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

from dither.codecs import codec
from dither.containers.gguf_target import ANY_GGUF
from dither.containers.target import Target
from dither.errors import UsageError
from dither.types import Model, No, Tensor


def candidates(
    model: Model, *, importance: Collection[str], types: Sequence[str] | None = None, target: Target = ANY_GGUF
) -> dict[str, tuple[str, ...]]:
    """The types each matrix that is to be quantized may take, the largest first; in the file's order.

    `importance` names the tensors that have evidence; `types` limits the choice (any case).  Raises
    UsageError for a type that is not known, and for a matrix that none of the types fits.
    """
    # By falling bits, so that a plan's choices, and the errors that list them, come in a fixed order.
    allowed = target.types(model, types)
    kept = target.fixed(model)
    found = {}
    for tensor in (tensor for tensor in model.tensors if tensor.name not in kept):
        refused = {name: _refusal(tensor, name, importance, target) for name in allowed}
        found[tensor.name] = tuple(name for name, reason in refused.items() if not reason)
        if not found[tensor.name]:
            reason = f"can become none of the types asked for ({'; '.join(refused.values()) or 'none were'})"
            raise UsageError(tensor.name, reason, "Add one that fits it to --types, such as Q8_0 or F16.")
    return found


def _refusal(tensor: Tensor, name: str, importance: Collection[str], target: Target) -> str:
    """Why a tensor cannot become a type, or ""."""
    verdict = target.can_hold(name, tensor.shape)
    if isinstance(verdict, No):
        return verdict.reason
    if codec(name, tensor.columns).needs_importance and tensor.name not in importance:
        return f"{name} needs importance, and there is none for it"
    return ""
