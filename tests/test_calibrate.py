"""Calibration against whole-model runs in float64, a slow routing loop, and llama.cpp's own numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xllamacpp
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

import dither
from dither.engines import llama_start
from dither.engines.llamacpp import LlamaCpp
from dither.engines.settings import Settings
from dither.errors import DitherError, OutputError, UsageError
from dither.formats.evidence import EvidenceStore
from dither.formats.imatrix import read_imatrix
from dither.measuring import collect, hidden
from dither.measuring.calibrate import Calibration, calibrate
from dither.models.source import open_model
from killed import killed
from models.families_util import TEXT, byte_level_tokenizer, random_model, save_model, write_gguf

pytestmark = pytest.mark.slow  # real engines and processes: `make test` runs it, `make check` does not

DEMO = Path(str(files("dither") / "demo_model"))
SMALL = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
LINEAR = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
Inputs = dict[str, list[torch.Tensor]]  # GGUF's name → float64 (tokens, columns) of each sequence


def rows_of(store: EvidenceStore) -> Iterator[list[int]]:
    tokens_ST, lengths_S = store.tokens()
    for row_T, length in zip(tokens_ST, lengths_S, strict=True):
        yield row_T[:length].tolist()


def hooked(folder: Path, sequences: list[list[int]]) -> Inputs:
    """Inputs of every linear layer, each sequence run alone and unpadded through the whole model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    seen: Inputs = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, args: seen.setdefault(name, []).append(args[0].detach()[0].clone())

    with ExitStack() as hooks, torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for theirs, ours in LINEAR.items():
                handle = layer.get_submodule(theirs).register_forward_pre_hook(keep(f"blk.{index}.{ours}.weight"))
                hooks.callback(handle.remove)
        hooks.callback(model.lm_head.register_forward_pre_hook(keep("output.weight")).remove)
        for ids in sequences:
            model(torch.tensor([ids]))
    return seen


def relative(found: Any, expected: torch.Tensor) -> float:
    difference = torch.from_numpy(np.asarray(found, np.float64)) - expected
    return float(difference.norm() / expected.norm())


def test_statistics_equal_a_whole_model_run_in_float64(checkpoint: Path, records: Path, tmp_path: Path) -> None:
    calibrate(checkpoint, records, tokens=800, context=48, out=tmp_path / "e", batch=100, threads=1)
    store = EvidenceStore.open(tmp_path / "e")
    sequences = list(rows_of(store))
    assert len({len(ids) for ids in sequences}) > 5
    seen = hooked(checkpoint, sequences)
    fitted = [s for s in range(len(sequences)) if s % 8 != 7]
    held = [s for s in range(len(sequences)) if s % 8 == 7]
    assert held
    assert set(seen) == set(store.tensors)
    for name, inputs in seen.items():
        evidence = store(name)
        assert evidence is not None and evidence.hessian_CC is not None and evidence.held_HC is not None
        whole_NC = torch.cat(inputs)
        assert evidence.tokens == len(whole_NC) == sum(map(len, sequences))
        assert relative(evidence.mean_square_C, whole_NC.square().mean(0)) < 2e-6
        fitted_NC = torch.cat([inputs[s] for s in fitted])
        assert relative(evidence.hessian_CC, fitted_NC.T @ fitted_NC / len(fitted_NC)) < 5e-6
        assert np.array_equal(evidence.hessian_CC, evidence.hessian_CC.T)
        held_NC = torch.cat([inputs[s] for s in held])
        assert len(evidence.held_HC) == len(held_NC)  # few enough to keep them all, in another order
        held_HC = torch.from_numpy(evidence.held_HC).double()
        assert relative(evidence.held_HC.T @ evidence.held_HC, held_NC.T @ held_NC) < 1e-5
        assert float(torch.cdist(held_HC, held_NC).amin(dim=1).max()) < 1e-3


