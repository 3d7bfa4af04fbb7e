"""Two models read one text (teacher forcing): what each predicts at every token, and how far apart they are.

`stream` measures thousands of tokens and keeps five numbers of each.  This is for one short text that a person
looks at: the divergence at every position and the likeliest tokens of both.  Here too there is one block of each
model in memory at a time, so that models larger than memory can be run.

Legend: T tokens of the text, H hidden width, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dither.errors import DitherError
from dither.measuring.metrics import rows_per_chunk, score
from dither.models.blocks import Blocks
from dither.progress import Progress, Silent


@dataclass(frozen=True)
class Expectation:
    """Before one token: KL divergence in nats, and the likeliest (token id, probability) of both models."""

    kl: float
    same_top: bool
    top_reference: tuple[tuple[int, float], ...]
    top: tuple[tuple[int, float], ...]


@torch.no_grad()
def expectations(
    reference: Blocks, quantized: Blocks, tokens: Sequence[int], *, top: int = 5, progress: Progress | None = None
) -> list[Expectation]:
    """What both predict for `tokens[1]`, `tokens[2]`, …: one less than there are tokens.

    Raises DitherError if a model computes NaN.
    """
    report = progress or Silent()
    tokens_1T = torch.tensor([list(tokens)], dtype=torch.int64)
    sides = (reference, quantized)
    hidden = [side.embed(tokens_1T) for side in sides]
    report.start(reference.count, 0)
    for index in range(reference.count):
        for place, side in enumerate(sides):
            block = side.load(index)
            hidden[place] = block(hidden[place])
            del block  # before the next one is loaded
        report.advance(1, f"reading, block {index}")
    heads = [side.head() for side in sides]
    found: list[Expectation] = []
    step = rows_per_chunk(reference.vocabulary)
    for start in range(0, len(tokens) - 1, step):
        at = slice(start, min(start + step, len(tokens) - 1))
        first_TV, second_TV = (
            head(hidden_1TH[:, at])[0].cpu().float() for head, hidden_1TH in zip(heads, hidden, strict=True)
        )
        scores = score(first_TV, second_TV, tokens_1T[0, at.start + 1 : at.stop + 1])
        if not torch.isfinite(scores.kl_N).all():
            way_out = "Their weights are damaged: `dither inspect` looks at them."
            raise DitherError(quantized.model.origin, "or its original computes NaN or infinity", way_out)
        tops = [_likeliest(logits_TV, top) for logits_TV in (first_TV, second_TV)]
        found += map(Expectation, scores.kl_N.tolist(), scores.same_top_N.tolist(), *tops)
    return found


def _likeliest(logits_TV: torch.Tensor, top: int) -> list[tuple[tuple[int, float], ...]]:
    best = torch.softmax(logits_TV.double(), dim=-1).topk(min(top, logits_TV.shape[-1]), dim=-1)
    return [
        tuple(zip(ids, shares, strict=True))
        for ids, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
