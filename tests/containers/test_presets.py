"""Presets against llama.cpp: what llama-quantize says each tensor becomes, for every preset.

`llama_quantize_types.json` holds seven shapes, `llama_quantize_types_more.json` ten more (fused
attention, tied embeddings, experts, Falcon, rows that no block fits) and the effect of overrides.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType, LlamaFileType

from dither.containers.presets import Wanted, assign, canonical, describe, file_type, preset_names, quantized_types
from dither.errors import UsageError
from dither.formats.ggml import GGML_TYPES, Field, ValueType, array, u32

HERE = Path(__file__).parent
SHAPES: dict[str, Any] = json.loads((HERE / "llama_quantize_types.json").read_text())["models"]
MORE: dict[str, Any] = json.loads((HERE / "llama_quantize_types_more.json").read_text())["models"]

Tensors = list[tuple[str, tuple[int, ...]]]

# query heads per key/value head follow from the shapes: the attention's width over the keys'
EXPERTS = {"mixtral-L4-e8": 8}


def tensors_of(entry: dict[str, Any]) -> Tensors:
    return [(name, tuple(reversed(shape))) for name, shape in entry["tensors"]]


def decoded(entry: dict[str, Any], code: str) -> list[str]:
    return [entry["types"][ord(letter) - 65] for letter in code]


def metadata_of(shape: str, tensors: Tensors) -> dict[str, Field]:
    sizes = dict(tensors)
    ratio = sizes["blk.0.attn_q.weight"][0] // sizes["blk.0.attn_k.weight"][0]
    layers = 1 + max(int(name.split(".")[1]) for name in sizes if name.startswith("blk."))
    return {
        "llama.block_count": u32(layers),
        "llama.attention.head_count": u32(2 * ratio),
        "llama.attention.head_count_kv": u32(2),
        "llama.expert_count": u32(EXPERTS.get(shape, 0)),
    }


def types(tensors: Tensors, preset: str, metadata: Any = None, overrides: Any = (), **asked: Any) -> dict[str, str]:
    wanted = Wanted(preset, tuple(overrides), **asked)
    given = assign(tensors, wanted, arch="llama", metadata=metadata or {}, has_imatrix=False)
    return {each.tensor: each.type for each in given}


@pytest.mark.parametrize("imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_preset_gives_the_types_of_llama_quantize(shape: str, imatrix: bool) -> None:
    entry = SHAPES[shape]
    tensors = tensors_of(entry)
    metadata = metadata_of(shape, tensors)
    presets = [name for name in entry["presets"] if "+" not in name]
    assert {*presets, "F32"} == {canonical(name) for name in preset_names()}
    for preset in presets:
        code = entry["presets"].get(f"{preset}+imatrix" if imatrix else preset, entry["presets"][preset])
        given = assign(tensors, Wanted(preset), arch="llama", metadata=metadata, has_imatrix=imatrix)
        assert [each.tensor for each in given] == [name for name, _ in tensors]
        assert [each.type for each in given] == decoded(entry, code), preset


@pytest.mark.parametrize("shape", MORE)
def test_other_families_and_overrides_give_the_types_of_llama_quantize(shape: str) -> None:
    entry = MORE[shape]
    tensors = tensors_of(entry)
    metadata = {f"{entry['arch']}.{key}": u32(value) for key, value in entry["metadata"].items()}
    for asked, code in entry["asked"]:
        given = assign(
            tensors,
            Wanted(
                asked["preset"],
                tuple((pattern, kind) for pattern, kind in asked.get("overrides", ())),
                output_type=asked.get("output"),
                embedding_type=asked.get("embedding"),
                pure=asked.get("pure", False),
            ),
            arch=entry["arch"],
            metadata=metadata,
            has_imatrix=asked["imatrix"],
        )
        assert [each.type for each in given] == decoded(entry, code), asked


def test_the_order_of_the_source_does_not_matter() -> None:
    entry = SHAPES["llama-L32-gqa4"]
    tensors = tensors_of(entry)
    metadata = metadata_of("llama-L32-gqa4", tensors)
    shuffled = sorted(tensors, key=lambda pair: pair[0][::-1])
    for preset in ("Q4_K_M", "IQ2_S", "Q3_K_M"):
        straight = types(tensors, preset, metadata=metadata)
        assert types(shuffled, preset, metadata=metadata) == straight
        assert list(types(shuffled, preset, metadata=metadata)) == [name for name, _ in shuffled]


def test_every_type_fits_the_rows_it_is_given_to() -> None:
    for columns in (1, 32, 48, 64, 256, 320, 576):
        tensors: Tensors = [("token_embd.weight", (8, columns)), ("blk.0.ffn_down.weight", (2, 8, columns))]
        for preset in (*preset_names(), "MXFP4", "NVFP4"):
            for kind in types(tensors, preset).values():
                assert columns % GGML_TYPES[kind].block == 0


def test_a_fallback_says_what_was_wanted_and_why() -> None:
    tensors: Tensors = [("token_embd.weight", (96, 576)), ("blk.0.attn_k.weight", (192, 576))]
    embedding, keys = assign(tensors, Wanted("Q4_K_M"), arch="llama", metadata={}, has_imatrix=False)
    assert (embedding.wanted, embedding.type) == ("Q6_K", "Q8_0")
    assert (keys.wanted, keys.type) == ("Q4_K", "Q5_0")
    assert embedding.reason == keys.reason == "576 columns are not a multiple of 256"


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("blk.0.attn_norm.weight", (256,), "1-D"),
        ("blk.0.attn_q_norm.weight", (4, 256), "norm"),
        ("blk.0.ffn_gate_inp.weight", (8, 256), "router"),
        ("blk.0.attn_q.bias", (256,), "1-D"),
        ("blk.0.ffn_gate_exps.bias", (8, 256), "bias"),
        ("blk.0.ssm_conv1d.weight", (256, 4), "convolution"),
        ("rope_freqs.weight", (1, 64), "1-D"),
        ("blk.0.time_mix_w1.weight", (64, 256), "small"),
    ],
)
def test_what_is_never_quantized(name: str, shape: tuple[int, ...], reason: str) -> None:
    matrix = ("blk.0.attn_q.weight", (256, 256))
    for wanted in (Wanted("Q4_K_M"), Wanted("Q4_K_M", pure=True), Wanted("Q4_K_M", ((".", "Q8_0"),))):
        kept, other = assign([(name, shape), matrix], wanted, arch="llama", metadata={}, has_imatrix=False)
        assert (kept.type, kept.wanted, kept.reason) == ("F32", "F32", reason)
        assert other.type != "F32"


def test_stacked_experts_are_quantized_like_one_matrix() -> None:
    tensors: Tensors = [(f"blk.0.ffn_{part}_exps.weight", (8, 512, 256)) for part in ("up", "gate")]
    assert set(types(tensors, "Q5_K_S").values()) == {"Q5_K"}
    assert set(types(tensors, "MXFP4_MOE").values()) == {"MXFP4"}


def test_overrides_win_over_the_mix_and_the_first_match_decides() -> None:
    tensors: Tensors = [(f"blk.{i}.attn_v.weight", (256, 256)) for i in range(3)]
    given = assign(
        tensors,
        Wanted("Q4_K_M", ((r"blk\.0\.", "q8_0"), ("attn_v", "F16"))),
        arch="llama",
        metadata={},
        has_imatrix=False,
    )
    assert [each.type for each in given] == ["Q8_0", "F16", "F16"]
    assert {each.reason for each in given} == {"override"}


def test_overrides_apply_to_an_unquantized_preset_too() -> None:
    """llama-quantize ignores them there without a word."""
    tensors: Tensors = [("blk.0.attn_q.weight", (64, 256)), ("blk.0.attn_k.weight", (64, 256))]
    given = types(tensors, "F16", overrides=(("attn_k", "Q8_0"),))
    assert given == {"blk.0.attn_q.weight": "F16", "blk.0.attn_k.weight": "Q8_0"}


def test_an_override_that_does_not_fit_falls_back_and_says_so() -> None:
    (given,) = assign(
        [("blk.0.attn_k.weight", (64, 320))],
        Wanted("Q8_0", (("attn_k", "Q6_K"),)),
        arch="llama",
        metadata={},
        has_imatrix=False,
    )
    assert (given.wanted, given.type) == ("Q6_K", "Q8_0") and "320 columns" in given.reason


def test_a_bare_type_is_given_to_every_matrix() -> None:
    tensors: Tensors = [("output.weight", (96, 256)), ("token_embd.weight", (96, 256)), ("x.weight", (4, 48))]
    assert list(types(tensors, "MXFP4").values()) == ["MXFP4", "MXFP4", "F16"]
    assert list(types(tensors, "nvfp4").values()) == ["NVFP4", "NVFP4", "F16"]


def test_heads_may_differ_per_layer() -> None:
    entry = SHAPES["llama-L32-gqa4"]
    tensors = tensors_of(entry)
    metadata = metadata_of("", tensors)
    per_layer = metadata | {
        "llama.attention.head_count": array(ValueType.UINT32, [8] * 32),
        "llama.attention.head_count_kv": array(ValueType.UINT32, [2] * 32),
    }
    assert types(tensors, "IQ4_XS", metadata=per_layer) == types(tensors, "IQ4_XS", metadata=metadata)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"preset": "Q4_K_N"}, r"type Q4_K_N: is not known\. Did you mean .*Q4_K_M"),
        ({"preset": "zebra"}, r"type zebra: is not known\. Choose one of F32"),
        ({"overrides": [("attn_k", "Q4_KM")]}, r"tensor type Q4_KM: is not known\. Did you mean .*Q4_K"),
        ({"overrides": [("attn_k", "Q8_1")]}, "tensor type Q8_1"),
        ({"overrides": [("attn_(", "Q4_K")]}, "no regular expression"),
        ({"overrides": [("attn_kk", "Q4_K")]}, "matches no matrix"),
        ({"overrides": [("attn_norm", "Q4_K")]}, "matches no matrix"),
        ({"output_type": "int8"}, "tensor type int8"),
        ({"embedding_type": "Q4_K_M"}, "tensor type Q4_K_M"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(asked: dict[str, Any], message: str) -> None:
    tensors: Tensors = [("blk.0.attn_k.weight", (64, 256)), ("blk.0.attn_norm.weight", (256,))]
    with pytest.raises(UsageError, match=message):
        types(tensors, asked.pop("preset", "Q4_K_M"), **asked)


def test_file_types_are_those_of_the_gguf_package() -> None:
    for name in preset_names():
        known = canonical(name)
        enum = {"F32": "ALL_F32"}.get(known, f"MOSTLY_{known}")
        number = 38 if known == "MXFP4_MOE" else LlamaFileType[enum].value  # younger than the package's list
        assert file_type(name) == file_type(name.lower()) == number


def test_override_types_are_types_of_the_format() -> None:
    assert {"F16", "Q4_K", "IQ1_M", "MXFP4"} <= set(quantized_types())
    assert set(quantized_types()) <= set(GGMLQuantizationType.__members__)


@pytest.mark.parametrize("preset", [*preset_names(), "MXFP4", "NVFP4"])
def test_descriptions_are_one_sentence_and_name_the_right_bits(preset: str) -> None:
    sentence = describe(preset)
    assert sentence.endswith(".") and sentence.count(". ") == 0 and "\n" not in sentence
    (base,) = types([("blk.0.attn_q.weight", (2, 256))], preset, pure=True).values()
    words = {"F32": "32-bit", "F16": "16 bits", "BF16": "Half", "TQ1_0": "Ternary", "TQ2_0": "Ternary"}
    digit = re.search(r"\d", base)
    assert digit and words.get(base, f"{digit[0]}-bit") in sentence
