"""How fast tokens will come: every weight that takes part is read once per token.

Writing text one token at a time does two operations for each weight it reads, and any processor computes
faster than it reads: time per token is bytes per token divided by memory bandwidth (the "roofline" of
Williams, Waterman, Patterson 2009, at its flat left end).  What is read:

- all matrices, but of a mixture of experts only those chosen: used / count of their bytes,
- one row of the embedding, which is nothing; all of it where it is the output matrix too,
- the cache, on average half full.

No program reaches the whole bandwidth: published runs of llama.cpp lie about half-way to 70 % of the data
sheet's (docs/fit.md has them).  And every token has costs that no bandwidth explains, which decide in
small models: threads that meet, or kernels that start, in every layer, and the choice of one token.

The band is what a machine that does nothing else may show; a busy one falls out of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dither.formats.tensor_names import EMBEDDING, OUTPUT, is_expert_stack, kind_of

LOW, LIKELY, HIGH = 0.40, 0.60, 0.90  # of the bandwidth
# Seconds per token beside reading; half and twice as much in the band.  The CPU's were chosen by the speed
# of the bundled model on one machine, the GPU's is a guess: they matter in small models alone.
CPU_LAYER, GPU_LAYER = 40e-6, 10e-6
SAMPLING = 10e-9  # per token of the vocabulary


@dataclass(frozen=True)
class SpeedEstimate:
    """Tokens per second: the estimate and the ends of its band."""

    likely: float
    low: float
    high: float


def active_bytes(tensors: Iterable[tuple[str, int]], experts: int, experts_used: int) -> int:
    """Bytes of weights read per token; `tensors` are names and stored bytes."""
    listed = list(tensors)
    is_tied = all(name != OUTPUT for name, _ in listed)
    total = 0.0
    for name, stored in listed:
        if kind_of(name) == "per_layer_token_embd" or (name == EMBEDDING and not is_tied):
            continue
        total += stored * (experts_used / experts if experts and is_expert_stack(name) else 1.0)
    return round(total)


def decode_speed(reads: Iterable[tuple[int, float]], fixed: float = 0.0) -> SpeedEstimate:
    """`reads` are (bytes per token, bytes per second) of each memory that holds a part of the model,
    `fixed` the seconds per token that are no reading."""
    seconds = sum(count / bandwidth for count, bandwidth in reads)
    return SpeedEstimate(
        1 / (seconds / LIKELY + fixed), 1 / (seconds / LOW + 2 * fixed), 1 / (seconds / HIGH + fixed / 2)
    )
