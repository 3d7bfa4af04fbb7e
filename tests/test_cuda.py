"""What a GPU computes against what the processor computes: calibration, measuring, planning, loading.

Nothing here has a number of its own: both sides are Dither's, in float32, and differ by the order of sums
alone.  Without a card torch can use, all of it is skipped.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dither
from conftest import BUNDLED
from dither.capacity import machine
from dither.formats.evidence import EvidenceStore

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"), pytest.mark.slow]
DEVICES = ("cpu", "cuda")
TYPES = ("nf4", "fp4", "int8", "int4", "fp8", "hqq")
PROMPT = [[1, 17, 204, 9, 33, 512, 7, 81]]


def away(found: Any, wanted: Any) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that the model writes, once for both."""
    from families_util import TEXT

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 8)
    return path


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, EvidenceStore]:
    folder, stores = tmp_path_factory.mktemp("evidence"), {}
    for device in DEVICES:
        dither.calibrate(BUNDLED, text, tokens=2048, gradients=True, out=folder / device, device=device)
        stores[device] = EvidenceStore.open(folder / device)
    return stores


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "demo-Q2_K.gguf"
    dither.quantize(BUNDLED, "Q2_K", path)
    return path


def test_statistics_of_both_are_one(evidence: dict[str, EvidenceStore]) -> None:
    assert evidence["cpu"].tensors == evidence["cuda"].tensors
    for tensor in evidence["cpu"].tensors:
        cpu, cuda = evidence["cpu"](tensor), evidence["cuda"](tensor)
        assert cpu is not None and cuda is not None
        for field in ("mean_square_C", "hessian_CC", "output_KOO"):
            wanted, found = getattr(cpu, field), getattr(cuda, field)
            assert (wanted is None) == (found is None)
            # Gradients start from drawn words, and a word on the edge of two falls either way.
            bound = 1e-4 if field == "mean_square_C" else 0.05
            assert wanted is None or away(found, wanted) < bound, (tensor, field)


def test_plain_hessians_of_both_are_one(tmp_path: Path, text: Path) -> None:
    stores = []
    for device in DEVICES:
        dither.calibrate(BUNDLED, text, tokens=2048, out=tmp_path / device, device=device)
        stores.append(EvidenceStore.open(tmp_path / device))
    for tensor in stores[0].tensors:
        cpu, cuda = (store(tensor) for store in stores)
        assert cpu is not None and cuda is not None
        if cpu.hessian_CC is not None:
            assert cuda.hessian_CC is not None
            assert away(cuda.hessian_CC, cpu.hessian_CC) < 1e-4, tensor


def test_a_measurement_of_both_is_one(quantized: Path, text: Path) -> None:
    cpu, cuda = (
        dither.measure(quantized, BUNDLED, data=text, tokens=1024, device=device, save=False)[0] for device in DEVICES
    )
    for field in ("kl_mean", "kl_p99", "ppl", "ppl_reference", "delta_p_rms"):
        assert getattr(cuda, field) == pytest.approx(getattr(cpu, field), rel=2e-3), field
    assert cuda.same_top == pytest.approx(cpu.same_top, abs=0.004)


def test_sensitivities_of_both_agree(evidence: dict[str, EvidenceStore]) -> None:
    """From one evidence: the probe is the same, what differs is where the network ran."""
    plans = [
        dither.plan(BUNDLED, bpw=4.0, evidence=evidence["cpu"], device=device, solver=solver).plan
        for device, solver in (("cpu", "nearest"), ("cuda", "nearest"))
    ]
    assert plans[0].kl == pytest.approx(plans[1].kl, rel=0.02)


def test_a_plan_on_the_card(evidence: dict[str, EvidenceStore]) -> None:
    planned = dither.plan(BUNDLED, bpw=4.0, evidence=evidence["cuda"], device="cuda").plan
    assert 0 < planned.kl < 0.5


