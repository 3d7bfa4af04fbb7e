"""What a budget leaves for the tensors that a plan decides about, and whether any choice of types meets it.

Nothing but headers is needed for that, so an impossible budget is refused in a second: before evidence is learnt,
which takes minutes, and, of a model on the hub, before its weights are fetched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dither.capacity.memory import memory_for
from dither.containers.target import Target
from dither.errors import UsageError
from dither.formats.tensor_names import EMBEDDING
from dither.planning.candidates import candidates
from dither.system.files import bytes_of
from dither.types import Model
from dither.units import format_bytes

Allowed = Mapping[str, Sequence[str]]  # tensor → the types it may take
_TO_COME = 8 * 2**10  # bytes; what a file says of evidence and measurements is under half of it
_OF_A_TOKEN = 48  # bytes; about what a token and its merge take in a header, where the tokenizer was not read


@dataclass(frozen=True)
class Budget:
    """One of three: bytes of the file, bytes of the tensors, or the divergence at most."""

    said: str  # as a person reads it
    file: int | None = None
    tensors: int | None = None
    max_kl: float | None = None
    beside: int | None = None  # with `tensors`, of a budget of memory: bytes that running takes beside them


def around(model: Model, target: Target, header: int) -> tuple[int, int]:
    """What is taken whatever is chosen: bytes of tensors that no plan decides about, and with them of all the file
    but the tensors that it does."""
    fixed = [tensor.bytes for tensor in target.fixed(model).values()]
    return sum(fixed), header + sum(target.aligned(model, size) for size in fixed)


def room_of(wanted: Budget, kept: int, taken: int) -> int | None:
    """Bytes for the tensors that a plan decides about, of what `around` says; None where only the divergence is
    limited."""
    if wanted.file is not None:
        return wanted.file - taken
    return None if wanted.tensors is None else wanted.tensors - kept


def check_room(
    model: Model, wanted: Budget, allowed: Allowed, target: Target, kept: int, taken: int, spare: int = 0
) -> None:
    """Raises UsageError, with the smallest budget that would do, where not even the smallest types fit.

    The size of a file that is named is larger by `spare`.
    """
    room = room_of(wanted, kept, taken)
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    least = sum(
        min(target.aligned(model, target.bytes_of(kind, shapes[name])) for kind in kinds)
        for name, kinds in allowed.items()
    )
    if room is None or least <= room:
        return
    bits = math.ceil(1000 * 8 * (least + kept) / model.parameters) / 1000
    weights = f"{format_bytes(least + kept)} of weights, {bits:.3f} bits for each"
    if wanted.file is not None:
        needed = f"a file of {format_bytes(least + taken + spare)}"
        way_out = f"Ask for at least --size {least + taken + spare}"
    elif wanted.beside is not None:
        needed = f"{weights}, and running takes {format_bytes(wanted.beside)} beside them"
        memory = memory_for(least + kept + wanted.beside)
        way_out = f"Give at least --memory {math.ceil(memory / 2**20)}MiB, ask for a shorter --context"
    else:
        needed, way_out = weights, f"Ask for at least --bpw {bits:.3f}, or for as much more memory"
    reason = f"is too small: the smallest types make {needed}"
    raise UsageError(wanted.said, reason, f"{way_out}, or allow smaller types with --types.")


def check_reachable(
    model: Model, wanted: Budget, target: Target, types: Sequence[str] | None, spare: int = _TO_COME
) -> None:
    """Raises UsageError, from headers alone, for a budget that not even the smallest types meet.

    Called before evidence is learnt, so it supposes that every tensor will have some.  What the file will say of its
    evidence is not known either: the size that is named leaves `spare` for it.
    """
    if wanted.max_kl is not None:
        return
    allowed = candidates(model, importance={tensor.name for tensor in model.tensors}, types=types, target=target)
    if target.options.folder and model.kind == "gguf":
        # What a GGUF's tokenizer takes in a folder is known once transformers has made it, which takes a while:
        # without it first, and about what it takes in the GGUF is named.
        beside = bytes_of(model.files) - sum(tensor.stored_bytes for tensor in model.tensors)
        check_room(model, wanted, allowed, target, *around(model, target, 0), spare + max(0, beside))
    check_room(model, wanted, allowed, target, *around(model, target, target.header_bytes(model, None, "", {})), spare)


def check_on_hub(
    model: str,
    wanted: Iterable[Callable[[Model], Budget]],
    target_of: Callable[[Model], Target],
    types: Sequence[str] | None,
) -> None:
    """`check_reachable` for a model that would have to be fetched, from its headers; nothing for any other.

    Raises what `open_headers` raises besides.
    """
    from dither.models.source import open_headers

    if Path(model).expanduser().exists():
        return
    with open_headers(model) as (outline, _, _):
        rows = next((tensor.shape[0] for tensor in outline.tensors if tensor.name == EMBEDDING), 0)
        for budget in wanted:
            check_reachable(outline, budget(outline), target_of(outline), types, _TO_COME + _OF_A_TOKEN * rows)
