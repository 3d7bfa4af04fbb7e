"""Processes that outlive who started them: is it still the same one, and how is it ended?

A process id is used again after its owner is gone, so an id alone would let us signal a stranger.  Together
with the moment the process began it names one process of this boot.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from pathlib import Path

from dither.system import native


def started(pid: int) -> str | None:
    """When process `pid` began, in whatever unit the system counts; None where there is none any more.

    Linux: field 22 of /proc/PID/stat, clock ticks since boot (proc(5)), beside the boot's own id.  Elsewhere
    `ps`.
    """
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # a name may hold spaces and parentheses
        except OSError:
            return None
        boot = ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return None if fields[0] in "ZX" else f"{boot} {fields[19]}"
    try:
        said = subprocess.run(
            ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, timeout=5, check=False
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if not said or said.startswith("Z") else said.partition(" ")[2].strip()


def alive(pid: int, since: str) -> bool:
    """Is the process that began then still there?"""
    return pid > 1 and started(pid) == since


def end(pid: int, since: str, number: signal.Signals) -> None:
    """Signals the process and those it started, if it is still the same one."""
    if alive(pid, since):
        native.end(pid, number)  # its own group, as we start it