def test_held_rows_are_bounded_and_spread(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "book.txt"
    text.write_text(TEXT * 8)
    monkeypatch.setattr(collect, "HELD_ROWS", 40)
    calibrate(checkpoint, text, tokens=24 * 64, context=64, out=tmp_path / "e", batch=128, threads=1)
    store = EvidenceStore.open(tmp_path / "e")
    sequences = list(rows_of(store))
    seen = hooked(checkpoint, sequences)["blk.0.attn_q.weight"]
    evidence = store("blk.0.attn_q.weight")
    assert evidence is not None and evidence.held_HC is not None
    assert len(evidence.held_HC) == 40
    held_HC = torch.from_numpy(evidence.held_HC).double()
    distance_HS = torch.stack([torch.cdist(held_HC, seen[s]).amin(dim=1) for s in (7, 15, 23)], dim=1)
    assert float(distance_HS.amin(dim=1).max()) < 1e-3  # each row is one of a held-back sequence
    from_sequence_S = torch.bincount(distance_HS.argmin(dim=1), minlength=3)
    assert int(from_sequence_S.min()) >= 5


def test_sequences_do_not_leak(checkpoint: Path, tmp_path: Path) -> None:
    """A token changed in one sequence changes nothing that only the others contribute to."""
    lines = [json.dumps({"text": text}) for text in TEXT.strip().splitlines()[:4] * 2]
    stores = []
    for name, changed in (("a", lines), ("b", [*lines[:-1], json.dumps({"text": "WHAT? 1234 herring!"})])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(changed))
        calibrate(checkpoint, tmp_path / f"{name}.jsonl", tokens=900, context=100, out=tmp_path / name, threads=1)
        stores.append(EvidenceStore.open(tmp_path / name))
    assert len(list(rows_of(stores[0]))) == len(list(rows_of(stores[1]))) == 8
    for tensor in stores[0].tensors:  # the eighth sequence is held back: Hessians know nothing of it
        a, b = (store(tensor) for store in stores)
        assert a is not None and b is not None
        assert a.hessian_CC is not None and b.hessian_CC is not None
        assert relative(a.hessian_CC, torch.from_numpy(b.hessian_CC).double()) < 1e-6
        assert not np.allclose(a.mean_square_C, b.mean_square_C, rtol=1e-4)


def test_gguf_and_checkpoint_agree(checkpoint: Path, records: Path, tmp_path: Path) -> None:
    path = write_gguf(open_model(checkpoint), tmp_path / "model.gguf")
    common = {"tokens": 500, "context": 48, "threads": 1}
    calibrate(checkpoint, records, out=tmp_path / "a", **common)
    calibrate(path, records, out=tmp_path / "b", **common)
    a, b = EvidenceStore.open(tmp_path / "a"), EvidenceStore.open(tmp_path / "b")
    assert a.manifest["data"]["sha256"] == b.manifest["data"]["sha256"]
    assert a.tensors == b.tensors
    assert a.check(open_model(path)) == b.check(open_model(checkpoint)) == ()
    for tensor in a.tensors:
        first, second = a(tensor), b(tensor)
        assert first is not None and second is not None
        assert np.array_equal(first.mean_square_C, second.mean_square_C)


MOE = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "qwen3 moe": Qwen3MoeConfig(
        **SMALL, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True
    ),
}


