"""A process that dies in the middle of its work, as of kill −9: what it leaves is what a power cut leaves."""

from __future__ import annotations

import signal
import subprocess
import sys

KILLER = """
import os, signal, sys
class Killer:
    left = int(sys.argv[1])
    def note(self, text): pass
    def start(self, total, done): pass
    def advance(self, amount, what):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(script: str, moment: int, *given: object) -> None:
    """Runs a script, which finds what is `given` in sys.argv[2:], and whose work, told `progress=Killer()`,
    dies when it advances for the `moment`th time."""
    words = [sys.executable, "-c", KILLER + script, str(moment), *map(str, given)]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL


STEPS = """
import os, signal, sys
left = int(sys.argv[1])
def hook(event, given):
    global left
    if event in {names} and "__pycache__" not in str(given):  # kernels that are compiled and kept are no step
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


def killed_at_step(names: tuple[str, ...], step: int, script: str, *given: object) -> None:
    """Runs a script that dies just before its `step`th audited event (`sys.addaudithook`) of these names."""
    words = [sys.executable, "-c", STEPS.format(names=names) + script, str(step), *map(str, given)]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
