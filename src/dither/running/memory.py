"""How much memory a process has taken, as Linux counts it (/proc/PID/status).

VmHWM is the largest resident set so far: the process's own pages and the pages of mapped files, weights among them,
that it has used.  That much must fit into memory for the model to run at full speed.
"""

from __future__ import annotations

import re
from pathlib import Path


def peak_bytes(process: int | str = "self") -> int:
    """The most memory that was resident at once; 0 if the system does not tell."""
    return _field("VmHWM", process)


def resident_bytes(process: int | str = "self") -> int:
    return _field("VmRSS", process)


def _field(name: str, process: int | str) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