def routed(folder: Path, sequences: list[list[int]], layer: int) -> tuple[Any, Any]:
    """Inputs of each expert's matrices in one layer: (of gate and up, of down), by a loop over tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    block = model.model.layers[layer].mlp
    entering: list[torch.Tensor] = []
    block.register_forward_pre_hook(lambda _m, args: entering.append(args[0].detach()[0]))
    with torch.no_grad():
        for ids in sequences:
            model(torch.tensor([ids]))
    count, chosen = block.experts.gate_up_proj.shape[0], model.config.num_experts_per_tok
    gate_up: list[list[torch.Tensor]] = [[] for _ in range(count)]
    down: list[list[torch.Tensor]] = [[] for _ in range(count)]
    for x_C in torch.cat(entering):
        scores_E = block.gate.weight @ x_C
        for expert in scores_E.topk(chosen).indices.tolist():
            gate_F, up_F = (block.experts.gate_up_proj[expert] @ x_C).chunk(2)
            gate_up[expert].append(x_C)
            down[expert].append((gate_F * torch.sigmoid(gate_F) * up_F).detach())
    return gate_up, down


@pytest.mark.parametrize("name", MOE)
def test_experts_equal_a_slow_routing_loop(name: str, records: Path, tmp_path: Path) -> None:
    config: PreTrainedConfig = MOE[name]
    folder = save_model(random_model(config), tmp_path / "model", byte_level_tokenizer(size=300))
    result = calibrate(folder, records, tokens=400, context=48, out=tmp_path / "e", threads=1)
    store = EvidenceStore.open(tmp_path / "e")
    sequences = list(rows_of(store))
    few_total = 0
    for layer in range(2):
        for parts, inputs in zip((("gate", "up"), ("down",)), routed(folder, sequences, layer), strict=True):
            sums_EC = torch.stack([torch.stack(x).square().sum(0) for x in inputs])
            counts = [len(x) for x in inputs]
            pool_C = sums_EC.sum(0) / sum(counts)
            for part, expert in ((part, expert) for part in parts for expert in range(4)):
                evidence = store(f"blk.{layer}.ffn_{part}_exps.weight", expert)
                assert evidence is not None
                assert evidence.tokens == counts[expert]
                lacking = max(0, collect.FEW - counts[expert])
                expected = (sums_EC[expert] + lacking * pool_C) / (counts[expert] + lacking)
                assert relative(evidence.mean_square_C, expected) < 1e-5
                assert evidence.hessian_CC is not None
                assert np.linalg.eigvalsh(evidence.hessian_CC.astype(np.float64)).min() > -1e-5
            few_total += sum(count < collect.FEW for count in counts)
    assert few_total > 0
    assert sum(map(len, result.few.values())) == few_total
    assert any("saw fewer than 256 tokens" in note for note in result.notes)
    matrix = read_imatrix(tmp_path / "e" / "imatrix.gguf")
    assert matrix.means["blk.1.ffn_down_exps.weight"].shape[0] == 4
    assert not matrix.unseen


def test_experts_hessians_are_filled_up_from_the_pool() -> None:
    rng = np.random.default_rng(0)
    x_NC = rng.standard_normal((700, 8)).astype(np.float32)
    expert_N = np.where(np.arange(700) < 600, 0, 1)  # the third expert sees nothing
    collector = collect.Collector({"e": 3}, sequences=1, context=700, hessians=True)
    collector.batch([0], [700])
    for expert in (0, 1):
        at = torch.from_numpy(np.flatnonzero(expert_N == expert))
        collector.see(("e",), torch.from_numpy(x_NC)[at], at, expert)
    (group,), few = collector.finish()
    x = x_NC.astype(np.float64)
    pool_CC = x.T @ x / 700
    own_CC = x[600:].T @ x[600:]
    expected = [x[:600].T @ x[:600] / 600, (own_CC + 156 * pool_CC) / 256, pool_CC]
    assert group.hessian_ECC is not None
    assert np.allclose(group.hessian_ECC, expected, rtol=1e-4, atol=1e-5)
    assert group.counts_E.tolist() == [600, 100, 0]
    assert few == {"e": [1, 2]}


@pytest.mark.parametrize("rows", [1, 64, 1000])
def test_sums_of_squares_keep_seven_digits(rows: int) -> None:
    x_NC = np.random.default_rng(2).standard_normal((rows, 7)).astype(np.float32)
    x_NC[:, 0] *= 1e4  # a massive activation beside ordinary ones
    exact_C = (x_NC.astype(np.float64) ** 2).sum(0)
    assert np.allclose(collect.sum_of_squares(torch.from_numpy(x_NC)).numpy(), exact_C, rtol=2e-7)


@pytest.mark.parametrize("columns", [5, 512, 700])
def test_panels_make_the_whole_product(columns: int) -> None:
    x_NC = torch.from_numpy(np.random.default_rng(1).standard_normal((90, columns)).astype(np.float32))
    sums_CC = torch.zeros(columns, columns)
    collect.add_products(sums_CC, x_NC[:40])
    collect.add_products(sums_CC, x_NC[40:])
    found_CC = sums_CC.numpy()
    collect.mirror(found_CC)
    exact_CC = x_NC.double().T @ x_NC.double()
    assert np.array_equal(found_CC, found_CC.T)
    assert relative(found_CC, exact_CC) < 1e-6


def test_inputs_that_are_no_numbers_are_named() -> None:
    collector = collect.Collector({}, sequences=1, context=4, hessians=False)
    collector.batch([0], [4])
    collector.see(("blk.0.attn_q.weight",), torch.full((4, 3), torch.nan), torch.arange(4), None)
    with pytest.raises(DitherError, match=r"blk\.0\.attn_q\.weight: its inputs became NaN"):
        collector.finish()


class _Embedder(LlamaCpp):
    """llama.cpp giving what leaves the last norm, token by token: the output matrix's input."""

    def last(self, ids: list[int]) -> np.ndarray:
        answer = self._call("/embedding", {"content": ids, "embd_normalize": -1})
        return np.array(answer[0]["embedding"], np.float64)


