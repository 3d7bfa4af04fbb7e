"""The stream against whole models: transformers runs reference and file from end to end, its own GGUF
reader and the `gguf` package de-quantizing; the formulas follow in float64.

Legend: S sequences, T positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dither
from dither.errors import DitherError, OutputError
from dither.measuring import stream
from dither.measuring.per_token import PerToken
from dither.measuring.stream import Lockstep, measure_stream, spilled
from dither.models.blocks import Blocks, open_blocks
from dither.models.source import open_model
from dither.types import Floats, Model, Tensor

LENGTHS = [40, 7, 64, 2, 33]


def tokens(vocabulary: int = 300, padding: int = 0) -> np.ndarray:
    tokens_ST = np.random.default_rng(0).integers(0, vocabulary, (len(LENGTHS), max(LENGTHS)))
    for row_T, length in zip(tokens_ST, LENGTHS, strict=True):
        row_T[length:] = padding
    return tokens_ST.astype(np.int32)


@pytest.fixture(scope="module")
def q4_0(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "tiny-Q4_0.gguf"
    dither.quantize(checkpoint, "Q4_0", path)
    return path


def run(checkpoint: Path, file: Path | Model, **options: Any) -> PerToken:
    model = file if isinstance(file, Model) else open_model(file)
    given = {"tokens_ST": tokens(), "lengths_S": LENGTHS, **options}
    return measure_stream(open_blocks(open_model(checkpoint)), {"it": model}, **given)["it"]


def whole(model: Any, row_T: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Log-probabilities (T, V) and what leaves each block (T, H), float64, of one sequence alone."""
    left: list[np.ndarray] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: left.append(out[0].double().numpy()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        logits_TV = model(torch.from_numpy(row_T.astype(np.int64))[None]).logits[0].double()
    for hook in hooks:
        hook.remove()
    return torch.log_softmax(logits_TV, -1).numpy(), [hidden.reshape(len(row_T), -1) for hidden in left]


@pytest.mark.parametrize("skip", [None, 3])
def test_stream_equals_whole_models(checkpoint: Path, q4_0: Path, skip: int | None) -> None:
    found = run(checkpoint, q4_0, skip=skip)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    quantized = AutoModelForCausalLM.from_pretrained(q4_0.parent, gguf_file=q4_0.name, dtype=torch.float32).eval()
    kl, same, delta, nll_p, nll_q, sequence = [], [], [], [], [], []
    away: list[list[float]] = [[], []]
    for s, (row_T, length) in enumerate(zip(tokens(), LENGTHS, strict=True)):
        (p_TV, left), (q_TV, left_q) = (whole(model, row_T[:length]) for model in (reference, quantized))
        for t in range(length // 2 if skip is None else skip, length - 1):
            token = row_T[t + 1]
            kl.append((np.exp(p_TV[t]) * (p_TV[t] - q_TV[t])).sum())
            same.append(p_TV[t].argmax() == q_TV[t].argmax())
            delta.append(np.exp(q_TV[t, token]) - np.exp(p_TV[t, token]))
            nll_p.append(-p_TV[t, token])
            nll_q.append(-q_TV[t, token])
            sequence.append(s)
            for block, (h, h_q) in enumerate(zip(left, left_q, strict=True)):
                away[block].append(np.linalg.norm(h_q[t] - h[t]) / np.linalg.norm(h[t]))
    assert min(kl) > 1e-4  # the file is far enough from its reference to tell
    # Logits of float32 arithmetic in another order differ by some 1e-6.
    np.testing.assert_allclose(found.kl_N, kl, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(found.delta_p_N, delta, atol=1e-6)
    np.testing.assert_allclose(found.nll_reference_N, nll_p, rtol=1e-5)
    np.testing.assert_allclose(found.nll_N, nll_q, rtol=1e-5)
    assert found.same_top_N.tolist() == same
    assert found.sequence_N.tolist() == sequence
    assert found.drift == pytest.approx([np.mean(block) for block in away], rel=1e-4)


def test_the_reference_itself_costs_exactly_nothing(checkpoint: Path, tmp_path: Path) -> None:
    dither.quantize(checkpoint, "F32", tmp_path / "same.gguf")
    for file in (checkpoint, tmp_path / "same.gguf"):
        found = run(checkpoint, file)
        assert not found.kl_N.any()
        assert not found.delta_p_N.any()
        assert found.same_top_N.all()
        assert found.drift == (0.0, 0.0)


def test_padding_and_neighbors_never_count(checkpoint: Path, q4_0: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other padding, other company in the batch, other chunks: the same numbers to float32's rounding."""
    expected = run(checkpoint, q4_0)
    other = run(checkpoint, q4_0, tokens_ST=tokens(padding=299))
    np.testing.assert_array_equal(other.kl_N, expected.kl_N)
    monkeypatch.setattr(stream, "BATCH_TOKENS", 1)
    monkeypatch.setattr(stream, "rows_per_chunk", lambda vocabulary: 7)
    alone = run(checkpoint, q4_0)
    np.testing.assert_allclose(alone.kl_N, expected.kl_N, rtol=1e-4, atol=1e-7)
    assert alone.sequence_N.tolist() == expected.sequence_N.tolist()


def test_several_files_share_the_pass(checkpoint: Path, q4_0: Path, tmp_path: Path) -> None:
    dither.quantize(checkpoint, "Q8_0", tmp_path / "q8.gguf")
    files = {"": open_model(q4_0), "eight": open_model(tmp_path / "q8.gguf")}
    found = measure_stream(open_blocks(open_model(checkpoint)), files, tokens(), LENGTHS)
    np.testing.assert_array_equal(found[""].kl_N, run(checkpoint, q4_0).kl_N)
    assert 0 < found["eight"].kl_N.mean() < found[""].kl_N.mean() / 50


def walk(reference: Blocks, files: dict[str, Any], **options: Any) -> dict[str, PerToken]:
    pass_ = Lockstep(reference, list(files), tokens(), LENGTHS, **options)
    pass_.embed(files)
    for index in range(reference.count):
        pass_.step(index, files)
    return pass_.finish(files)


def test_hidden_states_on_disk_give_the_same_bits(
    checkpoint: Path, q4_0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    reference = open_blocks(open_model(checkpoint))
    files = {"it": open_blocks(open_model(q4_0))}
    found = walk(reference, files, memory=0)["it"]
    np.testing.assert_array_equal(found.kl_N, run(checkpoint, q4_0).kl_N)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_an_error_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OutputError, match="hidden states"):
        spilled((2**20, 2**20, 2**10))
    assert list(tmp_path.iterdir()) == []


class Counted:
    """Real stages, of which it is counted how many blocks and heads are alive."""

    alive, most = 0, 0

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    def embed(self, tokens_ST: torch.Tensor) -> torch.Tensor:
        return self.blocks.embed(tokens_ST)

    def load(self, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return self._count(self.blocks.load(index))

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return self._count(self.blocks.head())

    def _count(self, part: Any) -> Any:
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)
        weakref.finalize(part, self._gone)
        return part

    @staticmethod
    def _gone() -> None:
        Counted.alive -= 1


def test_one_block_is_alive_at_a_time(checkpoint: Path, q4_0: Path) -> None:
    Counted.alive = Counted.most = 0
    files = {name: Counted(open_blocks(open_model(q4_0))) for name in "abc"}
    walk(open_blocks(open_model(checkpoint)), files)
    assert (Counted.alive, Counted.most) == (0, 1)


def spoilt(model: Model, name: str, value: float) -> Model:
    def read(tensor: Tensor) -> Callable[[int, int], Floats]:
        def rows(start: int, stop: int) -> Floats:
            w_RC = np.array(tensor.read(start, stop))
            w_RC[-1, 0] = value
            return w_RC

        return rows

    changed = (replace(t, read=read(t), read_raw=None) if t.name == name else t for t in model.tensors)
    return replace(model, tensors=tuple(changed))


@pytest.mark.parametrize(
    ("name", "said"), [("blk.1.ffn_up.weight", "block 1"), ("output.weight", "logits that are NaN")]
)
def test_damaged_weights_are_named(checkpoint: Path, name: str, said: str) -> None:
    damaged = spoilt(open_model(checkpoint), name, float("nan"))
    with pytest.raises(DitherError, match=f"it: .*{said}"):
        run(checkpoint, damaged)
