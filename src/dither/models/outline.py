"""A model's outline: names, shapes and metadata of what its GGUF would hold, and no way to read a weight.

Judging a model needs less than converting it: no tokenizer, and no certainty that llama.cpp computes it
as it should.  So a checkpoint is outlined from its headers and config.json alone.  Where a family of ours
knows it, its tables say exactly which tensors there will be.  Where none does, names are recognized by
what nearly every checkpoint calls its matrices, and config.json's usual keys become metadata; what is
not recognized keeps its name, counts with its bytes, and is said in a note.

Multi-head latent attention (DeepSeek): llama.cpp keeps the joint projection kv_b as two tensors per head,
k_b transposed (its rows are then as short as a head), so that only the compressed vector is cached.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dither.errors import DitherError, UnsupportedError
from dither.formats.ggml import Field, ValueType, array, u32
from dither.formats.tensor_names import OUTPUT, is_expert_stack
from dither.models.arch import convert, family_of
from dither.models.arch.conversion import build_tensors, matched, model_of
from dither.models.arch.settled import settle_output
from dither.models.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from dither.models.contradictions import note
from dither.models.json_object import JsonObject
from dither.types import Floats, Model, Tensor

_ARCHS = {"deepseek_v3": "deepseek2", "deepseek_v2": "deepseek2", "gpt_oss": "gpt-oss"}  # llama.cpp's names
_GGUF = re.compile(
    r"(blk\.\d+\.|[a-z]+\.blk\.\d+\.|(per_layer_)?(token_embd|model_proj|proj_norm)|output|rope_|dec\.|enc\.|token_types|position_embd|altup_|cls|dense_)"
)
_DROPPED = re.compile(r"(^|\.)(vision_tower|vision_model|visual|multi_modal_projector|audio_tower)\.")
_PREFIX = re.compile(r"^(?:language_model\.|model\.|text_model\.|transformer\.)+")
_LAYER = re.compile(r"^(?:layers|h|blocks)\.(\d{1,9})\.(.+)$")
_MOST = 2**31 - 1

# What matrices are called inside a layer → GGUF's name; # is an expert's number.
_NAMES = """
(self_attn|attention|attn)\\.q_proj -> attn_q
(self_attn|attention|attn)\\.k_proj -> attn_k
(self_attn|attention|attn)\\.v_proj -> attn_v
(self_attn|attention|attn)\\.(o_proj|out_proj|dense) -> attn_output
(self_attn|attention|attn)\\.(qkv_proj|query_key_value) -> attn_qkv
self_attn\\.q_a_proj -> attn_q_a
self_attn\\.q_b_proj -> attn_q_b
self_attn\\.kv_a_proj_with_mqa -> attn_kv_a_mqa
self_attn\\.kv_b_proj -> attn_kv_b
(mlp|block_sparse_moe|feed_forward)\\.experts\\.#\\.(gate_proj|w1) -> ffn_gate_exps
(mlp|block_sparse_moe|feed_forward)\\.experts\\.#\\.(up_proj|w3) -> ffn_up_exps
(mlp|block_sparse_moe|feed_forward)\\.experts\\.#\\.(down_proj|w2) -> ffn_down_exps
mlp\\.shared_experts?\\.gate_proj -> ffn_gate_shexp
mlp\\.shared_experts?\\.up_proj -> ffn_up_shexp
mlp\\.shared_experts?\\.down_proj -> ffn_down_shexp
(mlp|block_sparse_moe|feed_forward)\\.(gate|router) -> ffn_gate_inp
(mlp|feed_forward)\\.(gate_proj|w1) -> ffn_gate
(mlp|feed_forward)\\.(up_proj|w3) -> ffn_up
(mlp|feed_forward)\\.(down_proj|w2) -> ffn_down
"""
_RULES = [
    (re.compile(left.strip().replace("#", r"\d+")), right.strip())
    for left, right in (line.split("->") for line in _NAMES.strip().splitlines())
]
_TOP = {"embed_tokens": "token_embd", "wte": "token_embd", "lm_head": "output", "norm": "output_norm"}

# GGUF key <- the first of these that config.json has
_KEYS = {
    "block_count": ("num_hidden_layers", "n_layer"),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size", "n_embd"),
    "feed_forward_length": ("intermediate_size", "ffn_dim"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads", "n_head"),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("v_head_dim", "head_dim"),
    "attention.sliding_window": ("sliding_window",),
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "expert_count": ("n_routed_experts", "num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok", "moe_topk"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "leading_dense_block_count": ("first_k_dense_replace",),
    "ssm.conv_kernel": ("conv_kernel", "d_conv", "mamba_d_conv"),
    "ssm.state_size": ("state_size", "ssm_state_size", "mamba_d_state"),
    "ssm.group_count": ("n_groups", "mamba_n_groups"),
}


def outline(source: Path, origin: str = "", weights: Path | None = None) -> Model:
    """The model in a checkpoint's folder; all that llama.cpp would be given where a tokenizer is there too.

    Raises SourceError or FormatError where headers or config.json cannot be read.
    """
    model = _converted(open_checkpoint(source, weights))
    return replace(model, origin=origin or model.origin)


def _converted(checkpoint: Checkpoint) -> Model:
    """By the family's tables where one has it: with the tokenizer, else without; else by the usual names."""
    try:
        return convert(checkpoint, readable=False)
    except DitherError:
        pass  # a tokenizer that is missing or unknown changes no size; what else is wrong shows below
    try:
        return _of_family(checkpoint)
    except UnsupportedError as error:
        return _recognized(checkpoint, error)


