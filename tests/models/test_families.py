"""Every family against transformers: the same next-token distribution from the GGUF as from the checkpoint.

Legend: R rows, C columns, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from families_util import converted, expected_probabilities, opened, random_model, save_model, write_gguf
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from dither.errors import DitherError, SourceError, UnsupportedError
from dither.formats.ggml import u32
from dither.formats.gguf import lay_out
from dither.models.arch import convert, families, family_of, feeds
from dither.models.arch.naming import plain_name, rounded_count
from dither.models.checkpoint import open_checkpoint
from dither.types import Model

pytestmark = pytest.mark.slow  # real processes or engines: `make test` runs it, `make check` does not

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

SMALL = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
PROMPTS = ([5], [0, 7, 100, 50, 3], list(range(10, 50)), [(37 * i) % 300 for i in range(100)])
# llama.cpp keeps keys and values as float16 and ggml sums in float32: divergences measured here stay
# below 3e-5, a wrong permutation or a missing +1 gives more than 1e-2.
DIVERGENCE = 2e-4


def rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **numbers}}


YARN = {"factor": 16.0, "original_max_position_embeddings": 32}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LOCAL_AND_GLOBAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama with head_dim, biases, tied": LlamaConfig(
        **SMALL, head_dim=32, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama linear": LlamaConfig(**SMALL, **rope("linear", factor=4.0)),
    "llama 3.1": LlamaConfig(**SMALL, **rope("llama3", **LLAMA3)),
    "llama yarn": LlamaConfig(**SMALL, **rope("yarn", **YARN)),
    "mistral": MistralConfig(**SMALL, head_dim=32, sliding_window=None),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2 yarn with attention factor": Qwen2Config(**SMALL, **rope("yarn", **YARN, attention_factor=1.2)),
    "qwen3": Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True),
    "qwen3 moe": Qwen3MoeConfig(
        **SMALL, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True
    ),
    "gemma 2": Gemma2Config(
        **SMALL | {"num_hidden_layers": 4},
        head_dim=32,
        sliding_window=16,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=7.0,
    ),
    "gemma 3": Gemma3TextConfig(
        **SMALL | {"num_hidden_layers": 6},
        head_dim=32,
        sliding_window=16,
        query_pre_attn_scalar=32,
        rope_parameters=LOCAL_AND_GLOBAL,
    ),
    "phi-3": Phi3Config(**SMALL),
    "phi-4-mini": Phi3Config(**SMALL, **rope("default", partial_rotary_factor=0.5), tie_word_embeddings=True),
    "smollm3": SmolLM3Config(**SMALL | {"num_hidden_layers": 4}),
}


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for tests that damage a copy of it."""
    return save_model(random_model(CONFIGS["llama"]), tmp_path_factory.mktemp("small-llama"))


def copied(folder: Path, target: Path, **config: Any) -> Path:
    """A copy of a checkpoint with some of its config.json changed."""
    target.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".gguf":
            (target / path.name).write_bytes(path.read_bytes())
    stored = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(stored | config))
    return target


def divergences(path: Path, model: transformers.PreTrainedModel, prompts: Any = PROMPTS, **engine: Any) -> list[float]:
    """Kullback-Leibler divergence of llama.cpp's distribution from transformers', per prompt."""
    found = []
    with opened(path, **engine) as llama:
        for prompt in prompts:
            expected_V = expected_probabilities(model, prompt)
            actual_V = llama.next_token_probabilities(prompt).astype(np.float64)
            assert expected_V.max() < 0.99, "the reference is too sure of itself to tell anything"
            found.append(float(np.sum(expected_V * np.log(expected_V / np.maximum(actual_V, 1e-30)))))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    path = converted(save_model(model, tmp_path / "checkpoint"))
    assert max(divergences(path, model)) < DIVERGENCE


def test_half_precision_is_as_good(tmp_path: Path) -> None:
    model = random_model(CONFIGS["llama"])
    path = converted(save_model(model.half().float(), tmp_path), "F16")
    assert max(divergences(path, model)) < 1e-3


