"""Sources that contradict each other: what is opened, and what is converted, computes what transformers loads.

Every pair of `models/contradictions` is tried here.  The reference is `AutoModelForCausalLM.from_pretrained` on the
very folder, at positions where a wrong rotary embedding shows; a GGUF of it is held against llama.cpp besides.

Legend: S sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families_util import TEXT, byte_level_tokenizer, opened, random_model, save_model, save_tokenizer, write_gguf
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from test_blocks import logits_of
from test_families import DIVERGENCE, SMALL
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    SmolLM3Config,
)

import dither
from dither.errors import DitherError
from dither.models.arch import family_of
from dither.models.arch.rope_config import rewritten, settle
from dither.models.blocks import open_blocks
from dither.models.contradictions import PAIRS, REFUSED, markdown
from dither.models.json_object import JsonObject
from dither.models.source import open_headers, open_model
from dither.types import Model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 300
TINY = SMALL | {"num_hidden_layers": 2}
GEMMA = {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**TINY),
    "tied": LlamaConfig(**TINY, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
    "phi3": Phi3Config(**TINY),
    "mixtral": MixtralConfig(**TINY, num_local_experts=4),
    "smollm3": SmolLM3Config(**TINY | {"num_hidden_layers": 4}),
    "mistral": MistralConfig(**TINY, head_dim=16, sliding_window=16),
    "gemma2": Gemma2Config(**TINY, **GEMMA),
    "gemma3": Gemma3TextConfig(**TINY | {"num_hidden_layers": 6}, **GEMMA),
}
Tensors = dict[str, torch.Tensor]
GONE = object()


@dataclass(frozen=True)
class Case:
    """A checkpoint and what is done to it; `says` are the pairs whose notes are due, `loads` how config.json must be
    changed for transformers to load the folder at all."""

    of: str
    says: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Callable[[Tensors], object] | None = None
    files: Callable[[Path], object] | None = None
    loads: Mapping[str, Any] = field(default_factory=dict)


def head_is_embedding(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def only_the_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def another_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).clone()


def biases(kinds: str, value: float) -> Callable[[Tensors], None]:
    def add(tensors: Tensors) -> None:
        for kind in kinds:
            for layer in range(2):
                name = f"model.layers.{layer}.self_attn.{kind}_proj"
                rows = tensors[f"{name}.weight"].shape[0]
                tensors[f"{name}.bias"] = value * torch.randn(rows, generator=torch.Generator().manual_seed(layer))

    return add


def scales_of_a_cache(*names: str) -> Callable[[Tensors], None]:
    def add(tensors: Tensors) -> None:
        for name in names:
            for layer in range(2):
                tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor([0.02])

    return add


def copied_as(*names: str) -> Callable[[Path], None]:
    """Another set of weights, which are not the model's."""

    def add(folder: Path) -> None:
        for name in names:
            save_file({"model.norm.weight": torch.zeros(64)}, folder / name)

    return add


def an_adapter(folder: Path) -> None:
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": None, "r": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **numbers}


