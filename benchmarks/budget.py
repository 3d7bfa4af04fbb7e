"""What a plan is worth at equal bytes: KL to the original of planned files and of llama-quantize's presets.

    python benchmarks/budget.py --calibration TRAIN.txt --text VALID.txt --text OTHER.txt
        [--models demo,smol,smol-rotated] [--types Q5_K_M,Q4_K_M,…] [--random 30] [--save NAME]

For each preset the baseline is what llama-quantize writes with an importance matrix of the calibration text
(see quality.py); its bytes are the budget of the planned file, which never takes more.  Beside them stands
the same preset by error feedback with gradients: what of the gain is the solver's, and what the plan's.

`--random` draws so many allocations of random sizes, makes and measures each, and ranks their measured
divergence against the predicted one (Spearman), with the solver named by `--solver`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from ggml import Ggml
from quality import BASELINE, arguments, find_model, judge, run

import dither
from dither.cli.screen import Meter
from dither.measuring.calibrate import calibrate
from dither.measuring.measure import measure
from dither.planning.plan import Planned, plan
from dither.planning.rivals import random_plan

TYPES = "Q5_K_M,Q4_K_M,IQ4_XS,Q3_K_M,Q2_K"
TARGET = 0.40


def main() -> None:
    parser = arguments(__doc__, types=TYPES)
    parser.add_argument("--random", type=int, default=0, metavar="N", help="allocations to rank")
    parser.add_argument("--solver", help="of plans; default: gptq")
    parser.add_argument("--evidence", help="of an earlier run, instead of calibrating (one model only)")
    run(parser.parse_args(), run_model)


def run_model(name: str, scratch: Path, args: argparse.Namespace, meter: Meter) -> list[dict[str, Any]]:
    model = find_model(name, scratch)
    evidence, began = scratch / "evidence", time.monotonic()
    if args.evidence:
        evidence = Path(args.evidence)
    else:
        calibrate(model, args.calibration, tokens=args.tokens, gradients=True, out=evidence)
    calibration = time.monotonic() - began
    began = time.monotonic()
    plan(model, bpw=4, evidence=evidence, solver=args.solver)
    print(f"{name}: calibrated in {calibration:.0f} s, sensitivities in {time.monotonic() - began:.0f} s")
    rows = []
    for to in filter(None, args.types.split(",")):
        made = make(model, to, scratch, evidence, calibration, args.solver)
        found = judge(name, to, model, made, args, TARGET)
        rows += [{**row, "predicted": made[row["recipe"]][4]} for row in found]
        for path, *_ in made.values():
            path.unlink()
    if args.random:
        rows.append(rank(name, model, scratch, evidence, args))
    return rows


def make(model: Path, to: str, scratch: Path, evidence: Path, calibration: float, solver: str | None) -> dict[str, Any]:
    """recipe → path, result, seconds, seconds of calibration, predicted KL; the baseline first."""
    made: dict[str, Any] = {}
    for recipe, options in (
        (BASELINE, {"to": to, "solver": Ggml()}),
        ("gptq gradients", {"to": to, "solver": "gptq"}),
        ("plan", {}),
    ):
        began, predicted = time.monotonic(), None
        path = scratch / f"{recipe.replace(' ', '-')}-{to}.gguf"
        if recipe == "plan":
            planned = plan(model, size=made[BASELINE][1].bytes, evidence=evidence, solver=solver)
            options, predicted = {"plan": planned.plan}, planned.plan.kl
        result = dither.quantize(model, out=path, evidence=evidence, force=True, **options)
        assert recipe != "plan" or result.bytes <= made[BASELINE][1].bytes, "over the budget"
        made[recipe] = (path, result, time.monotonic() - began, calibration, predicted)
    return made


def rank(name: str, model: Path, scratch: Path, evidence: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Predicted and measured divergence of random allocations, and how alike they rank."""
    predicted, paths = [], []
    sizes = np.random.default_rng(0).uniform(2.8, 6.5, args.random)
    for seed, bpw in enumerate(sizes):
        planned: Planned = plan(model, bpw=float(bpw), evidence=evidence, solver=args.solver)
        drawn = random_plan(planned, seed)
        paths.append(scratch / f"random-{seed}.gguf")
        dither.quantize(model, plan=drawn, out=paths[-1], evidence=evidence, force=True)
        predicted.append(drawn.kl)
    found = measure(paths, model, data=args.text[0], tokens=args.measured, save=False)
    measured = [measurement.kl_mean for measurement in found]
    correlation = spearman(predicted, measured)
    print(f"{name}: rank correlation of {args.random} random allocations: {correlation:.3f}")
    solver = args.solver or "gptq"
    return {
        "model": name,
        "recipe": "random allocations",
        "solver": solver,
        "spearman": correlation,
        "predicted": predicted,
        "measured": measured,
        "bpw": [m.bpw for m in found],
        "text": Path(args.text[0]).name,
    }


def spearman(a: list[Any], b: list[Any]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    main()