@pytest.mark.parametrize(
    ("name", "change"),
    [("llama", "rope_rows_q"), ("llama", "rope_rows_k"), ("gemma 3", "plus_one"), ("smollm3", "rope_rows_k")],
)
def test_the_comparison_notices_a_change_left_out(
    name: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(CONFIGS[name])
    folder = save_model(model, tmp_path)
    family = family_of(json.loads((folder / "config.json").read_text()))
    plain = tuple(dataclasses.replace(rule, change="") if rule.change == change else rule for rule in family.rules)
    without = dataclasses.replace(family, rules=plain)
    monkeypatch.setattr("dither.models.arch.family_of", lambda _: without)
    assert max(divergences(converted(folder), model)) > 1e-2


@pytest.mark.parametrize("name", ["llama 3.1", "llama yarn", "gemma 3", "phi-4-mini"])
def test_the_comparison_notices_rope_left_out(name: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    folder = save_model(model, tmp_path)
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    plain = dict.fromkeys(LOCAL_AND_GLOBAL, plain) if name == "gemma 3" else plain
    path = converted(copied(folder, tmp_path / "plain", rope_parameters=plain))
    assert max(divergences(path, model)) > 1e-2


def test_longrope_uses_short_factors_in_a_short_context_and_long_ones_in_a_long(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
    config = Phi3Config(
        **SMALL | {"max_position_embeddings": 1024}, original_max_position_embeddings=256, **rope("longrope", **factors)
    )
    model = random_model(config)
    path = converted(save_model(model, tmp_path))
    short, long = [7, 8, 9, 200, 30] * 20, [7, 8, 9, 200, 30] * 60
    assert max(divergences(path, model, [short], context=256)) < DIVERGENCE
    assert max(divergences(path, model, [long], context=512)) < DIVERGENCE


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
def test_fused_experts_give_the_same_rows_as_separate_ones(name: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    separate = save_model(model, tmp_path / "separate")
    fused = copied(separate, tmp_path / "fused")
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, fused / "model.safetensors")
    names = {source for source in load_file(fused / "model.safetensors") if "gate_up_proj" in source}
    assert names, "transformers no longer fuses experts in memory: write the fused form by hand"
    assert not any("gate_up_proj" in source for source in load_file(separate / "model.safetensors"))
    ours, theirs = (convert(open_checkpoint(folder)) for folder in (fused, separate))
    assert [(a.name, a.shape) for a in ours.tensors] == [(b.name, b.shape) for b in theirs.tensors]
    for a, b in zip(ours.tensors, theirs.tensors, strict=True):
        np.testing.assert_array_equal(a.read(0, a.rows), b.read(0, b.rows))


def test_any_span_of_rows_is_a_part_of_the_whole(tmp_path: Path) -> None:
    for name in ("llama with head_dim, biases, tied", "mixtral", "gemma 3"):
        model = convert(open_checkpoint(save_model(random_model(CONFIGS[name]), tmp_path / name)))
        generator = np.random.default_rng(0)
        for tensor in model.tensors:
            whole_RC = tensor.read(0, tensor.rows)
            assert whole_RC.shape == (tensor.rows, tensor.columns) and whole_RC.dtype == np.float32
            for _ in range(4):
                start, stop = sorted(generator.integers(0, tensor.rows + 1, 2))
                if start < stop:
                    np.testing.assert_array_equal(tensor.read(int(start), int(stop)), whole_RC[start:stop])


def test_permuted_rows_match_the_formula(tmp_path: Path) -> None:
    """reshape(heads, 2, d/2) with the last two swapped, as Meta's weights were before conversion."""
    torch_model = random_model(CONFIGS["llama"])
    model = convert(open_checkpoint(save_model(torch_model, tmp_path)))
    by_name = {tensor.name: tensor for tensor in model.tensors}
    for target, source, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        w_RC = torch_model.get_parameter(f"model.layers.1.self_attn.{source}.weight").detach().numpy()
        expected_RC = w_RC.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(w_RC.shape)
        tensor = by_name[f"blk.1.{target}.weight"]
        np.testing.assert_array_equal(tensor.read(0, tensor.rows), expected_RC)


def test_a_multimodal_gemma_3_gives_up_its_text_model(tmp_path: Path) -> None:
    text = CONFIGS["gemma 3"].to_dict() | {"vocab_size": 310}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 16,
        "patch_size": 8,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    text_model = random_model(Gemma3TextConfig(**text))
    model.model.language_model.load_state_dict(text_model.model.state_dict())
    folder = save_model(model, tmp_path)
    ours = convert(open_checkpoint(folder))
    assert any("vision" in note for note in ours.notes)
    assert any("10 rows of the embedding have no token" in note for note in ours.notes)
    with opened(write_gguf(ours, tmp_path / "text.gguf")) as llama:
        for prompt in PROMPTS:
            # the ten rows left out get no probability here
            expected_V = expected_probabilities(text_model, prompt)[:300]
            actual_V = llama.next_token_probabilities(prompt)
            np.testing.assert_allclose(actual_V, expected_V / expected_V.sum(), atol=2e-3)


# Called "type" alone, transformers 5 ignores it in Gemma 3.
LINEAR = {"rope_type": "linear", "factor": 8.0}


def test_the_older_spelling_of_rope_gives_the_same_metadata(tmp_path: Path) -> None:
    for name in ("llama 3.1", "llama yarn", "gemma 3", "phi-4-mini"):
        folder = save_model(random_model(CONFIGS[name]), tmp_path / name)
        stored = json.loads((folder / "config.json").read_text())
        new = stored.pop("rope_parameters")
        if "full_attention" in new:
            old = {"rope_theta": 1e6, "rope_local_base_freq": 5000.0, "rope_scaling": LINEAR}
        else:
            scaling = {key: value for key, value in new.items() if key not in ("rope_theta", "partial_rotary_factor")}
            old = {"rope_theta": new["rope_theta"], "rope_scaling": scaling}
            old |= {"partial_rotary_factor": new.get("partial_rotary_factor", 1.0)}
        before = convert(open_checkpoint(folder))
        (folder / "config.json").write_text(json.dumps(stored | old))
        after = convert(open_checkpoint(folder))
        assert before.metadata == after.metadata
        assert [tensor.name for tensor in before.tensors] == [tensor.name for tensor in after.tensors]


def family_cases() -> list[tuple[str, str]]:
    return [(family.name, family.arch) for family in families()]


@pytest.mark.parametrize(("name", "arch"), family_cases())
def test_tensor_names_agree_with_the_gguf_package(name: str, arch: str) -> None:
    family = next(family for family in families() if family.name == name)
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    mapping = gguf.get_tensor_name_map(number, 4)
    checked = 0
    for rule in family.rules:
        source = rule.source.replace("*", "1").replace("#", "3")
        target = rule.target.replace("*", "1")
        theirs = mapping.get_name(source, try_suffixes=(".weight", ".bias"))
        if theirs is None:  # experts are merged under a made-up source name there, fused ones split
            assert "expert" in rule.source or rule.target == "output.weight", rule.source
            continue
        checked += 1
        assert target == theirs or target == f"{theirs}.weight"  # fused experts have no suffix at the source
    assert checked >= 9
    allowed = {gguf.TENSOR_NAMES[kind].format(bid=1) for kind in gguf.MODEL_TENSORS[number]}
    for rule in family.rules:
        assert rule.target.replace("*", "1").rpartition(".")[0] in allowed or rule.target == "output.weight"


@pytest.mark.parametrize(("name", "arch"), family_cases())
def test_every_linear_layer_has_one_feed(name: str, arch: str) -> None:
    family = next(family for family in families() if family.name == name)
    read = [reader for feed in family.feeds for reader in feed.readers]
    assert len(read) == len(set(read))
    matrices = {rule.target.removeprefix("blk.*.").removesuffix(".weight") for rule in family.rules}
    linear = {name for name in matrices if not name.endswith(("norm", ".bias", "token_embd"))}
    assert set(read) == linear
    assert {feed.source for feed in family.feeds} <= matrices
    for feed in family.feeds:
        assert set(feed.readers) <= {reader for merged in feeds(arch) for reader in merged.readers}


def test_feeds_of_an_unknown_architecture_are_an_error() -> None:
    with pytest.raises(UnsupportedError, match="llama, phi3, qwen2"):
        feeds("mamba")


CONFIG_CLASSES = {
    "Llama": LlamaConfig,
    "Mistral": MistralConfig,
    "Mixtral": MixtralConfig,
    "Qwen2": Qwen2Config,
    "Qwen3": Qwen3Config,
    "Qwen3-MoE": Qwen3MoeConfig,
    "Gemma 2": Gemma2Config,
    "Gemma 3": Gemma3TextConfig,
    "Phi-3": Phi3Config,
    "SmolLM3": SmolLM3Config,
}


@pytest.mark.parametrize("name", [name for name, _ in family_cases()])
def test_defaults_are_those_of_transformers(name: str) -> None:
    family = next(family for family in families() if family.name == name)
    config = CONFIG_CLASSES[name]()
    rope_parameters = config.rope_parameters
    expected = config.to_dict() | {
        "rope_theta": rope_parameters.get("full_attention", rope_parameters).get("rope_theta"),
        "rope_local_base_freq": rope_parameters.get("sliding_attention", {}).get("rope_theta"),
    }
    for key, value in family.defaults.items():
        assert expected[key] == value, key


def test_metadata_says_what_the_config_says(tmp_path: Path) -> None:
    folder = save_model(random_model(CONFIGS["qwen3 moe"]), tmp_path / "Tiny-Qwen")
    model = convert(open_checkpoint(folder))
    values = {key: field.value for key, field in model.metadata.items() if not key.startswith("tokenizer")}
    expected = {
        "general.architecture": "qwen3moe",
        "general.type": "model",
        "general.name": "Tiny-Qwen",
        "general.size_label": "4x141K",
        "qwen3moe.block_count": 3,
        "qwen3moe.context_length": 512,
        "qwen3moe.embedding_length": 64,
        "qwen3moe.feed_forward_length": 96,
        "qwen3moe.attention.head_count": 4,
        "qwen3moe.attention.head_count_kv": 2,
        "qwen3moe.expert_count": 4,
        "qwen3moe.expert_used_count": 2,
        "qwen3moe.expert_feed_forward_length": 48,
        "qwen3moe.attention.key_length": 32,
        "qwen3moe.attention.value_length": 32,
        "qwen3moe.rope.dimension_count": 32,
        "qwen3moe.rope.freq_base": 10000.0,
        "qwen3moe.vocab_size": 300,
        "qwen3moe.attention.layer_norm_rms_epsilon": 1e-6,
    }
    assert values == expected
    assert (model.kind, model.arch, model.origin) == ("safetensors", "qwen3moe", str(folder))


def test_names_and_sizes() -> None:
    cache = Path("/cache/models--org--Some-Model/snapshots/" + "0" * 40)
    assert plain_name(cache, "") == "Some-Model"
    assert plain_name(Path("/x") / ("a" * 40), "org/Other-Model") == "Other-Model"
    counts = {135e6: "135M", 1.24e9: "1.2B", 7.2e9: "7.2B", 9.97e9: "10B", 70.6e9: "71B", 5e3: "5.0K", 999: "1.0K"}
    assert {count: rounded_count(int(count)) for count in counts} == counts


def test_an_unknown_architecture_names_the_known_ones(small_llama: Path, tmp_path: Path) -> None:
    folder = copied(small_llama, tmp_path / "copy", architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedError, match=r"MambaForCausalLM.*Gemma 2 .*SmolLM3"):
        convert(open_checkpoint(folder))


def test_model_type_serves_where_architectures_are_missing(small_llama: Path, tmp_path: Path) -> None:
    folder = copied(small_llama, tmp_path / "copy", architectures=None)
    assert convert(open_checkpoint(folder)).arch == "llama"


def damaged_tensors(folder: Path, target: Path, **changes: Any) -> Path:
    copied(folder, target)
    tensors = load_file(target / "model.safetensors")
    for name in changes.get("without", ()):
        del tensors[name]
    save_file({**tensors, **changes.get("added", {})}, target / "model.safetensors")
    return target


def test_tensors_that_no_rule_knows_are_named(small_llama: Path, tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)}
    folder = damaged_tensors(small_llama, tmp_path / "copy", added=extra)
    with pytest.raises(UnsupportedError, match=r"1 tensors .* q_proj\.lora_A\.weight".replace(" q", ".*q")):
        convert(open_checkpoint(folder))


def test_derived_buffers_are_dropped(small_llama: Path, tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    folder = damaged_tensors(small_llama, tmp_path / "copy", added=extra)
    names = [tensor.name for tensor in convert(open_checkpoint(folder)).tensors]
    assert names == [tensor.name for tensor in convert(open_checkpoint(small_llama)).tensors]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", r"layer 1: lacks ffn_up\.weight"),
        ("model.embed_tokens.weight", r"token_embd\.weight"),
        ("lm_head.weight", r"lm_head\.weight: is missing"),
    ],
)
def test_missing_tensors_are_named(missing: str, message: str, small_llama: Path, tmp_path: Path) -> None:
    folder = damaged_tensors(small_llama, tmp_path / "copy", without=[missing])
    with pytest.raises(SourceError, match=message):
        convert(open_checkpoint(folder))


@pytest.mark.parametrize("missing", ["model.norm.weight", "mlp.up_proj.weight", "input_layernorm.weight"])
def test_what_is_missing_from_every_layer_is_named(missing: str, small_llama: Path, tmp_path: Path) -> None:
    names = load_file(small_llama / "model.safetensors")
    without = [name for name in names if name.endswith(missing)]
    folder = damaged_tensors(small_llama, tmp_path / "copy", without=without)
    with pytest.raises(SourceError, match=rf"{missing}: is missing"):
        convert(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("source", "target", "weight"),
    [
        ("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight", torch.zeros(64, 96)),
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight", torch.zeros(32, 32)),
        ("model.layers.2.mlp.down_proj.weight", "blk.2.ffn_down.weight", torch.zeros(64 * 96)),
        ("model.embed_tokens.weight", "token_embd.weight", torch.zeros(300, 65)),
        ("model.norm.weight", "output_norm.weight", torch.tensor(1.0)),
        ("lm_head.weight", "output.weight", torch.zeros(300, 63)),
    ],
)
def test_shapes_that_llama_cpp_would_refuse_are_named(
    source: str, target: str, weight: torch.Tensor, small_llama: Path, tmp_path: Path
) -> None:
    folder = damaged_tensors(small_llama, tmp_path / "copy", added={source: weight})
    with pytest.raises(SourceError, match=rf"tensor {target}: has shape .* config\.json makes"):
        convert(open_checkpoint(folder))


@pytest.mark.parametrize("shape", [(301, 64), (299, 64)])
def test_an_output_matrix_unlike_the_embedding_is_refused(
    shape: tuple[int, int], small_llama: Path, tmp_path: Path
) -> None:
    folder = damaged_tensors(small_llama, tmp_path / "copy", added={"lm_head.weight": torch.zeros(shape)})
    with pytest.raises(SourceError, match=r"lm_head\.weight: has shape .* not the embedding's 300 rows"):
        convert(open_checkpoint(folder))


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_key_value_heads"])
def test_a_config_of_another_model_is_refused(key: str, small_llama: Path, tmp_path: Path) -> None:
    folder = copied(small_llama, tmp_path / "copy", **{key: 4 * SMALL[key], "head_dim": 16})
    with pytest.raises(SourceError, match="tensor "):
        convert(open_checkpoint(folder))


def test_a_tie_is_true_or_false(small_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="tie_word_embeddings: is 'no', but true or false"):
        convert(open_checkpoint(copied(small_llama, tmp_path / "copy", tie_word_embeddings="no")))


def test_a_type_that_is_no_weight_is_refused_at_once(small_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = damaged_tensors(small_llama, tmp_path / "copy", added={name: torch.zeros(96, 64, dtype=torch.complex64)})
    with pytest.raises(UnsupportedError, match=r"up_proj\.weight: is stored as C64"):
        convert(open_checkpoint(folder))


def test_missing_experts_and_layers_are_named(tmp_path: Path) -> None:
    folder = save_model(random_model(CONFIGS["mixtral"]), tmp_path / "mixtral")
    name = "model.layers.2.block_sparse_moe.experts.1.w3.weight"
    without = damaged_tensors(folder, tmp_path / "copy", without=[name])
    with pytest.raises(SourceError, match=r"blk\.2\.ffn_up_exps\.weight: has 3 experts .* 4: expert 1"):
        convert(open_checkpoint(without))
    with pytest.raises(SourceError, match=r"layer 3: config\.json promises 4 layers, the tensors have 3"):
        convert(open_checkpoint(copied(folder, tmp_path / "more", num_hidden_layers=4)))
    with pytest.raises(SourceError, match="num_hidden_layers: is 16000000, but there are only"):
        convert(open_checkpoint(copied(folder, tmp_path / "most", num_hidden_layers=16_000_000)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: is 'gelu'"),
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1.0}}, "RoPE scaling 'mrope'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 8}}, "beta_fast"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    change: dict[str, Any], message: str, small_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        convert(open_checkpoint(copied(small_llama, tmp_path / "copy", **change)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gemma 3", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar: is 64"),
        ("gemma 3", {"layer_types": ["full_attention"] * 6}, "layer_types"),
        ("gemma 2", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers"),
        ("qwen3 moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3 moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen2", rope("llama3", **LLAMA3), "RoPE scaling 'llama3'"),
    ],
)
def test_what_a_family_has_built_in_is_checked(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save_model(random_model(CONFIGS[name]), tmp_path / "plain")
    with pytest.raises(UnsupportedError, match=message):
        convert(open_checkpoint(copied(folder, tmp_path / "copy", **change)))


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document, long lists by their first items."""
    items = node.items() if isinstance(node, dict) else enumerate(node[:3]) if isinstance(node, list) else ()
    for key, value in list(items)[:40]:
        yield (*path, key)
        yield from places(value, (*path, key))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_junk_in_any_json_file_is_an_error_of_ours(data: st.DataObject, small_llama: Path, tmp_path: Path) -> None:
    folder = copied(small_llama, tmp_path / "copy", **rope("llama3", **LLAMA3))
    name = data.draw(st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json"]))
    document = json.loads((folder / name).read_text())
    path = data.draw(st.sampled_from(list(places(document))))
    node = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = data.draw(JUNK)
    (folder / name).write_text(json.dumps(document))
    try:
        lay_out(*listed(convert(open_checkpoint(folder))))
    except DitherError as error:
        assert len(str(error)) < 4000


def listed(model: Model) -> tuple[Any, list[tuple[str, tuple[int, ...], str]]]:
    return model.metadata, [(tensor.name, tensor.shape, "F32") for tensor in model.tensors]


def test_sliding_windows_that_llama_cpp_ignores_are_told(tmp_path: Path) -> None:
    folder = save_model(random_model(CONFIGS["mistral"]), tmp_path / "plain")
    assert not convert(open_checkpoint(folder)).notes
    windowed = convert(open_checkpoint(copied(folder, tmp_path / "copy", sliding_window=64)))
    assert "exact up to 64 tokens" in windowed.notes[0]


def test_names_that_llama_cpp_reads_meaning_into_are_changed(tmp_path: Path) -> None:
    """Any model called phi-3 must have four tokens that this one lacks, or llama.cpp does not load it."""
    folder = save_model(random_model(CONFIGS["phi-3"]), tmp_path / "Phi-3-clone")
    model = convert(open_checkpoint(folder))
    assert model.name == "Phi 3-clone" and "general.name" in model.notes[0]
    with opened(write_gguf(model, tmp_path / "model.gguf")) as llama:
        assert llama.vocabulary_size == 300


def test_padding_fills_an_embedding_that_has_more_rows_than_tokens(tmp_path: Path) -> None:
    model = random_model(LlamaConfig(**SMALL | {"vocab_size": 320}))
    ours = convert(open_checkpoint(save_model(model, tmp_path)))
    assert ours.metadata["tokenizer.ggml.tokens"].value[300:302] == ["[PAD300]", "[PAD301]"]
    assert ours.metadata["llama.vocab_size"] == u32(320)
    assert max(divergences(write_gguf(ours, tmp_path / "model.gguf"), model)) < DIVERGENCE


def test_tokens_beyond_the_embedding_are_left_out_and_told(tmp_path: Path) -> None:
    folder = save_model(random_model(LlamaConfig(**SMALL | {"vocab_size": 290})), tmp_path)
    ours = convert(open_checkpoint(folder))
    assert "10 tokens lie beyond the embedding's 290 rows" in ours.notes[0]
    assert len(ours.metadata["tokenizer.ggml.tokens"].value) == 290


def test_auto_config_agrees_on_the_architecture(tmp_path: Path) -> None:
    """What save_pretrained writes for each family is found again by name."""
    for name, config in CONFIGS.items():
        config.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())
        assert family_of(stored).name == family_of({"model_type": stored["model_type"]}).name, name
        assert type(AutoConfig.from_pretrained(tmp_path)) is type(config)


def test_importing_needs_neither_torch_nor_transformers() -> None:
    import subprocess
    import sys

    heavy = {"torch", "transformers", "sentencepiece"}
    code = f"import sys, dither.models.arch; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
