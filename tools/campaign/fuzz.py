"""Hostile bytes through every parser: the campaign's share of `fuzzing.py`, which runs alone for longer.

Each target of `fuzz_targets.py` gets as many seconds as the row's allow, two at a time.  Broken is whatever is no
DitherError, takes more than two seconds of processor time or more than 64 MiB beyond the file, and every process lost.
A longer run of `fuzzing.py --out FILE` becomes the row's figures with `--from FILE`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from frame import Ask, Line, Row, main
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
    if EARLIER:
        document = json.loads(Path(EARLIER).read_text())
        return lines(document["rows"], document["engine"])
    jobs, engine = 2, best_engine()
    effort = Effort(ask.seconds * jobs / len(TARGETS), ask.runs or 10**18, ask.seed, engine, jobs)
    made = lines(fuzz(list(TARGETS), ask.work, effort), engine)
    if any(line.broke for line in made):
        shutil.copytree(ask.work, KEPT, dirs_exist_ok=True)
        print(f"what broke something lies in {KEPT}/TARGET")
    return made


EARLIER = ""
ROW = Row("fuzz", "Hostile bytes", run, share=14)

if __name__ == "__main__":
    if "--from" in sys.argv:
        at = sys.argv.index("--from")
        EARLIER = sys.argv[at + 1]
        del sys.argv[at : at + 2]
    main(ROW)
