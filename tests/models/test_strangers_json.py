"""config.json may hold anything under any key: an error of ours that names the key, and never a bug passed for one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import write_checkpoint
from dither.errors import DitherError, FormatError
from dither.models.arch import convert, families
from dither.models.checkpoint import open_checkpoint
from dither.models.json_object import JsonObject
from dither.models.outline import outline
from dither.types import Model

KINDS: tuple[Any, ...] = (
    None, True, False, -1, 0, 3, 2**70, 1.5, float("inf"), float("nan"), "", "x", [], [1], ["a"], [None], [[1]], {},
    {"a": 1}, {"type": 3}, json.loads("[" * 200 + "]" * 200), json.loads('{"full_attention":' * 90 + "1" + "}" * 90),
)  # fmt: skip
ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
READERS: dict[str, Callable[[Path], Model]] = {
    "convert": lambda folder: convert(open_checkpoint(folder)),
    "outline": outline,
}


def keys_read() -> set[str]:
    """What any family, the outline or the tokenizer asks config.json for, as far as tables say."""
    tables = {source for family in families() for key in family.keys for source in key.sources}
    assumed = {name for family in families() for name in (*family.defaults, *family.assumes)}
    others = """
    architectures model_type text_config rope_parameters rope_scaling layer_types _name_or_path eos_token_id eos_token
    bos_token_id tie_word_embeddings num_experts moe_intermediate_size use_sliding_window kv_lora_rank
    qk_rope_head_dim state_size d_inner
    """
    return tables | assumed | set(others.split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", hidden=64, ffn=64, layers=1)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "UnheardOfForCausalLM"])
def test_any_kind_of_value_at_any_key_is_read_or_refused_by_name(architecture: str, reader: str, folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"architectures": [architecture], "rope_parameters": ROPE}
    refused = 0
    for key in sorted(keys_read() | config.keys()):
        for value in KINDS:
            path.write_text(json.dumps(config | {key: value}))
            try:
                READERS[reader](folder)
            except DitherError as error:
                refused += 1
                assert len(str(error)) < 4000
    assert refused > 50, "nothing was refused: the values do not reach what reads them"


@pytest.mark.parametrize("kind", ["llama3", "yarn", "longrope", "linear"])
def test_any_kind_of_value_in_a_scaling_of_rope_is_read_or_refused(kind: str, folder: Path) -> None:
    path = folder / "config.json"
    lists = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "mscale": 1.0, "mscale_all_dim": 1.0}
    rope = ROPE | lists | {"rope_type": kind, "attention_factor": 1.0, "beta_fast": 32}
    config = json.loads(path.read_text())
    for key in rope:
        for value in KINDS:
            path.write_text(json.dumps(config | {"rope_parameters": rope | {key: value}}))
            try:
                convert(open_checkpoint(folder))
            except DitherError as error:
                assert "config.json" in str(error)


@pytest.mark.parametrize("shape", [(), (0,), (0, 64), (64, 0), (64,), (2, 3, 4), (1, 1, 1, 1)])
def test_tensors_of_any_shape_are_read_or_refused(shape: tuple[int, ...], folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        save_file({**tensors, name: np.zeros(shape, np.float32)}, folder / "model.safetensors")
        for read in READERS.values():
            try:
                read(folder)
            except DitherError as error:
                assert "tensor" in str(error) or "token" in str(error)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("error", [AttributeError, TypeError, KeyError, ValueError, ZeroDivisionError])
def test_a_bug_of_ours_is_not_told_as_a_damaged_file(
    error: type[Exception], reader: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise error("a slip of ours")

    monkeypatch.setattr("dither.models.arch.conversion.size_label", broken)
    with pytest.raises(error, match="a slip of ours"):
        READERS[reader](folder)


def test_a_value_is_given_as_wanted_or_named() -> None:
    found = JsonObject({"n": 3, "x": 0.5, "t": "a", "f": True, "o": {"k": [{"d": 1}]}, "l": [1, 2.5]}, "config.json")
    assert (found.whole("n"), found.text("t"), found.flag("f"), found.whole("none")) == (3, "a", True, None)
    assert (found.positive("x"), found.numbers("l")) == (0.5, [1.0, 2.5])
    assert found.section("o").sections("k")[0].whole("d") == 1 and not found.section("none")
    for read, key, wanted in (
        (found.whole, "x", r"config\.json, x: is 0\.5, but a whole number"),
        (found.whole, "f", "f: is True, but a whole number"),
        (found.text, "n", "n: is 3, but a text"),
        (found.flag, "n", "n: is 3, but true or false"),
        (found.section, "l", r"l: is \[1, 2\.5\], but an object"),
        (found.sections, "o", "o: is .*, but a list of objects"),
        (found.positive, "none", "none: is missing"),
        (found.section("o").sections("k")[0].text, "d", r"config\.json, o, k\[0\], d: is 1, but a text"),
    ):
        with pytest.raises(FormatError, match=wanted):
            read(key)
