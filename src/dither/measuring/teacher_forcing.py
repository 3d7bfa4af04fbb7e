"""Two models reading one text: what each expects next, at every token, and how far apart they are.

`stream` measures thousands of tokens and keeps five numbers of each.  Here it is one short text to be looked
at, so what is kept is what a person asks for: the divergence of every position and the likeliest tokens of
both.  The walk is the same: one block of each model at a time, so that models larger than memory can be read.

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
    """What both expect before `tokens[1]`, `tokens[2]`, …: one less than there are tokens.

    Raises DitherError where a model computes NaN.
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
            raise DitherError(
                quantized.model.origin,
                "or its original computes NaN or infinity",
                "Their weights are damaged: `dither inspect` looks at them.",
            )
        tops = [_likeliest(logits_TV, top) for logits_TV in (first_TV, second_TV)]
        found += [
            Expectation(kl, same, *both)
            for kl, same, both in zip(
                scores.kl_N.tolist(), scores.same_top_N.tolist(), zip(*tops, strict=True), strict=True
            )
        ]
    return found


def _likeliest(logits_TV: torch.Tensor, top: int) -> list[tuple[tuple[int, float], ...]]:
    best = torch.softmax(logits_TV.double(), dim=-1).topk(min(top, logits_TV.shape[-1]), dim=-1)
    return [
        tuple(zip(ids, shares, strict=True))
        for ids, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
