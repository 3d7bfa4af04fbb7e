"""Blocks against transformers: the same logits, the same inputs of every layer, the same gradients.

Legend: S sequences, T tokens, H hidden width, V vocabulary, N tokens of all sequences, R rows, C columns.
"""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families_util import TEXT, random_model, save_model, write_gguf
from hypothesis import given, settings, strategies as st
from test_families import CONFIGS, SMALL, rope
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedModel

import dither
from conftest import write_checkpoint
from dither.errors import DitherError, SourceError, UnsupportedError, UsageError
from dither.formats.ggml import Field, ValueType, f32, string, u32
from dither.models.blocks import Block, Blocks, open_blocks
from dither.models.source import open_model
from dither.types import Floats, Model, Tensor

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

MODULES = {  # transformers' names of what GGUF calls so
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_gate_inp": "mlp.gate",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
FUSED = {**MODULES, "ffn_up": "mlp.gate_up_proj"}  # Phi-3
SHARING = {  # which matrices read one input
    "phi3": [["attn_qkv"], ["attn_output"], ["ffn_up"], ["ffn_down"]],
    "dense": [["attn_q", "attn_k", "attn_v"], ["attn_output"], ["ffn_gate", "ffn_up"], ["ffn_down"]],
    "experts": [["attn_q", "attn_k", "attn_v"], ["attn_output"], ["ffn_gate_inp"]],
}
pytestmark = pytest.mark.usefixtures("one_thread")
Saved = tuple[Path, PreTrainedModel]
Save = Callable[[str], Saved]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """A family's tiny checkpoint, and the network that transformers loads from it."""
    made: dict[str, Saved] = {}

    def save(name: str) -> Saved:
        if name not in made:
            folder = save_model(random_model(CONFIGS[name]), tmp_path_factory.mktemp("checkpoint"))
            made[name] = folder, loaded(folder)
        return made[name]

    return save


def loaded(folder: Path, **settings: Any) -> PreTrainedModel:
    settings = {"attn_implementation": "eager", "dtype": torch.float32, **settings}
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def some_tokens(sequences: int = 2, length: int = 70, vocabulary: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, vocabulary, (sequences, length), generator=generator)


def hidden_after(blocks: Blocks, tokens_ST: torch.Tensor, count: int, **settings: Any) -> torch.Tensor:
    hidden_STH = blocks.embed(tokens_ST, **settings)
    for index in range(count):
        hidden_STH = blocks.load(index, **settings)(hidden_STH)
    return hidden_STH


def logits_of(blocks: Blocks, tokens_ST: torch.Tensor, **settings: Any) -> torch.Tensor:
    return blocks.head(**settings)(hidden_after(blocks, tokens_ST, blocks.count, **settings))


def expected_logits(model: PreTrainedModel, tokens_ST: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens_ST).logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    """The largest difference, relative to the largest number."""
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= relative * float(expected.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name: str, saved: Save, tmp_path: Path) -> None:
    folder, model = saved(name)
    within_ST, tokens_ST = some_tokens(1, 16), some_tokens()  # within a local layer's window, and beyond
    blocks = open_blocks(open_model(folder))
    assert_close(logits_of(blocks, within_ST), expected_logits(model, within_ST))
    by_blocks = logits_of(blocks, tokens_ST)
    assert_close(by_blocks, expected_logits(model, tokens_ST))
    from_gguf = open_blocks(open_model(write_gguf(open_model(folder), tmp_path / "model.gguf")))
    assert from_gguf.notes == ()
    assert_close(logits_of(from_gguf, tokens_ST), by_blocks)


@pytest.mark.parametrize("length", [100, 300])
def test_longrope_has_factors_for_short_and_for_long_sequences(length: int, tmp_path: Path) -> None:
    factors = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
    config = Phi3Config(
        **SMALL | {"max_position_embeddings": 1024}, original_max_position_embeddings=256, **rope("longrope", **factors)
    )
    folder = save_model(random_model(config), tmp_path)
    tokens_ST = some_tokens(1, length)
    actual = logits_of(open_blocks(open_model(folder)), tokens_ST)
    assert_close(actual, expected_logits(loaded(folder), tokens_ST))


def test_a_quantized_gguf_computes_what_transformers_reads_from_it(saved: Save, tmp_path: Path) -> None:
    """transformers has a reader of GGUF of its own: other names, another permutation, other decoders."""
    folder, _ = saved("llama")
    dither.quantize(folder, "Q8_0", tmp_path / "model.gguf")
    theirs = loaded(tmp_path, gguf_file="model.gguf")
    tokens_ST = some_tokens()
    quantized = open_model(tmp_path / "model.gguf")
    expected = expected_logits(theirs, tokens_ST)
    assert_close(logits_of(open_blocks(quantized), tokens_ST), expected)
    original = open_blocks(open_model(folder))
    assert_close(logits_of(original, tokens_ST, weights=quantized), expected)
    assert float((logits_of(original, tokens_ST) - expected).abs().max()) > 1e-3


def test_a_tie_is_that_of_the_weights(tmp_path: Path) -> None:
    tied = open_model(write_checkpoint(tmp_path / "tied", tied=True))
    untied = open_model(write_checkpoint(tmp_path / "untied", tied=False, seed=1))
    tokens_ST = some_tokens()
    assert open_blocks(tied).head().names == ("token_embd.weight",)
    assert open_blocks(tied).head(untied).names == ("output.weight",)
    expected = expected_logits(loaded(tmp_path / "untied"), tokens_ST)
    assert_close(logits_of(open_blocks(tied), tokens_ST, weights=untied), expected)


def test_the_bundled_model_has_the_loss_that_transformers_computes() -> None:
    folder = Path(dither.__file__).parent / "demo_model"
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    tokens_ST = torch.tensor([ids[:128], ids[128:256]])
    with torch.no_grad():
        expected = float(loaded(folder)(tokens_ST, labels=tokens_ST).loss)
    logits_STV = logits_of(open_blocks(open_model(folder)), tokens_ST)
    loss = functional.cross_entropy(logits_STV[:, :-1].flatten(0, 1), tokens_ST[:, 1:].flatten())
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_half_the_precision_costs_no_more_than_in_transformers(saved: Save) -> None:
    folder, model = saved("llama 3.1")
    blocks = open_blocks(open_model(folder), dtype="bfloat16")
    assert blocks.load(0)(blocks.embed(some_tokens())).dtype == torch.bfloat16
    exact, actual = expected_logits(model, some_tokens()), logits_of(blocks, some_tokens())
    theirs = expected_logits(AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16"), some_tokens())
    assert actual.dtype == torch.float32
    assert float((actual - exact).norm()) < 1.2 * float((theirs - exact).norm())


def test_sequences_do_not_see_each_other_nor_what_follows(saved: Save) -> None:
    for name in ("llama", "gemma 2", "gemma 3", "qwen3 moe"):
        blocks = open_blocks(open_model(saved(name)[0]))
        tokens_ST = some_tokens(3)
        changed_ST = tokens_ST.clone()
        changed_ST[1] = tokens_ST[1].flip(0)
        changed_ST[2, 40:] = 7
        before, after = (hidden_after(blocks, ids_ST, blocks.count) for ids_ST in (tokens_ST, changed_ST))
        assert_close(after[0], before[0], 1e-6)
        assert_close(after[2, :40], before[2, :40], 1e-6)
        for row, start in ((1, 0), (2, 40)):
            assert float((after[row, start:] - before[row, start:]).abs().max()) > 0.1


def inputs_of(model: PreTrainedModel, names: list[str], tokens_ST: torch.Tensor) -> dict[str, torch.Tensor]:
    """What plain hooks see the modules read."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: found.update({name: inputs[0].detach()})
        )
        for name in names
    ]
    expected_logits(model, tokens_ST)
    for hook in hooks:
        hook.remove()
    return found


def watched(block: Block, hidden_STH: torch.Tensor) -> tuple[torch.Tensor, list[tuple[Any, ...]]]:
    calls: list[tuple[Any, ...]] = []
    output_STH = block.watch(hidden_STH, lambda *call: calls.append(call))
    return output_STH, calls


@pytest.mark.parametrize("name", CONFIGS)
def test_watching_sees_what_hooks_see(name: str, saved: Save) -> None:
    folder, model = saved(name)
    blocks = open_blocks(open_model(folder))
    tokens_ST = some_tokens()
    hidden_STH = hidden_after(blocks, tokens_ST, 1)
    block = blocks.load(1)
    output_STH, calls = watched(block, hidden_STH)
    assert torch.equal(output_STH, block(hidden_STH))
    kind = "experts" if "moe" in name or "mixtral" in name else "dense"
    groups = SHARING.get(blocks.model.arch if blocks.model.arch == "phi3" else kind)
    modules = FUSED if blocks.model.arch == "phi3" else MODULES
    dense = [call for call in calls if call[3] is None]
    assert [list(names) for names, *_ in dense] == [[f"blk.1.{leaf}.weight" for leaf in g] for g in groups]
    expected = inputs_of(model, [f"model.layers.1.{modules[group[0]]}" for group in groups], tokens_ST)
    for (_, x_NC, position_N, _), group in zip(dense, groups, strict=True):
        x_STC = expected[f"model.layers.1.{modules[group[0]]}"]
        assert_close(x_NC, x_STC.reshape(-1, x_STC.shape[-1]))
        assert position_N.tolist() == list(range(tokens_ST.numel()))
    assert {name for call in calls for name in call[0]} == set(block.names)


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
def test_experts_see_the_tokens_that_a_slow_loop_routes_to_them(name: str, saved: Save) -> None:
    folder, model = saved(name)
    blocks = open_blocks(open_model(folder))
    tokens_ST = some_tokens()
    _, calls = watched(blocks.load(1), hidden_after(blocks, tokens_ST, 1))
    x_NC = inputs_of(model, ["model.layers.1.mlp"], tokens_ST)["model.layers.1.mlp"].flatten(0, 1).double()
    experts = model.get_submodule("model.layers.1.mlp.experts")
    router_EC = model.get_parameter("model.layers.1.mlp.gate.weight").detach().double()
    expected: dict[tuple[str, int], dict[int, torch.Tensor]] = defaultdict(dict)
    for token, x_C in enumerate(x_NC):
        for expert in torch.topk(router_EC @ x_C, 2).indices.tolist():
            gate_up_RC = experts.gate_up_proj[expert].detach().double()
            gate, up = (gate_up_RC @ x_C).chunk(2)
            expected["blk.1.ffn_gate_exps.weight", expert][token] = x_C
            expected["blk.1.ffn_down_exps.weight", expert][token] = gate * torch.sigmoid(gate) * up
    routed = [call for call in calls if call[3] is not None]
    pair = ("blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight")
    assert {names for names, *_ in routed} == {pair, ("blk.1.ffn_down_exps.weight",)}
    assert len(routed) == len(expected)
    for names, seen_NC, position_N, expert in routed:
        rows = expected[names[0], expert]
        assert sorted(position_N.tolist()) == sorted(rows)
        assert_close(seen_NC.double(), torch.stack([rows[token] for token in position_N.tolist()]))


def test_an_expert_without_tokens_is_not_reported(saved: Save) -> None:
    blocks = open_blocks(open_model(saved("mixtral")[0]))
    block = blocks.load(0)
    _, calls = watched(block, blocks.embed(torch.tensor([[5]])))
    assert len({call[3] for call in calls if call[3] is not None}) == 2
    assert all(len(call[1]) == 1 and call[2].tolist() == [0] for call in calls)


def test_watching_the_head(saved: Save) -> None:
    folder, model = saved("gemma 3")
    blocks = open_blocks(open_model(folder))
    calls: list[tuple[Any, ...]] = []
    blocks.head().watch(hidden_after(blocks, some_tokens(), blocks.count), lambda *call: calls.append(call))
    [(names, x_NC, position_N, expert)] = calls
    assert names == ("token_embd.weight",) and expert is None and len(position_N) == len(x_NC)
    assert_close(x_NC, inputs_of(model, ["lm_head"], some_tokens())["lm_head"].flatten(0, 1))


def stored(parameter: torch.Tensor, leaf: str) -> torch.Tensor:
    """A parameter, or its gradient, as GGUF stores it: Llama's q and k have rotated pairs side by side."""
    heads = {"attn_q": 4, "attn_k": 2}.get(leaf)
    if heads is None:
        return parameter
    by_half = parameter.reshape(heads, 2, -1, parameter.shape[-1])
    return by_half.swapaxes(1, 2).reshape(parameter.shape)


def reference_gradients(
    model: PreTrainedModel, parameters: list[str], tokens_ST: torch.Tensor, probe_STH: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Of the probe's product with layer 1's output, through the plain network."""
    outputs: list[torch.Tensor] = []
    hook = model.get_submodule("model.layers.1").register_forward_hook(lambda *call: outputs.append(call[2]))
    model(tokens_ST)
    hook.remove()
    found = [model.get_parameter(f"model.layers.1.{name}") for name in parameters]
    return torch.autograd.grad(outputs[0], found, probe_STH)


def test_gradients_reach_replaced_weights(saved: Save) -> None:
    folder, model = saved("llama")
    blocks = open_blocks(open_model(folder))
    tokens_ST = some_tokens()
    with torch.inference_mode():  # what blocks keep for later calls must not stand in the way of gradients
        hidden_STH = hidden_after(blocks, tokens_ST, 1)
        block = blocks.load(1)
    hidden_STH = hidden_STH.clone()
    probe_STH = torch.randn(hidden_STH.shape, generator=torch.Generator().manual_seed(0))
    leaves = [name.split(".")[2] for name in block.names]
    weights = {name: block.weight(name).requires_grad_() for name in block.names}
    block(hidden_STH, weights).backward(probe_STH)
    expected = reference_gradients(model, [f"{MODULES[leaf]}.weight" for leaf in leaves], tokens_ST, probe_STH)
    for name, leaf, gradient in zip(block.names, leaves, expected, strict=True):
        found = weights[name].grad
        assert found is not None
        assert_close(found, stored(gradient, leaf), 1e-4)
    assert not block(hidden_STH).requires_grad
    assert not block(hidden_STH, {name: w.detach() for name, w in weights.items()}).requires_grad


def test_gradients_reach_one_stack_of_experts_that_share_a_parameter(saved: Save) -> None:
    folder, model = saved("mixtral")
    blocks = open_blocks(open_model(folder))
    tokens_ST = some_tokens()
    hidden_STH = hidden_after(blocks, tokens_ST, 1)
    block = blocks.load(1)
    probe_STH = torch.randn(hidden_STH.shape, generator=torch.Generator().manual_seed(0))
    up = block.weight("blk.1.ffn_up_exps.weight").requires_grad_()
    block(hidden_STH, {"blk.1.ffn_up_exps.weight": up}).backward(probe_STH)
    [expected] = reference_gradients(model, ["mlp.experts.gate_up_proj"], tokens_ST, probe_STH)
    assert up.grad is not None
    assert_close(up.grad, expected[:, SMALL["intermediate_size"] :], 1e-4)


@pytest.mark.parametrize("name", ["llama with head_dim, biases, tied", "mixtral", "gemma 3", "phi-3"])
def test_a_weight_is_read_and_set_as_the_source_has_it(name: str, saved: Save) -> None:
    model = open_model(saved(name)[0])
    by_name = {tensor.name: tensor for tensor in model.tensors}
    blocks = open_blocks(model)
    hidden_STH = hidden_after(blocks, some_tokens(), 1)
    block, fresh = blocks.load(1), blocks.load(1)
    generator = np.random.default_rng(0)
    before = fresh(hidden_STH)
    for tensor in by_name.values():
        if tensor.name.startswith("blk.1."):
            w = tensor.read(0, tensor.rows).reshape(tensor.shape)
            np.testing.assert_allclose(block.weight(tensor.name).numpy(), w, rtol=0, atol=3e-7)
            changed = w * generator.uniform(0.9, 1.1, w.shape).astype(np.float32)
            replaced = fresh(hidden_STH, {tensor.name: torch.from_numpy(changed)})
            block.set_weight(tensor.name, changed)
            np.testing.assert_allclose(block.weight(tensor.name).numpy(), changed, rtol=0, atol=3e-7)
            assert_close(replaced, block(hidden_STH), 1e-6)
            assert not torch.equal(replaced, before)
            block.set_weight(tensor.name, torch.from_numpy(w))
    assert torch.equal(fresh(hidden_STH), before)
    assert block.names == tuple(
        tensor.name for tensor in model.tensors if tensor.name.startswith("blk.1.") and len(tensor.shape) > 1
    )


def alive() -> int:
    """Bytes of all tensors that have memory."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # By exact type: libraries that were imported leave stand-ins behind that have no memory either.
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type != "meta":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_one_block_is_in_memory_at_a_time(tmp_path: Path) -> None:
    model = open_model(write_checkpoint(tmp_path / "model", layers=12))
    block_bytes = 4 * sum(tensor.size for tensor in model.tensors if tensor.name.startswith("blk.0."))
    before = alive()
    blocks = open_blocks(model)
    hidden_STH = blocks.embed(some_tokens(1, 8))
    assert alive() - before < block_bytes / 20
    for index in range(blocks.count):
        block = blocks.load(index)
        hidden_STH = block(hidden_STH)
        if index % 5 == 1:
            assert block_bytes <= alive() - before < 1.05 * block_bytes
        del block
    assert alive() - before < block_bytes / 20


def test_the_embedding_reads_only_the_rows_of_its_tokens(checkpoint: Path) -> None:
    model = open_model(checkpoint)
    spans: list[tuple[int, int]] = []

    def spied(tensor: Tensor) -> Tensor:
        def read(start: int, stop: int) -> Floats:
            spans.append((start, stop))
            return tensor.read(start, stop)

        return dataclasses.replace(tensor, read=read) if tensor.name == "token_embd.weight" else tensor

    spying = dataclasses.replace(model, tensors=tuple(map(spied, model.tensors)))
    tokens_ST = torch.tensor([[200, 3, 5], [200, 201, 5]])
    hidden_STH = open_blocks(spying).embed(tokens_ST)
    assert spans == [(3, 6), (200, 202)]
    w_VH = next(tensor for tensor in model.tensors if tensor.name == "token_embd.weight").read(0, 320)
    np.testing.assert_array_equal(hidden_STH.numpy(), w_VH[tokens_ST.numpy()])


def changed(model: Model, *, without: str = "", added: Tensor | None = None, **metadata: Field | None) -> Model:
    """A model with a tensor left out or added, and metadata (dots written __) changed or left out: as in a GGUF, where
    nothing but metadata says what the network is."""
    tensors = [tensor for tensor in model.tensors if tensor.name != without]
    fields = {**model.metadata, **{f"llama.{key.replace('__', '.')}": field for key, field in metadata.items()}}
    return dataclasses.replace(
        model,
        tensors=(*tensors, *([added] if added else [])),
        metadata={key: field for key, field in fields.items() if field is not None},
        config={},
    )


def a_tensor(name: str, *shape: int) -> Tensor:
    return Tensor(name, shape, "F32", 4, lambda start, stop: np.zeros((stop - start, shape[-1]), np.float32))


def test_nothing_is_missing_or_left_over_in_silence(checkpoint: Path) -> None:
    model = open_model(checkpoint)
    for name in ("blk.1.attn_k.weight", "token_embd.weight", "output_norm.weight", "blk.0.ffn_norm.weight"):
        with pytest.raises(SourceError, match=rf"tensor {name}: is missing"):
            open_blocks(changed(model, without=name))
    for name in ("blk.1.attn_q.bias", "blk.0.attn_sinks.weight", "blk.0.ffn_gate_exps.weight", "extra"):
        with pytest.raises(DitherError, match=name.replace("blk.1", "blk.0")):
            open_blocks(changed(model, added=a_tensor(name, 256)))
    with pytest.raises(SourceError, match=r"block_count: is 2, but there are tensors of 3 layers"):
        open_blocks(changed(model, added=a_tensor("blk.2.attn_norm.weight", 256)))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"attention__head_count": u32(3)}, r"hidden size .* not a multiple|attn_q\.weight: has"),
        ({"attention__head_count_kv": u32(4)}, r"attn_k\.weight: has shape \[128, 256\], but"),
        ({"embedding_length": u32(512)}, r"token_embd\.weight: has shape"),
        ({"attention__head_count": u32(0)}, r"attention\.head_count: is 0"),
        ({"block_count": u32(2**31)}, r"block_count: is 2147483648"),
        ({"attention__head_count_kv": Field(ValueType.ARRAY, [2, 1], ValueType.UINT32)}, "layer to layer"),
        ({"attention__layer_norm_rms_epsilon": f32(float("nan"))}, "rms_epsilon: is nan"),
        ({"attention__layer_norm_rms_epsilon": None}, "rms_epsilon: is missing"),
        ({"attention__value_length": u32(32)}, r"value_length: is 32, that of keys 64"),
        ({"rope__dimension_count": u32(32)}, r"dimension_count: is 32 of a head's 64"),
        ({"rope__scaling__type": string("mrope")}, r"scaling\.type: is mrope"),
        ({"rope__scaling__type": string("yarn")}, r"scaling\.factor: is missing"),
    ],
)
def test_metadata_that_makes_no_network_is_an_error(
    metadata: dict[str, Field | None], message: str, checkpoint: Path
) -> None:
    with pytest.raises(DitherError, match=message):
        open_blocks(changed(open_model(checkpoint), **metadata))


