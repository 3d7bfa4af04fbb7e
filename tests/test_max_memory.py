"""`max_memory`: what a refusal says is enough is enough, and no more than that is ever held.

The memory held is the kernel's own count (RssAnon of /proc), sampled by a thread of the process that quantizes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dither
from conftest import write_checkpoint
from dither.errors import OutputError, UsageError
from dither.quantizing import working_memory
from dither.system.memory import is_refusal

pytestmark = pytest.mark.slow  # real processes: `make test` runs it, `make check` does not

HELD = """
import json, sys, threading, time
def held():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, held())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
import dither
model, out, how = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
try:
    dither.quantize(model, "Q4_K_M", out, **how)
    print(json.dumps({"peak": peak}))
except dither.DitherError as error:
    print(json.dumps({"error": str(error), "peak": peak}))
"""


def held(model: Path, out: Path, **how: object) -> dict:
    words = [sys.executable, "-c", HELD, str(model), str(out), json.dumps(how)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with one layer of 1536 columns, whose Hessian is most of what a run holds, and its evidence."""
    folder = tmp_path_factory.mktemp("wide")
    model = write_checkpoint(folder / "model", hidden=256, ffn=1536, layers=1)
    text = folder / "text.txt"
    text.write_text("The sea was quiet, and the old man slept in the boat. " * 200)
    dither.calibrate(model, text, tokens=512, context=64, out=folder / "evidence")
    return model, folder / "evidence"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel's count is Linux's")
@pytest.mark.parametrize("solver", ["gptq", "nearest"])
def test_the_least_that_a_refusal_names_is_enough_and_is_kept(
    wide: tuple[Path, Path], tmp_path: Path, solver: str
) -> None:
    model, evidence = wide
    how = {"evidence": str(evidence), "solver": solver, "threads": 2}
    refused = held(model, tmp_path / "no.gguf", max_memory="64MiB", **how)
    named = r"blk\.0\.ffn_down\.weight \(256 × 1536\) with its Hessian" if solver == "gptq" else "one chunk of rows"
    assert re.search(rf"--max-memory 64\.0 MiB: is too little: {named} needs", refused["error"])
    assert not list(tmp_path.iterdir())
    least = re.search(r"at least --max-memory (\d+)MiB", refused["error"])
    assert least
    # The program's own share differs by a few megabytes from process to process.
    limit = (int(least[1]) + 8) * 2**20
    done = held(model, tmp_path / "yes.gguf", max_memory=limit, **how)
    assert "error" not in done
    assert done["peak"] <= limit
    whole = dither.quantize(model, "Q4_K_M", tmp_path / "whole.gguf", evidence=evidence, solver=solver)
    assert (tmp_path / "yes.gguf").read_bytes() == Path(whole.path).read_bytes()


def test_a_run_that_holds_more_than_was_foreseen_stops_and_keeps_its_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = iter([2**20] * 9 + [2**40] * 99)
    target = tmp_path / "m.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(working_memory, "own_memory", lambda: next(pieces))
        with pytest.raises(OutputError, match=r"exceeded: 1\.00 TiB .* the same command continues"):
            dither.quantize(checkpoint, "Q4_K_M", target, max_memory="4GiB")
    assert dither.quantize(checkpoint, "Q4_K_M", target).resumed > 0
    assert target.read_bytes() == Path(dither.quantize(checkpoint, "Q4_K_M", tmp_path / "w.gguf").path).read_bytes()


def test_what_is_no_size_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--max-memory much: is not a size"):
        dither.quantize(checkpoint, "Q4_K_M", tmp_path / "m.gguf", max_memory="much")


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(12, "Cannot allocate memory"), False),
    ],
)
def test_what_means_that_memory_ran_out(error: BaseException, refused: bool) -> None:
    assert is_refusal(error) is refused