def _of_family(checkpoint: Checkpoint) -> Model:
    match = matched(checkpoint, family_of(checkpoint.config), readable=False)
    notes = [*match.notes]
    if match.family.crop_embedding:
        notes.append("without the tokenizer, rows of the embedding that have no token are counted too")
    notes += settle_output(match.family, match.config, match.targets, readable=False)
    tensors = build_tensors(match, match.embedding_rows)
    name = checkpoint.folder.resolve().name
    return model_of(checkpoint, name, match.family.arch, match.hyperparameters(), tensors, notes)


def _recognized(checkpoint: Checkpoint, why: UnsupportedError) -> Model:
    whole = JsonObject(checkpoint.config, "config.json")
    config = JsonObject({**whole, **whole.section("text_config")}, "config.json")
    kind = config.text("model_type") or "unknown"
    arch = _ARCHS.get(kind, kind.replace("_", "-"))
    metadata = {f"{arch}.{key}": value for key, value in _metadata(config).items()}
    tensors, strange, dropped, extra = _tensors(checkpoint, config)
    notes = [*checkpoint.notes, f"Dither cannot convert it ({why.thing}: {why.reason.partition(';')[0]})"]
    notes.append("sizes are recognized from the usual names of tensors, not from a family's tables")
    if strange:
        notes.append(f"{len(strange)} tensors are not recognized and counted as they are: {strange[0]}, …")
    if extra:
        notes.append(f"{extra} tensors of layers that only predict further tokens are left out")
    if config.get("tie_word_embeddings") and any(_target(name) == OUTPUT for name in checkpoint.tensors):
        notes.append(note("tied, unread head"))
    if dropped:
        notes.append(f"{dropped} tensors that see or hear are left out: only the text model is judged")
    return model_of(checkpoint, checkpoint.folder.resolve().name, arch, metadata, tensors, notes)


def _metadata(config: JsonObject) -> dict[str, Field]:
    """config.json's usual keys under GGUF's names.  Raises FormatError where a number is none."""
    found: dict[str, Field] = {}
    for key, sources in _KEYS.items():
        name = next((name for name in sources if config.get(name) is not None), None)
        if name is not None:
            found[key] = _whole_or_list(config, name)
    if config.get("use_sliding_window") is False:
        found.pop("attention.sliding_window", None)
    kinds = config.get("layer_types")
    if "attention.sliding_window" in found and isinstance(kinds, list) and kinds:
        local = [int(kind == "sliding_attention") for kind in kinds]
        found["attention.sliding_window_pattern"] = array(ValueType.UINT32, local)
    rank, rotated = config.whole("kv_lora_rank", most=_MOST), config.whole("qk_rope_head_dim", most=_MOST)
    if rank and rotated:
        found["attention.key_length_mla"] = u32(_needed(config, "qk_nope_head_dim") + rotated)
        found["attention.key_length"], found["attention.head_count_kv"] = u32(rank + rotated), u32(1)
        found["attention.value_length"] = u32(rank)
    if "ssm.state_size" in found:
        wide = config.whole("intermediate_size" if "d_inner" not in config else "d_inner", most=_MOST)
        found["ssm.inner_size"] = u32(wide or 2 * _needed(config, "hidden_size"))
    return found


