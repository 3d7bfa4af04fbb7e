"""How a child of ours is started: with what this interpreter imports, wherever it stands.

`python -m` and `python -c` search the folder one happens to stand in for modules, and that may be a folder of
strangers' models.  An isolated interpreter does not; it is given this one's own path instead.
"""

from __future__ import annotations

import sys
from pathlib import Path


def running(module: str) -> list[str]:
    """The command that runs `main()` of a module."""
    paths = [str(Path(path).resolve()) for path in sys.path if path]
    boot = f"import sys; sys.path[:0] = {paths!r}; from {module} import main; main()"
    return [sys.executable, "-I", "-c", boot]
