"""Do Dither's figures agree with llama.cpp's on the same files, text and context?

    python benchmarks/measure_agreement.py --text wiki.test.raw --save measure_agreement
    python benchmarks/measure_agreement.py --text wiki.test.raw --llama-perplexity path/to/llama-perplexity

Two ways, both against the F16 file of the bundled model.  *Token by token*: llama.cpp, through the
`xllamacpp` wheel, gives the full distribution after each of some prefixes; KL divergences are taken from
those.  *As a whole*, where a llama-perplexity is at hand: its `--kl-divergence` over the same chunks.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import record

import dither
from dither.engines.llamacpp import LlamaCpp
from dither.measuring.measure import measure
from dither.measuring.stream import measure_stream
from dither.measuring.text import sequences
from dither.models.blocks import open_blocks
from dither.models.source import open_model

DEMO = Path(dither.__file__).parent / "demo_model"
NUMBER = r"\s*:?\s*(-?\d+\.\d+)"
SAID = {  # a line of llama-perplexity → our field, and what a percentage is divided by
    "kl_mean": (r"Mean\s+KLD" + NUMBER, 1),
    "kl_median": (r"Median\s+KLD" + NUMBER, 1),
    "kl_p90": (r"90\.0%\s+KLD" + NUMBER, 1),
    "kl_p99": (r"99\.0%\s+KLD" + NUMBER, 1),
    "kl_p999": (r"99\.9%\s+KLD" + NUMBER, 1),
    "kl_max": (r"Maximum\s+KLD" + NUMBER, 1),
    "same_top": (r"Same top p" + NUMBER, 100),
    "delta_p_mean": (r"Mean\s+Δp" + NUMBER, 100),
    "delta_p_rms": (r"RMS\s+Δp" + NUMBER, 100),
    "ppl": (r"Mean PPL\(Q\)" + NUMBER, 1),
    "ppl_reference": (r"Mean PPL\(base\)" + NUMBER, 1),
    "ppl_ratio": (r"Mean PPL\(Q\)/PPL\(base\)" + NUMBER, 1),
}


def distributions(file: Path, ids: list[int], positions: range) -> list[np.ndarray]:
    with LlamaCpp(file, context=len(ids) + 8) as engine:
        return [engine.next_token_probabilities(ids[: t + 1]).astype(np.float64) for t in positions]


def by_token(files: dict[str, Path], text: Path, count: int) -> list[dict[str, Any]]:
    """Mean divergence over `count` positions of one sequence, each as llama.cpp and the stream find it."""
    reference = open_model(files["F16"])
    ids = sequences(reference, text, tokens=256, context=256).tokens_ST[0].tolist()
    positions = range(16, 255, max(1, 239 // count))
    p_NV = distributions(files["F16"], ids, positions)
    rows = []
    for kind, file in files.items():
        q_NV = distributions(file, ids, positions)
        theirs_N = np.array([(p * (np.log(p) - np.log(q))).sum() for p, q in zip(p_NV, q_NV, strict=True)])
        tokens_ST = np.array([ids], np.int32)
        found = measure_stream(open_blocks(reference), {"it": open_model(file)}, tokens_ST, [256], skip=0)["it"]
        ours_N = found.kl_N[positions]
        row = {"type": kind, "positions": len(positions), "kl_mean": float(ours_N.mean())}
        row |= {"kl_mean_llamacpp": float(theirs_N.mean())}
        rows.append(row)
        print(f"{kind:8} {len(positions)} positions: ours {ours_N.mean():.6f}, llama.cpp {theirs_N.mean():.6f}")
    return rows


def as_a_whole(files: dict[str, Path], text: Path, program: Path, chunks: int, context: int) -> list[dict[str, Any]]:
    """Every figure of llama-perplexity's summary beside ours."""
    common = ["-f", str(text), "-c", str(context), "--chunks", str(chunks), "-t", "2"]
    base = files["F16"].with_suffix(".kld")
    run(program, "-m", str(files["F16"]), "--kl-divergence-base", str(base), *common)
    rows = []
    for kind, file in files.items():
        said = run(program, "-m", str(file), "--kl-divergence-base", str(base), "--kl-divergence", *common)
        (ours,) = measure([file], files["F16"], data=text, tokens=chunks * context, context=context, save=False)
        row: dict[str, Any] = {"type": kind, "tokens": ours.tokens}
        for field, (pattern, divisor) in SAID.items():
            match = re.search(pattern, said)
            row[field] = getattr(ours, field)
            row[f"{field}_llamacpp"] = float(match[1]) / divisor if match else None
        row |= {"kl_mean_low": ours.kl_mean_low, "kl_mean_high": ours.kl_mean_high}
        rows.append(row)
        print(f"{kind:8}", *(f"{f} {row[f]:.5g} / {row[f'{f}_llamacpp']}" for f in SAID))
    return rows


def run(program: Path, *arguments: str) -> str:
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{program} failed:\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--types", default="Q8_0,Q6_K,Q4_K_M,IQ4_XS,Q3_K_M,Q2_K")
    parser.add_argument("--positions", type=int, default=60)
    parser.add_argument("--llama-perplexity", type=Path)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--save", metavar="NAME")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for kind in ["F16", *options.types.split(",")]:
            files[kind] = Path(folder) / f"{kind}.gguf"
            dither.quantize(DEMO, kind, files[kind])
        rows = {"by_token": by_token(files, options.text, options.positions)}
        if options.llama_perplexity:
            rows["llama_perplexity"] = as_a_whole(
                files, options.text, options.llama_perplexity, options.chunks, options.context
            )
    if options.save:
        print(record.save(options.save, rows))


if __name__ == "__main__":
    main()
