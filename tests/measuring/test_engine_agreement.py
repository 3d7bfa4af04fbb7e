"""The divergence between two files as llama.cpp computes them, token by token, against the stream's.

llama.cpp gives both files' full distributions after each of some prefixes of one text.  It differs from
the stream in its activations alone: rounded to 8 bits with a scale per 256 (Q8_K) before they meet a
K-quantized matrix, and to 16 bits before an F16 one, where the stream computes in float32.  That noise
is independent of the weights' error, so it adds a little to the divergence rather than shifting it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dither
from dither.engines.llamacpp import LlamaCpp
from dither.measuring.stream import measure_stream
from dither.models.blocks import open_blocks
from dither.models.source import open_model

pytestmark = pytest.mark.slow  # starts llama.cpp

DEMO = Path(dither.__file__).parent / "demo_model"
TEXT = (
    "The old house stood at the end of the lane, and nobody had lived in it for years. The children "
    "were told not to play there, but in summer, when the doors stood open and the garden was full of "
    "bees, they went all the same, and nothing ever happened to them until the day the clock began to "
    "strike again."
)


@pytest.mark.parametrize("to", ["Q4_K_M", "Q2_K"])
def test_llama_cpp_finds_the_same_divergence(to: str, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"{kind}.gguf" for kind in ("F16", to)}
    for kind, path in files.items():
        dither.quantize(DEMO, kind, path)
    with LlamaCpp(files["F16"], context=256, threads=1) as engine:
        ids = engine.tokenize(TEXT, add_special=True)
        positions = list(range(8, min(len(ids) - 1, 68), 2))
        p_NV = [engine.next_token_probabilities(ids[: t + 1]).astype(np.float64) for t in positions]
    with LlamaCpp(files[to], context=256, threads=1) as engine:
        q_NV = [engine.next_token_probabilities(ids[: t + 1]).astype(np.float64) for t in positions]
    assert len(positions) >= 28
    theirs_N = np.array([(p * (np.log(p) - np.log(q))).sum() for p, q in zip(p_NV, q_NV, strict=True)])

    tokens_ST = np.array([ids], dtype=np.int32)
    reference = open_blocks(open_model(files["F16"]))
    found = measure_stream(reference, {"it": open_model(files[to])}, tokens_ST, [len(ids)], skip=0)["it"]
    ours_N = found.kl_N[positions]

    # Per token the activations' noise is felt (a tenth of the divergence or so), in the mean it is not.
    assert theirs_N.mean() == pytest.approx(ours_N.mean(), rel=0.08)
    assert np.corrcoef(theirs_N, ours_N)[0, 1] > 0.93
    next_N = [ids[t + 1] for t in positions]
    nll_N = [-np.log(q[token]) for q, token in zip(q_NV, next_N, strict=True)]
    np.testing.assert_allclose(found.nll_N[positions], nll_N, atol=0.15)
    assert np.mean(nll_N) == pytest.approx(found.nll_N[positions].mean(), abs=0.02)
    same_N = np.array([p.argmax() == q.argmax() for p, q in zip(p_NV, q_NV, strict=True)])
    assert (same_N != found.same_top_N[positions]).sum() <= 1  # a tie that the noise decides
