"""An environment for each peer: what its script's docstring says, in a folder that can be thrown away.

A peer's pins contradict another's, and none of them belongs beside Dither.  A script states its own as lines
`pip install …`; here they are run, in a fresh venv.  One that exists and was made by the same lines is used.
"""

from __future__ import annotations

import ast
import shlex
import subprocess
import sys
from pathlib import Path

MADE = "made-by.txt"  # written last: without it an environment is half made
_PIP = "pip install "


def python_for(script: Path, environments: Path) -> Path:
    """The interpreter that runs `script`, made where there is none."""
    lines, folder = pip_lines(script), environments / script.stem
    python = folder / "bin" / "python"
    if python.exists() and (folder / MADE).is_file() and (folder / MADE).read_text().splitlines() == lines:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    for line in lines:
        print(f"{script.stem}: {line}", flush=True)
        subprocess.run([str(python), "-m", *shlex.split(line), "--quiet"], check=True)
    (folder / MADE).write_text("\n".join(lines) + "\n")
    return python


def pip_lines(script: Path) -> list[str]:
    """`pip install …`, as the script's docstring has them, in order."""
    text = ast.get_docstring(ast.parse(script.read_text())) or ""
    return [line.strip() for line in text.splitlines() if line.strip().startswith(_PIP)]
