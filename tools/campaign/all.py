"""All rows of the campaign, one after another, each for its share of the time: `make campaign`.

python tools/campaign/all.py --minutes 55

Each row is a process of its own, so that what one breaks cannot spoil the next.  Exits with 1 where something broke.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from frame import Row

HERE = Path(__file__).parent
BESIDE = {"all", "frame", "render"}


def rows() -> Iterator[Row]:
    """Found by iterating the folder: a file without a ROW is there for others to use."""
    for path in sorted(HERE.glob("*.py")):
        row = None if path.stem in BESIDE else getattr(import_module(path.stem), "ROW", None)
        if row is not None:
            yield row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=55)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="rows by name, with commas between")
    parser.add_argument("--no-save", action="store_true", help="keep no figures, and leave the page as it is")
    given = parser.parse_args()
    chosen = [row for row in rows() if not given.only or row.name in given.only.split(",")]
    shares = sum(row.share for row in chosen)
    broke = False
    for row in chosen:
        seconds = 60 * given.minutes * row.share / shares
        print(f"== {row.title}, {seconds:.0f} s", flush=True)
        words = [f"{HERE / row.name}.py", "--seconds", f"{seconds:.0f}", "--seed", str(given.seed)]
        words += [] if given.no_save else ["--save"]
        broke |= subprocess.run([sys.executable, *words], check=False).returncode != 0
    if not given.no_save:
        subprocess.run([sys.executable, str(HERE / "render.py")], check=True)
    raise SystemExit(broke)


if __name__ == "__main__":
    main()
