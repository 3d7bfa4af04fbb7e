"""Dither's files for GPUs beside those of the tools that the formats come from: KL to the original, seconds.

    python benchmarks/gpu_formats.py --calibration TRAIN.txt --text VALID.txt --text OTHER.txt
        [--types int4-g128,int3-g128] [--peers GPTQModel,…] [--recipes gptq,awq] [--only peers|dither]
        [--environments FOLDER] [--threads 1] [--save NAME]

Every contestant calibrates on the very same token ids: Dither's evidence is made first, and its sequences
are what the peers are handed.  Each peer runs in an environment of its own (`peers/environments.py`), kept in
--environments and thrown away without it.  All files of one width are measured side by side by
`dither.measure`, on the same held-out texts; a ratio is to the best of the peers on that text, and intervals
are 95 %, over sequences.  Seconds are calibration and solving, without imports, compiling and saving;
cpu_seconds are those of all threads, which a busy machine changes less.  --threads is for all alike: one is
best beside other work, where threads that wait for each other spin.

Peers solve in float32, which is also the fastest where the processor has no bfloat16 products of its own.

NF4 has nothing to choose: our codes are counted against bitsandbytes' own, one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from peers.environments import python_for
from quality import arguments, find_model, ratio_interval, run

import dither
from dither.cli.screen import Meter
from dither.formats.evidence import EvidenceStore
from dither.measuring.calibrate import calibrate
from dither.measuring.measure import measure

TARGET = 0.85  # of the best peer's KL
TYPES = "int4-g128,int3-g128"
NF4 = "nf4"
SCRIPTS = Path(__file__).resolve().parent / "peers"


@dataclass(frozen=True)
class Peer:
    script: str
    options: dict[str, Any] = field(default_factory=dict)


PEERS = {
    "GPTQModel": Peer("gptqmodel_gptq"),
    "GPTQModel desc_act": Peer("gptqmodel_gptq", {"desc_act": True}),
    "GPTQModel asymmetric": Peer("gptqmodel_gptq", {"sym": False, "format": "gptq_v2"}),
    "GPTQModel mse": Peer("gptqmodel_gptq", {"mse": 2.4}),
    "llm-compressor": Peer("llmcompressor_gptq"),
    "llm-compressor asymmetric": Peer("llmcompressor_gptq", {"symmetric": False}),
    "llm-compressor mse": Peer("llmcompressor_gptq", {"observer": "mse"}),
    "GPTQModel best": Peer("gptqmodel_gptq", {"sym": False, "format": "gptq_v2", "mse": 2.4}),
    "llm-compressor best": Peer("llmcompressor_gptq", {"symmetric": False, "observer": "mse"}),
    "AutoAWQ": Peer("autoawq_awq"),
    "AutoRound": Peer("autoround_signround"),
    "AutoRound asymmetric": Peer("autoround_signround", {"sym": False}),
}
RECIPES: dict[str, dict[str, Any]] = {
    "gptq": {"to": "gptq", "solver": "gptq"},
    "gptq asymmetric": {"to": "gptq", "solver": "gptq", "sym": False},
    "gptq asymmetric gradients": {"to": "gptq", "solver": "gptq", "sym": False},
    "learned asymmetric gradients": {"to": "gptq", "solver": "learned", "sym": False},
    "awq": {"to": "awq", "solver": "scales", "transforms": ["awq"]},
    "awq nearest": {"to": "awq", "solver": "nearest", "transforms": ["awq"]},
    "scales": {"to": "awq", "solver": "scales", "transforms": []},
    "awq+gptq": {"to": "gptq", "solver": "gptq", "transforms": ["awq"]},
    "w4a16": {"to": "w4a16", "solver": "gptq"},
}
GRADIENTS = "gradients"  # in a recipe's name: with evidence of `calibrate --gradients`
AWQ_BITS = 4  # AWQ's layout has no other width: there the same weights travel in GPTQ's


@dataclass(frozen=True)
class Made:
    """A folder that a contestant wrote, and what it took."""

    path: Path
    seconds: float
    cpu_seconds: float
    about: dict[str, Any]


def main() -> None:
    parser = arguments(__doc__, types=TYPES)
    parser.set_defaults(tokens=128 * 512)
    parser.add_argument("--peers", default="GPTQModel,llm-compressor,AutoAWQ")
    parser.add_argument("--recipes", default="gptq,awq")
    parser.add_argument("--only", choices=("peers", "dither"))
    parser.add_argument("--environments", type=Path, help="where the peers' environments are kept")
    parser.add_argument("--threads", type=int, help="of every contestant; theirs by default")
    run(parser.parse_args(), run_model)


def run_model(name: str, scratch: Path, args: argparse.Namespace, meter: Meter) -> list[dict[str, Any]]:
    model, evidence = find_model(name, scratch), scratch / "evidence"
    began = time.process_time()
    calibration = calibrate(model, args.calibration, tokens=args.tokens, out=evidence, threads=args.threads)
    learnt = {"": Made(evidence, calibration.seconds, time.process_time() - began, {})}
    if GRADIENTS in args.recipes:
        began, pulls = time.process_time(), scratch / "evidence-gradients"
        calibration = calibrate(
            model, args.calibration, tokens=args.tokens, gradients=True, out=pulls, threads=args.threads
        )
        learnt[GRADIENTS] = Made(pulls, calibration.seconds, time.process_time() - began, {})
    tokens_ST, lengths_S = EvidenceStore.open(evidence).tokens()
    if (lengths_S != tokens_ST.shape[1]).any():
        raise SystemExit("Peers take sequences of one length: give plain text.")
    np.save(scratch / "tokens.npy", tokens_ST)
    print(f"{name}: {len(tokens_ST)} sequences of {tokens_ST.shape[1]}, learnt in {learnt[''].seconds:.0f} s")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as thrown_away:
        environments = args.environments or Path(thrown_away)
        for type_ in args.types.split(","):
            if type_ == NF4:
                rows.append(count_nf4_codes(name, model, scratch, environments, args.threads))
                continue
            made = {} if args.only == "dither" else run_peers(type_, model, scratch, environments, args)
            peers = set(made)
            if args.only != "peers":
                made |= run_ours(type_, model, scratch, learnt, args)
            rows += judge(name, type_, model, made, peers, args)
    return rows


def width(type_: str) -> tuple[int, int]:
    """(bits, group) of a name such as int4-g128."""
    found = re.fullmatch(r"u?int(\d)-g(\d+)", type_)
    if found is None:
        raise SystemExit(f"{type_}: not of the form int4-g128.")
    return int(found[1]), int(found[2])


def run_peers(type_: str, model: Path, scratch: Path, environments: Path, args: argparse.Namespace) -> dict[str, Made]:
    bits, group = width(type_)
    return {
        label: run_peer(label, PEERS[label], model, scratch, environments, bits, group, args.threads)
        for label in args.peers.split(",")
        if label != "AutoAWQ" or bits == AWQ_BITS  # it would save no quantized file of another width
    }


def run_peer(
    label: str, peer: Peer, model: Path, scratch: Path, environments: Path, bits: int, group: int, threads: int | None
) -> Made:
    """Its script in its environment; what it prints goes to a log beside its folder."""
    script = SCRIPTS / f"{peer.script}.py"
    out = scratch / f"{label.replace(' ', '-')}-{bits}"
    command = [
        str(python_for(script, environments.absolute())),
        str(script),
        str(model.absolute()),
        str(scratch / "tokens.npy"),
        str(out),
        "--bits",
        str(bits),
        "--group",
        str(group),
        *(f"--option={key}={value}" for key, value in peer.options.items()),
    ]
    log = out.with_suffix(".log")
    variables = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with log.open("w") as errors:
        # In the scratch folder, since some leave logs where they stand.
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=scratch, env=variables)
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"peer"')]
    if done.returncode or not answers:
        raise SystemExit(f"{label} failed:\n{log.read_text()[-2000:]}")
    about = json.loads(answers[-1])
    return Made(out, about.pop("seconds"), about.pop("cpu_seconds"), about)


def run_ours(
    type_: str, model: Path, scratch: Path, evidence: dict[str, Made], args: argparse.Namespace
) -> dict[str, Made]:
    bits, group = width(type_)
    made = {}
    for recipe in args.recipes.split(","):
        options = dict(RECIPES[recipe])
        if options["to"] == "awq" and bits != AWQ_BITS:
            options["to"] = "gptq"
        learnt = evidence[GRADIENTS if GRADIENTS in recipe else ""]
        out, began = scratch / f"{recipe.replace(' ', '-')}-{bits}", time.process_time()
        result = dither.quantize(
            model, out=out, bits=bits, group=group, evidence=learnt.path, threads=args.threads, force=True, **options
        )
        cpu_seconds = time.process_time() - began + learnt.cpu_seconds
        about = {"options": options, "solvers": dict(result.solvers or {})}
        made[f"dither {recipe}"] = Made(out, result.seconds + learnt.seconds, cpu_seconds, about)
    return made


def judge(
    name: str, type_: str, model: Path, made: dict[str, Made], peers: set[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per contestant and text; ratios are to the best peer of that text, or of all without any."""
    bits, group = width(type_)
    rows: list[dict[str, Any]] = []
    paths = [each.path for each in made.values()]
    for text in args.text:
        found = measure(paths, model, data=text, tokens=args.measured, save=False)
        results = dict(zip(made, found, strict=True))
        best = min(peers or results, key=lambda label: results[label].kl_mean)
        for label, measured in results.items():
            low, high = ratio_interval(measured, results[best])
            row = {
                "model": name,
                "type": type_,
                "bits": bits,
                "group": group,
                "recipe": label,
                "text": Path(text).name,
                "bytes": measured.tensor_bytes,
                "kl": measured.kl_mean,
                "kl_low": measured.kl_mean_low,
                "kl_high": measured.kl_mean_high,
                "same_top": measured.same_top,
                "ppl_ratio": measured.ppl_ratio,
                "best_peer": best,
                "ratio": measured.kl_mean / results[best].kl_mean,
                "ratio_low": low,
                "ratio_high": high,
                "target": None if label in peers else TARGET,
                "seconds": made[label].seconds,
                "cpu_seconds": made[label].cpu_seconds,
                "seconds_ratio": made[label].seconds / made[best].seconds,
                **made[label].about,
            }
            show(row, header=not rows)
            rows.append(row)
    return rows