def test_learned_rounding_on_the_card(tmp_path: Path, evidence: dict[str, EvidenceStore], text: Path) -> None:
    kl = {}
    for solver, device in (("gptq", "cpu"), ("learned", "cpu"), ("learned", "cuda")):
        path = tmp_path / f"{solver}-{device}.gguf"
        dither.quantize(BUNDLED, "Q2_K", path, solver=solver, evidence=evidence["cpu"], device=device)
        kl[solver, device] = dither.measure(path, BUNDLED, data=text, tokens=1024, save=False)[0].kl_mean
    assert kl["learned", "cuda"] == pytest.approx(kl["learned", "cpu"], rel=0.1)
    assert kl["learned", "cuda"] < kl["gptq", "cpu"]


@pytest.mark.parametrize("backend", ["dither", "auto"])
@pytest.mark.parametrize("to", TYPES)
def test_a_loaded_model_computes_alike(to: str, backend: str) -> None:
    logits = {}
    for device in DEVICES:
        model = dither.load(BUNDLED, to, device=device, dtype="float32", backend="dither")
        if device == "cuda" and backend == "auto":
            model = dither.load(BUNDLED, to, device=device, dtype="float32")
        with torch.no_grad():
            logits[device] = model(torch.tensor(PROMPT, device=device)).logits.float().cpu().numpy()
    # bitsandbytes' int8 rounds activations too, and its FP4 takes the other of two near codes on a card.
    bound = 1e-4 if backend == "dither" else {"int8": 0.05, "fp4": 0.02}.get(to, 5e-3)
    assert away(logits["cuda"], logits["cpu"]) < bound


@pytest.mark.parametrize("to", ["int4", "hqq"])
def test_torchs_4_bit_kernel_on_the_card(to: str) -> None:
    logits = {}
    for device in DEVICES:
        model = dither.load(BUNDLED, to, device=device, dtype="bfloat16", backend="torch")
        assert set(model.dither["by_layer"].values()) == {"torch"}
        with torch.no_grad():
            logits[device] = model(torch.tensor(PROMPT, device=device)).logits.float().cpu().numpy()
    assert away(logits["cuda"], logits["cpu"]) < 0.05
    moved = model.cpu()  # codes change their order with the device
    with torch.no_grad():
        assert away(moved(torch.tensor(PROMPT)).logits.float().numpy(), logits["cpu"]) < 0.05


@pytest.mark.parametrize("to", ["nf4", "int4", "fp8"])
def test_an_adapter_learns_on_the_card(to: str) -> None:
    peft = pytest.importorskip("peft")
    model = dither.load(BUNDLED, to, device="cuda", dtype="bfloat16")
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.tensor(PROMPT, device="cuda")
    losses = []
    for _ in range(20):
        loss = lora(ids, labels=ids).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("to", ["nf4", "int8", "w4a16", "w8a8", "fp8"])
def test_a_folder_runs_on_the_card(tmp_path: Path, to: str) -> None:
    """Loaded by transformers with the format's own package, against Dither's decoding of the same file."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes" if to in ("nf4", "int8") else "compressed_tensors")
    folder = tmp_path / to
    dither.quantize(BUNDLED, to=to, out=folder)
    dither.convert(folder, tmp_path / "dense", to="safetensors")
    ids = torch.tensor(PROMPT, device="cuda")
    logits = []
    for place in (folder, tmp_path / "dense"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float16 if to in ("nf4", "int8") else torch.bfloat16, device_map="cuda"
        )
        with torch.no_grad():
            logits.append(model(ids).logits.float().cpu().numpy())
    bound = 0.1 if to in ("int8", "w8a8", "fp8") else 0.03  # those round activations as well
    assert away(logits[0], logits[1]) < bound


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no nvidia-smi")
def test_fit_finds_the_card() -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    cards = machine.graphics_cards()
    assert cards and cards[0].bytes == pytest.approx(total, rel=0.02)
    assert cards[0].name == torch.cuda.get_device_name(0)


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no nvidia-smi")
def test_fit_recommends_for_the_card() -> None:
    done = subprocess.run(
        ["python3", "-m", "dither", "fit", str(BUNDLED), "--json"], capture_output=True, text=True, check=True
    )
    assert '"verdict": "GPU"' in done.stdout
