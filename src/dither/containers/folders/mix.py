"""From a wish ("awq, 4 bits, groups of 128") to a mix: what every tensor of the folder becomes.

The matrices of the blocks are quantized; the embedding, the output matrix, routers, norms and biases stay
numbers, as every consumer expects of these files.  A matrix that the container cannot hold as wished gets a
smaller group where it may, or stays numbers, and either is said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from dither.codecs import codec as find_codec
from dither.containers.folders.joined import parted
from dither.containers.folders.scheme import Scheme, Wish
from dither.containers.mix import Mix, MixTensor, Options, check_patterns
from dither.errors import UsageError
from dither.formats.ggml import FLOAT_TYPES
from dither.formats.safetensors import nbytes
from dither.formats.tensor_names import block_of, is_router
from dither.models.arch.written import Written, written
from dither.types import Model, No, Tensor


def dtype_of(model: Model) -> str:
    """What most of a model's numbers are stored as; BF16 where they are quantized already."""
    counts: Counter[str] = Counter()
    for tensor in model.tensors:
        if len(tensor.shape) > 1:
            counts[tensor.stored if tensor.stored in FLOAT_TYPES else "BF16"] += tensor.size
    return counts.most_common(1)[0][0] if counts else "BF16"


def is_linear(tensor: Tensor) -> bool:
    """Whether a tensor is a matrix of a block that consumers expect to be quantized."""
    name = tensor.name  # routers stay numbers: a few thousand weights on which everything hangs
    return len(tensor.shape) > 1 and block_of(name) is not None and not is_router(name) and name.endswith(".weight")


def make_folder_mix(model: Model, options: Options, scheme: Scheme, wish: Wish) -> Mix:
    """Raises UsageError: a pattern that matches nothing, a type that the container cannot hold."""
    if options.output_type or options.embedding_type:
        reason = f"are for GGUF; {scheme.title} leaves both as they are"
        raise UsageError("--output-type and --embedding-type", reason, "Leave them out.")
    check_patterns(model, options)
    wanted = scheme.codec(wish)
    usual = wanted if wish.group is not None else _common(model, scheme, wanted)
    _, entries = written(model)
    named = {entry.tensor for entry in entries}
    shifted = {entry.tensor for entry in entries if entry.change.new_numbers}
    torn = {entry.tensor for entry in entries if splits_scales(wanted, entry)}

    def entry_of(tensor: Tensor) -> MixTensor:
        # Norms that a checkpoint stores less one lose nothing as float32 alone.
        if tensor.name in shifted:
            return _numbers(tensor, "F32", "stored less one")
        if tensor.name in torn:
            return _numbers(tensor, wish.dtype, "heads of its rows do not divide a tile", wanted)
        return _planned(tensor, options.tensors, scheme, (wanted, usual), wish)

    planned = [entry_of(tensor) for tensor in model.tensors if tensor.name in named]
    _check_mix(scheme, planned)
    return Mix(options.label, 0, *_joined(scheme, planned))


def _joined(scheme: Scheme, planned: Sequence[MixTensor]) -> tuple[tuple[MixTensor, ...], tuple[str, ...]]:
    """Matrices that servers compute as one in one type, and remarks about those that are not."""
    matrices = {tensor.name: tensor.type for tensor in planned if len(tensor.shape) > 1}
    changed: dict[str, str] = {}
    apart = []
    for names in parted(matrices):
        kind = scheme.shared({matrices[name] for name in names})
        if kind is None:
            apart.append(", ".join(names))
        else:
            changed |= dict.fromkeys(names, kind)
    joined = []
    for tensor in planned:
        kind = changed.get(tensor.name, tensor.type)
        joined.append(replace(tensor, type=kind, wanted=tensor.wanted if tensor.is_fallback else kind))
    if not apart:
        return tuple(joined), ()
    more = f", and so have {len(apart) - 1} more groups" if len(apart) > 1 else ""
    what = "vLLM and SGLang compute these as one and refuse such a file; transformers reads it."
    return tuple(joined), (f"{apart[0]} have different types{more}: {what}",)