def _embedding(path: Path, asked: Settings, key: str, parameters: Any = llama_start._parameters) -> Any:
    params = parameters(path, asked, key)
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    return params


def test_bundled_models_last_input_is_llama_cpps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp writes no importance matrix through its wheel, but it shows the last layer's input,
    which every block above has shaped.  Its keys and values are float16, hence the tolerance."""
    path = dither.quantize(DEMO, "F32", tmp_path / "demo.gguf").path
    text = tmp_path / "text.txt"
    text.write_text("The sea was quiet, and the old man slept in the boat. " * 20)
    calibrate(DEMO, text, tokens=128, context=32, hessians=False, out=tmp_path / "e", threads=1)
    store = EvidenceStore.open(tmp_path / "e")
    monkeypatch.setattr(llama_start, "_parameters", _embedding)
    with _Embedder(path, context=64, threads=1) as engine:
        x_NC = np.concatenate([engine.last(ids) for ids in rows_of(store)])
    evidence = store("token_embd.weight")
    assert evidence is not None
    assert evidence.tokens == len(x_NC) == 128
    assert relative(evidence.mean_square_C, torch.from_numpy((x_NC**2).mean(0))) < 2e-3
    assert not store.has_hessians


CALIBRATE = """
from dither.measuring import hidden
hidden.SNAPSHOT_SECONDS = 0.0
from dither.measuring.calibrate import calibrate
calibrate(sys.argv[2], sys.argv[3], tokens=480, context=48, out=sys.argv[4], batch=100, threads=1,
          progress=Killer())
