"""A tiny Llama with a float64 reference, evidence with channels that stick out, and plain formulas.

Legend: C columns, H held-back inputs, T tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llama_util import TinyLlama

from dither.codecs import codec
from dither.models.gguf_source import open_gguf
from dither.types import Codec, Evidence, EvidenceSource, Floats, Model

TOKENS = [5, 40, 200, 17, 99, 3, 250, 61]


def outlier_inputs(columns: int, seed: int, tokens: int = 600) -> npt.NDArray[np.float64]:
    """Correlated inputs (T, C) of which one channel in sixteen is 20 times as large."""
    generator = np.random.default_rng(seed)
    mixing = np.eye(columns) + 0.3 * generator.standard_normal((columns, columns)) / np.sqrt(columns)
    x_TC = generator.standard_normal((tokens, columns)) @ mixing
    x_TC[:, generator.permutation(columns)[: columns // 16]] *= 20
    return x_TC


def evidence_of(x_TC: npt.NDArray[np.float64], held: int = 0, hessian: bool = True) -> Evidence:
    kept_TC = x_TC[held:]
    return Evidence(
        len(x_TC),
        (x_TC**2).mean(axis=0).astype(np.float32),
        (kept_TC.T @ kept_TC / len(kept_TC)).astype(np.float32) if hessian else None,
        x_TC[:held].astype(np.float32) if held else None,
    )


def made_up_evidence(model: Model, hessian: bool = True) -> EvidenceSource:
    """Evidence for every matrix, with outliers; layers of the same block and width share theirs."""
    columns = {tensor.name: tensor.columns for tensor in model.tensors if len(tensor.shape) > 1}
    made: dict[str, Evidence] = {}

    def find(tensor: str, expert: int = 0) -> Evidence | None:
        if tensor not in columns:
            return None
        key = f"{tensor.split('.')[1]} {columns[tensor]} {expert}"
        if key not in made:
            seed = zlib.crc32(key.encode())
            made[key] = evidence_of(outlier_inputs(columns[tensor], seed), hessian=hessian)
        return made[key]

    return find


def everything_as(
    name: str, *, floats: tuple[str, ...] = ("token_embd", "ffn_gate_inp")
) -> Callable[[str], Codec | None]:
    """A plan that stores all matrices but some in one codec."""

    def codec_of(tensor: str) -> Codec | None:
        return None if any(part in tensor for part in floats) else codec(name)

    return codec_of


def tiny_model(folder: Path, llama: TinyLlama) -> Model:
    return open_gguf(llama.write(folder / "tiny.gguf"))


def reference(llama: TinyLlama, model: Model) -> npt.NDArray[np.float64]:
    """The float64 forward pass of the tiny Llama with the weights that `model` reads."""
    weights: Mapping[str, Floats] = {t.name: t.read(0, t.rows).reshape(t.shape) for t in model.tensors}
    twin = TinyLlama(layers=llama.layers, D=llama.D, F=llama.F, H=llama.H, G=llama.G)
    twin.weights = dict(weights)
    return twin.probabilities(TOKENS)
