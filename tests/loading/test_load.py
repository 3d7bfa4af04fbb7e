"""`dither.load` against transformers' network of decoded weights, and against what bitsandbytes makes.

Legend: S sequences, T tokens, R rows, C columns.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families_util import random_model, save_model
from safetensors.numpy import load_file, save_file
from test_families import CONFIGS
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import dither
from conftest import BUNDLED
from dither.codecs import codec
from dither.errors import SourceError, UnsupportedError, UsageError
from dither.loading import int4
from dither.loading.int4 import Int4Linear
from dither.loading.linear import Grid, QuantizedLinear, QuantizedStack
from dither.loading.methods import METHODS
from dither.models.source import open_model
from dither.solvers import find_solver

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

OURS = list(METHODS)
EACH = [pytest.param(to, marks=pytest.mark.slow) if to == "hqq" else to for to in OURS]  # it takes seconds
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            made[name] = save_model(random_model(CONFIGS[name]), tmp_path_factory.mktemp("checkpoint"))
        return made[name]

    return save


def plain(source: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="eager").eval()


def rounded(w: torch.Tensor, to: str, group: int) -> torch.Tensor:
    """A matrix, or a stack of them, as the codec that `to` stands for decodes it."""
    method = METHODS[to]
    w_RC = w.detach().float().numpy().reshape(-1, w.shape[-1])
    c = codec(method.codec_name(group), w_RC.shape[1])
    decoded_RC = c.decode(find_solver(method.solver)(w_RC, c, None).raw_RN)
    return torch.from_numpy(decoded_RC).view(w.shape)


def with_decoded(model: PreTrainedModel, to: str, group: int = 64) -> PreTrainedModel:
    """transformers' own model, every matrix of its blocks replaced by what the codec makes of it."""
    for name, parameter in model.model.layers.named_parameters():
        if any(matrix in name for matrix in MATRICES) and parameter.dim() > 1:
            parameter.data = rounded(parameter.data, to, group).to(parameter.dtype)
    return model


def tokens(length: int = 40, vocabulary: int = 300) -> torch.Tensor:
    return torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(3))


def logits(model: nn.Module, tokens_ST: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens_ST).logits.float()


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= relative * float(expected.abs().max())


@pytest.mark.parametrize("to", EACH)
def test_logits_are_those_of_the_decoded_weights(to: str) -> None:
    loaded = dither.load(BUNDLED, to, dtype="float32", backend="dither")
    assert_close(logits(loaded, tokens()), logits(with_decoded(plain(BUNDLED), to), tokens()))
    assert loaded.dither["layers"] == 28
    assert set(loaded.dither["by_layer"].values()) == {"dither"}
    assert not loaded.dither["notes"]


@pytest.mark.parametrize("to", ["int4", "hqq"])
def test_torchs_kernel_computes_what_is_decoded(to: str) -> None:
    """In bfloat16, of which the decoded model makes as many roundings."""
    loaded = dither.load(BUNDLED, to, dtype="bfloat16")
    assert set(loaded.dither["by_layer"].values()) == {"torch"} and not loaded.dither["notes"]
    layers = [module for module in loaded.modules() if isinstance(module, Int4Linear)]
    assert len(layers) == 28 and all(layer.agrees() for layer in layers)
    reference = plain(BUNDLED).to(torch.bfloat16)
    for name, layer in loaded.named_modules():
        if isinstance(layer, Int4Linear):
            reference.get_submodule(name).weight.data = layer.dequantize(torch.bfloat16)
    found, expected = logits(loaded, tokens()), logits(reference, tokens())
    exact = logits(reference.float(), tokens())
    assert (found - exact).square().mean() < 4 * (expected - exact).square().mean()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_put_together_as_transformers_does(name: str, folder_of: Callable[[str], Path]) -> None:
    """Permuted and fused rows, biases, experts, scaled embeddings, frequencies of the rotary embedding."""
    folder = folder_of(name)
    loaded = dither.load(folder, "int8", dtype="float32", backend="dither")
    expected = logits(with_decoded(plain(folder), "int8"), tokens())
    assert_close(logits(loaded, tokens()), expected, 1e-4)


