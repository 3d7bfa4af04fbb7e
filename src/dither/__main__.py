"""`python -m dither` and the `dither` command: where a process of ours begins and ends.

While a command runs, Ctrl-C puts its work in order and says how to go on (`cli/screen.py`).  Before, while modules
load, and after, while the interpreter takes itself down, there is nothing to put in order: Ctrl-C then ends the
process as it ends one that is not written in Python, at once and without a traceback.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

_INTERRUPTED = 130


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command line on `words`, by default the process's own, and exits."""
    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where a shell had it ignored
    if handled:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from typer.main import get_command

    from dither.cli import app

    command = get_command(app)
    try:
        if handled:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command(words)
    except KeyboardInterrupt:  # between two lines of this
        sys.exit(_INTERRUPTED)
    finally:
        if handled:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
