"""What quantization did to the prediction of one token.

At every position the reference model gives a distribution p over the next token and the quantized
model gives q.  Five numbers are kept of each pair:

    kl               Σ p · (log p − log q), in nats: how many nats longer a message about the
                     reference's next token becomes when it is coded with q (Kullback, Leibler 1951)
    same_top         whether both find the same token likeliest (of equals, the first)
    delta_p          q(t) − p(t) of the token t that really came next in the text
    nll_reference    −log p(t), whose mean's exponential is the perplexity
    nll              −log q(t)

The definitions are those of `llama-perplexity --kl-divergence` (`tools/perplexity/perplexity.cpp` in
llama.cpp), which also skips the first half of each context: early positions have little to go on and
are not how a model is used.  The approximations of its base file are not made here: it keeps log p in 16
bits, raises whatever is more than 16 below the likeliest token to that floor (so the reference's perplexity
comes out too low on surprising text), and leaves tokens with log p < −16 out of the divergence.

Logits are float32; everything after them is float64, because the logarithms of two sums that agree to seven
digits are subtracted, and a good quantization's divergence (1e-6) would be lost in float32's rounding.

Legend: N scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dither.measuring.per_token import Integers, PerToken

CHUNK_LOGITS = 2**23  # of one model, held at a time: 32 MiB, and ten times that during scoring


class ChunkScores(NamedTuple):
    """The five numbers of a chunk of positions: tensors (N,), float64 and bool, on the CPU."""

    kl_N: torch.Tensor
    same_top_N: torch.Tensor
    delta_p_N: torch.Tensor
    nll_reference_N: torch.Tensor
    nll_N: torch.Tensor


def score(reference_NV: torch.Tensor, logits_NV: torch.Tensor, next_N: torch.Tensor) -> ChunkScores:
    """The five numbers from two models' logits (N, V) and the tokens that came next, int64 (N,).

    Equal logits give exactly zero divergence and Δp; a NaN or an infinity among the logits gives a NaN or an
    infinity here, which the caller refuses.
    """
    log_p_NV, log_q_NV = (torch.log_softmax(z.double(), dim=-1) for z in (reference_NV, logits_NV))
    kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    at_N1 = next_N.to(log_p_NV.device)[:, None]
    log_p_N, log_q_N = log_p_NV.gather(-1, at_N1)[:, 0], log_q_NV.gather(-1, at_N1)[:, 0]
    same_top_N = reference_NV.argmax(-1) == logits_NV.argmax(-1)
    # A divergence is never negative; rounding makes it so by about 1e-16.
    found = (kl_N.clamp_min(0.0), same_top_N, log_q_N.exp() - log_p_N.exp(), -log_p_N, -log_q_N)
    return ChunkScores(*(values_N.cpu() for values_N in found))


def gather(scores: Sequence[ChunkScores], sequence_N: Integers, drift: Sequence[float] = ()) -> PerToken:
    """The scores of all chunks, joined."""
    no_N = torch.zeros(0, dtype=torch.float64)
    chunks = scores or [ChunkScores(no_N, no_N.bool(), no_N, no_N, no_N)]
    joined = {name: torch.cat([getattr(chunk, name) for chunk in chunks]).numpy() for name in ChunkScores._fields}
    return PerToken(**joined, sequence_N=sequence_N, drift=tuple(drift))


def rows_per_chunk(vocabulary: int) -> int:
    """How many positions' logits are held at a time."""
    return max(1, CHUNK_LOGITS // max(1, vocabulary))