@pytest.mark.parametrize("to", ["nf4", pytest.param("hqq", marks=pytest.mark.slow)])
def test_a_gguf_is_loaded_as_what_it_holds(to: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    dither.quantize(BUNDLED, "Q8_0", path, pure=True)
    opened = open_model(path)
    loaded = dither.load(path, to, backend="dither")
    assert loaded.dtype == torch.float32  # what a quantized source is computed in

    reference = plain(BUNDLED)
    eight = codec("Q8_0")
    for parameter in (*reference.model.layers.parameters(), reference.model.embed_tokens.weight):
        if parameter.dim() > 1:
            parameter.data = torch.from_numpy(eight.decode(eight.encode(parameter.detach().numpy())))
    assert opened.kind == "gguf"
    assert_close(logits(loaded, tokens()), logits(with_decoded(reference, to), tokens()))


def test_the_experts_stay_packed(folder_of: Callable[[str], Path]) -> None:
    name = "mixtral"
    loaded = dither.load(folder_of(name), "int4", group=32)
    stacks = [module for module in loaded.modules() if isinstance(module, QuantizedStack)]
    assert len(stacks) == 2 * loaded.config.num_hidden_layers
    assert not [p for n, p in loaded.named_parameters() if p.dim() == 3 and p.is_floating_point()]
    with pytest.raises(UnsupportedError, match="quantized expert"):
        torch.matmul(torch.ones(1), stacks[0][0])  # type: ignore[call-overload]


def test_an_expert_gives_gradients(folder_of: Callable[[str], Path]) -> None:
    name = "mixtral"
    folder = folder_of(name)
    loaded, dense = dither.load(folder, "int4", group=32), with_decoded(plain(folder), "int4", 32)
    gradients = []
    for model in (loaded, dense):
        embedded = model.model.embed_tokens(tokens(12)).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().mean().backward()
        gradients.append(embedded.grad)
    assert_close(gradients[0], gradients[1], 1e-4)


def test_generates_what_the_decoded_model_does() -> None:
    loaded = dither.load(BUNDLED, "int4", dtype="float32")
    settings = {"max_new_tokens": 12, "do_sample": False}
    found = loaded.generate(tokens(6, 4000), **settings)
    assert found.shape == (2, 18)
    assert (found == with_decoded(plain(BUNDLED), "int4").generate(tokens(6, 4000), **settings)).all()


def test_the_dtype_is_the_checkpoints_and_the_tie_is_kept() -> None:
    loaded = dither.load(BUNDLED, "int8", backend="dither")
    assert loaded.dtype == torch.bfloat16 == loaded.config.dtype
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.eos_token_id == 0
    assert not loaded.training
    assert_close(logits(loaded, tokens()), logits(with_decoded(plain(BUNDLED), "int8"), tokens()), 0.03)


@pytest.mark.parametrize("to", EACH)
def test_bits_are_those_of_the_tensors(to: str) -> None:
    loaded = dither.load(BUNDLED, to, backend="dither")
    layers = [module for module in loaded.modules() if isinstance(module, QuantizedLinear)]
    stored = sum(tensor.nbytes for layer in layers for tensor in layer.state_dict().values())
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert loaded.dither["bits_per_weight"] == pytest.approx(8 * stored / weights)
    declared = np.mean([codec(METHODS[to].codec_name(64), layer.in_features).bits_per_weight for layer in layers])
    assert loaded.dither["bits_per_weight"] == pytest.approx(declared, abs=0.15)


class TestLayer:
    """The packed layer by itself."""

    @pytest.fixture
    def layer(self) -> QuantizedLinear:
        random = torch.Generator().manual_seed(0)
        codes_RC = torch.randint(0, 16, (24, 64), generator=random, dtype=torch.uint8)
        scale_RG, zero_RG = torch.rand(24, 2, generator=random) / 8, torch.full((24, 2), 7, dtype=torch.uint8)
        grid = Grid("steps", 4, 64)
        bias_R = nn.Parameter(torch.randn(24, generator=random))
        made = QuantizedLinear(grid, grid.packed(codes_RC), scale_RG, zero_RG, bias_R)
        made.expected_RC = (codes_RC.double() - 7) * scale_RG.double().repeat_interleave(32, dim=1)
        return made

    def test_packs_two_codes_per_byte(self, layer: QuantizedLinear) -> None:
        assert layer.weight.shape == (24, 32)
        assert layer.weight.dtype == torch.uint8
        assert torch.equal(
            Grid("steps", 4, 4).packed(torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8)),
            torch.tensor([[0x21, 0xF3]], dtype=torch.uint8),
        )
        torch.testing.assert_close(layer.dequantize().double(), layer.expected_RC, atol=1e-7, rtol=1e-6)

    def test_values_of_every_kind(self) -> None:
        scale, none = torch.tensor([[2.0]]), torch.empty(1, 0, dtype=torch.uint8)
        bits = torch.tensor([[0x38, 0xB8, 0x7E, 0x01]], dtype=torch.uint8)  # 1, −1, 448, 2⁻⁹ as E4M3
        assert Grid("float8", 8, 4).values(bits, scale, none).tolist() == [[2.0, -2.0, 896.0, 2.0**-8]]
        numbers = tuple(float(k) ** 2 for k in range(16))
        assert Grid("table", 4, 2, numbers).values(bits[:, :1], scale, none).tolist() == [[128.0, 18.0]]
        assert Grid("steps", 8, 4).values(bits, scale, none).tolist() == [[-144.0, 112.0, -4.0, -254.0]]

    def test_gradients_are_those_of_the_dense_layer(self, layer: QuantizedLinear) -> None:
        x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
        given, other = x.clone().requires_grad_(), x.double().requires_grad_()
        bias = layer.bias.detach().double().requires_grad_()
        layer(given).square().sum().backward()
        functional.linear(other, layer.expected_RC, bias).square().sum().backward()
        torch.testing.assert_close(given.grad.double(), other.grad, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.bias.grad.double(), bias.grad, atol=1e-4, rtol=1e-4)
        assert layer.weight.grad is None

    def test_no_dense_weight_lives_from_forward_to_backward(self, layer: QuantizedLinear) -> None:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            layer(torch.randn(3, 64, requires_grad=True))
        assert not [count for count in kept if count >= 24 * 64]

    def test_autocast_and_casts_leave_scales_alone(self, layer: QuantizedLinear) -> None:
        x = torch.randn(3, 64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        cast = copy.deepcopy(layer).to(torch.bfloat16)
        assert cast.scale.dtype == torch.float32
        assert cast.bias.dtype == torch.bfloat16
        assert torch.equal(cast.dequantize(), layer.dequantize())
        assert cast(x.bfloat16()).dtype == torch.bfloat16
        assert layer.to("meta").weight.is_meta

    def test_state_dict_round_trip(self, layer: QuantizedLinear) -> None:
        other = copy.deepcopy(layer)
        other.weight.data.zero_()
        other.scale.zero_()
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other.dequantize(), layer.dequantize())


