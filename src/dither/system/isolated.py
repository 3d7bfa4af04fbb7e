"""How a child of ours is started: with what this interpreter imports, wherever it stands.

`python -m` and `python -c` search the folder one happens to stand in for modules, and that may be a folder of
strangers' models.  An isolated interpreter does not; it is given this one's own path instead.
"""

from __future__ import annotations

import sys
from pathlib import Path


def command(module: str, function: str = "main") -> list[str]:
    """The command that calls a function of a module; words that follow it are its arguments."""
    paths = [str(Path(path).resolve()) for path in sys.path if path]
    boot = f"import sys; sys.path[:0] = {paths!r}; sys.argv[0] = 'dither'"
    boot += f"; from {module} import {function}; {function}()"
    return [sys.executable, "-I", "-c", boot]
