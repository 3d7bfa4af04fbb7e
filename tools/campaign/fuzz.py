"""Hostile bytes through every parser: the campaign's share of `fuzzing.py`, which runs alone for longer.

Each target of `fuzz_targets.py` gets as many seconds as the row's allow, two at a time.  Broken is whatever is no
DitherError, takes more than two seconds of processor time or more than 64 MiB beyond the file, and every process lost.
Longer runs, `fuzzing.py --out FILE`, become the row's figures with `fuzz.py --from FILE…`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from frame import Ask, Line, Row, main, save
from fuzz_targets import TARGETS
from fuzzing import Effort, best_engine, fuzz

KEPT = Path("fuzz-findings")  # where inputs that broke something are left


def lines(rows: Iterable[dict[str, Any]], engine: str) -> list[Line]:
    made = []
    for row in rows:
        line = Line(row["target"], tried=row["executions"])
        line.figures = {"refused": f"{row['refused']:,}", "guided by": engine, "slowest": f"{row['most_seconds']} s"}
        for kind, finding in row["findings"].items():
            line.broke += finding["times"]
            line.failures.append(f"{kind}: input {finding['input']}")
        for lost in row["processes_lost"]:
            line.broke += 1
            line.failures.append(f"process ended with {lost['code']}")
        made.append(line)
    return made


def run(ask: Ask) -> Sequence[Line]:
    jobs, engine = 2, best_engine()
    effort = Effort(ask.seconds * jobs / len(TARGETS), ask.runs or 10**18, ask.seed, engine, jobs)
    made = lines(fuzz(list(TARGETS), ask.work, effort), engine)
    if any(line.broke for line in made):
        shutil.copytree(ask.work, KEPT, dirs_exist_ok=True)
        print(f"what broke something lies in {KEPT}/TARGET")
    return made


def keep(earlier: Sequence[str]) -> None:
    """Figures of longer runs, one file or several, as the row's."""
    documents = [json.loads(Path(name).read_text()) for name in earlier]
    found = {row["target"]: (row, document["engine"]) for document in documents for row in document["rows"]}
    made = [line for name in TARGETS if name in found for line in lines([found[name][0]], found[name][1])]
    seconds = sum(row["seconds"] for row, _ in found.values())
    command = "; ".join(dict.fromkeys(document["command"] for document in documents))
    print(save(ROW, 1, seconds, made, command))


ROW = Row("fuzz", "Hostile bytes", run, share=14)

if __name__ == "__main__":
    if sys.argv[1:2] == ["--from"]:
        keep(sys.argv[2:])
    else:
        main(ROW)
