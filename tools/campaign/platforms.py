"""Platforms: a wheel of every package for each, and Windows as far as it can be imitated.

The wheels are those that the index named when `make lock` asked it (tools/dependencies.json).  The imitation is
tests/system/test_other_systems.py: no fcntl, no pwrite, no renaming of open files.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from frame import ROOT, Ask, Line, Row, main

TESTS = "tests/system/test_other_systems.py"


def wheels() -> list[Line]:
    facts = json.loads((ROOT / "tools" / "dependencies.json").read_text())
    lines = []
    for platform in facts["platforms"]:
        line, source = Line(f"packages with a wheel for {platform}, Python {facts['python']}"), []
        for package in facts["packages"]:
            if list(package["files"]) == ["source"]:
                source.append(package)
            elif platform not in package["files"]:
                line.count(package["name"] if package["for"] == "running" else None)
                if package["for"] != "running":
                    line.figures["without, for options and tests"] = ", ".join(
                        filter(None, [line.figures.get("without, for options and tests", ""), package["name"]])
                    )
            else:
                line.count()
        needed = [package["name"] for package in source if package["for"] == "running"]
        line.figures["as source everywhere"] = len(source)
        for name in needed:
            line.count(f"{name}: source only")
        lines.append(line)
    return lines


def imitated() -> Line:
    line = Line(f"Windows imitated: `{TESTS}`")
    words = [sys.executable, "-m", "pytest", TESTS, "-p", "no:cacheprovider", "-rA", "-q"]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    for said in ran.stdout.splitlines():
        if said.startswith(("PASSED ", "FAILED ", "ERROR ")):
            line.count(None if said.startswith("PASSED") else said)
    if not line.tried:
        line.count(ran.stdout[-500:])
    return line


def run(ask: Ask) -> Sequence[Line]:
    return [*wheels(), imitated()]


ROW = Row("platforms", "Other systems", run, share=0.5)

if __name__ == "__main__":
    main(ROW)
