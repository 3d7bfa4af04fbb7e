"""What strangers' bytes meet first, one function for each kind of file: the targets of `fuzz.py`.

Each target makes its seeds (small valid inputs) in a folder and gives a function of bytes that does what a command
does with such a file: parse it, and use what was parsed.  Only a DitherError may come out.  Files lie in memory
(/dev/shm where there is one), so that an execution costs microseconds.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from dither.containers.plan_file import read_plan
from dither.errors import DitherError
from dither.formats import gguf, safetensors
from dither.formats.evidence import EvidenceStore, GroupStatistics, write_arrays, write_groups, write_manifest
from dither.formats.imatrix import read_imatrix, write_imatrix
from dither.formats.intervals import Interval
from dither.measuring import schema
from dither.models.source import open_model
from dither.models.tokenizers import sentencepiece
from dither.reporting import answer_records
from dither.reporting.inspect import inspect
from dither.running import benchmark

Run = Callable[[bytes], Any]
VOCABULARY = ["<|endoftext|>", "a", "b", "Ġ", "ab", "é", "Ġa", "!"]


@dataclass(frozen=True)
class Target:
    name: str
    prepare: Callable[[Path], tuple[list[bytes], Run]]  # a folder of its own → seeds, what is done with bytes
    is_json: bool = False  # mutated as a tree, too
    longest: int = 8192  # bytes


def _file(path: Path, use: Callable[[Path], Any]) -> Run:
    def run(data: bytes) -> None:
        path.write_bytes(data)
        use(path)

    return run


# GGUF -------------------------------------------------------------------------------------------------------


def gguf_bytes() -> bytes:
    from dither.formats.ggml import ValueType, array, boolean, f32, string, u32

    metadata = {
        "general.architecture": string("llama"),
        "general.name": string("tiny"),
        "llama.block_count": u32(1),
        "llama.context_length": u32(64),
        "llama.embedding_length": u32(32),
        "llama.feed_forward_length": u32(32),
        "llama.attention.head_count": u32(2),
        "llama.attention.head_count_kv": u32(1),
        "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.tokens": array(ValueType.STRING, VOCABULARY),
        "tokenizer.ggml.add_bos_token": boolean(False),
        "dither.recipe": string('{"solver": "nearest"}'),
    }
    shapes = {
        "token_embd.weight": ((8, 32), "Q4_0"),
        "blk.0.attn_q.weight": ((32, 32), "Q8_0"),
        "blk.0.attn_norm.weight": ((32,), "F32"),
        "output_norm.weight": ((32,), "F32"),
    }
    laid = gguf.lay_out(metadata, [(name, shape, kind) for name, (shape, kind) in shapes.items()])
    return laid.header + bytes(laid.total - len(laid.header))


def _gguf_header(_folder: Path) -> tuple[list[bytes], Run]:
    def run(data: bytes) -> None:
        header = gguf.parse_header(data, "file")
        for tensor in header.tensors:
            assert header.data_offset <= tensor.offset <= tensor.offset + tensor.nbytes <= len(data)

    return [gguf_bytes()], run


def _gguf_model(folder: Path) -> tuple[list[bytes], Run]:
    def use(path: Path) -> None:
        model = open_model(path)
        for tensor in model.tensors:
            tensor.read(0, min(tensor.rows, 2))
        inspect(model).to_json()

    return [gguf_bytes()], _file(folder / "m.gguf", use)


# A checkpoint's folder --------------------------------------------------------------------------------------

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": len(VOCABULARY),
    "bos_token_id": 0,
    "eos_token_id": [0],
    "dtype": "bfloat16",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
QUANTIZED = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 0, "content": "<|endoftext|>", "special": True, "lstrip": False, "normalized": False}],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {},
    },
    "decoder": {"type": "ByteLevel"},
    "model": {
        "type": "BPE",
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: at for at, token in enumerate(VOCABULARY)},
        "merges": [["a", "b"], ["Ġ", "a"]],
    },
}
SETTINGS = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"}, "chat_template": "{{ messages }}"}
_LAYER = "model.layers.0."
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (8, 32),
    "model.norm.weight": (32,),
    f"{_LAYER}self_attn.q_proj.weight": (32, 32),
    f"{_LAYER}self_attn.k_proj.weight": (16, 32),
    f"{_LAYER}self_attn.v_proj.weight": (16, 32),
    f"{_LAYER}self_attn.o_proj.weight": (32, 32),
    f"{_LAYER}mlp.gate_proj.weight": (32, 32),
    f"{_LAYER}mlp.up_proj.weight": (32, 32),
    f"{_LAYER}mlp.down_proj.weight": (32, 32),
    f"{_LAYER}input_layernorm.weight": (32,),
    f"{_LAYER}post_attention_layernorm.weight": (32,),
}


def safetensors_bytes() -> bytes:
    header, places = safetensors.lay_out([(n, "BF16", shape) for n, shape in SHAPES.items()], {"format": "pt"})
    return header + bytes(max(at + size for at, size in places.values()) - len(header))


def checkpoint(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(safetensors_bytes())
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))


def _in_checkpoint(name: str, *seeds: Any) -> Callable[[Path], tuple[list[bytes], Run]]:
    """A folder of which this one file is the stranger's."""

    def prepare(folder: Path) -> tuple[list[bytes], Run]:
        checkpoint(folder)

        def use(_path: Path) -> None:
            model = open_model(folder)
            for tensor in model.tensors[:3]:
                tensor.read(0, 1)

        return [json.dumps(seed).encode() for seed in seeds], _file(folder / name, use)

    return prepare


