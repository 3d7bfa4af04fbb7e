"""FP8 weights joined to their scales, whichever tool wrote them: the arrangement follows from the shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dither.errors import FormatError, UnsupportedError
from dither.models import dtypes, fp8
from dither.models.packed.matrix import Joined
from dither.models.packed.settings import Quantization
from dither.models.stored import PlainTensor, StoredTensor
from dither.system.text import shown

_CODES = ("I8", "U8", "F4", "F6_E2M3", "F6_E3M2")  # 4-bit codes hide in pairs in the first two
_FETCH_AGAIN = "The download is incomplete: fetch the model again."


def join(stored: Mapping[str, PlainTensor], block: tuple[int, int] | None) -> tuple[dict[str, StoredTensor], list[str]]:
    """The scales are taken out of sight.  `block` is None where the config does not speak of scales."""
    for tensor in stored.values():
        if tensor.dtype in _CODES and any(tensor.name + end in stored for end in fp8.WEIGHT_SCALES):
            reason = f"is {tensor.dtype} under a scale; of the scaled types only FP8 can be read"
            raise UnsupportedError(f"tensor {shown(tensor.name)}", reason, "Take a bf16 checkpoint.")
    weights = [tensor for tensor in stored.values() if tensor.dtype in dtypes.FP8]
    if not weights:
        return dict(stored), []
    joined, hidden = dict(stored), set()
    bare = []
    for weight in weights:
        scale_name = next((weight.name + end for end in fp8.WEIGHT_SCALES if weight.name + end in stored), "")
        hidden |= {scale_name} | fp8.beside(weight.name, fp8.ACTIVATION_SCALES)
        if scale_name:
            joined[weight.name] = _scaled(weight, stored[scale_name], block or (128, 128))
        else:
            bare.append(weight.name)
    if bare and block:
        reason = "is FP8 but has no scale, in a checkpoint whose config says that it is scaled"
        raise FormatError(f"tensor {shown(bare[0])}", reason, _FETCH_AGAIN)
    notes = [f"{len(weights)} tensors are FP8: de-quantized as they are read"]
    if bare:
        notes.append(f"{len(bare)} FP8 tensors have no scale: taken at face value")
    return {name: tensor for name, tensor in joined.items() if name not in hidden}, notes


def _scaled(weight: PlainTensor, scale: PlainTensor, block: tuple[int, int]) -> PlainTensor:
    if scale.dtype not in dtypes.READABLE:
        reason = f"is stored as {scale.dtype}, which no scale can be"
        raise UnsupportedError(f"tensor {shown(scale.name)}", reason, "Take a bf16 checkpoint.")
    if scale.dtype == "U8":  # exponents without a type of their own, as MXFP8 is often saved
        scale = replace(scale, dtype="F8_E8M0")
    exponents = scale.dtype == "F8_E8M0"
    fitted = fp8.fit_scale(weight.name, weight.shape, scale.shape, scale.read_flat, block, exponents)
    return replace(weight, _scale=fitted)


def nothing_packed(stored: Mapping[str, PlainTensor], found: Quantization) -> list[Joined]:
    """FP8 weights are no parts of another weight: `join` finds them beside those of any method."""
    return []


METHODS = {"fp8": nothing_packed, "fbgemm_fp8": nothing_packed}
LEAVES_FLOATS = True
