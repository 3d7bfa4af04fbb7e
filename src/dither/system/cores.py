"""How many cores there are to work with.

Kernels that compute on cached data gain from every logical processor; llama.cpp, which waits for memory,
runs slower when two of its threads share a physical core.  So there are two counts, and both respect the
affinity mask by which a container, a batch system or `taskset` grants a process fewer.
"""

from __future__ import annotations

import os
from pathlib import Path

from dither.system import native


def available_cores() -> int:
    """Logical processors that this process may use."""
    return len(native.processors()) or os.cpu_count() or 1


def usable_cores() -> int:
    """Physical cores that this process may use; where the system does not say which, all logical processors."""
    cores = set()
    for cpu in native.processors():
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores) or os.cpu_count() or 1
