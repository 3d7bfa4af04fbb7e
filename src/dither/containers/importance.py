"""Evidence meets a mix: what is missing, and what that means.

Legend: E experts (1 for an ordinary layer), C columns.
"""

from __future__ import annotations

from dither.codecs import codec as find_codec
from dither.containers.mix import Mix
from dither.errors import UsageError
from dither.formats.evidence import EvidenceStore
from dither.formats.ggml import FLOAT_TYPES
from dither.units import counted


def check_evidence(mix: Mix, store: EvidenceStore | None) -> None:
    """Raises UsageError where a type needs importance that is not there."""
    known = set(store.tensors) if store else set()
    way_out = "Give evidence of `dither calibrate` or an importance matrix with --evidence, or choose a larger type."
    for planned in mix.tensors:
        if planned.name in known or planned.type in FLOAT_TYPES:
            continue
        if find_codec(planned.type, planned.shape[-1]).needs_importance:
            reason = f"{planned.type} needs importance, and there is none for this tensor"
            raise UsageError(planned.name, reason, way_out)


def evidence_notes(mix: Mix, store: EvidenceStore | None) -> list[str]:
    """What the evidence does not cover."""
    if store is None:
        return []
    quantized = [t.name for t in mix.tensors if t.type not in FLOAT_TYPES]
    known = set(store.tensors)
    missing = [name for name in quantized if name not in known]
    notes = []
    if missing:
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        notes.append(f"No importance for {len(missing)} of {len(quantized)} quantized tensors: {shown}.")
    matrix = store.matrix
    unseen = {name: count for name, count in matrix.unseen.items() if name in set(quantized)} if matrix else {}
    if unseen:
        shown = ", ".join(f"{name} ({count})" for name, count in list(unseen.items())[:3])
        more = f" and {counted(len(unseen) - 3, 'tensor')} more" if len(unseen) > 3 else ""
        notes.append(
            f"Experts that saw no token are rounded plainly, as without a matrix: {sum(unseen.values())}, "
            f"in {shown}{more}."
        )
    return notes