class TestInt4Kernel:
    """The layer whose codes lie in the order of torch's kernel, against the plain one."""

    @pytest.fixture(params=[(64, 64, 32, False), (192, 768, 64, True), (128, 4096, 128, False)])
    def layer(self, request: pytest.FixtureRequest) -> QuantizedLinear:
        rows, columns, group, zeros = request.param
        random = torch.Generator().manual_seed(0)
        codes_RC = torch.randint(0, 16, (rows, columns), generator=random, dtype=torch.uint8)
        scale_RG = (torch.rand(rows, columns // group, generator=random) / 8).bfloat16()
        zero_RG = torch.randint(0, 16, scale_RG.shape, generator=random, dtype=torch.uint8)
        grid, bias_R = Grid("steps", 4, columns), nn.Parameter(torch.randn(rows, generator=random))
        return QuantizedLinear(grid, grid.packed(codes_RC), scale_RG, zero_RG if zeros else zero_RG[:, :0], bias_R)

    def test_the_order_is_a_permutation_of_codes(self, layer: QuantizedLinear) -> None:
        there = int4.ordered(layer.weight.data)
        assert not torch.equal(there, layer.weight.data)
        assert torch.equal(int4.usual(there), layer.weight.data)

    def test_products_and_gradients(self, layer: QuantizedLinear) -> None:
        kernel, random = Int4Linear(layer).bfloat16(), torch.Generator().manual_seed(1)
        assert torch.equal(kernel.dequantize(), layer.dequantize())
        x = torch.randn(2, 3, layer.in_features, generator=random).bfloat16()
        given, other = x.clone().requires_grad_(), x.double().requires_grad_()
        found = kernel(given)
        expected = functional.linear(other, layer.dequantize().double(), layer.bias.double())
        assert_close(found.detach().double(), expected.detach(), 0.02)
        found.sum().backward()
        expected.sum().backward()
        assert_close(given.grad.double(), other.grad, 0.01)
        assert torch.equal(kernel(x.float()), layer(x.float()))  # float32 has no kernel
        assert kernel(x[:, :0]).shape == (2, 0, layer.out_features)

    def test_its_state_dict_is_the_plain_layers(self, layer: QuantizedLinear) -> None:
        kernel, other = Int4Linear(layer), copy.deepcopy(Int4Linear(layer))
        assert {k: v.tolist() for k, v in kernel.state_dict().items()} == {
            k: v.tolist() for k, v in layer.state_dict().items()
        }
        other.weight.data.zero_()
        other.means.zero_()
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other.dequantize(), layer.dequantize()) and other.agrees()

    def test_casts_and_other_devices_leave_the_numbers_alone(self, layer: QuantizedLinear) -> None:
        kernel = Int4Linear(layer)
        assert kernel.half().means.dtype == torch.bfloat16 and kernel.agrees()
        assert kernel.to("meta").weight.is_meta

    def test_a_kernel_that_disagrees_is_found_out(
        self, layer: QuantizedLinear, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kernel = Int4Linear(layer)
        with monkeypatch.context() as patch:
            patch.setattr(int4, "usual", lambda ordered_RN: ordered_RN)  # an order that is not the kernel's
            assert not kernel.agrees()
        monkeypatch.setattr(Int4Linear, "agrees", lambda self: False)
        loaded = dither.load(BUNDLED, "int4", dtype="bfloat16")
        assert set(loaded.dither["by_layer"].values()) == {"dither"}
        assert loaded.dither["notes"] == [
            "28 of 28 matrices are de-quantized for each product: torch's 4-bit kernel has no place for them"
        ]


def test_state_dicts_carry_a_whole_model() -> None:
    first, second = (dither.load(BUNDLED, to, dtype="float32", backend="dither") for to in ("int4", "int4"))
    for parameter in second.parameters():
        parameter.data.zero_()
    second.load_state_dict(first.state_dict())
    assert_close(logits(second, tokens()), logits(first, tokens()), 1e-6)
    assert_close(logits(copy.deepcopy(first), tokens()), logits(first, tokens()), 1e-6)


# peft asks transformers for names that are on their way out
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("backend", ["dither", "torch", "bitsandbytes"])
def test_adapters_train_on_top(backend: str, request: pytest.FixtureRequest) -> None:
    peft = pytest.importorskip("peft")
    if backend == "bitsandbytes":
        request.getfixturevalue("wide_bitsandbytes")
    to = "nf4" if backend == "bitsandbytes" else "int4"
    dtype = "bfloat16" if backend == "torch" else "float32"
    loaded = dither.load(BUNDLED, to, dtype=dtype, backend=backend)
    before = {n: p.clone() for n, p in loaded.named_parameters() if p.dtype == torch.uint8}
    assert len(before) == 28
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(loaded, config)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    batch_ST, losses = tokens(24), []
    for _ in range(8):
        loss = tuned(batch_ST, labels=batch_ST).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    after = {
        name.replace("base_model.model.", "").replace("base_layer.", ""): parameter
        for name, parameter in tuned.named_parameters()
    }
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_merging_an_adapter_fails_rather_than_being_lost() -> None:
    peft = pytest.importorskip("peft")
    loaded = dither.load(BUNDLED, "int4", dtype="float32")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with pytest.raises(RuntimeError):
        peft.get_peft_model(loaded, config).merge_and_unload()


def bnb_config(to: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if to == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=to, bnb_4bit_compute_dtype=dtype)


class TestBitsAndBytes:
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("accelerate")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("to", ["nf4", "fp4", "int8"])
    def test_equals_transformers_own_loading(self, to: str, dtype: torch.dtype) -> None:
        reference = AutoModelForCausalLM.from_pretrained(
            BUNDLED, dtype=dtype, device_map="cpu", quantization_config=bnb_config(to, dtype)
        )
        loaded = dither.load(BUNDLED, to, dtype=dtype)
        assert loaded.dither["backend"] == "bitsandbytes"
        assert torch.equal(logits(loaded, tokens()), logits(reference, tokens()))

    @pytest.mark.parametrize("to", [name for name in OURS if METHODS[name].bnb])
    def test_ours_agrees(self, to: str) -> None:
        """The same table and scales; what remains is how products are rounded, and 8-bit inputs."""
        theirs, ours = (
            dither.load(BUNDLED, to, dtype="float32", backend=backend) for backend in ("bitsandbytes", "dither")
        )
        found, expected = logits(ours, tokens()), logits(theirs, tokens())
        assert float((found - expected).std() / expected.std()) < 0.05
        assert ours.dither["bits_per_weight"] == pytest.approx(theirs.dither["bits_per_weight"])

    def test_experts_run_on_our_kernels_and_that_is_said(self, folder_of: Callable[[str], Path]) -> None:
        loaded = dither.load(folder_of("mixtral"), "int8")
        assert loaded.dither["backend"] == "bitsandbytes and dither"
        assert any("experts" in note for note in loaded.dither["notes"])

    def test_generates_and_is_copied(self) -> None:
        loaded = dither.load(BUNDLED, "nf4")
        assert loaded.generate(tokens(4), max_new_tokens=3, do_sample=False).shape == (2, 7)
        assert torch.equal(logits(copy.deepcopy(loaded), tokens()), logits(loaded, tokens()))


def test_rows_that_do_not_fit_are_kept_and_said(folder_of: Callable[[str], Path]) -> None:
    name = next(iter(CONFIGS))
    loaded = dither.load(folder_of(name), "int4", group=4096)
    assert loaded.dither["layers"] == 0
    assert loaded.dither["backend"] == "none"
    assert "cannot hold" in loaded.dither["notes"][-1]


def test_what_is_not_a_number_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].copy()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=r"blk\.1\.ffn_up.* row 3, column 5"):
        dither.load(tmp_path, "int4")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"to": "int3"}, "not one of nf4"),
        ({"to": "nf4", "group": 48}, "group of 48"),
        ({"to": "int4", "backend": "bitsandbytes"}, "has no int4"),
        ({"to": "int4", "backend": "cuda"}, "not one of auto"),
        ({"to": "nf4", "backend": "torch"}, "has no nf4: it has int4 and hqq"),
        ({"to": "int4", "backend": "torch", "dtype": "float16"}, "computes in bfloat16, not in float16"),
        ({"to": "int4", "backend": "torch", "group": 512}, "has no groups of 512"),
        ({"to": "int4", "dtype": "int8"}, "dtype int8"),
        ({"to": "int4", "device": "nowhere"}, "device nowhere"),
    ],
)
def test_requests_that_make_no_sense(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        dither.load(BUNDLED, **arguments)


@pytest.mark.parametrize("missing", ["torch", "transformers", "bitsandbytes"])
def test_what_is_missing_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dither.loading import load as job

    find = job.find_spec
    monkeypatch.setattr(job, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(UsageError, match=rf"{missing}.*pip install 'dither\[bnb\]'"):
        dither.load(BUNDLED, "nf4", backend="bitsandbytes")


def test_a_loaded_model_is_not_saved_as_something_else(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="dither quantize"):
        dither.load(BUNDLED, "int4").save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


MEMORY = """
import sys
import torch, transformers
import dither
from dither.loading import network

def anonymous():  # memory of its own: pages of the mapped file are the system's to take back
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024

dither.load(sys.argv[2], sys.argv[3], backend="dither", threads=1)  # whatever is built once
before, most = anonymous(), 0
put = network._put
def watched(*args):
    global most
    found = put(*args)
    most = max(most, anonymous())
    return found
network._put = watched
model = dither.load(sys.argv[1], sys.argv[3], backend="dither", threads=1)
print(max(most, anonymous()) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_original_is_never_whole_in_memory(checkpoint: Path, tmp_path: Path) -> None:
    from conftest import write_checkpoint

    folder = write_checkpoint(tmp_path / "large", hidden=1024, ffn=4096, layers=6)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 300e6
    command = [sys.executable, "-c", MEMORY, str(folder), str(checkpoint), "int8"]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak < size * 8.1 / 32 + 60e6  # the quantized model, and a few chunks of weights on their way
