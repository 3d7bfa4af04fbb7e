"""Which family an opened model is of, told by its tensors: several share one architecture's name in GGUF."""

from __future__ import annotations

from dither.errors import SourceError, UnsupportedError
from dither.formats.tensor_names import OUTPUT, ROPE_TABLES, in_every_block
from dither.models.arch import families
from dither.models.arch.family import Family
from dither.system.text import shown
from dither.types import Model

WAY_OUT = "Take the GGUF from its authors, or convert the checkpoint again."
PLAIN = "Only what is understood is run: take a plain model of this architecture."


def family_of_tensors(model: Model) -> Family:
    """The first family of this architecture that has exactly these tensors: Mixtral is a "llama" too."""
    candidates = [family for family in families() if family.arch == model.arch]
    if not candidates:
        known = ", ".join(sorted({family.arch for family in families()}))
        raise UnsupportedError(
            f"architecture {shown(model.arch)}",
            f"is of no family that is known here; known are {known}",
            "Quantize it to GGUF without data, or calibrate it with llama.cpp's llama-imatrix.",
        )
    names = {in_every_block(tensor.name) for tensor in model.tensors}
    faults = [(tensor_faults(family, names), family) for family in candidates]
    (missing, unknown), family = min(faults, key=lambda fault: len(fault[0][0]) + len(fault[0][1]))
    if missing:
        raise SourceError(f"tensor {missing[0]}", f"is missing: a {family.name} model has it", WAY_OUT)
    if unknown:
        name = next(tensor.name for tensor in model.tensors if in_every_block(tensor.name) == unknown[0])
        reason = f"is not part of a {family.name} model, as far as is known here"
        raise UnsupportedError(f"tensor {shown(name)}", reason, PLAIN)
    return family


def tensor_faults(family: Family, names: set[str]) -> tuple[list[str], list[str]]:
    """Tensors that the family lacks among these names, and names that it has no use for."""
    targets = {rule.target for rule in family.rules}
    needed = {target for target in targets if target.endswith(".weight")} - {OUTPUT}
    rope = {name for name, scaling in ROPE_TABLES.items() if scaling in family.scalings}
    return sorted(needed - names), sorted(names - targets - rope)
