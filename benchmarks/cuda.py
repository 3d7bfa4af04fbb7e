"""Loading and quantizing large models on one GPU: seconds and peak memory, beside the tools people use.

    python benchmarks/cuda.py load FOLDER [--save NAME]
    python benchmarks/cuda.py gptq FOLDER --calibration TEXT [--tokens 32768] [--peer PYTHON] [--save NAME]

FOLDER keeps the synthetic checkpoint (random weights of real shapes: 6.3 B parameters for `load`, 1.1 B for
`gptq`), which is written where it is missing.  Every contestant runs in a process of its own, begins with
imports done and a GPU that holds nothing, and is timed from opening the checkpoint until the model, or the
folder, is there; the GPU is synchronized before the clock is read.  The checkpoint was read once before,
so that the disk is nobody's handicap.

    load   `dither.load` beside transformers' `BitsAndBytesConfig`, and one prompt of 512 tokens through each
    gptq   calibration on the GPU and GPTQ to 4 bits in groups of 128 (`--to w4a16`), beside llm-compressor's,
           from the same token ids.  --peer names a Python that has llmcompressor; ours solves on the
           processor's cores

GPU memory is torch's own peak, host memory the process's resident peak (GiB).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import record
import synthetic

GIB = 2**30
LOADS = ("dither nf4", "transformers nf4", "dither int8", "transformers int8", "own nf4", "own int4", "own fp8")
PROMPT = 512  # tokens
DEMO = Path(str(files("dither") / "demo_model"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("load", "gptq"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calibration", help="a text, for gptq")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--peer", help="a Python with llmcompressor")
    parser.add_argument("--layers", type=int, help="of the checkpoint; fewer, to try it out")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--save", metavar="NAME")
    args = parser.parse_args()
    large = args.what == "load"
    layers = args.layers or (synthetic.LARGE_LAYERS if large else synthetic.LAYERS)
    if args.one:
        print(json.dumps(one(args.one, args)))
        return
    model = synthetic.write(args.folder, layers, synthetic.LARGE if large else synthetic.Widths())
    for file in model.glob("*.safetensors"):
        while_read(file)
    rows = load_all(args) if large else gptq_all(args, model)
    if args.save:
        record.save(args.save, {"card": card(), "layers": layers, "contestants": rows})


def while_read(file: Path) -> None:
    with file.open("rb") as opened:
        while opened.read(2**24):
            pass


def card() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"


def load_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [child(args, label) for label in LOADS]


def gptq_all(args: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        os.environ["DITHER_SCRATCH"] = scratch
        rows = [child(args, "dither gptq")]
        if args.peer:
            rows.append(peer(args, model, Path(scratch)))
        return rows


def child(args: argparse.Namespace, label: str) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--one", label]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    row = {"contestant": label, **(json.loads(lines[-1]) if lines else {"failed": done.returncode})}
    print(json.dumps(row), flush=True)
    return row


def one(label: str, args: argparse.Namespace) -> dict[str, Any]:
    """In the contestant's own process."""
    import torch

    import dither

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.empty(1, device=device)
    who, to = label.split()
    if to == "gptq":
        return gptq(args, device)
    made: dict[str, Callable[[], Any]] = {
        "dither": lambda: dither.load(args.folder, to, device=device),
        "own": lambda: dither.load(args.folder, to, device=device, backend="dither"),
        "transformers": lambda: theirs(args.folder, to, device),
    }
    if who != "transformers":  # compiled before the clock starts
        dither.load(Path(str(dither.__path__[0])) / "demo_model", to, backend="auto" if who == "dither" else "dither")
    began = time.monotonic()
    model = made[who]()
    synchronize(device)
    found = {"seconds": time.monotonic() - began, **peaks(device)}
    ids = torch.arange(PROMPT, device=device)[None] % 256
    with torch.no_grad():
        model(ids)
        synchronize(device)
        began = time.monotonic()
        for _ in range(5):
            model(ids)
        synchronize(device)
    return {**found, "prompt_tokens_per_second": 5 * PROMPT / (time.monotonic() - began)}


def theirs(folder: Path, to: str, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=to == "nf4",
        load_in_8bit=to == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map=device
    )


def gptq(args: argparse.Namespace, device: str) -> dict[str, Any]:
    import dither
    from dither.formats.evidence import EvidenceStore

    scratch = Path(os.environ["DITHER_SCRATCH"])
    dither.calibrate(DEMO, args.calibration, tokens=1024, out=scratch / "warm-evidence")
    dither.quantize(DEMO, to="w4a16", solver="gptq", evidence=scratch / "warm-evidence", out=scratch / "warm")
    began = time.monotonic()
    learnt = dither.calibrate(
        args.folder, args.calibration, tokens=args.tokens, out=scratch / "evidence", device=device
    )
    found = {"calibration_seconds": learnt.seconds}
    result = dither.quantize(
        args.folder, to="w4a16", solver="gptq", evidence=scratch / "evidence", out=scratch / "ours", force=True
    )
    found |= {"seconds": time.monotonic() - began, "solvers": dict(result.solvers or {}), **peaks(device)}
    tokens_ST, _ = EvidenceStore.open(scratch / "evidence").tokens()
    np.save(scratch / "tokens.npy", tokens_ST)
    return found


def peer(args: argparse.Namespace, model: Path, scratch: Path) -> dict[str, Any]:
    script = Path(__file__).parent / "peers" / "llmcompressor_gptq.py"
    command = [
        args.peer,
        str(script),
        str(model.absolute()),
        str(scratch / "tokens.npy"),
        str(scratch / "theirs"),
        "--option=device='cuda'",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=scratch)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"peer"')]
    row = {"contestant": "llm-compressor", **(json.loads(lines[-1]) if lines else {"failed": done.returncode})}
    print(json.dumps(row), flush=True)
    return row


def synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def peaks(device: str) -> dict[str, float]:
    """Of this process, GiB."""
    import resource

    import torch

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    on_card = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"gpu_gib": on_card / GIB, "host_gib": resident / GIB}


if __name__ == "__main__":
    main()
