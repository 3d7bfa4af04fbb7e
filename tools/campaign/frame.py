"""What every row of the campaign shares: how it is asked, what it answers, where that is kept.

A row is a file of this folder that tries to break one kind of thing for as long as it is told:

    ROW = Row("kills", "Killed at random moments", run, share=20)

`run` gets an `Ask` and gives back lines, one per thing tried: how often, and how often it broke.  `python
tools/campaign/kills.py --seconds 600 --seed 1` runs one row; `python tools/campaign/all.py` runs all of them, each in
a process of its own, for its share of an hour.  Figures go to benchmarks/results/campaign/<row>.json with the command
and the processor; `python tools/campaign/render.py` writes them into docs/trust.md, between a row's markers.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "campaign"
sys.path.append(str(ROOT / "benchmarks"))

from record import processor  # noqa: E402  # the processor's name is told as benchmarks tell it


@dataclass(frozen=True)
class Ask:
    """What a row is asked for.  Whoever runs out of either seconds or runs stops."""

    seconds: float
    seed: int
    runs: int  # 0: as many as the seconds allow
    work: Path  # an empty folder of its own, taken away afterwards
    started: float = field(default_factory=time.monotonic)

    def over(self, done: int = 0) -> bool:
        return time.monotonic() - self.started > self.seconds or bool(self.runs and done >= self.runs)


@dataclass
class Line:
    """One thing that was tried, as a line of the page's table."""

    what: str
    tried: int = 0
    broke: int = 0
    figures: dict[str, Any] = field(default_factory=dict)  # printed behind, "name value": "worst 3 ms"
    failures: list[str] = field(default_factory=list)  # the first few, with all that is needed to try them again

    def count(self, failure: str | None = None) -> None:
        self.tried += 1
        if failure is not None:
            self.broke += 1
            if len(self.failures) < 10:
                self.failures.append(failure)
            print(f"BROKE  {self.what}: {failure}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Row:
    name: str  # the file's, of its results and of its marker in docs/trust.md
    title: str
    run: Callable[[Ask], Sequence[Line]]
    share: float = 1.0  # of the hour, beside the other rows'
    untried: Callable[[], str] = str  # why it cannot run on this machine; "" where it can


def main(row: Row) -> None:
    """The command line of one row: exits with 1 where something broke."""
    parser = argparse.ArgumentParser(description=row.title)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=0, help="stop after so many; default: when the seconds are over")
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results/campaign")
    given = parser.parse_args()
    if reason := row.untried():
        print(f"{row.name}: not tried here: {reason}")
        return
    with tempfile.TemporaryDirectory(prefix=f"campaign-{row.name}-") as work:
        ask = Ask(given.seconds, given.seed, given.runs, Path(work))
        lines = list(row.run(ask))
        seconds = time.monotonic() - ask.started
    for line in lines:
        print(f"{line.what}: tried {line.tried}, broke {line.broke}{words(line.figures)}")
    if given.save:
        command = shlex.join(["python", f"tools/campaign/{row.name}.py", *sys.argv[1:]])
        print(f"kept in {save(row, given.seed, seconds, lines, command).relative_to(ROOT)}")
    if any(line.broke for line in lines):
        raise SystemExit(1)


def words(figures: dict[str, Any]) -> str:
    return "".join(f", {name} {value}" for name, value in figures.items())


def save(row: Row, seed: int, seconds: float, lines: Sequence[Line], command: str) -> Path:
    document = {
        "title": row.title,
        "command": command,
        "processor": processor(),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in ("dither", "numba", "numpy", "torch")},
        "seed": seed,
        "seconds": round(seconds),
        "tried": sum(line.tried for line in lines),
        "broke": sum(line.broke for line in lines),
        "lines": [asdict(line) for line in lines],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{row.name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
