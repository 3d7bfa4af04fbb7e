"""Memory of this process: how much it has of its own, and whether an error means that it got no more.

Units: bytes.
"""

from __future__ import annotations

import re
from pathlib import Path

from dither.system import native

# What torch and Python say, as RuntimeErrors, where they are refused memory: for an array, and for a thread's stack.
_REFUSED = re.compile(r"can't allocate memory|out of memory|can't start new thread")


def own_memory() -> int:
    """What this process holds that no file backs: on Linux at this moment, elsewhere the most it ever held."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    return native.most_memory()


def is_refusal(error: BaseException) -> bool:
    """Whether an error says that the system, or a limit, had no memory left."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_REFUSED.search(str(error))))