def _safetensors(_folder: Path) -> tuple[list[bytes], Run]:
    small, _ = safetensors.lay_out([("a", "F32", (2, 3)), ("b", "BF16", (4,))], {"format": "pt"})
    return [small + bytes(32), safetensors_bytes()], lambda data: safetensors.parse_header(data, "file")


def piece(text: bytes, score: float, kind: int) -> bytes:
    body = b"\n" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
    return b"\n" + bytes([len(body)]) + body


def _tokenizer_model(folder: Path) -> tuple[list[bytes], Run]:
    checkpoint(folder)
    (folder / "tokenizer.json").unlink()
    pieces = [(b"<unk>", 0.0, 2), (b"<s>", 0.0, 3), (b"</s>", 0.0, 3), (b"a", -1.0, 1), (b"<0x0A>", 0.0, 6)]
    seed = b"".join(piece(*entry) for entry in pieces) + b"\x12\x02\x18\x02" + b"\x1a\x02\x18\x01"
    whole = _file(folder / "tokenizer.model", lambda _: open_model(folder))

    def run(data: bytes) -> None:
        sentencepiece.parse(data)
        whole(data)

    return [seed], run


# Importance, evidence, plans, records -----------------------------------------------------------------------


def _imatrix_gguf(folder: Path) -> tuple[list[bytes], Run]:
    path = folder / "i.gguf"
    means = {"blk.0.attn_q.weight": np.ones((1, 32), np.float32), "e": np.ones((2, 8), np.float32)}
    counts = {"blk.0.attn_q.weight": np.array([5], np.int64), "e": np.array([3, 1], np.int64)}
    write_imatrix(path, means, counts, datasets=["text"], chunks=2, context=16)
    return [path.read_bytes()], _file(path, read_imatrix)


def dat(entries: dict[bytes, tuple[int, list[float]]]) -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, (calls, values) in entries.items():
        parts.append(struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values)))
        parts.append(np.array(values, "<f4").tobytes())
    return b"".join(parts)


def _imatrix_dat(folder: Path) -> tuple[list[bytes], Run]:
    plain = dat({b"blk.0.attn_q.weight": (3, [1.0] * 8), b"output.weight": (1, [0.5] * 4)})
    named = plain + struct.pack("<i", 7) + struct.pack("<i", 4) + b"text"
    return [plain, named], _file(folder / "i.dat", read_imatrix)


PLAN = """\
format = 1
model = "tiny"
model_identity = "x"
evidence = ""
solver = "nearest"
transforms = ["awq"]
budget = 1000
bytes = 900
kl = 0.5
notes = ["a note"]

[tensors]
"blk.0.attn_q.weight" = { type = "Q4_K", bytes = 36864, kl = 0.25 }
"output.weight" = { type = "Q8_0", bytes = 3 }
"""


def _plan(folder: Path) -> tuple[list[bytes], Run]:
    other = PLAN.replace('solver = "nearest"', 'solver = "gptq"\ncontainer = "gptq"').replace("Q4_K", "int4-g128")
    return [PLAN.encode(), other.encode()], _file(folder / "plan.toml", read_plan)


def example(model: type[BaseModel]) -> BaseModel:
    """A record with every required field."""
    made: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if field.is_required():
            kind = field.annotation
            is_interval = isinstance(kind, type) and issubclass(kind, Interval)
            made[name] = kind(0.5, 0.25, 0.75) if is_interval else "x" if kind is str else 1  # type: ignore[misc]
    return model.model_validate(made)