def _common(model: Model, scheme: Scheme, wanted: str) -> str:
    """The codec with the largest group that all matrices can have: every loader reads a file of one grid.

    The one that is wanted where there is none.
    """
    shapes = {tensor.shape for tensor in model.tensors if is_linear(tensor)}
    kinds = (wanted, *scheme.with_groups(wanted))
    return next((k for k in kinds if not any(isinstance(scheme.can_hold(k, s), No) for s in shapes)), wanted)


def splits_scales(kind: str, entry: Written) -> bool:
    """Whether rows that share scales would be parted by putting them into the checkpoint's order."""
    if not entry.heads or len(entry.shape) < 2 or kind in FLOAT_TYPES:
        return False
    together = find_codec(kind, entry.shape[-1]).rows_together
    return together > 1 and together % (entry.shape[0] // entry.heads) != 0


def _planned(
    tensor: Tensor, overrides: Sequence[tuple[str, str]], scheme: Scheme, kinds: tuple[str, str], wish: Wish
) -> MixTensor:
    """`kinds` are the codec as it was wished for, and as it suits all of the model."""
    wanted, usual = kinds
    asked = next((kind for pattern, kind in overrides if re.search(pattern, tensor.name)), None)
    if not is_linear(tensor):
        if asked is not None and asked.upper() not in FLOAT_TYPES:
            reason = f"is not stored so in {scheme.title}: it stays numbers"
            raise UsageError(f"{tensor.name} as {asked}", reason, "Name matrices of the blocks.")
        return _numbers(tensor, wish.dtype, "no matrix of a block")
    if asked is not None:
        return _as_asked(tensor, scheme, asked, wish)
    if wanted in FLOAT_TYPES:
        return _numbers(tensor, wanted, "")
    verdict = scheme.can_hold(wanted, tensor.shape)
    reason = verdict.reason if isinstance(verdict, No) else ""
    # The grid that suits the whole model first: one that differs from the others' is for where nothing else fits.
    for fitting in (usual, scheme.smaller(wanted, tensor.columns)):
        if fitting is not None and not isinstance(scheme.can_hold(fitting, tensor.shape), No):
            kind = scheme.codec_of(tensor, fitting)
            size = scheme.bytes_of(kind, tensor.shape)
            return MixTensor.of(tensor, kind, size, wanted if reason else kind, reason)
    return _numbers(tensor, wish.dtype, reason, wanted)


def _as_asked(tensor: Tensor, scheme: Scheme, asked: str, wish: Wish) -> MixTensor:
    if asked.upper() in FLOAT_TYPES:
        return _numbers(tensor, wish.dtype, "")
    kind = find_codec(asked, tensor.columns).name
    verdict = scheme.can_hold(kind, tensor.shape)
    if isinstance(verdict, No):
        raise UsageError(tensor.name, verdict.reason, "Choose another type for it.")
    kind = scheme.codec_of(tensor, kind)
    return MixTensor.of(tensor, kind, scheme.bytes_of(kind, tensor.shape))


def _numbers(tensor: Tensor, dtype: str, reason: str, wanted: str = "") -> MixTensor:
    return MixTensor.of(tensor, dtype, nbytes(dtype, tensor.shape), wanted, reason)


def _check_mix(scheme: Scheme, planned: Sequence[MixTensor]) -> None:
    kinds = sorted({tensor.type for tensor in planned} - set(FLOAT_TYPES))
    way_out = "Give all matrices one type, or choose compressed-tensors (--to w4a16), which mixes."
    for kind in kinds[1:]:
        if not scheme.mixes(kinds[0], kind):
            raise UsageError(f"{kinds[0]} and {kind}", f"cannot stand in one {scheme.title} file", way_out)
