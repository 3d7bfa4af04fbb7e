"""Two models read one text (teacher forcing): what each predicts at every token, and how far apart they are.

`stream` measures thousands of tokens and keeps five numbers of each.  This is for one short text that a person
looks at: the divergence at every position and the likeliest tokens of both.

Legend: N tokens of the text but the first, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dither.errors import DitherError
from dither.measuring.metrics import score
from dither.measuring.stream import Lockstep
from dither.models.blocks import Blocks
from dither.progress import Progress


@dataclass(frozen=True)
class Expectation:
    """Before one token: KL divergence in nats, and the likeliest (token id, probability) of both models."""

    kl: float
    same_top: bool
    top_reference: tuple[tuple[int, float], ...]
    top: tuple[tuple[int, float], ...]


def expectations(
    reference: Blocks, quantized: Blocks, tokens: Sequence[int], *, top: int = 5, progress: Progress | None = None
) -> list[Expectation]:
    """What both predict for `tokens[1]`, `tokens[2]`, …: one less than there are tokens.

    Raises DitherError if a model computes NaN.
    """
    name = quantized.model.origin
    run = Lockstep(reference, [name], np.array([tokens]), [len(tokens)], skip=0, progress=progress)
    run.through({name: quantized})
    found: list[Expectation] = []
    for reference_NV, logits_NV, next_N in run.logits(name, quantized):
        scores = score(reference_NV, logits_NV, next_N)
        if not torch.isfinite(scores.kl_N).all():
            way_out = "Their weights are damaged: `dither inspect` looks at them."
            raise DitherError(name, "or its original computes NaN or infinity", way_out)
        tops = [_likeliest(side_NV.cpu(), top) for side_NV in (reference_NV, logits_NV)]
        found += map(Expectation, scores.kl_N.tolist(), scores.same_top_N.tolist(), *tops)
    return found


def _likeliest(logits_NV: torch.Tensor, top: int) -> list[tuple[tuple[int, float], ...]]:
    best = torch.softmax(logits_NV.double(), dim=-1).topk(min(top, logits_NV.shape[-1]), dim=-1)
    return [
        tuple(zip(ids, shares, strict=True))
        for ids, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
