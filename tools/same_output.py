"""Whether two checkouts write the same bytes: the ladder, a file of every folder format, evidence, plans, conversions.

    python tools/same_output.py OLD NEW [--keep FOLDER] [--only WORD ...]

Every command runs twice by the interpreter that runs this, once on the code of either checkout, in folders side by
side; then all files that lie there are compared.  Of JSON documents the times are left out, which no two runs share.
The exit code is 1 where anything differs, or where a command fails on one side only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LADDER = ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_1", "Q4_0", "IQ4_XS", "IQ4_NL", "Q3_K_M", "Q2_K"]
LADDER += ["MXFP4_MOE", "TQ2_0"]
FOLDERS = ["gptq", "awq", "w4a16", "w8a16", "w8a8", "fp8", "fp8-block", "nf4", "fp4", "int8", "mxfp4", "nvfp4"]
TIMES = ("seconds", "made", "started", "finished", "created", "modified", "when")


def commands(model: str) -> list[tuple[str, list[str]]]:
    """A name for each command, and its words; later ones read what earlier ones wrote."""
    found = [("evidence", ["calibrate", model, "--tokens", "2048", "--context", "256", "-o", "evidence"])]
    found += [(f"ladder {kind}", ["quantize", model, "--to", kind, "-o", f"{kind}.gguf"]) for kind in LADDER]
    found += [(f"folder {kind}", ["quantize", model, "--to", kind, "-o", kind]) for kind in FOLDERS]
    known = ["quantize", model, "--evidence", "evidence"]
    for name, words in {
        "solved Q4_K_M": ["--to", "Q4_K_M"],
        "solved IQ3_XXS": ["--to", "IQ3_XXS", "--solver", "nearest"],
        "solved scales": ["--to", "w4a16", "--solver", "scales", "--transform", "awq"],
        "solved half-quadratic": ["--to", "Q3_K_M", "--solver", "half-quadratic"],
        "solved rotate": ["--to", "Q4_0", "--transform", "rotate"],
        "solved act-order": ["--to", "gptq", "--act-order", "--bits", "3", "--asym"],
        "solved sequential": ["--to", "Q2_K", "--statistics", "sequential"],
    }.items():
        suffix = "" if "-" in name or "scales" in name else ".gguf"
        found.append((name, [*known, *words, "-o", name.replace(" ", "-") + suffix]))
    found += [
        ("plan", ["plan", model, "--size", "2.4MiB", "--evidence", "evidence", "-o", "plan.toml"]),
        ("by plan", ["quantize", model, "--plan", "plan.toml", "--evidence", "evidence", "-o", "planned.gguf"]),
        ("plan of a folder", ["plan", model, "--to", "gptq", "--bpw", "6.2", "--evidence", "evidence", "-o", "f.toml"]),
        ("convert", ["convert", "gptq", "from-gptq.gguf"]),
        ("convert back", ["convert", "Q4_0.gguf", "to-gptq", "--to", "gptq"]),
    ]
    return found


def run(checkout: Path, words: list[str], folder: Path) -> int:
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "PYTHONHASHSEED": "0"}
    ended = subprocess.run(
        [sys.executable, "-m", "dither", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        print(f"  {checkout}: {ended.stderr.strip().splitlines()[-1] if ended.stderr.strip() else 'failed'}")
    return ended.returncode


def timeless(value: object) -> object:
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not any(word in k for word in TIMES)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def digest(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".json":
        content = json.dumps(timeless(json.loads(content))).encode()
    return hashlib.sha256(content).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def main() -> int:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("old", type=Path)
    reader.add_argument("new", type=Path)
    reader.add_argument("--keep", type=Path, help="the folder for what is written; by default a temporary one")
    reader.add_argument("--only", nargs="*", default=[], help="commands whose names contain one of these words")
    asked = reader.parse_args()
    checkouts = {"old": asked.old.resolve(), "new": asked.new.resolve()}
    model = str(checkouts["old"] / "src" / "dither" / "demo_model")
    with tempfile.TemporaryDirectory() as temporary:
        root = asked.keep or Path(temporary)
        failed = 0
        for name, words in commands(model):
            if asked.only and not any(word in name for word in asked.only):
                continue
            codes = []
            for side, checkout in checkouts.items():
                (root / side).mkdir(parents=True, exist_ok=True)
                codes.append(run(checkout, words, root / side))
            same = codes[0] == codes[1]
            print(f"{'ran' if same else 'FAILED on one side'}: {name}", flush=True)
            failed += not same
        old, new = digests(root / "old"), digests(root / "new")
    differing = sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    for path in differing:
        print(f"differs: {path}")
    print(f"{len(old)} files, {len(differing)} differ, {failed} commands failed on one side only")
    return 1 if differing or failed else 0


if __name__ == "__main__":
    sys.exit(main())