def count_nf4_codes(name: str, model: Path, scratch: Path, environments: Path, threads: int | None) -> dict[str, Any]:
    """How many of our NF4 bytes and scales differ from bitsandbytes'."""
    nested = Peer("bitsandbytes_nf4", {"bnb_4bit_use_double_quant": True})  # as QLoRA has it, and we
    theirs = run_peer("bitsandbytes", nested, model, scratch, environments, 4, 64, threads)
    ours = scratch / "nf4"
    dither.quantize(model, NF4, ours, force=True)
    a, b = packed_parts(theirs.path), packed_parts(ours)
    packed = [key for key in a if f"{key}.absmax" in a]
    row = {
        "model": name,
        "type": NF4,
        "peer": theirs.about["version"],
        "matrices": len(packed),
        "codes": 2 * sum(a[key].size for key in packed),
        "bytes_that_differ": sum(_differing(a[key], b[key]) for key in packed),
        "scales_that_differ": sum(
            _differing(a[f"{key}.{part}"], b[f"{key}.{part}"]) for key in packed for part in ("absmax", "nested_absmax")
        ),
    }
    print(json.dumps(row))
    return row


def packed_parts(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The codes of quantized weights and their scales."""
    from safetensors import safe_open

    with safe_open(next(folder.glob("*.safetensors")), "np") as file:
        names = set(file.keys())
        wanted = {name for name in names if f"{name}.absmax" in names or name.endswith("absmax")}
        return {name: file.get_tensor(name) for name in wanted}


def _differing(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> int:
    return int((a.reshape(-1) != b.reshape(-1)).sum())


def show(row: dict[str, Any], header: bool) -> None:
    if header:
        print(
            f"\n{'type':10} {'recipe':26} {'text':20} {'MiB':>6} {'KL':>8} {'95 % interval':>17} "
            f"{'ratio':>6} {'interval':>13} {'target':>6} {'s':>6} {'cpu s':>6} {'ratio':>6}"
        )
    print(
        f"{row['type']:10} {row['recipe']:26} {row['text'][:20]:20} {row['bytes'] / 2**20:6.2f} "
        f"{row['kl']:8.5f} {row['kl_low']:8.5f}–{row['kl_high']:8.5f} {row['ratio']:6.3f} "
        f"{row['ratio_low']:6.3f}–{row['ratio_high']:6.3f} {row['target'] or 0:6.2f} {row['seconds']:6.0f} "
        f"{row['cpu_seconds']:6.0f} {row['seconds_ratio']:6.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