BOTH = ("rope_scaling beside rope_parameters",)
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"short_factor": [1 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
ROTARY = [pair for pair in PAIRS if re.match("rope|type|partial|original", pair)]
ORIGINAL, SHARE = "original_max_position_embeddings", "partial_rotary_factor"

CASES = {
    "tied, another head": Case("llama", ("tied, another head",), {"tie_word_embeddings": True}),
    "tied, another head, Gemma 3": Case("gemma3", ("tied, another head",), tensors=another_head),
    "tied, the same head": Case("llama", ("tied, the same head",), {"tie_word_embeddings": True}, head_is_embedding),
    "tied, only the head": Case("tied", ("tied, only the head",), tensors=only_the_head),
    "untied, the same head": Case("llama", (), tensors=head_is_embedding),
    "rope in both": Case("qwen3", BOTH, {"rope_scaling": {"rope_type": "yarn", **YARN}}),
    "rope in both, a base is lost": Case(
        "qwen3",
        BOTH,
        {"rope_scaling": {"rope_type": "yarn", **YARN}, "rope_parameters": rope("default") | {"rope_theta": 1e6}},
    ),
    "rope in both, a base at the top": Case(
        "qwen3",
        BOTH,
        {
            "rope_scaling": {"rope_type": "yarn", **YARN},
            "rope_theta": 5e5,
            "rope_parameters": rope("default") | {"rope_theta": 1e6},
        },
    ),
    "rope in both, the older empty": Case(
        "qwen3", (), {"rope_scaling": {}, "rope_parameters": rope("linear", factor=2.0)}
    ),
    "rope in both, Gemma 3": Case("gemma3", BOTH, {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "rope in both, the same": Case(
        "llama",
        (),
        {
            "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 1e4},
            "rope_parameters": rope("linear", factor=2.0),
        },
    ),
    "rope_theta twice": Case("llama", ("rope_theta twice",), {"rope_theta": 5e5}),
    "rope_theta twice, older": Case(
        "llama",
        ("rope_theta twice",),
        {"rope_theta": 5e5, "rope_parameters": GONE, "rope_scaling": rope("linear", factor=2.0)},
    ),
    "rope_theta twice, local": Case("gemma3", ("rope_theta twice",), {"rope_local_base_freq": 3000.0}),
    "partial_rotary_factor twice": Case(
        "phi3", ("partial_rotary_factor twice",), {SHARE: 1.0, "rope_parameters": rope("default", **{SHARE: 0.5})}
    ),
    "partial_rotary_factor at the top": Case("phi3", (), {SHARE: 0.5, "rope_parameters": rope("default")}),
    "type beside rope_type": Case(
        "llama", ("type beside rope_type",), {"rope_parameters": rope("default", type="linear", factor=2.0)}
    ),
    "type beside rope_type, the other way": Case(
        "llama", ("type beside rope_type",), {"rope_parameters": rope("linear", type="default", factor=2.0)}
    ),
    "type alone": Case("llama", (), {"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "original context twice, yarn": Case(
        "llama", ("original context twice",), {ORIGINAL: 16, "rope_parameters": rope("yarn", **YARN)}
    ),
    "original context twice, llama3": Case(
        "llama",
        ("original context twice",),
        {ORIGINAL: 128, "rope_parameters": rope("llama3", **LLAMA3, **{ORIGINAL: 32})},
    ),
    "original context twice, longrope": Case(
        "llama",
        ("original context twice",),
        {ORIGINAL: 64, "rope_parameters": rope("longrope", **LONG, **{ORIGINAL: 128})},
    ),
    "original context, Phi-3": Case(
        "phi3",
        ("original context, Phi-3",),
        {ORIGINAL: GONE, "rope_parameters": rope("longrope", **LONG, **{ORIGINAL: 128})},
    ),
    "original context missing": Case(
        "llama", ("original context missing",), {"rope_parameters": rope("llama3", **LLAMA3)}
    ),
    "longrope factor": Case(
        "phi3", ("longrope factor",), {ORIGINAL: 128, "rope_parameters": rope("longrope", factor=32.0, **LONG)}
    ),
    "longrope called yarn": Case(
        "phi3", ("longrope called yarn",), {ORIGINAL: 128, "rope_parameters": rope("yarn", **LONG)}
    ),
    "zero biases denied": Case("llama", ("biases denied",), tensors=biases("qkvo", 0.0)),
    "biases promised": Case("llama", ("biases promised",), {"attention_bias": True}),
    "biases promised, some there": Case("llama", ("biases promised",), {"attention_bias": True}, biases("qkv", 0.5)),
    "a larger vocab_size": Case("llama", ("vocab_size and rows",), {"vocab_size": 310}, loads={"vocab_size": 300}),
    "a smaller vocab_size": Case("llama", ("vocab_size and rows",), {"vocab_size": 290}, loads={"vocab_size": 300}),
    "dtype": Case("llama", ("dtype",), {"dtype": "bfloat16"}),
    "an unknown model_type": Case(
        "llama", ("architectures and model_type",), {"model_type": "yi"}, loads={"model_type": "llama"}
    ),
    "scales of a cache": Case("llama", ("scales of a cache",), tensors=scales_of_a_cache("k_scale", "v_scale")),
    "scales of attention": Case(
        "llama", ("scales of a cache",), tensors=scales_of_a_cache("q_scale", "k_scale", "v_scale")
    ),
    "another set of weights": Case(
        "llama", ("other weights",), files=copied_as("consolidated.safetensors", "model.fp16.safetensors")
    ),
    "keys of other families": Case(
        "llama", (), {"sliding_window": 16, "layer_types": ["sliding_attention"] * 2, "final_logit_softcapping": 5.0}
    ),
    "an adapter": Case("llama", ("an adapter",), files=an_adapter),
}

REFUSALS = {
    "untied, no head": (Case("llama", (), tensors=lambda t: t.pop("lm_head.weight")), "tie_word_embeddings to true"),
    "tied, another head": (Case("gemma2", (), tensors=another_head), "llama.cpp ties it in Gemma 2"),
    "type alone, Gemma 3": (
        Case("gemma3", (), {"rope_parameters": GONE, "rope_scaling": {"type": "linear", "factor": 8.0}}),
        "rope_scaling: has type 'linear' and no rope_type",
    ),
    "rope_type null": (
        Case("llama", (), {"rope_parameters": rope("default") | {"rope_type": None}}),
        "rope_type: is null",
    ),
    "rope by kind of layer": (
        Case("llama", (), {"rope_parameters": {"full_attention": rope("linear", factor=4.0)}}),
        "by kind of layer, which Llama has not",
    ),
    "rope by kind of layer, without": (
        Case("gemma3", (), {"rope_parameters": rope("linear", factor=8.0)}),
        "no kinds of layer, which Gemma 3 has",
    ),
    "biases denied": (Case("llama", (), tensors=biases("qkvo", 0.5)), "attention_bias is not true in config.json"),
    "layers": (Case("llama", (), {"num_hidden_layers": 1}), "promises 1 layers, the tensors have 2"),
    "layers, more": (Case("llama", (), {"num_hidden_layers": 3}), "promises 3 layers, the tensors have 2"),
    "shapes": (Case("llama", (), {"head_dim": 32}), "not 4 heads of 32"),
    "shapes, keys": (Case("llama", (), {"num_key_value_heads": 4}), "not 4 heads of 16"),
    "shapes, experts": (Case("mixtral", (), {"num_local_experts": 8}), "4 experts where config.json has 8"),
    "layers that do not rotate": (
        Case("smollm3", (), {"no_rope_layers": GONE, "no_rope_layer_interval": 2}),
        "no_rope_layer_interval: is 2, but llama.cpp computes SmolLM3 with 4",
    ),
    "architectures and model_type": (
        Case("llama", (), {"model_type": "mistral"}),
        r"model_type: is 'mistral' \(Mistral\), but architectures names Llama",
    ),
}
# Tried by name below, or in the files named.
ELSEWHERE = {
    "tied, unread head", "text_config", "quantization twice", "ends of a text", "chat templates",
    "rows and tokens", "a projector",  # test_families.py
    "index and shards",  # test_checkpoints.py
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            made[name] = save_model(random_model(CONFIGS[name]), tmp_path_factory.mktemp(name))
        return made[name]

    return base


def make(case: Case, base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder, dirs_exist_ok=True)
    edit(folder, case.config)
    if case.tensors:
        tensors = load_file(folder / "model.safetensors")
        case.tensors(tensors)
        save_file({name: w.contiguous() for name, w in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    if case.files:
        case.files(folder)
    return folder


def edit(folder: Path, changes: Mapping[str, Any], name: str = "config.json") -> None:
    document = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in document.items() if value is not GONE}))


def theirs(folder: Path, tokens_ST: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(tokens_ST).logits


def some_tokens() -> torch.Tensor:
    return torch.randint(0, 290, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def divergence(expected_STV: torch.Tensor, actual_STV: torch.Tensor) -> float:
    p, q = (logits.double().log_softmax(-1) for logits in (expected_STV, actual_STV))
    return float((p.exp() * (p - q)).sum(-1).max())


def is_said(pair: str, notes: tuple[str, ...]) -> bool:
    """Once, and in the words of the table."""
    pattern = re.sub(r"\\\{\w+\\\}", ".*", re.escape(PAIRS[pair].note))
    return sum(bool(re.fullmatch(pattern, note)) for note in notes) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_opened_and_converted_is_what_transformers_loads(
    name: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    case, tokens_ST = CASES[name], some_tokens()
    folder = make(case, bases(case.of), tmp_path / "model")
    model = open_model(folder)
    assert len(model.notes) == len(case.says) and all(is_said(pair, model.notes) for pair in case.says), model.notes
    ours_STV = logits_of(open_blocks(model), tokens_ST)
    path = write_gguf(model, tmp_path / "model.gguf")
    with opened(path, context=512) as llama:
        last_V = np.maximum(llama.next_token_probabilities(tokens_ST[0].tolist()).astype(np.float64), 1e-30)

    (folder / "adapter_config.json").unlink(missing_ok=True)  # transformers would look for the base model
    edit(folder, case.loads)
    expected_STV = theirs(folder, tokens_ST)
    assert divergence(expected_STV, ours_STV) < 1e-6
    assert divergence(expected_STV[:, -1:], torch.from_numpy(np.log(last_V))[None, None]) < DIVERGENCE

    # What a folder of ours says is the same for transformers, and its keys contradict each other no more.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(rewritten(config, family_of(config))))
    assert divergence(expected_STV, theirs(folder, tokens_ST)) < 1e-6
    assert not any(is_said(pair, open_model(folder).notes) for pair in case.says if pair in ROTARY)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_readers_disagree_about_is_refused(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    case, message = REFUSALS[name]
    folder = make(case, bases(case.of), tmp_path / "model")
    with pytest.raises(DitherError, match=message) as told:
        open_model(folder)
    assert told.value.way_out


def test_every_pair_is_tried() -> None:
    tried = {pair for case in CASES.values() for pair in case.says} | set(REFUSALS) | ELSEWHERE
    assert set(PAIRS) <= tried
    assert {name for name, pair in PAIRS.items() if pair.here == REFUSED} <= set(REFUSALS)
    assert all(pair.note or pair.here == REFUSED for pair in PAIRS.values())


def test_the_documentation_is_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "contradictions.md"
    assert markdown() in page.read_text(), (
        "python -c 'from dither.models import contradictions as c; print(c.markdown())'"
    )


def test_a_wrong_conversion_does_not_score_zero(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """The original's network is made of its own config.json, whatever was made of that for the GGUF."""
    model = open_model(bases("llama"))
    wrong = {**model.metadata, "llama.rope.freq_base": type(model.metadata["llama.rope.freq_base"])(*[6, 500.0])}
    swapped = Model(**{**vars(model), "metadata": wrong})
    tokens_ST = some_tokens()
    assert divergence(theirs(bases("llama"), tokens_ST), logits_of(open_blocks(swapped), tokens_ST)) < 1e-6
    converted = open_model(write_gguf(swapped, tmp_path / "model.gguf"))
    assert divergence(theirs(bases("llama"), tokens_ST), logits_of(open_blocks(converted), tokens_ST)) > 1e-2


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"rope_parameters": rope("dynamic", factor=4.0), "max_position_embeddings": 64, "sliding_window": None},
    ],
)
def test_what_llama_cpp_leaves_out_is_a_loss_and_said(
    change: dict[str, Any], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Windows and dynamic scaling are the original's: its GGUF, which has neither, diverges from it."""
    folder = make(Case("mistral", (), change), bases("mistral"), tmp_path / "model")
    model, tokens_ST = open_model(folder), some_tokens()
    expected_STV = theirs(folder, tokens_ST)
    assert divergence(expected_STV, logits_of(open_blocks(model), tokens_ST)) < 1e-6
    assert len(model.notes) == 1 and "exact up to" in model.notes[0]
    converted = open_model(write_gguf(model, tmp_path / "model.gguf"))
    assert divergence(expected_STV, logits_of(open_blocks(converted), tokens_ST)) > 1e-2


def test_headers_alone_do_not_tell_a_copy(bases: Callable[[str], Path], tmp_path: Path) -> None:
    case = CASES["tied, another head"]
    folder = make(case, bases(case.of), tmp_path / "model")
    with open_headers(folder) as (model, _, _):
        assert is_said("tied, unread head", model.notes)
        assert "output.weight" not in {tensor.name for tensor in model.tensors}


def test_whatever_is_measured_says_how_its_original_was_read(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """In the result, too, which `--json` prints."""
    case = CASES["tied, another head"]
    folder = make(case, bases(case.of), tmp_path / "model")
    path = write_gguf(open_model(folder), tmp_path / "model.gguf")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 3)
    (found,) = dither.measure(path, folder, data=text, tokens=128, context=64, save=False)
    assert is_said("tied, another head", tuple(line.removeprefix("the reference, model: ") for line in found.notes))
    assert found.kl_mean < 1e-6


def test_a_text_model_is_what_its_own_section_says(tmp_path: Path) -> None:
    """Keys at the top of a multimodal config.json are not the text model's, whether it has them or not."""
    config = transformers.Gemma3Config(
        text_config=CONFIGS["gemma3"].to_dict(),
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 56, "patch_size": 14},
        mm_tokens_per_image=4,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.Gemma3ForConditionalGeneration(config).eval()
    network.save_pretrained(tmp_path)
    save_tokenizer(byte_level_tokenizer(size=300), tmp_path)
    edit(tmp_path, {"rms_norm_eps": 0.1, "sliding_window": 4, "rope_theta": 500.0})
    model, tokens_ST = open_model(tmp_path), some_tokens()
    assert is_said("text_config", model.notes) and any("'rms_norm_eps'" in note for note in model.notes)
    expected_STV = theirs(tmp_path, tokens_ST)
    assert divergence(expected_STV, logits_of(open_blocks(model), tokens_ST)) < 1e-6
    converted = open_model(write_gguf(model, tmp_path / "model.gguf"))
    assert divergence(expected_STV, logits_of(open_blocks(converted), tokens_ST)) < 1e-6


def test_chat_templates_are_those_of_transformers(bases: Callable[[str], Path], tmp_path: Path) -> None:
    key, files = "tokenizer.chat_template", {"chat_template.jinja": "file", "tokenizer_config.json": "config"}
    folder = shutil.copytree(bases("llama"), tmp_path / "model")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    alone = open_model(folder)  # no tokenizer of transformers reads it, their processors do
    assert (alone.value(key), alone.notes) == ("processor", ())
    edit(folder, {"chat_template": files["tokenizer_config.json"]}, "tokenizer_config.json")
    two = open_model(folder)
    assert two.value(key) == AutoTokenizer.from_pretrained(folder).chat_template == "config"
    assert two.notes[0].startswith("chat_template.json holds another chat template than tokenizer_config.json")
    (folder / "chat_template.jinja").write_text(files["chat_template.jinja"])
    three = open_model(folder)
    assert three.value(key) == AutoTokenizer.from_pretrained(folder).chat_template == "file"
    assert is_said("chat templates", three.notes) and "tokenizer_config.json and chat_template.json" in three.notes[0]
    edit(folder, {"chat_template": "file\n"}, "tokenizer_config.json")
    (folder / "chat_template.json").unlink()
    assert open_model(folder).notes == ()


def ends_of(model: Model) -> set[int]:
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    return {model.value(key) for key in keys} - {None}


@pytest.mark.parametrize(
    ("in_config", "in_generation", "told"),
    [
        (1, 1, False),
        (1, [1, 7], False),
        (7, 1, False),
        (1, 7, True),
        (7, None, True),
        (1, [7, 8], True),
        (1, [1, 7, 8, 9], True),
    ],
)
def test_generation_ends_where_that_of_transformers_does(
    in_config: int, in_generation: Any, told: bool, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(bases("llama"), tmp_path / "model")
    edit(folder, {"eos_token_id": in_config})
    edit(folder, {"eos_token_id": GONE if in_generation is None else in_generation}, "generation_config.json")
    if in_generation is None:
        (folder / "generation_config.json").unlink()
    expected = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    expected = set(expected if isinstance(expected, list) else [expected])
    model = open_model(folder)
    assert is_said("ends of a text", model.notes) is told
    assert ends_of(model) == ({1, *expected} if len(expected | {1}) < 4 else {1, 7, 8})
    assert ("cannot be told" in " ".join(model.notes)) is (len(expected | {1}) > 3)


def test_two_words_on_one_quantization(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers reads config.json alone."""
    folder = shutil.copytree(bases("llama"), tmp_path / "model")
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
    edit(folder, {"quantization_config": stated})
    assert AutoConfig.from_pretrained(folder).quantization_config["bits"] == 4
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 128, "sym": True}))
    assert open_model(folder).notes == ()
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 8, "group_size": 128, "sym": False}))
    (note,) = open_model(folder).notes
    assert note.startswith("quantize_config.json says bits 8, sym False and config.json bits 4, sym True")
    edit(folder, {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}})
    (folder / "quantize_config.json").unlink()
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert is_said("quantization twice", open_model(folder).notes)


MAYBE = st.sampled_from
NUMBERS = {
    "rope_type": MAYBE(["default", "linear", "yarn", "llama3", "longrope"]),
    "type": MAYBE(["default", "linear", "yarn", "su"]),
    "rope_theta": MAYBE([1e4, 5e5]),
    "factor": MAYBE([1.0, 4.0]),
    SHARE: MAYBE([0.5, 1.0]),
    ORIGINAL: MAYBE([64, 128]),
}
SECTION = st.fixed_dictionaries({}, optional=NUMBERS).map(lambda section: {**LLAMA3, **LONG, **section})
SECTIONS = st.one_of(
    st.none(),
    SECTION,
    st.fixed_dictionaries({}, optional=dict.fromkeys(("full_attention", "sliding_attention"), SECTION)),
)
TOP = {
    "rope_theta": NUMBERS["rope_theta"],
    SHARE: NUMBERS[SHARE],
    ORIGINAL: NUMBERS[ORIGINAL],
    "rope_local_base_freq": MAYBE([3e3]),
}
SPELLINGS = st.fixed_dictionaries({}, optional={"rope_parameters": SECTIONS, "rope_scaling": SECTIONS, **TOP})


@settings(max_examples=150, deadline=None)
@given(name=MAYBE(["llama", "qwen3", "phi3", "mixtral", "gemma2", "gemma3"]), stated=SPELLINGS)
def test_any_spelling_of_rope_is_refused_or_read_as_transformers_reads_it(name: str, stated: dict[str, Any]) -> None:
    kind = CONFIGS[name].model_type
    family = family_of({"model_type": kind})
    plain = {key: value for key, value in CONFIGS[name].to_dict().items() if key not in ("rope_parameters", ORIGINAL)}
    try:
        rotary = settle(JsonObject(deepcopy(plain | stated), "config.json"), family)
    except DitherError:
        return
    try:
        config = transformers.CONFIG_MAPPING[kind].from_dict(deepcopy(plain | stated))
        config.standardize_rope_params()  # once more, as whoever computes frequencies does
    except (KeyError, TypeError, ValueError, StrictDataclassError):
        return  # transformers loads no such model
    theirs, local = config.rope_parameters, config.rope_parameters.get("sliding_attention", {})
    theirs = theirs.get("full_attention", theirs)
    for key in ("rope_type", "rope_theta", "factor", SHARE, ORIGINAL):
        if key == ORIGINAL and theirs["rope_type"] not in ("llama3", "yarn", "longrope"):
            continue
        default = 1.0 if key == SHARE else None
        assert rotary.shared.get(key, default) == theirs.get(key, default), key
    assert rotary.local.get("rope_theta") == local.get("rope_theta")