"""


class Listener:
    """Keeps the notes, and stops the run like Ctrl-C at a moment of its choosing."""

    def __init__(self, stop_at: int = 0) -> None:
        self.notes: list[str] = []
        self.left = stop_at
        self.done = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, total: int, done: int) -> None:
        self.done = done

    def advance(self, amount: int, what: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def run(checkpoint: Path, records: Path, out: Path, listener: Listener | None = None) -> Calibration:
    return calibrate(checkpoint, records, tokens=480, context=48, out=out, batch=100, threads=1, progress=listener)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """What a run that nothing interrupts writes."""
    return run(checkpoint, records, tmp_path_factory.mktemp("whole") / "e")


def test_a_killed_run_resumes_to_identical_bytes(
    checkpoint: Path, records: Path, tmp_path: Path, whole: Calibration
) -> None:
    """Eight batches a block: the twelfth is in the middle of the second block."""
    out = tmp_path / "killed"
    killed(CALIBRATE, 12, checkpoint, records, out)
    assert not (out / "evidence.json").exists()
    result = run(checkpoint, records, out)
    assert result.resumed == 1
    assert contents(out) == contents(Path(whole.path))
    assert result.notes == whole.notes


@pytest.mark.parametrize(
    ("moment", "in_memory", "seconds", "resumed"),
    [
        (2, 2**31, 0.0, 0),
        (14, 2**31, 0.0, 1),
        (20, 2**31, 0.0, 2),
        (20, 2**31, 60.0, 0),
        (2, 0, 0.0, 0),
        (12, 0, 0.0, 1),
        (20, 0, 0.0, 2),
    ],
)
def test_an_interrupted_run_resumes_in_memory_and_on_disk(
    checkpoint: Path,
    records: Path,
    tmp_path: Path,
    whole: Calibration,
    monkeypatch: pytest.MonkeyPatch,
    moment: int,
    in_memory: int,
    seconds: float,
    resumed: int,
) -> None:
    monkeypatch.setattr(hidden, "IN_MEMORY", in_memory)
    monkeypatch.setattr(hidden, "SNAPSHOT_SECONDS", seconds)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, records, tmp_path / "e", Listener(stop_at=moment))
    result = run(checkpoint, records, tmp_path / "e")
    assert result.resumed == resumed
    assert contents(tmp_path / "e") == contents(Path(whole.path))


def test_other_settings_start_over_and_say_so(checkpoint: Path, records: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, records, tmp_path / "e", Listener(stop_at=12))
    listener = Listener()
    result = calibrate(checkpoint, records, tokens=240, context=48, out=tmp_path / "e", threads=1, progress=listener)
    assert (result.resumed, listener.done) == (0, 0)
    assert any("other settings was discarded" in note for note in listener.notes)
    assert EvidenceStore.open(tmp_path / "e").manifest["data"]["tokens"] == 240


def test_text_that_changed_starts_over_and_says_so(checkpoint: Path, records: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(records.read_text())
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, data, tmp_path / "e", Listener(stop_at=12))
    data.write_text("\n".join(reversed(records.read_text().splitlines())))
    listener = Listener()
    result = run(checkpoint, data, tmp_path / "e", listener)
    assert result.resumed == 0
    assert any("text has changed" in note for note in listener.notes)
    run(checkpoint, data, tmp_path / "fresh")
    assert contents(tmp_path / "e") == contents(tmp_path / "fresh")


def test_folders_are_not_overwritten_or_shared(checkpoint: Path, records: Path, tmp_path: Path) -> None:
    from dither.measuring.calibration_folder import Folder

    common = {"tokens": 96, "context": 48, "hessians": False, "threads": 1}
    calibrate(checkpoint, records, out=tmp_path / "e", **common)
    with pytest.raises(OutputError, match="holds evidence already"):
        calibrate(checkpoint, records, out=tmp_path / "e", **common)
    calibrate(checkpoint, records, out=tmp_path / "e", force=True, **common)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match=r"letter\.txt"):
        calibrate(checkpoint, records, out=tmp_path / "home", force=True, **common)
    with Folder(tmp_path / "busy", force=False), pytest.raises(OutputError, match="another run"):
        calibrate(checkpoint, records, out=tmp_path / "busy", **common)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_refused_requests_leave_nothing(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Two boats.")
    for data, tokens, context in ((text, 64, 64), (tmp_path / "none.txt", 64, 64), (text, 640, 640)):
        with pytest.raises(DitherError):
            calibrate(checkpoint, data, tokens=tokens, context=context, out=tmp_path / "e")
        assert not (tmp_path / "e").exists()


def test_without_torch_the_way_out_is_named(checkpoint: Path, tmp_path: Path) -> None:
    blocked = "import sys; sys.modules['torch'] = None; from dither.measuring.calibrate import calibrate\n"
    blocked += "from dither.errors import UsageError\n"
    blocked += "try:\n    calibrate(sys.argv[1], 'x.txt', out=sys.argv[2])\n"
    blocked += "except UsageError as error:\n    print(error)"
    process = subprocess.run(
        [sys.executable, "-c", blocked, str(checkpoint), str(tmp_path / "e")],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    assert "pip install 'dither[calibrate]'" in process.stdout
    assert not (tmp_path / "e").exists()


def test_model_writes_its_own_text_the_same_for_a_seed(tmp_path: Path) -> None:
    """On the bundled model: the text is the seed's, and likelier to the model than shuffled words."""
    stores = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        calibrate(DEMO, tokens=512, context=64, hessians=False, seed=seed, out=tmp_path / name, threads=1)
        stores.append(EvidenceStore.open(tmp_path / name))
    a, b, c = (store.manifest["data"] for store in stores)
    assert a["name"] == "self (seed 1)"
    assert a["tokens"] == 512
    assert a["sha256"] == b["sha256"] != c["sha256"]
    tokens_ST, _ = stores[0].tokens()
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()

    def loss(ids_ST: np.ndarray) -> float:
        ids = torch.from_numpy(ids_ST.astype(np.int64))
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)

    shuffled_ST = np.random.default_rng(0).permuted(tokens_ST, axis=1)
    assert loss(tokens_ST) < loss(shuffled_ST) - 1
    assert not [entry for entry in (tmp_path / "a").iterdir() if entry.is_dir()]


def test_context_longer_than_the_models_is_refused(checkpoint: Path, records: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"longer than .* 128"):
        calibrate(checkpoint, records, tokens=4096, context=129, out=tmp_path / "e")