JUNK = st.one_of(
    st.integers(-(2**63), 2**64),
    st.integers(0, 600),
    st.floats(),
    st.booleans(),
    st.text(max_size=8),
    st.lists(st.integers(0, 300), max_size=3),
)


@settings(max_examples=100)
@given(data=st.data())
def test_junk_in_the_metadata_is_an_error_of_ours(data: st.DataObject, checkpoint: Path) -> None:
    model = open_model(checkpoint)
    more = ("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length")
    keys = [key for key in model.metadata if key.startswith("llama.")] + [f"llama.{key}" for key in more]
    junk = {key: Field(ValueType.UINT32, data.draw(JUNK)) for key in data.draw(st.sets(st.sampled_from(keys)))}
    try:
        open_blocks(dataclasses.replace(model, metadata={**model.metadata, **junk}, config={}))
    except DitherError as error:
        assert len(str(error)) < 1000


def test_what_is_not_taken_into_account_is_a_note(checkpoint: Path) -> None:
    blocks = open_blocks(changed(open_model(checkpoint), logit_scale=f32(2.0)))
    assert blocks.notes == ("metadata llama.logit_scale is not taken into account",)


def test_requests_that_make_no_sense(checkpoint: Path, saved: Save) -> None:
    model = open_model(checkpoint)
    blocks = open_blocks(model)
    block = blocks.load(0)
    hidden_STH = blocks.embed(torch.tensor([[1, 2]]))
    with pytest.raises(UsageError, match="token 320: is outside the model's vocabulary of 320"):
        blocks.embed(torch.tensor([[1, 320]]))
    with pytest.raises(UsageError, match="token -1: is outside"):
        blocks.embed(torch.tensor([[1, -1]]))
    with pytest.raises(UsageError, match="block 2: is not one of the model's 2"):
        blocks.load(2)
    with pytest.raises(UsageError, match=r"blk\.1\.attn_q\.weight: is not part of block 0"):
        block(hidden_STH, {"blk.1.attn_q.weight": torch.zeros(256, 256)})
    with pytest.raises(UsageError, match=r"attn_k\.weight: is given as \[256, 256\], but has shape \[128"):
        block(hidden_STH, {"blk.0.attn_k.weight": torch.zeros(256, 256)})
    with pytest.raises(UsageError, match=r"attn_k\.weight: is given as"):
        block.set_weight("blk.0.attn_k.weight", np.zeros((128, 255), np.float32))
    with pytest.raises(UsageError, match="is of architecture qwen2, not llama"):
        blocks.load(0, open_model(saved("qwen2")[0]))
    with pytest.raises(SourceError, match=r"token_embd\.weight: has shape \[300, 64\]"):
        blocks.head(open_model(saved("llama")[0]))
    with pytest.raises(UsageError, match="dtype float8"):
        open_blocks(model, dtype="float8")
    with pytest.raises(UsageError, match="device abacus"):
        open_blocks(model, device="abacus")
    with pytest.raises(UnsupportedError, match="architecture mamba: is of no family that is known here"):
        open_blocks(dataclasses.replace(model, arch="mamba"))


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_torch_the_user_is_told_what_to_install(missing: str, checkpoint: Path) -> None:
    code = f"""
import sys
sys.modules[{missing!r}] = None
from dither.models.source import open_model
from dither.models.blocks import open_blocks
from dither.errors import UsageError
try:
    open_blocks(open_model({str(checkpoint)!r}))
except UsageError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert f"needs {missing}, which is not installed. pip install 'dither[calibrate]'" in found.stdout
