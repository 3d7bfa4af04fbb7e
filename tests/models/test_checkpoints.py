"""Hugging Face folders as sources: number types, FP8 scales, shards, and what is refused.

References: torch's own conversions, transformers' writer and its FP8 de-quantizer.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from sources_util import folder_bytes

from dither.errors import DitherError, FormatError, SourceError, UnsupportedError, UsageError
from dither.models.checkpoint import Checkpoint, open_checkpoint
from dither.models.source import open_model

KEYS = (
    "quantization_config", "compression_config", "quant_method", "weight_block_size", "config_groups",
    "format", "weights", "block_structure", "auto_map", "weight_map", "w",
)  # fmt: skip
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def save(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def rows_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().reshape(-1, tensor.shape[-1] if tensor.ndim else 1).numpy()


def check_reads(checkpoint: Checkpoint, expected: Mapping[str, torch.Tensor]) -> None:
    """Every tensor, whole and in pieces that start and end anywhere."""
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        stored, reference_RC = checkpoint.tensors[name], rows_of(tensor)
        assert stored.shape == tuple(tensor.shape)
        read_RC = stored.read(0, stored.rows)
        assert read_RC.dtype == np.float32 and read_RC.flags.writeable and read_RC.flags.c_contiguous
        assert np.array_equal(read_RC, reference_RC, equal_nan=True), name
        for start in range(0, stored.rows, max(stored.rows // 3, 1)):
            stop = min(start + 129, stored.rows)
            assert np.array_equal(stored.read(start, stop), reference_RC[start:stop], equal_nan=True), name


# ------------------------------------------------------------------------------------ number types


def test_every_dtype_reads_as_torch_reads_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 3, 37, generator=generator) * 100
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    tensors = {str(kind): w.to(kind) for kind in kinds}
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    tensors |= {str(kind): w.clamp(0, 100).to(kind) for kind in whole}
    tensors |= {"bool": w > 0, "scalar": torch.tensor(-2.5), "vector": w[0, 0].clone(), "empty": torch.zeros(0, 4)}
    check_reads(open_checkpoint(save(tmp_path, tensors)), tensors)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_all_256_codes_of_an_8_bit_type(tmp_path: Path, dtype: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype)).reshape(16, 16)
    check_reads(open_checkpoint(save(tmp_path, {"w": codes})), {"w": codes})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_65536_codes_of_a_16_bit_type(tmp_path: Path, dtype: str) -> None:
    codes = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(getattr(torch, dtype)).reshape(256, 256)
    check_reads(open_checkpoint(save(tmp_path, {"w": codes})), {"w": codes})


def test_data_need_not_be_aligned(tmp_path: Path) -> None:
    w = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).bfloat16()
    header = json.dumps({"w": {"dtype": "BF16", "shape": [5, 7], "data_offsets": [0, 70]}}).encode()
    header += b" " * (1 - len(header) % 2)  # an odd length
    content = len(header).to_bytes(8, "little") + header + w.view(torch.uint8).numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    check_reads(open_checkpoint(tmp_path), {"w": w})


def test_types_without_a_decoder_say_so(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F4", "shape": [2, 2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="tensor w: is stored as F4"):
        open_checkpoint(tmp_path).tensors["w"].read(0, 2)


def test_rows_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    tensor = open_checkpoint(save(tmp_path, {"w": torch.ones(4, 4)})).tensors["w"]
    for start, stop in ((0, 5), (-1, 2), (3, 2)):
        with pytest.raises(UsageError, match="w: has 4 rows"):
            tensor.read(start, stop)


# ------------------------------------------------------------------------------------------- FP8


def fp8(*shape: int, kind: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(kind)


def test_block_scales_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = fp8(256, 384), torch.rand(2, 3) + 0.5
    folder = save(tmp_path, {"l.weight": weight, "l.weight_scale_inv": scale}, FP8)

    expected = Fp8Dequantize(None).convert({"weight": weight, "weight_scale_inv": scale})["weight"]
    check_reads(open_checkpoint(folder), {"l.weight": expected})


@pytest.mark.parametrize("experts", [(), (3,)])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
def test_blocks_may_be_cut_off_at_the_edges(
    tmp_path: Path, experts: tuple[int, ...], kind: torch.dtype, block: tuple[int, int]
) -> None:
    weight = fp8(*experts, 300, 200, kind=kind)
    scale = torch.rand(*experts, -(-300 // block[0]), -(-200 // block[1])) + 0.5
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}
    folder = save(tmp_path, {"w.weight": weight, "w.weight_scale_inv": scale, "n": torch.ones(3)}, config)
    spread = scale.repeat_interleave(block[0], -2)[..., :300, :].repeat_interleave(block[1], -1)[..., :200]
    checkpoint = open_checkpoint(folder)
    check_reads(checkpoint, {"w.weight": weight.float() * spread, "n": torch.ones(3)})
    assert any("FP8" in note for note in checkpoint.notes)


SCALES = {
    "per tensor": ((), ()),
    "per tensor, as a vector": ((1,), (1,)),
    "per channel": ((40, 1), (40, 1)),
    "per channel, as a vector": ((40,), (40, 1)),
}


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "fp8", "weight_block_size": None},
        {"quant_method": "fbgemm_fp8"},
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"g": {}}},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ],
)
def test_other_scales(tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    stored, spread = SCALES[kind]
    weight, scale = fp8(40, 24), (torch.rand(stored) + 0.5).bfloat16()
    tensors = {
        "a.q_proj.weight": weight,
        "a.q_proj.weight_scale": scale,
        "a.q_proj.input_scale": torch.ones(1),
        "a.k_scale": torch.ones(1),
        "a.o_proj.weight": torch.ones(2, 2),
        "a.input_scale_norm": torch.ones(2),
    }
    checkpoint = open_checkpoint(save(tmp_path, tensors, {"quantization_config": config}))
    expected = {name: tensors[name] for name in ("a.o_proj.weight", "a.input_scale_norm")}
    check_reads(checkpoint, expected | {"a.q_proj.weight": weight.float() * scale.float().reshape(spread)})


def test_one_scale_per_expert(tmp_path: Path) -> None:
    weight, scale = fp8(3, 8, 16), torch.tensor([[[1.0]], [[2.0]], [[3.0]]])
    folder = save(tmp_path, {"w": weight, "w_scale": scale}, {"quantization_config": {"quant_method": "fp8"}})
    check_reads(open_checkpoint(folder), {"w": weight.float() * scale})


def test_scales_may_be_bare_exponents(tmp_path: Path) -> None:
    """MXFP8: E8M0 scales for every 32 columns, also where they are stored as plain bytes."""
    weight, exponents = fp8(4, 64), torch.randint(120, 134, (4, 2), dtype=torch.uint8)
    expected = weight.float() * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 32]}}
    for scale in (exponents, exponents.view(torch.float8_e8m0fnu)):
        folder = save(tmp_path, {"w": weight, "w_scale_inv": scale}, config)
        check_reads(open_checkpoint(folder), {"w": expected})


def test_codes_of_other_widths_are_not_taken_for_weights(tmp_path: Path) -> None:
    codes, scale = torch.ones(4, 64, dtype=torch.int8), torch.ones(4, 1)
    folder = save(tmp_path, {"w.weight": codes, "w.weight_scale": scale}, FP8)
    with pytest.raises(UnsupportedError, match=r"tensor w\.weight: is I8 under a scale"):
        open_checkpoint(folder)


def test_scales_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    save(tmp_path / "shape", {"l.weight": fp8(256, 256), "l.weight_scale_inv": torch.ones(2, 3)}, FP8)
    with pytest.raises(FormatError, match=r"tensor l.weight: is FP8 of shape \[256, 256\].*\[2, 3\]"):
        open_checkpoint(tmp_path / "shape")
    save(tmp_path / "none", {"l.weight": fp8(256, 256)}, FP8)
    with pytest.raises(FormatError, match=r"tensor l.weight: is FP8 but has no scale"):
        open_checkpoint(tmp_path / "none")
    bad = torch.tensor([[1.0], [float("nan")]])
    save(tmp_path / "nan", {"l.weight": fp8(256, 128), "l.weight_scale_inv": bad}, FP8)
    tensor = open_checkpoint(tmp_path / "nan").tensors["l.weight"]
    assert np.isfinite(tensor.read(0, 128)).all()
    with pytest.raises(FormatError, match=r"tensor l.weight: has an FP8 scale that is NaN"):
        tensor.read(100, 200)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"},
        {"quant_method": "hqq"},
        {"quant_method": "aqlm"},
        {"quant_method": "gptq", "checkpoint_format": "marlin"},
        {"quant_method": "awq", "version": "gemv"},
        {"quant_method": "compressed-tensors", "format": "marlin-24"},
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}},
        {"quant_method": "auto-round", "data_type": "mx_fp"},
        {"bits": 4},
    ],
)
def test_other_quantizations_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = save(tmp_path, {"w": torch.ones(2, 2)}, {"quantization_config": config})
    with pytest.raises(UnsupportedError, match="is already quantized") as caught:
        open_checkpoint(folder)
    assert config.get("quant_method", "unnamed") in str(caught.value)


# --------------------------------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint in several shards with an index, as transformers writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder, model.state_dict()


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for name, content in folder_bytes(source).items():
        (target / name).write_bytes(content)
    return target


def test_shards_are_one_model(sharded: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, state = sharded
    checkpoint = open_checkpoint(folder)
    check_reads(checkpoint, state)
    assert checkpoint.config["hidden_size"] == 32 and checkpoint.notes == ()
    assert {path.name for path in checkpoint.files} >= {path.name for path in folder.glob("*.safetensors")}
    assert checkpoint.read_json("generation_config.json") is not None
    assert checkpoint.read_json("no_such.json") is None
    without_index = copied(folder, tmp_path / "copy")
    (without_index / "model.safetensors.index.json").unlink()
    check_reads(open_checkpoint(without_index), state)
    check_reads(open_checkpoint(folder, sorted(folder.glob("*.safetensors"))[1]), state)


def test_the_fingerprint_follows_the_files(sharded: tuple[Path, Any], tmp_path: Path) -> None:
    folder = copied(sharded[0], tmp_path / "copy")
    first = open_checkpoint(folder).fingerprint
    assert open_checkpoint(folder).fingerprint == first
    for name in ("model-00001-of-00003.safetensors", "config.json", "generation_config.json"):
        path = next(folder.glob(name.replace("00003", "*")))
        os.utime(path, ns=(1, 1))
        second = open_checkpoint(folder).fingerprint
        assert second != first
        first = second


def rewrite_index(folder: Path, tensor: str, shard: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][tensor] = shard
    path.write_text(json.dumps(index))


def test_inconsistent_shards(sharded: tuple[Path, Any], tmp_path: Path) -> None:
    source = sharded[0]
    shards = sorted(path.name for path in source.glob("*.safetensors"))

    folder = copied(source, tmp_path / "missing")
    (folder / shards[1]).unlink()
    with pytest.raises(SourceError, match=f"1 of {len(shards)} shards are missing: {shards[1]}"):
        open_checkpoint(folder)

    folder = copied(source, tmp_path / "promised")
    rewrite_index(folder, "model.ghost", shards[0])
    with pytest.raises(FormatError, match=r"tensor model.ghost: should be in"):
        open_checkpoint(folder)

    folder = copied(source, tmp_path / "twice")
    (folder / shards[1]).write_bytes((folder / shards[0]).read_bytes())
    with pytest.raises(FormatError, match=r"is in .*00001-of.* and again in .*00002-of"):
        open_checkpoint(folder)

    folder = copied(source, tmp_path / "moved")
    rewrite_index(folder, "model.norm.weight", shards[0])
    assert any("another shard" in note for note in open_checkpoint(folder).notes)

    folder = copied(source, tmp_path / "truncated")
    content = (folder / shards[0]).read_bytes()
    (folder / shards[0]).write_bytes(content[:-1])
    with pytest.raises(FormatError, match=r"tensor .*it is truncated"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b.safetensors", "model.bin", "..", 5, ""]
)
def test_an_index_cannot_leave_its_folder(sharded: tuple[Path, Any], tmp_path: Path, shard: Any) -> None:
    folder = copied(sharded[0], tmp_path / "inner")
    (tmp_path / "secret.safetensors").write_bytes(next(folder.glob("*.safetensors")).read_bytes())
    rewrite_index(folder, "model.norm.weight", shard)
    with pytest.raises(FormatError, match=r"model.norm.weight is in .* no safetensors of the folder"):
        open_checkpoint(folder)


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["DITHER_TRAP"],)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickle_is_refused_and_never_run(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITHER_TRAP", str(tmp_path / "sprung"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(_Trap()))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for source in (folder, folder / name):
        with pytest.raises(SourceError, match="pickle") as caught:
            open_model(source)
        assert "safe_serialization=True" in caught.value.way_out
    assert not (tmp_path / "sprung").exists()


def test_remote_code_is_noted_and_never_run(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", {"w": torch.ones(2, 2)}, {"auto_map": {"AutoModel": "modeling.Net"}})
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    assert any("auto_map" in note for note in open_checkpoint(folder).notes)
    with pytest.raises(DitherError):
        open_model(folder)  # no family of ours
    assert not (tmp_path / "sprung").exists()


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(SourceError, match="holds no safetensors"):
        open_checkpoint(tmp_path)
    save_file({"w": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SourceError, match="LoRA adapter"):
        open_checkpoint(tmp_path)
    save_file({"w": torch.ones(1)}, tmp_path / "one.safetensors")
    with pytest.raises(SourceError, match=r"holds no config\.json"):
        open_checkpoint(tmp_path)
    save_file({"w": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(SourceError, match="3 safetensors that are not one model"):
        open_checkpoint(tmp_path)
    for content in ("[]", "{", '{"a": 1, "a": 2}', '{"a":' * 100_000):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(FormatError, match=r"config\.json"):
            open_checkpoint(tmp_path, tmp_path / "one.safetensors")


VALUE = st.recursive(
    st.sampled_from(
        [None, True, 0, -1, 2**70, 1.5, float("nan"), "", "fp8", "gptq", "float-quantized", "a.safetensors"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)


@settings(derandomize=True, deadline=None, max_examples=150, database=None)
@given(
    config=st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=4),
    index=st.fixed_dictionaries({"weight_map": VALUE}) | VALUE,
)
def test_any_json_gives_a_checkpoint_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, config: Any, index: Any
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-json"
    folder.mkdir(exist_ok=True)
    save_file({"w": fp8(128, 128), "w_scale": torch.ones(1)}, folder / "a.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for weights in (None, folder / "a.safetensors"):
        try:
            opened = open_checkpoint(folder, weights)
        except DitherError:
            continue
        assert opened.config.keys() == config.keys()
        assert set(opened.tensors) == {"w"}


@pytest.mark.skipif(sys.platform != "linux", reason="tells own memory from mapped memory by Linux's counters")
def test_reading_costs_no_memory_of_our_own(tmp_path: Path) -> None:
    rows, columns = 16384, 2048  # 64 MiB of bf16
    header = json.dumps({"w": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, 2 * rows * columns]}})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 2 * rows * columns)
    (tmp_path / "config.json").write_text("{}")
    tensor = open_checkpoint(tmp_path).tensors["w"]
    process = psutil.Process()

    def own() -> int:
        memory = process.memory_info()
        return int(memory.rss - memory.shared)

    tensor.read(0, 256)
    before, most = own(), 0
    for start in range(0, rows, 256):
        tensor.read(start, start + 256)
        most = max(most, own())
    assert most - before < 16 * 2**20


def test_a_file_that_shrinks_is_an_error_not_a_crash(tmp_path: Path) -> None:
    folder = save(tmp_path, {"w": torch.ones(4096, 64)})
    tensor = open_checkpoint(folder).tensors["w"]
    os.truncate(folder / "model.safetensors", 8192)
    with pytest.raises(SourceError, match="shrank from"):
        tensor.read(4000, 4096)