def _records(_folder: Path) -> tuple[list[bytes], Run]:
    """All three kinds of sidecars: whatever the bytes are, each reader is given them."""
    side = answer_records.Side(tokens=("a", "b"), seconds=0.5)
    token = answer_records.ForcedToken(text="a", kl=0.5, top_original=(("a", 0.5),), top_quantized=(("b", 0.25),))
    recorded = answer_records.Recorded(
        file="f.gguf",
        reference="f",
        answers=(answer_records.Answer(prompt="p", original=side, quantized=side, first_divergence=1),),
        forced=(answer_records.Forced(text="t", tokens=(token,)),),
    )
    readers = (schema.parse, benchmark.parse, answer_records.parse)
    records = (example(schema.Measurement), example(benchmark.Benchmark), recorded)

    def run(data: bytes) -> None:
        for parse in readers:
            try:
                parse(data, "file").model_dump_json()
            except DitherError:
                continue

    return [record.model_dump_json().encode() for record in records], run


def _evidence_folder(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    names = ("blk.0.attn_q.weight", "blk.0.attn_k.weight")
    hessian = np.eye(8, dtype=np.float32)[None]
    held = [generator.standard_normal((2, 8)).astype(np.float32)]
    group = GroupStatistics(names, np.ones((1, 8), np.float32), np.array([7], np.int64), hessian, held)
    entries = write_groups(folder / "blk.0.npz", [group])
    write_manifest(
        folder,
        {
            "model": "tiny",
            "model_identity": "x",
            "weights_sample": "y",
            "data": {"sha256": "abc"},
            "hessians": True,
            "files": {"blk.0.npz": entries},
            "notes": ["a note"],
        },
    )
    lengths = np.array([3, 1], np.int32)
    write_arrays(folder / "tokens.npz", {"tokens_ST": np.zeros((2, 3), np.int32), "lengths_S": lengths})
    return folder


def _use_evidence(folder: Path) -> None:
    store = EvidenceStore.open(folder)
    store.tokens()
    for tensor in store.tensors[:4]:
        store(tensor)


def _evidence_manifest(folder: Path) -> tuple[list[bytes], Run]:
    _evidence_folder(folder)
    path = folder / "evidence.json"
    return [path.read_bytes()], _file(path, lambda _: _use_evidence(folder))


def _evidence_arrays(folder: Path) -> tuple[list[bytes], Run]:
    _evidence_folder(folder)
    path = folder / "blk.0.npz"
    return [path.read_bytes()], _file(path, lambda _: _use_evidence(folder))


# Chat templates ---------------------------------------------------------------------------------------------

TEMPLATES = [
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{%- set ns = namespace(x=0) -%}{% for m in messages %}{% set ns.x = ns.x + 1 %}{{ m.content | trim }}{% endfor %}",
    "{% macro f(x) %}{{ x | tojson }}{% endmacro %}{{ f(messages[0]) }}{{ raise_exception('no') if not messages }}",
    "{{ ''.__class__.__mro__ }}{{ 'a' * 3 }}{{ strftime_now('%Y') }}{{ messages | length }}",
]


def _template(_folder: Path) -> tuple[list[bytes], Run]:
    """Rendered as the server does it for folders.  (A GGUF's is rendered by llama.cpp in its own process.)"""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from dither.engines.protocol import CHAT
    from dither.engines.transformers import TransformersEngine, template_faults

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<|end|>")
    engine, faults = TransformersEngine(None, tokenizer, 64), template_faults()
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]

    def run(data: bytes) -> None:
        tokenizer.chat_template = data.decode("utf-8", "replace")
        try:
            engine.tokens(CHAT, {"messages": messages})
        except faults as error:
            str(error)

    return [text.encode() for text in TEMPLATES], run


TARGETS = {
    target.name: target
    for target in (
        Target("gguf-header", _gguf_header),
        Target("gguf-model", _gguf_model),
        Target("safetensors", _safetensors),
        Target(
            "config.json",
            _in_checkpoint(
                "config.json",
                CONFIG,
                CONFIG | {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32, "rope_theta": 1e6}},
                CONFIG | {"quantization_config": QUANTIZED},
            ),
            is_json=True,
        ),
        Target("tokenizer.json", _in_checkpoint("tokenizer.json", TOKENIZER), is_json=True),
        Target("tokenizer_config.json", _in_checkpoint("tokenizer_config.json", SETTINGS), is_json=True),
        Target("tokenizer.model", _tokenizer_model),
        Target("imatrix-gguf", _imatrix_gguf),
        Target("imatrix-dat", _imatrix_dat),
        Target("plan", _plan),
        Target("records", _records, is_json=True),
        Target("evidence-manifest", _evidence_manifest, is_json=True),
        Target("evidence-arrays", _evidence_arrays),
        Target("template", _template),
    )
}
