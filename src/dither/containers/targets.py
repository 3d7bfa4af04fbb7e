"""The target of what was asked for."""

from __future__ import annotations

from dither.containers.folders import find_scheme
from dither.containers.folders.mix import dtype_of
from dither.containers.folders.target import FolderTarget
from dither.containers.gguf_target import GGUFTarget
from dither.containers.mix import Options
from dither.containers.target import Target
from dither.errors import UsageError
from dither.types import Model


def target_of(options: Options, model: Model) -> Target:
    """Where `model`, as it was opened, goes.

    Raises UsageError where options of one kind of container are given to another, UnsupportedError and SourceError
    where those who run the container would not load the model."""
    target = _target_of(options, model)
    target.check(model)
    return target


def _target_of(options: Options, model: Model) -> Target:
    scheme = find_scheme(options.to) if options.folder else None
    if options.act_order and not (scheme is not None and scheme.reorders):
        reason = f"has no place in {options.label}: only GPTQ says which column is of which group"
        raise UsageError("--act-order", reason, "Leave it out, or choose --to gptq.")
    if scheme is not None:
        own, taken = options.dtype or dtype_of(model), scheme.dtypes
        if own in taken:
            return FolderTarget(options, scheme, own)
        if options.dtype is not None:
            reason = f"is not what {scheme.title} is computed in: its loaders take {', '.join(taken)}"
            raise UsageError(f"--dtype {own.lower()}", reason, "Leave it out.")
        note = f"numbers that stay numbers become {taken[0]}: {scheme.title} is computed in it, and the model is {own}"
        return FolderTarget(options, scheme, taken[0], (note,))
    for name in ("bits", "group", "sym", "dtype"):
        if getattr(options, name) is not None:
            reason = "is for the GPU formats: a GGUF type says it all"
            raise UsageError(f"--{name}", reason, "Leave it out, or choose --to gptq, awq, w4a16, …")
    return GGUFTarget(options)
