"""Candidates against the plan that writes: same matrices, same bytes, and every type can be encoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conftest import write_checkpoint
from dither.codecs import codec
from dither.containers.gguf_target import ANY_GGUF
from dither.containers.mix import Options, make_mix
from dither.errors import UsageError
from dither.models.source import open_model
from dither.planning.candidates import candidates
from dither.types import Floats, Model, Tensor

NEEDY = {"IQ2_XS", "IQ2_XXS", "IQ1_S"}
EVERY = [
    "BF16", "F16", "Q8_0", "Q6_K", "Q5_1", "Q5_0", "Q5_K", "Q4_1", "IQ4_NL", "NVFP4", "Q4_0", "Q4_K",
    "IQ4_XS", "MXFP4", "IQ3_S", "Q3_K", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return open_model(str(checkpoint))


@pytest.fixture(scope="module")
def odd(odd_checkpoint: Path) -> Model:
    return open_model(str(odd_checkpoint))


def toy(*shapes: tuple[str, tuple[int, ...]]) -> Model:
    def read(start: int, stop: int) -> Floats:
        raise AssertionError("planning reads no weights")

    tensors = tuple(Tensor(name, shape, "F32", 4 * int(np.prod(shape)), read) for name, shape in shapes)
    return Model("toy", "llama", {}, tensors, "toy", "safetensors", (), "")


def test_every_tensor_is_decided_or_fixed(model: Model) -> None:
    found, kept = candidates(model, importance=()), ANY_GGUF.fixed(model)
    assert [t.name for t in model.tensors if t.name in found] == list(found)
    assert not found.keys() & kept.keys()
    assert found.keys() | kept.keys() == {tensor.name for tensor in model.tensors}
    assert {"token_embd.weight", "output.weight", "blk.1.ffn_down.weight"} <= found.keys()
    assert {"output_norm.weight", "blk.0.attn_norm.weight"} <= kept.keys()
    for tensor in make_mix(model, Options("Q2_K")).tensors:  # another preset leaves the same ones alone
        if tensor.name in kept:
            assert tensor == kept[tensor.name] and tensor.type == "F32"


def test_all_types_are_offered_but_those_for_ternary_models(model: Model) -> None:
    found = candidates(model, importance={"output.weight"})
    assert list(found["output.weight"]) == EVERY
    assert list(found["blk.0.attn_q.weight"]) == [name for name in EVERY if name not in NEEDY]
    named = candidates(model, importance=(), types=["tq1_0", "F32", "Q4_K"])
    assert named["blk.0.attn_q.weight"] == ("F32", "Q4_K", "TQ1_0")


@pytest.mark.parametrize("name", ["model", "odd"])
def test_bytes_are_those_that_are_written(name: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(name)
    everything = {tensor.name for tensor in model.tensors}
    tensors = {tensor.name: tensor for tensor in model.tensors}
    found = candidates(model, importance=everything)
    for matrix in ("token_embd.weight", "output.weight", "blk.0.attn_k.weight", "blk.1.ffn_down.weight"):
        tensor, types = tensors[matrix], found[matrix]
        for kind in types:
            chosen = make_mix(model, Options("Q4_K_M", ((rf"\A{matrix}\Z", kind),)), everything)
            planned = next(each for each in chosen.tensors if each.name == matrix)
            assert (planned.type, planned.bytes) == (kind, ANY_GGUF.bytes_of(kind, tensor.shape))
        row = np.ones((1, tensor.columns), np.float32)
        encoded = codec(types[-1]).encode(row, row[0])
        assert encoded.shape[1] * tensor.rows == ANY_GGUF.bytes_of(types[-1], tensor.shape)


def test_rows_of_320_take_only_types_of_short_blocks(odd: Model) -> None:
    found = candidates(odd, importance=())
    assert set(found["blk.0.attn_q.weight"]) == {
        "BF16",
        "F16",
        "Q8_0",
        "Q5_1",
        "Q5_0",
        "Q4_1",
        "IQ4_NL",
        "NVFP4",
        "Q4_0",
        "MXFP4",
    }
    assert "Q4_K" in found["blk.0.ffn_down.weight"]
    with pytest.raises(UsageError, match=r"token_embd.weight: can become none .*320 columns; Q4_K needs"):
        candidates(odd, importance=(), types=["Q4_K"])


def test_types_that_cannot_be_are_named(model: Model) -> None:
    with pytest.raises(UsageError, match=r"type Q9_Z: is not known.*Choose one of F32"):
        candidates(model, importance=(), types=["Q4_K", "Q9_Z"])
    with pytest.raises(UsageError, match=r"type int4-g128: is none of GGUF's"):
        candidates(model, importance=(), types=["Q4_K", "int4-G128"])
    with pytest.raises(UsageError, match=r"token_embd.weight: can become none.*IQ2_XS needs importance"):
        candidates(model, importance=(), types=["IQ2_XS"])
    with pytest.raises(UsageError, match="none were"):
        candidates(model, importance=(), types=[])


def test_experts_routers_and_rows_that_fit_nothing() -> None:
    model = toy(
        ("token_embd.weight", (64, 256)),
        ("blk.0.ffn_gate_inp.weight", (8, 256)),
        ("blk.0.ffn_down_exps.weight", (8, 256, 512)),
        ("blk.0.attn_q.weight", (256, 100)),
        ("blk.0.attn_q.bias", (256,)),
    )
    found = candidates(model, importance=())
    assert list(ANY_GGUF.fixed(model)) == ["blk.0.ffn_gate_inp.weight", "blk.0.attn_q.bias"]
    assert found["blk.0.attn_q.weight"] == ("BF16", "F16")  # a fallback, but its type is still a choice
    assert ANY_GGUF.bytes_of("Q4_K", model.tensors[2].shape) == 8 * 256 * 512 // 256 * 144


def test_a_gguf_of_floats_is_planned_like_its_checkpoint(tmp_path: Path) -> None:
    import dither

    source = write_checkpoint(tmp_path / "tied", tied=True)
    dither.quantize(str(source), "F16", out=tmp_path / "f16.gguf")
    first, second = open_model(str(source)), open_model(str(tmp_path / "f16.gguf"))
    assert candidates(first, importance=()) == candidates(second, importance=())
    assert {n: t.bytes for n, t in ANY_GGUF.fixed(first).items()} == {
        n: t.bytes for n, t in ANY_GGUF.fixed(second).items()
    }