def _whole_or_list(config: JsonObject, name: str) -> Field:
    values = config[name] if isinstance(config[name], list) else [config[name]]
    if not all(type(value) is int and 0 <= value <= _MOST for value in values):
        raise config.wrong(name, f"a whole number up to {_MOST}, or a list of them")
    return array(ValueType.UINT32, values) if isinstance(config[name], list) else u32(config[name])


def _needed(config: JsonObject, name: str) -> int:
    config.given(name)
    return config.whole(name, 1, _MOST) or 0


def _tensors(checkpoint: Checkpoint, config: JsonObject) -> tuple[tuple[Tensor, ...], list[str], int, int]:
    """What the file would hold, the names that no rule knows, and how many tensors are left out: of other
    senses than reading, and of layers past the last."""
    groups: dict[str, list[StoredTensor]] = defaultdict(list)
    strange: list[str] = []
    dropped = extra = 0
    tied = bool(config.get("tie_word_embeddings"))
    layers = config.whole("num_hidden_layers") or 2**31
    for name, stored in checkpoint.tensors.items():
        inside = _LAYER.match(_PREFIX.sub("", name))
        if _DROPPED.search(name):
            dropped += 1
        elif inside and int(inside[1]) >= layers:
            extra += 1
        else:
            target = _target(name)
            if target is None:
                strange.append(name)
            if not (tied and target == OUTPUT):
                groups[target or name].append(stored)
    built = [tensor for name, found in groups.items() for tensor in _built(name, found, config)]
    return tuple(built), strange, dropped, extra


def _target(name: str) -> str | None:
    short = _PREFIX.sub("", name)
    stem, _, end = short.rpartition(".")
    if not stem:
        stem, end = short, "weight"
    if stem in _TOP:
        return f"{_TOP[stem]}.{end}"
    inside = _LAYER.match(short)
    if not inside:
        return None
    layer, rest = inside[1], inside[2]
    stem, _, end = rest.rpartition(".")
    norm = stem.replace(".", "_") if "norm" in stem else None
    kind = next((target for pattern, target in _RULES if pattern.fullmatch(stem)), norm)
    return f"blk.{layer}.{kind}.{end}" if kind else None


def _built(name: str, found: list[StoredTensor], config: JsonObject) -> Iterator[Tensor]:
    first, stored = found[0], sum(tensor.nbytes for tensor in found)
    if not name.endswith("attn_kv_b.weight") or not config.get("qk_nope_head_dim"):
        shape = (len(found), *first.shape) if is_expert_stack(name) else first.shape
        yield Tensor(name, shape, first.dtype, stored, _unreadable)
        return
    rank = first.columns
    plain, heads, value = (_needed(config, key) for key in ("qk_nope_head_dim", "num_attention_heads", "v_head_dim"))
    keys, values = name.replace("attn_kv_b", "attn_k_b"), name.replace("attn_kv_b", "attn_v_b")
    share = int(first.nbytes * (plain / (plain + value)))
    yield Tensor(keys, (heads, rank, plain), first.dtype, share, _unreadable)
    yield Tensor(values, (heads, value, rank), first.dtype, first.nbytes - share, _unreadable)


def is_ours(name: str) -> bool:
    """Whether a tensor's name is GGUF's: others were not recognized.

    >>> is_ours("blk.3.attn_q.weight"), is_ours("model.layers.3.mixer.A_log")
    (True, False)
    """
    return bool(_GGUF.match(name))


def _unreadable(_start: int, _stop: int) -> Floats:
    raise UnsupportedError("an outline", "has no weights to read", "Open the model with open_model.")
